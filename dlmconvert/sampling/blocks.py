"""Semi-autoregressive blocks: the masked positions of a row, counted from the left, in groups of `block_length`; one group after the
other, each with its share of the steps (LLaDA, arXiv 2502.09992). Nothing about the model changes: it sees the whole canvas.

A group counts masked positions, not columns, so after a prompt the first block begins at the first new token, and the gaps of an
infill are cut from left to right. A row moves to its next block by itself: rows of one batch may stand in different blocks.

Shapes: B rows, L positions of the canvas.
"""

from __future__ import annotations

import torch

from .budget import Plan


class Blocks:
    """Where each row stands. num_steps: steps of a whole row; None gives each row as many as it has masked positions. eps: see budget.py."""

    def __init__(self, masked_BL: torch.Tensor, block_length: int | None, num_steps: int | None, eps: float = 1e-3):
        self.eps = eps
        self.length = masked_BL.shape[1] if block_length is None else block_length
        self.total_B = masked_BL.sum(dim=1)
        self.number_BL = (masked_BL.cumsum(dim=1) - 1).clamp(min=0) // self.length
        self.steps_B = (self.total_B if num_steps is None else torch.full_like(self.total_B, num_steps)).clamp(min=1)
        self.block_B = torch.full_like(self.total_B, -1)
        self.began_B = self.num_masked_B = self.num_steps_B = torch.zeros_like(self.total_B)
        self.last_step = int(self.steps_B.max()) - 1

    def plan(self, masked_BL: torch.Tensor, step: int, u_BL: torch.Tensor) -> Plan:
        """The part of `masked_BL` that may be committed at this step, and where its rows stand in their blocks.

        Blocks end in time by themselves. Only a hook that masks positions again can lead to a row's last step with more than its
        last block open: then that step takes everything, so that no mask is left.
        """
        nowhere = masked_BL.shape[1]
        block_B = self.number_BL.masked_fill(~masked_BL, nowhere).min(dim=1).values
        current_BL = masked_BL & (self.number_BL == block_B[:, None])
        is_new_B = block_B != self.block_B
        self.block_B = block_B
        self.began_B = torch.where(is_new_B, step, self.began_B)
        self.num_masked_B = torch.where(is_new_B, current_BL.sum(dim=1), self.num_masked_B)
        self.num_steps_B = torch.where(is_new_B, self._steps_of(block_B), self.num_steps_B)
        step_B = step - self.began_B
        is_last_B = step >= self.steps_B - 1
        current_BL = torch.where(is_last_B[:, None], masked_BL, current_BL)
        return Plan(current_BL, self.num_masked_B, step_B, torch.where(is_last_B, step_B + 1, self.num_steps_B), u_BL, self.eps)

    def _steps_of(self, block_B: torch.Tensor) -> torch.Tensor:
        """Its share of the row's steps, in proportion to its masked positions: at least 1 when there are as many steps as blocks."""
        total_B = self.total_B.clamp(min=1)
        first_B = (block_B * self.length).clamp(max=total_B)
        end_B = (first_B + self.length).clamp(max=total_B)
        return (self.steps_B * end_B // total_B - self.steps_B * first_B // total_B).clamp(min=1)


def check_blocks(masked_BL: torch.Tensor, block_length: int | None, num_steps: int | None) -> None:
    """Raises ValueError for a length without meaning and for fewer steps than blocks."""
    if block_length is None:
        return
    if block_length < 1:
        raise ValueError(f"block_length is {block_length}; it must be at least 1")
    most = int(masked_BL.sum(dim=1).max())
    num_blocks = -(-most // block_length)
    if num_steps is not None and num_steps < num_blocks:
        raise ValueError(
            f"{most} positions in blocks of {block_length} are {num_blocks} blocks, and each takes a step at least: {num_steps} steps are"
            " too few; give more steps, or longer blocks"
        )
