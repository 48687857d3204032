"""Schedules of the optimizer step: noise levels of a batch, and the annealing of the attention mask.

Shapes: B rows of the global batch.
"""

from __future__ import annotations

import torch

from dlmconvert.diffusion.randomness import NOISE_LEVEL, counter_uniform


def noise_levels(seed: int, step: int, num_rows: int, eps: float, kind: str) -> torch.Tensor:
    """t_B in [eps, 1], float64: the mask probability of each row of the global batch of `step`.

    `uniform`: t = (1 - eps) U + eps, one independent U a row (arXiv 2410.17891, Algorithm 1).
    `stratified`: row j draws from stratum (j + U_j) / B (arXiv 2503.09573); the same mean, a lower variance.
    The draws depend on (seed, step, row number in the global batch) and on nothing else.
    """
    rows_B = torch.arange(num_rows)
    u_B = counter_uniform(NOISE_LEVEL, seed, step, rows_B)
    if kind == "stratified":
        u_B = (rows_B + u_B) / num_rows
    else:
        assert kind == "uniform", kind
    return (1 - eps) * u_B + eps


def annealing_ratio(step: int, anneal_steps: int) -> float:
    """Share of the non-causal pairs that is open at optimizer step `step` (from 0): min(1, (step + 1) / anneal_steps).

    arXiv 2410.17891. `anneal_steps` = 1 opens everything at once.
    """
    return min(1.0, (step + 1) / anneal_steps)
