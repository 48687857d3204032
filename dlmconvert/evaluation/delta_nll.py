"""Delta-NLL: how much likelier the true continuation of a text is than continuations of other texts.

Multiple choice follows this difference and not the loss: it can keep growing while the held-out loss rises (arXiv 2511.03276).
Shapes: B rows, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.diffusion.likelihood import mean_and_standard_error
from dlmconvert.evaluation.nelbo import RowSource, row_nats


@dataclass(frozen=True)
class DeltaNll:
    """kind: `nelbo` (both NLLs are upper bounds) or `nll` (exact).

    truth, distractors: nats a token of the true continuation and of the others, given the true prefix. delta: distractors - truth, with
    its standard error over rows (None for one row). accuracy: share of rows whose truth is likelier than each distractor (chance is
    1 / (num_distractors + 1)).
    """

    kind: str
    delta: float
    standard_error: float | None
    truth: float
    distractors: float
    accuracy: float
    rows: int
    num_distractors: int
    draws: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_delta_nll(
    denoiser: Denoiser,
    source: RowSource,
    *,
    num_rows: int,
    num_distractors: int,
    prefix_length: int,
    draws: int,
    batch: int,
    seed: int,
    advance: Callable[[int], None] = lambda forwards: None,
) -> DeltaNll:
    """mean over rows i of [ mean_j NLL(c_j | p_i) ] - NLL(c_i | p_i), a token, where row i is its prefix p_i and its continuation c_i.

    Distractors are continuations of other rows among the first `num_rows`, spread evenly and never a neighbour where there are enough
    rows: the next row of packed text often goes on with the same document. A diffusion model is scored by exact counts over the
    continuation only, its prefix clean, with the same masks for all continuations of a row, so that their noise cancels (LLaDA, arXiv
    2502.09992). Rows are read as one document each. advance: called with the rows of each forward, for progress.
    """
    num_rows = min(num_rows, source.num_rows)
    assert num_rows > num_distractors >= 1, (num_rows, num_distractors)
    causal = denoiser.spec.attention == "causal"
    offsets = [(k * num_rows) // (num_distractors + 1) for k in range(num_distractors + 1)]  # 0: the truth
    tokens_BL = source.rows(np.arange(num_rows)).tokens_BL
    targets_L = torch.arange(tokens_BL.shape[1]) >= prefix_length
    assert 0 < prefix_length < tokens_BL.shape[1]
    was_training = denoiser.training
    denoiser.eval()
    options = []
    for offset in offsets:
        x_0_BL = torch.where(targets_L, tokens_BL.roll(-offset, 0), tokens_BL)
        nats = []
        for first in range(0, num_rows, batch):
            part_BL = x_0_BL[first : first + batch]
            positions_BL = torch.arange(part_BL.shape[1]).expand_as(part_BL)
            keys_B = torch.arange(first, first + len(part_BL))
            nats.append(
                row_nats(
                    denoiser, part_BL, targets_L.expand_as(part_BL), keys_B, draws=1 if causal else draws, seed=seed,
                    positions_BL=positions_BL, advance=advance,
                )
            )  # fmt: skip
        options.append(torch.cat(nats))
    denoiser.train(was_training)
    nats_KB = torch.stack(options)
    tokens_B = targets_L.sum().expand(num_rows)
    delta, error = mean_and_standard_error(nats_KB[1:].mean(0) - nats_KB[0], tokens_B)
    tokens = int(tokens_B.sum())
    return DeltaNll(
        kind="nll" if causal else "nelbo",
        delta=delta,
        standard_error=None if math.isnan(error) else error,
        truth=float(nats_KB[0].sum()) / tokens,
        distractors=float(nats_KB[1:].mean(0).sum()) / tokens,
        accuracy=float((nats_KB[0] < nats_KB[1:].min(0).values).double().mean()),
        rows=num_rows,
        num_distractors=num_distractors,
        draws=1 if causal else draws,
    )
