"""Schedules of the optimizer step: noise levels of a batch, and the path from causal to bidirectional attention.

Shapes: B rows of the global batch, L positions of a row.
"""

from __future__ import annotations

import torch

from dlmconvert.diffusion.attention import AttentionContext
from dlmconvert.diffusion.randomness import NOISE_LEVEL, counter_uniform


def noise_levels(seed: int, step: int, num_rows: int, low: float, kind: str, high: float = 1.0) -> torch.Tensor:
    """t_B in [low, high], float64: the mask probability of each row of the global batch of `step`, t = low + (high - low) U.

    `uniform`: one independent U a row (arXiv 2410.17891, Algorithm 1, with low = eps).
    `stratified`: row j draws from stratum (j + U_j) / B (arXiv 2503.09573); the same mean, a lower variance.
    `offset`: (j / B + U) mod 1 with one U for all rows (arXiv 2107.00630; Dream, GIDD): evenly spaced.
    `antithetic`: rows 2j and 2j + 1 take U and 1 - U (an odd last row has its own draw).
    Each level by itself is uniform on [low, high], so all kinds estimate the same; only the variance differs. [low, high] inside
    of [0, 1] is a band: with the weight 1/t kept, a clipped schedule (arXiv 2503.09573), which is not a bound.
    The draws depend on (seed, step, row number in the global batch) and on nothing else.
    """
    rows_B = torch.arange(num_rows)
    u_B = counter_uniform(NOISE_LEVEL, seed, step, rows_B)
    if kind == "stratified":
        u_B = (rows_B + u_B) / num_rows
    elif kind == "offset":
        u_B = (rows_B.double() / num_rows + u_B[0]) % 1.0
    elif kind == "antithetic":
        u_B = torch.where(rows_B % 2 == 0, u_B, 1 - u_B[(rows_B - 1).clamp(min=0)])
    else:
        assert kind == "uniform", kind
    return (high - low) * u_B + low


def noise_share(step: int, rise_steps: int, rise_from: float) -> float:
    """Share of the range of noise levels, from its low end, that optimizer step `step` (from 0) draws from: from `rise_from` in a straight
    line to 1 at step `rise_steps`.

    An AR model has little to learn from a row that is nearly clean, and forgets much under one that is nearly all masks: few masks first.
    """
    return 1.0 if step >= rise_steps else rise_from + (1 - rise_from) * step / rise_steps


def annealing_ratio(step: int, anneal_steps: int) -> float:
    """Share of the non-causal pairs that is open at optimizer step `step` (from 0): min(1, (step + 1) / anneal_steps).

    arXiv 2410.17891. `anneal_steps` = 1 opens everything at once.
    """
    return min(1.0, (step + 1) / anneal_steps)


def look_ahead_width(step: int, anneal_steps: int, length: int) -> int:
    """Positions ahead that a query of a row of `length` sees at optimizer step `step` (from 0): ceil(ratio (length - 1)).

    The window grows by equal widths a step, is at least 1, and reaches the end of the row at step `anneal_steps` - 1.
    """
    return min(length - 1, -(-(length - 1) * (step + 1) // anneal_steps))


def attention_at(step: int, *, anneal: str, anneal_steps: int, length: int, seed: int) -> AttentionContext:
    """The pattern of optimizer step `step` (from 0) on the way from causal to bidirectional attention of rows of `length`.

    `none`: open at once (and `pieces`, where the rows themselves are shorter). `random`: a drawn share of the future pairs (`annealing_ratio`). `window`: every future key within a
    width that grows (`look_ahead_width`). From step `anneal_steps` - 1 on, all of them are the bidirectional pattern.
    """
    if anneal == "random":
        return AttentionContext(open_ratio=annealing_ratio(step, anneal_steps), seed=seed, step=step)
    width = length - 1
    if anneal == "window":
        width = look_ahead_width(step, anneal_steps, length)
    else:
        assert anneal in ("none", "pieces"), anneal
    return AttentionContext(open_ratio=1.0, seed=seed, step=step, look_ahead=None if width >= length - 1 else width)


def block_length_at(step: int, stages: tuple[tuple[int, int], ...]) -> int:
    """Block length at optimizer step `step` (from 0). stages: (first step, block length), ascending, the first at 0."""
    return [length for first, length in stages if first <= step][-1]


def piece_share(piece_length: int, row_length: int) -> float:
    """Share of the future pairs of a row that lie within its pieces."""
    return 1.0 if piece_length == row_length else (piece_length - 1) / (row_length - 1)


def open_share(context: AttentionContext, length: int) -> float:
    """Share of the future pairs of one document of `length` that the context opens (of drawn pairs: on average).

    Of a block pattern: of the noised copy's pairs within its block, out of all future pairs.
    """
    if context.block_length is not None:
        if context.pattern == "causal_in_block" or length < 2:
            return 0.0
        whole, rest = divmod(length, min(int(context.block_length), length))
        size = min(int(context.block_length), length)
        return (whole * size * (size - 1) + rest * (rest - 1)) / (length * (length - 1))
    if context.look_ahead is None or length < 2:
        return float(context.open_ratio)
    width = min(int(context.look_ahead), length - 1)
    return float(context.open_ratio) * width * (2 * length - 1 - width) / (length * (length - 1))
