"""AdamW with decoupled decay, and learning rates as pure functions of the step."""

from __future__ import annotations

import math

import torch
from torch import nn


def learning_rate(
    step: int, *, steps: int, peak: float, final: float, warmup_steps: int, schedule: str, decay_fraction: float
) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`.

    Linear warm-up to `peak`, then `cosine` to `final`, `constant`, or `wsd`: constant and then linear to `final` over the last
    `decay_fraction` of all steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        decay_steps = max(1, round(decay_fraction * steps))
        left = steps - step
        return peak if left > decay_steps else final + (peak - final) * left / decay_steps
    assert schedule == "cosine", schedule
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def make_adamw(model: nn.Module, *, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters; biases, norms and embeddings do not decay.

    A decayed mask row would shrink to 0, where gradients explode at high noise (arXiv 2512.15745).
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # peft keeps the trained embedding rows (the mask token's) outside of the embedding, whole.
            is_embedding = id(parameter) in embeddings or "trainable_tokens" in name
            (decayed if parameter.ndim >= 2 and not is_embedding else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    # The fused kernel exists for these devices; it is the same arithmetic in one pass over memory.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=fused)
