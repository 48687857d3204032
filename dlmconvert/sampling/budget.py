"""How many positions are committed at step j of S (j = 0 .. S-1), for each row by itself.

`even`: k_j = floor(n (j+1) / S) - floor(n j / S), n the row's masked positions at the start. Sums to n; never 0 while S <= n; with
S > n some steps commit nothing and cost no forward.

`ancestral`: Algorithm 2 of DiffuLLaMA (arXiv 2410.17891). On the linear grid t = (S-j)/S -> s = (S-j-1)/S a masked token is revealed
with probability (alpha_s - alpha_t) / (1 - alpha_t) = 1 - s/t = 1/(S-j) = 1/(k+1), k = S-1-j steps remaining; the last step reveals
all. The step at which a token is revealed is uniform over the S steps. The count is #{i masked: u_i < 1/(k+1)}; the `random` order
scores with -u from the same draws, so the positions that it commits are exactly those with u_i < 1/(k+1).

A budget is a function (masked_BL, num_masked_B, u_BL, step, num_steps) -> count_B, int64.
Shapes: B rows, L positions of the canvas.
"""

from __future__ import annotations

import torch


def even(masked_BL: torch.Tensor, num_masked_B: torch.Tensor, u_BL: torch.Tensor, step: int, num_steps: int) -> torch.Tensor:
    """The same share at every step."""
    left_B = masked_BL.sum(dim=1)
    if step == num_steps - 1:
        return left_B
    return torch.minimum(num_masked_B * (step + 1) // num_steps - num_masked_B * step // num_steps, left_B)


def ancestral(masked_BL: torch.Tensor, num_masked_B: torch.Tensor, u_BL: torch.Tensor, step: int, num_steps: int) -> torch.Tensor:
    """As many as draws fall below 1/(k+1)."""
    return ((u_BL < 1 / (num_steps - step)) & masked_BL).sum(dim=1)


BUDGETS = {"even": even, "ancestral": ancestral}


def default_budget(order: str) -> str:
    """`random` order is the ancestral sampler; the other orders spread their positions evenly."""
    return "ancestral" if order == "random" else "even"
