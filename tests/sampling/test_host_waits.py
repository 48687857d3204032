"""A step waits for the device once. On a CPU nothing waits, but the operations that would are visible: reading a number out of a tensor,
counting what is true, selecting by a mask."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import denoiser_of
from torch.utils._python_dispatch import TorchDispatchMode

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
    "whole rows": ("bidirectional", "shift", dict(order="confidence", threshold=0.1), False),
    "prefix cache": ("bidirectional", "shift", dict(order="confidence", threshold=0.1, block_length=4, cache="prefix"), True),
    "dual cache": ("bidirectional", "in_place", dict(order="entropy", entropy_bound=1.0, block_length=4, cache="dual"), True),
    "block cache": ("block_causal", "in_place", dict(order="margin", factor=1.5), True),
    "block cache, shift": ("context_causal", "shift", dict(order="confidence", threshold=0.1, end_ids=[7], repetition_penalty=1.2), True),
    "guidance": ("block_causal", "in_place", dict(order="entropy", num_steps=6, cfg_scale=1.0), True),
    "speculation": ("context_causal", "shift", dict(draft_length=3), True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_holds_no_hidden_wait(case):
    pattern, alignment, settings, is_windowed = CASES[case]
    denoiser = denoiser_of("llama", pattern, alignment, 4 if pattern != "bidirectional" else None)
    steps = denoise(denoiser, build_canvas([[1, 2, 3, 4] + [None] * 12], 0), **settings)
    next(steps)  # what is done once, before the first step, may wait
    with Waits() as waits:
        num_steps = sum(1 for _ in steps)
    assert num_steps >= 2
    if is_windowed:
        assert waits.seen == []
    else:  # transformers selects the hidden states of a whole row by a boolean mask
        assert len(waits.seen) <= num_steps and set(waits.seen) <= {"aten::index"}


def test_the_counter_sees_what_it_should():
    x = torch.tensor([1.0, 0.0])
    with Waits() as waits:
        bool(x.any()), x[x > 0], x.nonzero(), int(x.sum())
    assert len(waits.seen) >= 4
