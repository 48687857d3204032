"""engine.compile: everything before the head in one graph, and the same numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from deepspeed_engines import make_deepspeed
from memory_stream import SETTINGS, make_engine, run
from torch._dynamo.testing import CompileCounter

from dlmconvert.backbone.head import check_compiler
from dlmconvert.errors import UserError
from dlmconvert.recipe.optimization import Engine, engine_contradictions

SHORT = dataclasses.replace(SETTINGS, steps=4, anneal_steps=2, save_steps=10)


@pytest.fixture
def graphs(monkeypatch):
    """Compiles with torch's tracer and runs the graphs as they are: no C++ compiler is needed. Counts them."""
    counter = CompileCounter()
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, dynamic=None: real(module, backend=counter, dynamic=dynamic))
    torch._dynamo.reset()
    return counter


def zero_2(family, **changes):
    return make_deepspeed(2, family, **changes)


@pytest.mark.parametrize(("make", "family", "changes"), [(make_engine, "gpt2", {}), (make_engine, "qwen2", {"gradient_checkpointing": True}), (zero_2, "llama", {})])
def test_compiled_steps_are_the_steps(make, family, changes, graphs, tmp_path):
    _, plain = run(tmp_path / "plain", SHORT, make(family, **changes))
    _, compiled = run(tmp_path / "compiled", SHORT, make(family, compile=True, **changes))
    for one, other in zip(plain, compiled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5) and other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)
    # Once with the mask of annealing and once without; neither the number of masked tokens nor the step makes another graph.
    assert graphs.frame_count == 2


def test_zero_3_is_not_compiled():
    sentences = list(engine_contradictions(Engine(name="deepspeed", zero_stage=3, compile=True)))
    assert len(sentences) == 1 and "engine.zero_stage=2" in sentences[0]
    assert not list(engine_contradictions(Engine(name="deepspeed", zero_stage=2, compile=True)))


def test_a_machine_without_a_compiler_says_so(monkeypatch):
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    getattr(cpp_builder.cpp_compiler_search, "cache_clear", bool)()  # what it found before
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        check_compiler("engine.compile=true")
