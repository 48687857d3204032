"""q(x_t given x_0): absorbing (masking) corruption.

Shapes: B rows, L tokens a row. x_0 clean, x_t noised, t the mask probability.
"""

from __future__ import annotations

import torch


def mask_tokens(
    x_0_BL: torch.Tensor, eligible_BL: torch.Tensor, t_B: torch.Tensor, u_BL: torch.Tensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each eligible token becomes the mask token with probability t: q(x_t = M) = 1 - alpha_t = t (linear schedule).

    u_BL: uniform draws in [0, 1). Returns (x_t_BL, masked_BL). The masks are a boolean array because the mask token may be
    an ordinary word that the text contains as well. arXiv 2107.03006, arXiv 2410.17891 Algorithm 1.
    """
    masked_BL = eligible_BL & (u_BL < t_B[:, None])
    return x_0_BL.masked_fill(masked_BL, mask_token_id), masked_BL
