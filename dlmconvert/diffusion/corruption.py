"""q(x_t given x_0): absorbing (masking) corruption.

A kernel draws which tokens are masked and returns, beside them, the t whose inverse is the weight that makes the masked sum an
estimate of the bound. For independent masks that is the noise level itself.

Shapes: B rows, L tokens a row. x_0 clean, x_t noised, t the mask probability, u uniform draws in [0, 1).
"""

from __future__ import annotations

import torch


def draw_masks(eligible_BL: torch.Tensor, t_B: torch.Tensor, u_BL: torch.Tensor, count: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(masked_BL, t_B): which eligible tokens of each row are masked at its level t_B, and the t of its weight 1/t.

    count: `bernoulli`: each becomes the mask token with probability t, q(x_t = M) = 1 - alpha_t = t (linear schedule; arXiv
    2107.03006, arXiv 2410.17891 Algorithm 1). `exact`, `at_least_one`: see the functions below.
    The masks are a boolean array because the mask token may be an ordinary word that the text contains as well.
    """
    if count == "exact":
        return exact_count(eligible_BL, t_B, u_BL)
    if count == "at_least_one":
        return at_least_one(eligible_BL, t_B, u_BL)
    assert count == "bernoulli", count
    return eligible_BL & (u_BL < t_B[:, None]), t_B


def exact_count(eligible_BL: torch.Tensor, level_B: torch.Tensor, u_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """l = floor(n level) + 1 of a row's n eligible tokens, uniformly; weight n/l (LLaDA, arXiv 2502.09992, Eq. 6).

    A level that is uniform on [0, 1) makes l uniform on {1..n}: the bound, as with independent masks and 1/t, but without the
    noise of the count and with no empty row. Stratified levels make stratified counts.
    """
    num_eligible_B = eligible_BL.sum(1)
    counts_B = torch.minimum((num_eligible_B * level_B).floor().long() + 1, num_eligible_B)
    masked_BL = smallest_draws(eligible_BL, counts_B, u_BL)
    # Rows without eligible tokens have no masks; any t will do for them.
    return masked_BL, torch.where(num_eligible_B > 0, counts_B / num_eligible_B.clamp(min=1), 1.0).to(level_B.dtype)


def at_least_one(eligible_BL: torch.Tensor, t_B: torch.Tensor, u_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent masks at level t; a row that would have none masks its eligible token with the smallest draw.

    A row with one mask among n tokens is then more probable than under independent masks, by the factor
    (t + (1 - t) / n) / t; its weight is divided by that factor, so that the sum stays the bound. (Published code redraws or
    forces a mask and keeps 1/t: with n = 4 that is 2.3 times the bound.)
    """
    num_eligible_B = eligible_BL.sum(1)
    masked_BL = eligible_BL & (u_BL < t_B[:, None])
    counts_B = torch.minimum(masked_BL.sum(1).clamp(min=1), num_eligible_B)
    single_B = counts_B == 1
    masked_BL = torch.where(single_B[:, None], smallest_draws(eligible_BL, counts_B, u_BL), masked_BL)
    return masked_BL, torch.where(single_B, t_B + (1 - t_B) / num_eligible_B.clamp(min=1), t_B)


def smallest_draws(eligible_BL: torch.Tensor, counts_B: torch.Tensor, u_BL: torch.Tensor) -> torch.Tensor:
    """bool (B, L): in each row the `counts_B` eligible tokens with the smallest draws: a uniform subset of that size."""
    rank_BL = u_BL.masked_fill(~eligible_BL, 2.0).argsort(dim=1).argsort(dim=1)
    return eligible_BL & (rank_BL < counts_B[:, None])


def complement(eligible_BL: torch.Tensor, masked_BL: torch.Tensor, t_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The other view of complementary pairs: what was clean is masked, at level 1 - t (arXiv 2509.26328).

    Both views together predict every eligible token exactly once; each by itself has independent masks at its own level.
    """
    return eligible_BL & ~masked_BL, 1 - t_B
