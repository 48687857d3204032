"""A step waits for the device once. On a CPU nothing waits, but the operations that would are visible: reading a number out of a tensor,
counting what is true, selecting by a mask."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_decoders import denoiser_of
from torch.utils._python_dispatch import TorchDispatchMode

from dlmconvert.sampling import draw, loop, shadow, windows
from dlmconvert.sampling.canvas import build_canvas
from dlmconvert.sampling.denoise import denoise

WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique", "aten::_unique2", "aten::equal")


class Waits(TorchDispatchMode):
    """Counts the operations inside of it for which a host would wait for its device. `.tolist()` is no operation and is not seen."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


CASES = {
    "whole rows": ("bidirectional", "shift", dict(order="confidence", threshold=0.1)),
    "prefix cache": ("bidirectional", "shift", dict(order="confidence", threshold=0.1, block_length=4, cache="prefix")),
    "dual cache": ("bidirectional", "in_place", dict(order="entropy", entropy_bound=1.0, block_length=4, cache="dual")),
    "block cache": ("block_causal", "in_place", dict(order="margin", factor=1.5)),
    "block cache, shift": ("context_causal", "shift", dict(order="confidence", threshold=0.1, end_ids=[7], repetition_penalty=1.2)),
    "guidance": ("block_causal", "in_place", dict(order="entropy", num_steps=6, cfg_scale=1.0)),
    "speculation": ("context_causal", "shift", dict(draft_length=3)),
    "drawn tokens": ("bidirectional", "shift", dict(order="confidence", threshold=0.05, temperature=1.0, top_p=0.9)),
    "drawn tokens of an order that needs none": ("bidirectional", "shift", dict(order="entropy", num_steps=5, temperature=1.0, block_length=4, cache="dual")),
    "drawn drafts": ("context_causal", "shift", dict(draft_length=2, temperature=1.0, end_ids=[7], repetition_penalty=1.2)),
    "remdm": ("bidirectional", "shift", dict(revision="remdm", revision_strength=0.5, num_steps=6, block_length=4, cache="dual")),
    "p2": ("block_causal", "in_place", dict(revision="p2", num_steps=6, end_ids=[7])),
    "wino": ("bidirectional", "in_place", dict(revision="wino", threshold=0.05, block_length=6, cache="prefix", cfg_scale=1.0)),
    "a growing answer": ("bidirectional", "shift", dict(initial_length=4, threshold=0.3, block_length=4, end_ids=[7], repetition_penalty=1.2)),
    "a growing answer, guided": ("bidirectional", "in_place", dict(initial_length=4, threshold=0.3, block_length=4, end_ids=[7], cfg_scale=1.0, temperature=1.0)),
    "a growing answer, polished": ("bidirectional", "shift", dict(initial_length=4, threshold=0.3, block_length=4, end_ids=[7], revision="gidd")),
    "a helper": ("bidirectional", "shift", dict(helper="causal", draft_length=4, repetition_penalty=1.2)),
    "a helper, drawn tokens": ("bidirectional", "in_place", dict(helper="causal", draft_length=3, temperature=1.0, top_k=20, end_ids=[7])),
    "gidd": ("bidirectional", "shift", dict(revision="gidd", order="confidence", threshold=0.05, repetition_penalty=1.2)),
}
ROWS = {"one row": [[1, 2, 3, 4]], "rows of several lengths": [[1, 2, 3, 4], [5, 6], [9, 8, 7]]}


@pytest.fixture
def like_a_gpu(monkeypatch):
    """What depends on whether the host waits when it counts, as on a GPU. And a list becomes a tensor on the device through `on_device` only."""
    for module in (draw, loop, shadow, windows):
        monkeypatch.setattr(module, "waits_for_counts", lambda device: True)
    real, copies = torch.tensor, []

    def tensor(*args, device=None, **more):
        copies.append(device)
        return real(*args, device=device, **more)

    monkeypatch.setattr(torch, "tensor", tensor)
    return copies


def steps_of(case, rows):
    pattern, alignment, settings = CASES[case]
    denoiser = denoiser_of("llama", pattern, alignment, 4 if pattern != "bidirectional" else None)
    if "helper" in settings:
        settings = settings | {"helper": denoiser_of("gpt2", settings["helper"])}
    denoiser.spec = dataclasses.replace(denoiser.spec, corruption="gidd")
    return denoise(denoiser, build_canvas([prompt + [None] * 12 for prompt in ROWS[rows]], 0), **settings)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_holds_no_hidden_wait(case, rows, like_a_gpu):
    steps = steps_of(case, rows)
    next(steps)  # what is done once, before the first step, may wait
    like_a_gpu.clear()
    with Waits() as waits:
        num_steps = sum(1 for _ in steps)
    assert num_steps >= 2
    assert waits.seen == []
    assert set(like_a_gpu) <= {None}, "a list was sent to the device, and the host waited"


@pytest.mark.parametrize("case", CASES)
def test_a_device_that_counts_at_leisure_gets_the_same_tokens(case, request):
    here = [step.tokens_BL for step in steps_of(case, "rows of several lengths")]
    request.getfixturevalue("like_a_gpu")
    there = [step.tokens_BL for step in steps_of(case, "rows of several lengths")]
    assert len(here) == len(there) and all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_the_counter_sees_what_it_should():
    x = torch.tensor([1.0, 0.0])
    with Waits() as waits:
        bool(x.any()), x[x > 0], x.nonzero(), int(x.sum())
    assert len(waits.seen) >= 4
