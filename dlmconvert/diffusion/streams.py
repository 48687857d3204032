"""The two copies of a row that a block model is trained on: [x_t | x_0], noised and clean, in one forward.

Both copies have the same position ids. A prediction is read from the noised copy (a denoised token) or from the clean one (an
autoregressive one), and under `shift` the first token of a block is always read from the clean copy:

    in sampling the block before it is clean, so its state is the cached clean one; the state of the noised copy exists in training
    only. So the first token s of a block is never masked, is predicted by the clean state of s - 1, with weight 1, and diffusion
    runs over the other L' - 1 tokens. The sum is a bound, and training and sampling see the same logits.

Shapes: B rows, L tokens a row, S = 2L.
"""

from __future__ import annotations

import torch

from dlmconvert.diffusion.alignment import predicting_positions


def two_streams(x_t_BL: torch.Tensor, x_0_BL: torch.Tensor, positions_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens_BS, positions_BS)."""
    return torch.cat([x_t_BL, x_0_BL], dim=1), torch.cat([positions_BL, positions_BL], dim=1)


def reading_positions(noised_targets_BL: torch.Tensor, clean_targets_BL: torch.Tensor, alignment: str) -> torch.Tensor:
    """bool (B, S): the hidden states that predict the noised targets (under the alignment) and the clean ones (always the state before).

    Row-major order is kept within each copy, so the n-th True belongs to the n-th True of [noised targets | clean targets].
    """
    return torch.cat([predicting_positions(noised_targets_BL, alignment), predicting_positions(clean_targets_BL, "shift")], dim=1)


def block_starts(positions_BL: torch.Tensor, block_length: int) -> torch.Tensor:
    """bool (B, L): the first token of each block."""
    return positions_BL % block_length == 0
