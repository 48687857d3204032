"""Real training steps with every position masked, and what torch's CPU allocator hands out in them."""

from __future__ import annotations

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from dlmconvert.diffusion.attention import AttentionContext


def traced_peak(begin, run=None):
    """Most bytes allocated at once while `run(what begin returned)` runs, those of `begin` among them; without `run`, in `begin`.

    By address: a tensor that another thread frees (gloo's) leaves no trace until its memory is given out again.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = begin()
        with record_function("traced run"):
            if run is not None:
                run(result)
    allocations, since = [], 0
    stack = list(profiler.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        elif event.tag == _EventType.TorchOp and run is not None and event.name == "traced run":
            since = event.start_time_ns
    alive, now, peak = {}, 0, 0
    for at, address, num_bytes in sorted(allocations):
        now -= alive.pop(address, 0)
        if num_bytes > 0:
            alive[address] = num_bytes
            now += num_bytes
        if at >= since:
            peak = max(peak, now)
    return peak


def loss_of(engine, step, rows, length, open_ratio=1.0, streams=1):
    """The loss of one micro-batch, as training/losses.py computes it. streams: 2 is a block pattern, its clean copy scored as well."""
    tokens_BL = torch.zeros(rows, length, dtype=torch.long)
    masked_BL = torch.ones(rows, length, dtype=torch.bool)
    masked_BL[:, 0] = False
    positions_BL = torch.arange(length).expand(rows, length)
    x_0_N = tokens_BL[masked_BL].repeat(streams)
    weights_N = torch.full(x_0_N.shape, 1 / tokens_BL.numel())
    context, clean = AttentionContext(open_ratio, 0, step), ()
    if streams == 2:
        context, clean = AttentionContext(pattern="block_causal", block_length=16, length=length), (tokens_BL, masked_BL)
    with engine.autocast():
        return engine.denoiser(tokens_BL, masked_BL, positions_BL, context, weights_N, x_0_N, *clean)[0]
