"""Which hidden state predicts token i: `shift` (hidden state i-1, as the AR model did) or `in_place` (hidden state i).

Shapes: B rows, L tokens a row.
"""

from __future__ import annotations

import torch

ALIGNMENTS = ("shift", "in_place")


def predictable(segments_BL: torch.Tensor, alignment: str) -> torch.Tensor:
    """bool (B, L): tokens that some hidden state of their own document predicts.

    Under `shift` the first token of a document has no predictor: never a target, never masked, in no likelihood.
    segments_BL: document number of each position (all equal when documents are joined).
    """
    result_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    if alignment == "shift":
        result_BL[:, 0] = False
        result_BL[:, 1:] = segments_BL[:, 1:] == segments_BL[:, :-1]
    return result_BL


def predicting_positions(targets_BL: torch.Tensor, alignment: str) -> torch.Tensor:
    """bool (B, L): the hidden states that predict the targets.

    Row-major order is kept, so the n-th chosen hidden state predicts the n-th target. Under `shift` no target may stand at
    position 0 (it would have no predictor).
    """
    if alignment == "in_place":
        return targets_BL
    assert alignment == "shift", alignment
    return torch.roll(targets_BL, -1, dims=1)
