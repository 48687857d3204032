"""Arithmetic of a training stage, and how long it may take: an estimate, never a measurement."""

from __future__ import annotations

import time
from typing import Any

from dlmconvert.planning.architecture import Architecture

# Share of a large matrix product's speed that a whole training step reaches: attention, norms, the loss and the optimizer are slower.
# Measured side by side on one busy core: 0.3 to 0.75 (GPT-2 small and a Llama of 3M; fp32 about 0.6, bf16 about 0.4).
STEP_EFFICIENCY = 0.5
MASKED_SHARE = 0.5  # E[t] of uniform noise levels: the share of the tokens that goes through the output matrix


def flops_per_token(shape: Architecture, row_length: int, *, causal: bool = False, gradient_checkpointing: bool = False) -> float:
    """Floating-point operations a training token.

    6 N (2 forward, 4 backward; arXiv 2001.08361) for the N matrix elements that it goes through, + 12 L q a layer for attention to
    all L positions (half under the AR objective), + 6 V d for the output matrix, times the share of masked tokens. Checkpointing
    repeats the forward of the layers: 8 in place of 6. Frozen matrices (LoRA) get no gradient of their own: 4 in place of 6.
    """
    frozen = 0.0 if shape.embedding_trained else 2.0
    again = 2.0 if gradient_checkpointing else 0.0
    layers = (6 - frozen + again) * shape.active_matrix_parameters
    if not shape.embedding_trained:
        layers += (6 + again) * shape.num_trainable
    attention = (12 + 2 * again) * shape.num_layers * row_length * shape.query * (0.5 if causal else 1.0)
    head = (6 - frozen) * shape.vocab_size * shape.hidden * (1.0 if causal else MASKED_SHARE)
    return layers + attention + head


def measured_flops_per_second(device: str, precision: str, budget_s: float = 0.5) -> float:
    """Speed of a matrix product on this machine's device, in FLOP/s. Takes less than a second."""
    import torch

    size = 1024 if device == "cpu" else 4096
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    synchronise: Any = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    a @ a
    synchronise()
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < budget_s:
        begin = time.perf_counter()
        a @ a
        synchronise()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
