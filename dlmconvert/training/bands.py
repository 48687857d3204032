"""Clipped schedules that are looked for: the band of noise levels in which the loss of held-out text has the least variance (BD3-LM, arXiv 2503.09573).

    (beta, omega) = argmin over the grid of Var[ sum over the masked of a group of CE / t, a token ],  t ~ U[beta, omega]

A group is what has a noise level of its own: a row, or a block. Levels of [eps, 1] that fall into a band are uniform in it, so one pass over
held-out rows serves the whole grid.

Shapes: B rows, L tokens, G groups a row, N groups in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dlmconvert.data.loader import BatchStream
from dlmconvert.diffusion.corruption import count_in_groups
from dlmconvert.training.engine import batch_to
from dlmconvert.training.losses import LoopSettings, context_of

Band = tuple[float, float]
LEAST_GROUPS = 16
"""A band in which fewer groups fell is not judged."""


def bands() -> list[Band]:
    """The grid of the paper: widths 0.5 to 0.9 and the whole, at offsets of 0.05."""
    found = [(offset / 20, (offset + width) / 20) for width in (10, 12, 14, 16, 18) for offset in range(20 - width + 1)]
    return [(0.0, 1.0), *found]


def variances(t_N: torch.Tensor, loss_N: torch.Tensor, eps: float) -> dict[Band, float]:
    """Variance of the groups' losses in each band of the grid that enough of them fell into; a band from 0 begins at eps."""
    found = {}
    for low, high in bands():
        inside_N = (t_N >= low) & (t_N <= high)
        if int(inside_N.sum()) >= LEAST_GROUPS:
            found[(max(low, eps), high)] = float(loss_N[inside_N].double().var())
    return found


@dataclass
class BandSearch:
    """stream: held-out rows, noised over the whole range. num_batches: of its global batches, all of them scored. every: optimizer steps
    between two searches. eps: lower end of the whole range."""

    stream: BatchStream
    num_batches: int
    every: int
    eps: float

    def look(self, engine: Any, settings: LoopSettings, step: int) -> dict[str, float]:
        """{"band_low", "band_high", "band_variance", "full_variance"} after `step` steps. Collective: every rank does the same, and rank 0's result counts.

        Raises no error when too few groups fell into every band: the whole range is kept.
        """
        context = context_of(settings, step)
        if context.block_length is not None:
            self.stream.block_length = lambda number: context.block_length  # the training's at this step, for all batches of the search
        found = [self._groups(engine, settings, context, number, start) for number in range(self.num_batches) for start in range(0, self.stream.rows_per_step, settings.micro_batch)]
        t_N, loss_N = (torch.cat(parts) for parts in zip(*found, strict=True))
        measured = variances(t_N, loss_N, self.eps)
        low, high = min(measured, key=measured.get) if measured else (self.eps, 1.0)
        line = {"band_low": low, "band_high": high}
        if measured:
            line |= {"band_variance": measured[(low, high)], "full_variance": measured.get((self.eps, 1.0), measured[(low, high)])}
        return engine.ranks.share(line)

    @torch.no_grad()
    def _groups(self, engine: Any, settings: LoopSettings, context: Any, number: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(t_N, loss_N) of the groups with anything to mask: the 1/t-weighted loss divided by their eligible tokens."""
        batch = self.stream.batch(number, start, min(start + settings.micro_batch, self.stream.rows_per_step))
        x_0_BL, x_t_BL, masked_BL, positions_BL, segments_BL = batch_to(engine.device, batch.x_0_BL, batch.x_t_BL, batch.masked_BL, batch.positions_BL, batch.segments_BL)
        context = context.in_documents(segments_BL, positions_BL)
        clean = (x_0_BL, torch.zeros_like(masked_BL)) if context.has_two_streams else ()
        x_0_N = x_0_BL[masked_BL]
        with engine.autocast():
            _, ce_N = engine.denoiser(x_t_BL, masked_BL, positions_BL, context, torch.zeros(x_0_N.shape, device=x_0_N.device), x_0_N, *clean)
        ce_BL = torch.zeros(masked_BL.shape, device=ce_N.device).masked_scatter(masked_BL, ce_N).cpu()
        groups_BL = self.stream.groups(number, batch.positions_BL)
        maskable_BL = batch.eligible_BL if batch.starts_BL is None else batch.eligible_BL & ~batch.starts_BL
        num_groups = int(groups_BL.max()) + 1
        counts_BG = count_in_groups(maskable_BL, groups_BL, num_groups)
        loss_BG = torch.zeros(counts_BG.shape).scatter_add_(1, groups_BL, ce_BL / batch.t_BL)
        t_BG = torch.zeros(counts_BG.shape).scatter_reduce_(1, groups_BL, batch.t_BL, "amax")
        some_BG = counts_BG > 0
        return t_BG[some_BG], (loss_BG / counts_BG.clamp(min=1))[some_BG]
