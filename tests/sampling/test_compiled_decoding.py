"""--compile: the same tokens, and few graphs whatever the windows are."""

from __future__ import annotations

import pytest
import torch
from command_line import fails
from test_block_cli import folders, samples  # noqa: F401
from tiny_decoders import denoiser_of
from torch._dynamo.testing import CompileCounter

from dlmconvert.backbone.head import compile_for_decoding
from dlmconvert.sampling.canvas import build_canvas
from dlmconvert.sampling.denoise import generate


@pytest.fixture
def graphs(monkeypatch):
    """Compiles with torch's tracer and runs the graphs as they are: no C++ compiler is needed. Counts them."""
    counter = CompileCounter()
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, dynamic=None: real(module, backend=counter, dynamic=dynamic))
    monkeypatch.setattr("dlmconvert.backbone.head.check_compiler", lambda asked: None)
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


def texts(denoiser, lengths, new, **settings):
    canvas = build_canvas([[*range(3, 3 + length), *[None] * new] for length in lengths], 0)
    return generate(denoiser, canvas, order="confidence", **settings).tokens_BL


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("pattern", "settings"),
    [("bidirectional", {"cache": "dual", "block_length": 4}), ("bidirectional", {"cache": "none"}), ("block_causal", {}), ("context_causal", {"draft_length": 2})],
)
def test_compiled_forwards_give_the_same_tokens_from_few_graphs(family, pattern, settings, graphs):
    denoiser = denoiser_of(family, pattern, "shift", None if pattern == "bidirectional" else 4)
    if "draft_length" in settings:

        def made(lengths, new):
            return generate(denoiser, build_canvas([[*range(3, 3 + n), *[None] * new] for n in lengths], 0), **settings).tokens_BL
    else:

        def made(lengths, new):
            return texts(denoiser, lengths, new, **settings)

    shapes = [((7, 7, 7), 9), ((9, 9, 9), 11), ((6,) * 5, 10), ((5, 9, 7), 9), ((8, 6, 11), 12), ((4,), 8), ((10,), 13)]
    plain = [made(*shape) for shape in shapes]
    compile_for_decoding(denoiser.model)
    compiled = [made(*shape) for shape in shapes]
    assert all(torch.equal(one, other) for one, other in zip(plain, compiled, strict=True))
    assert 0 < graphs.frame_count <= 8, "torch gives up at eight"
    before = graphs.frame_count
    for shape in [((8, 8, 8, 8), 10), ((5, 10, 8, 7), 11), ((6,), 9)]:
        made(*shape)
    assert graphs.frame_count <= before + 1, "new lengths and row counts are no new graphs"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_helper_says_the_same_from_few_graphs(family, graphs):
    denoiser, helper = denoiser_of("llama"), denoiser_of(family, "causal")

    def made(lengths, new):
        canvas = build_canvas([[*range(3, 3 + n), *[None] * new] for n in lengths], 0)
        return generate(denoiser, canvas, helper=helper, draft_length=3).tokens_BL

    shapes = [((7, 7, 7), 9), ((5, 9, 7), 11), ((4,), 8), ((10,), 13), ((6,) * 5, 10), ((8, 8), 10), ((11,), 9)]
    plain = [made(*shape) for shape in shapes]
    compile_for_decoding(helper.model)
    assert all(torch.equal(one, made(*shape)) for one, shape in zip(plain, shapes, strict=True))
    assert 0 < graphs.frame_count <= 8, "torch gives up at eight"


def test_the_command_line_compiles(folders, graphs):  # noqa: F811
    words = ("sample", str(folders["bidirectional"]), "--prompt", "a story", "--max-new-tokens", "8", "--block-length", "4", "--cache", "dual", "--seed", "3")
    assert samples(*words)[0]["text"] == samples(*words, "--compile")[0]["text"]
    assert graphs.frame_count > 0


def test_without_a_compiler_the_command_line_says_so(folders, monkeypatch):  # noqa: F811
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert "--compile needs a C++ compiler" in fails(1, "sample", str(folders["bidirectional"]), "--prompt", "a", "--compile")


def test_a_benchmark_compiles_before_it_measures(graphs):
    from dlmconvert.evaluation.benchmark import Sampler, Task, benchmark

    denoiser = denoiser_of("llama", "bidirectional", "shift", None)
    compile_for_decoding(denoiser.model)
    samplers = [Sampler("dual", {"alg": "confidence", "threshold": 0.05, "block_length": 4, "cache": "dual"}), Sampler("whole", {"alg": "entropy", "steps": 4})]
    task = Task([[3, 4, 5], [6, 7, 8, 9], [10]], num_new=9, batch=2, is_compiled=True)
    seen = []
    benchmark(denoiser, None, samplers, task, repeats=2, measure_memory=False, advance=lambda name: seen.append(graphs.frame_count))
    assert seen[0] > 0 and len(set(seen[1:])) == 1, "no graph is made once the clock runs"
