"""ZeRO 1 and 2 in one process, where nothing is dealt out: gradients stay where the backward pass leaves them until the update.

DeepSpeed takes each gradient in a hook, adds it to a flat partition that it allocates and fills with zeros in every step, divides that by one,
scales it for the norm, and copies masters onto weights. Here AdamW reads the gradients themselves, beside views of the flat masters and
moments: the same numbers, in the fewest passes over memory. What a checkpoint holds (the flat masters and moments) is DeepSpeed's as ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.adamw import adamw

from dlmconvert.training.optimizer import gradient_norm

PIECE = 1 << 22  # elements of a gradient in bf16 or fp16 that are float32 at one time


def update_in_place(engine: Any) -> bool:
    """Let gradients lie in `.grad` until the update, and update from there; before the first step. engine: DeepSpeed's, of one process, under
    ZeRO 1 or 2. Replaces `step` of its one optimizer object. False, and nothing is changed, where gradients are summed in another type
    than the weights' (`engine.deepspeed.data_types`)."""
    optimizer = engine.optimizer
    base = optimizer.optimizer
    if optimizer.gradient_accumulation_dtype != optimizer.dtype or not all(group.get("fused") for group in base.param_groups):
        return False
    engine.enable_backward_allreduce = False  # nobody to sum with
    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    if optimizer.dtype == torch.float32:
        for master, weights in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups_flat, strict=True):
            master.data = weights.data
        optimizer._link_all_hp_params()  # its views of the masters were of the copies

    def step(closure: Any = None) -> None:
        norm = float(gradient_norm(p.grad for group in optimizer.bit16_groups for p in group if p.grad is not None))
        scale = float(optimizer.loss_scale)
        optimizer.overflow = not math.isfinite(norm)
        optimizer._update_scale(optimizer.overflow)
        optimizer._global_grad_norm = norm / scale
        if optimizer.overflow:
            return
        divisor = scale * (max(1.0, (norm / scale + 1e-6) / optimizer.clip_grad) if optimizer.clip_grad > 0 else 1.0)
        for number in range(len(base.param_groups)):
            _update_group(optimizer, number, divisor)
        optimizer._lazy_init_hp_params_optimizer_state()

    optimizer.step = step
    return True


@torch.no_grad()
def _update_group(optimizer: Any, number: int, divisor: float) -> None:
    """divisor: of all gradients; the loss scale and the clipping."""
    group, master = optimizer.optimizer.param_groups[number], optimizer.single_partition_of_fp32_groups[number]
    state = optimizer.optimizer.state[master]
    if not state:  # as AdamW makes it
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
    flat = (master, state["exp_avg"], state["exp_avg_sq"])
    beta1, beta2 = group["betas"]
    for gradients, places in _pieces(optimizer, number):
        masters, means, squares = ([tensor[start : start + gradient.numel()] for start, gradient in zip(places, gradients, strict=True)] for tensor in flat)
        adamw(
            masters, gradients, means, squares, [], list(state["step"].repeat(len(gradients)).unbind()), fused=True, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            grad_scale=None if divisor == 1 else torch.tensor(divisor, device=master.device),
        )  # fmt: skip
    state["step"] += 1
    weights = optimizer.bit16_groups_flat[number]
    if weights.data_ptr() != master.data_ptr():
        weights.copy_(master)


def _pieces(optimizer: Any, number: int) -> Iterator[tuple[list[torch.Tensor], list[int]]]:
    """(flat float32 gradients, where each begins in the flat master), all at once or, where they are copies, some at a time."""
    parameters, starts = optimizer.round_robin_bit16_groups[number], optimizer.round_robin_bit16_offsets[number]
    found = [((torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1), start) for p, start in zip(parameters, starts, strict=True)]
    if optimizer.dtype == torch.float32:
        yield [gradient for gradient, _ in found], [start for _, start in found]
        return
    gradients: list[torch.Tensor] = []
    places: list[int] = []
    held = 0
    for gradient, start in found:
        for first in range(0, gradient.numel(), PIECE):
            cut = gradient[first : first + PIECE]
            if held + cut.numel() > PIECE and gradients:
                yield gradients, places
                gradients, places, held = [], [], 0
            gradients.append(cut.float())
            places.append(start + first)
            held += cut.numel()
    yield gradients, places
