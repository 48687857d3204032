"""GELUs that their family writes out term by term, in one kernel while training.

    gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))        (arXiv 1606.08415)

Written out, as GPT-2's family does, this is eight passes over the widest activation of the model, and four copies of it that wait for the
backward pass; torch has it in one, which keeps its input alone. The two differ by rounding, so a model that is sampled from or evaluated
computes what its family computes, to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class TanhGelu(nn.Module):
    """written_out: the family's own module, without parameters."""

    def __init__(self, written_out: nn.Module):
        super().__init__()
        self.written_out = written_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh") if self.training else self.written_out(x)


def fuse_activations(model: Any) -> None:
    """Puts a `TanhGelu` around each written-out GELU of the model; others stay."""
    from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in (NewGELUActivation, FastGELUActivation, AccurateGELUActivation) and not isinstance(module, TanhGelu):
                setattr(module, name, TanhGelu(child).train(child.training))
