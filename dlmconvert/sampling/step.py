"""What a sampler tells about each of its steps.

Shapes: B rows, L positions of the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Step:
    """What one step did. The tensors are copies: keep them, the loop goes on with its own.

    index: the step, from 0. tokens_BL: the mask token at masked positions. masked_BL: still masked after the step.
    committed_BL: filled by this step. confidence_BL: p(x_hat) at temperature 1 without filters where committed, else 0.
    given_back_BL: not filled, because they stand after the end of the text; the end token stands there from now on.
    nfe: forwards so far; a step with guidance is two.
    """

    index: int
    tokens_BL: torch.Tensor
    masked_BL: torch.Tensor
    committed_BL: torch.Tensor
    confidence_BL: torch.Tensor
    given_back_BL: torch.Tensor
    nfe: int
