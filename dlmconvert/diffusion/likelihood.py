"""Likelihood of a denoiser: the negative evidence lower bound (NELBO) by exact counts, and the AR likelihood beside it.

Shapes: B rows, L positions, N predicted tokens, K noise draws a row, V vocabulary.
A `predict` is called as predict(tokens_BL, wanted_BL, positions_BL, segments_BL) and returns logits_NV of token i, aligned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dlmconvert.diffusion.corruption import count_in_groups, smallest_draws
from dlmconvert.diffusion.objective import cross_entropy
from dlmconvert.diffusion.randomness import LIKELIHOOD, counter_uniform

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def exact_counts(num_targets_BG: torch.Tensor, row_keys_B: torch.Tensor, draw: int, num_draws: int, seed: int) -> torch.Tensor:
    """l_BG in 1..n: how many of a group's n targets are masked in draw `draw` of `num_draws`. A group is a row, or a block of it.

    Stratified over the draws of a row: l = floor(n (draw + u) / K) + 1 with one u a draw. Each l has probability 1/n over a
    uniformly random draw, so the average over draws is unbiased (unlike rounding half to even: methods of LLaDA's release).
    The blocks of a row walk through the strata out of step, so that each draw has all counts somewhere.
    """
    groups_G = torch.arange(num_targets_BG.shape[1], device=num_targets_BG.device)
    u_BG = counter_uniform(LIKELIHOOD, seed, row_keys_B[:, None], draw, -1 - groups_G)
    level_BG = num_targets_BG * ((draw + groups_G) % num_draws + u_BG) / num_draws
    return torch.minimum(level_BG.floor().long() + 1, num_targets_BG)


def random_subset(
    targets_BL: torch.Tensor, blocks_BL: torch.Tensor, row_keys_B: torch.Tensor, draw: int, num_draws: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(masked_BL, weight_BL): exactly l of the n targets of each block, uniformly, keyed by row and draw; and n / l.

    blocks_BL: 0 .. G - 1 along the row, 0 everywhere for one group a row.
    """
    num_targets_BG = count_in_groups(targets_BL, blocks_BL, int(blocks_BL.max()) + 1)
    counts_BG = exact_counts(num_targets_BG, row_keys_B, draw, num_draws, seed)
    positions_L = torch.arange(targets_BL.shape[1], device=targets_BL.device)
    u_BL = counter_uniform(LIKELIHOOD, seed, row_keys_B[:, None], draw, positions_L[None, :])
    return smallest_draws(targets_BL, counts_BG, u_BL, blocks_BL), (num_targets_BG / counts_BG.clamp(min=1)).gather(1, blocks_BL)


def nelbo_draw(
    predict: Predict, x_0_BL: torch.Tensor, targets_BL: torch.Tensor, row_keys_B: torch.Tensor, mask_token_id: int, *, draw: int, num_draws: int,
    seed: int, positions_BL: torch.Tensor, segments_BL: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """One draw of the estimator: nats_B = (n / l) sum over the l masked targets of CE_i; its mean over draws is the NELBO.

    NELBO = E_{l ~ U{1..n}} [ (n / l) E[ sum CE ] ] >= -log p(targets | the rest)  (LLaDA, arXiv 2502.09992, Eq. 6; equal in
    expectation to Bernoulli masking with weight 1/t). Tokens that are not targets stay clean: they are the condition. The mask
    token stays in the softmax, as in training. Rows without targets give 0.
    """
    masked_BL, weight_BL = random_subset(targets_BL, torch.zeros_like(x_0_BL), row_keys_B, draw, num_draws, seed)
    logits_NV = predict(x_0_BL.masked_fill(masked_BL, mask_token_id), masked_BL, positions_BL, segments_BL)
    return _row_sums(cross_entropy(logits_NV, x_0_BL[masked_BL]), masked_BL, weight_BL)


def block_nelbo_draw(
    predict: Callable[..., torch.Tensor], x_0_BL: torch.Tensor, targets_BL: torch.Tensor, starts_BL: torch.Tensor, blocks_BL: torch.Tensor,
    row_keys_B: torch.Tensor, mask_token_id: int, *, draw: int, num_draws: int, seed: int, positions_BL: torch.Tensor,
    segments_BL: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """One draw of the block model's bound, all blocks in one two-stream forward: nats_B.

    sum_b NELBO(block b | clean blocks before it), each by exact counts as in `nelbo_draw`, with a count and a subset of its own (BD3-LM,
    arXiv 2503.09573, Eq. 6-7). starts_BL: targets that the clean copy predicts, exactly (streams.py). blocks_BL: 0 .. G - 1 along the row.
    predict(x_t_BL, x_0_BL, masked_BL, starts_BL, positions_BL, segments_BL) -> logits in the order of [masked | starts].
    """
    masked_BL, weight_BL = random_subset(targets_BL & ~starts_BL, blocks_BL, row_keys_B, draw, num_draws, seed)
    logits_NV = predict(x_0_BL.masked_fill(masked_BL, mask_token_id), x_0_BL, masked_BL, starts_BL, positions_BL, segments_BL)
    chosen_BS = torch.cat([masked_BL, starts_BL], dim=1)
    ce_N = cross_entropy(logits_NV, torch.cat([x_0_BL, x_0_BL], dim=1)[chosen_BS])
    return _row_sums(ce_N, chosen_BS, torch.cat([weight_BL, torch.ones_like(weight_BL)], dim=1))


def ar_nll(
    predict: Predict, x_0_BL: torch.Tensor, targets_BL: torch.Tensor, positions_BL: torch.Tensor, segments_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """nats_B: exact -log p of the targets under a causal model, one forward (chain rule)."""
    logits_NV = predict(x_0_BL, targets_BL, positions_BL, segments_BL)
    return _row_sums(cross_entropy(logits_NV, x_0_BL[targets_BL]), targets_BL)


def _row_sums(ce_N: torch.Tensor, chosen_BL: torch.Tensor, weight_BL: torch.Tensor | None = None) -> torch.Tensor:
    # Apple's GPUs have no float64.
    ce_BL = torch.zeros(chosen_BL.shape, dtype=torch.float32 if ce_N.device.type == "mps" else torch.float64, device=ce_N.device)
    ce_BL[chosen_BL] = ce_N.to(ce_BL.dtype)
    return (ce_BL if weight_BL is None else ce_BL * weight_BL).sum(1)


def mean_and_standard_error(nats_B: torch.Tensor, tokens_B: torch.Tensor) -> tuple[float, float]:
    """Nats a token over all rows, and the standard error of that ratio with rows as the independent units."""
    num_rows, total = len(nats_B), float(tokens_B.sum())
    mean = float(nats_B.sum()) / total
    if num_rows < 2:
        return mean, float("nan")
    residual_B = nats_B - mean * tokens_B
    return mean, float((residual_B.square().sum() * num_rows / (num_rows - 1)).sqrt() / total)
