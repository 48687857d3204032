"""q(x_t given x_0): absorbing (masking) corruption.

A kernel draws which tokens are masked and returns, beside them, the t whose inverse is the weight that makes the masked sum an
estimate of the bound. For independent masks that is the noise level itself.

Shapes: B rows, L tokens a row, G groups a row. x_0 clean, x_t noised, t the mask probability, u uniform draws in [0, 1).
"""

from __future__ import annotations

import math

import torch


def draw_masks(
    eligible_BL: torch.Tensor, t_BG: torch.Tensor, u_BL: torch.Tensor, count: str, groups_BL: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(masked_BL, t_BL): which eligible tokens are masked at the level of their group, and the t of their weight 1/t.

    t_BG: a level a group. groups_BL: the group of each position, 0 .. G - 1; None is one group a row. In a block model each block is
    one (a level a block is what its bound needs; arXiv 2503.09573).
    count: `bernoulli`: each becomes the mask token with probability t, q(x_t = M) = 1 - alpha_t = t (linear schedule; arXiv
    2107.03006, arXiv 2410.17891 Algorithm 1). `exact`, `at_least_one`: see the functions below.
    The masks are a boolean array because the mask token may be an ordinary word that the text contains as well.
    """
    if groups_BL is None:
        groups_BL = torch.zeros_like(eligible_BL, dtype=torch.int64)
    if count == "exact":
        return exact_count(eligible_BL, t_BG, u_BL, groups_BL)
    if count == "at_least_one":
        return at_least_one(eligible_BL, t_BG, u_BL, groups_BL)
    assert count == "bernoulli", count
    t_BL = t_BG.gather(1, groups_BL)
    return eligible_BL & (u_BL < t_BL), t_BL


def exact_count(
    eligible_BL: torch.Tensor, level_BG: torch.Tensor, u_BL: torch.Tensor, groups_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """l = floor(n level) + 1 of a group's n eligible tokens, uniformly; weight n/l (LLaDA, arXiv 2502.09992, Eq. 6).

    A level that is uniform on [0, 1) makes l uniform on {1..n}: the bound, as with independent masks and 1/t, but without the
    noise of the count and with no empty group. Stratified levels make stratified counts.
    """
    num_eligible_BG = count_in_groups(eligible_BL, groups_BL, level_BG.shape[1])
    counts_BG = torch.minimum((num_eligible_BG * level_BG).floor().long() + 1, num_eligible_BG)
    masked_BL = smallest_draws(eligible_BL, counts_BG, u_BL, groups_BL)
    # Groups without eligible tokens have no masks; any t will do for them.
    t_BG = torch.where(num_eligible_BG > 0, counts_BG / num_eligible_BG.clamp(min=1), 1.0).to(level_BG.dtype)
    return masked_BL, t_BG.gather(1, groups_BL)


def at_least_one(eligible_BL: torch.Tensor, t_BG: torch.Tensor, u_BL: torch.Tensor, groups_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent masks at level t; a group that would have none masks its eligible token with the smallest draw.

    A group with one mask among n tokens is then more probable than under independent masks, by the factor
    (t + (1 - t) / n) / t; its weight is divided by that factor, so that the sum stays the bound. (Published code redraws or
    forces a mask and keeps 1/t: with n = 4 that is 2.3 times the bound.)
    """
    num_groups = t_BG.shape[1]
    num_eligible_BG = count_in_groups(eligible_BL, groups_BL, num_groups)
    masked_BL = eligible_BL & (u_BL < t_BG.gather(1, groups_BL))
    counts_BG = torch.minimum(count_in_groups(masked_BL, groups_BL, num_groups).clamp(min=1), num_eligible_BG)
    single_BG = counts_BG == 1
    masked_BL = torch.where(single_BG.gather(1, groups_BL), smallest_draws(eligible_BL, counts_BG, u_BL, groups_BL), masked_BL)
    t_BG = torch.where(single_BG, t_BG + (1 - t_BG) / num_eligible_BG.clamp(min=1), t_BG)
    return masked_BL, t_BG.gather(1, groups_BL)


def late_in_block(
    eligible_BL: torch.Tensor, t_BG: torch.Tensor, u_BL: torch.Tensor, groups_BL: torch.Tensor, half_life: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """k = round(t n) of a group's n eligible tokens, later ones more probably, the more so the fewer are masked (Efficient-DLM, arXiv 2512.14067).

    Without replacement (Gumbel top-k) from log-weights (ln 2 / (lambda n)) (1 - t) i, i the place among the group's eligible tokens: as t
    goes to 0 the weight doubles every lambda n places. half_life: lambda. At t = 1 the draw is uniform. A model that decodes from left
    to right meets such states. Inclusion probabilities differ, so no weight by t alone makes
    this a bound; the t returned is k/n.
    """
    num_groups = t_BG.shape[1]
    num_eligible_BG = count_in_groups(eligible_BL, groups_BL, num_groups)
    counts_BG = torch.minimum((num_eligible_BG * t_BG).round().long().clamp(min=1), num_eligible_BG)
    before_BL = eligible_BL.cumsum(1) - eligible_BL.long()
    first_BG = torch.zeros_like(num_eligible_BG).scatter_reduce(1, groups_BL, before_BL, "amin", include_self=False)
    place_BL = before_BL - first_BG.gather(1, groups_BL)
    slope_BG = math.log(2) / (half_life * num_eligible_BG.clamp(min=1)) * (1 - t_BG)
    gumbel_BL = -torch.log(-torch.log(u_BL + 2.0**-54))
    score_BL = slope_BG.gather(1, groups_BL) * place_BL + gumbel_BL
    # The largest scores are the smallest of a decreasing map into (0, 1).
    share_BG = torch.where(num_eligible_BG > 0, counts_BG / num_eligible_BG.clamp(min=1), 1.0).to(t_BG.dtype)
    return smallest_draws(eligible_BL, counts_BG, torch.sigmoid(-score_BL), groups_BL), share_BG.gather(1, groups_BL)


def count_in_groups(chosen_BL: torch.Tensor, groups_BL: torch.Tensor, num_groups: int) -> torch.Tensor:
    """int64 (B, G): how many positions of each group are chosen."""
    counts_BG = torch.zeros((chosen_BL.shape[0], num_groups), dtype=torch.int64, device=chosen_BL.device)
    return counts_BG.scatter_add_(1, groups_BL, chosen_BL.long())


def smallest_draws(
    eligible_BL: torch.Tensor, counts_BG: torch.Tensor, u_BL: torch.Tensor, groups_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """bool (B, L): in each group the `counts_BG` eligible tokens with the smallest draws in [0, 1): a uniform subset of that size.

    Without groups_BL the counts are (B,), one a row.
    """
    u_BL = u_BL.masked_fill(~eligible_BL, 2.0)
    if groups_BL is None:
        return eligible_BL & (u_BL.argsort(dim=1).argsort(dim=1) < counts_BG[:, None])
    rank_BL = (u_BL + 4.0 * groups_BL).argsort(dim=1).argsort(dim=1)  # group after group, by draw within each
    sizes_BG = count_in_groups(torch.ones_like(eligible_BL), groups_BL, counts_BG.shape[1])
    first_BG = sizes_BG.cumsum(1) - sizes_BG
    return eligible_BL & (rank_BL - first_BG.gather(1, groups_BL) < counts_BG.gather(1, groups_BL))


def complement(eligible_BL: torch.Tensor, masked_BL: torch.Tensor, t_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The other view of complementary pairs: what was clean is masked, at level 1 - t (arXiv 2509.26328).

    Both views together predict every eligible token exactly once; each by itself has independent masks at its own level.
    """
    return eligible_BL & ~masked_BL, 1 - t_BL


def edit_tokens(
    x_0_BL: torch.Tensor, eligible_BL: torch.Tensor, share_B: torch.Tensor, u_BL: torch.Tensor, random_BL: torch.Tensor
) -> torch.Tensor:
    """x_edit_BL: k = floor(n a) of a row's n eligible tokens replaced by random ones (Seed Diffusion, arXiv 2508.02193; substitutions only,
    which keep the length). share_B: a. random_BL: what replaces."""
    counts_B = (eligible_BL.sum(1) * share_B).floor().long()
    return torch.where(smallest_draws(eligible_BL, counts_B, u_BL), random_BL, x_0_BL)
