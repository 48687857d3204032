"""Rows become noised batches: a pure function of (settings, step).

A batch does not depend on the number of processes, on accumulation, or on where a run was interrupted. Global slot
n = step * rows_per_step + row decides which row of which source is read; the noise level comes from (seed, step), the mask
from (seed, source, epoch, row, position).

Shapes: N slots, B rows, L tokens a row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dlmconvert.data.rows import Rows, RowStore
from dlmconvert.diffusion.alignment import predictable
from dlmconvert.diffusion.corruption import mask_tokens
from dlmconvert.diffusion.randomness import MASK, SOURCE_CHOICE, counter_uniform, permutation
from dlmconvert.diffusion.schedules import noise_levels

PERIOD = 1000
"""Slots in which every source of a mixture gets exactly its share."""


class Mixture:
    """Which row stands in which global slot.

    A source is read through in a seeded order, a new one every epoch. Several sources share periods of `PERIOD` slots in
    proportion to their weights (largest remainder, at least one slot each), in a hashed order within the period; so how many
    rows of a source stand before a slot is known without walking there.
    """

    def __init__(self, stores: Sequence[RowStore], weights: Sequence[float], seed: int):
        assert len(stores) == len(weights) > 0 and all(store.num_rows > 0 for store in stores)
        self.stores = list(stores)
        self._seed = seed
        self._counts = period_counts(weights, PERIOD) if len(stores) > 1 else None
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @property
    def row_length(self) -> int:
        return self.stores[0].row_length

    @property
    def num_rows(self) -> int:
        """Rows of all sources together."""
        return sum(store.num_rows for store in self.stores)

    def slots(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source index, epoch, row index) of the slots first .. first + count - 1, int64 (N,)."""
        slots_N = np.arange(first, first + count, dtype=np.int64)
        if self._counts is None:
            sources_N, draws_N = np.zeros(count, dtype=np.int64), slots_N
        else:
            sources_N, draws_N = self._shares(slots_N)
        sizes = np.asarray([store.num_rows for store in self.stores], dtype=np.int64)
        epochs_N, places_N = np.divmod(draws_N, sizes[sources_N])
        rows_N = np.empty(count, dtype=np.int64)
        for source, epoch in sorted(set(zip(sources_N.tolist(), epochs_N.tolist(), strict=True))):
            here_N = (sources_N == source) & (epochs_N == epoch)
            rows_N[here_N] = self._order(source, epoch)[places_N[here_N]]
        return sources_N, epochs_N, rows_N

    def _shares(self, slots_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each slot, and how many slots of that source stand before it."""
        assert self._counts is not None
        sources_N, draws_N = np.empty_like(slots_N), np.empty_like(slots_N)
        labels = np.repeat(np.arange(len(self._counts)), self._counts)
        periods_N, places_N = np.divmod(slots_N, PERIOD)
        for period in np.unique(periods_N):
            here_N = periods_N == period
            order = labels[permutation(PERIOD, SOURCE_CHOICE, self._seed, int(period)).numpy()]
            before = np.empty(PERIOD, dtype=np.int64)
            for source, share in enumerate(self._counts):
                before[order == source] = period * share + np.arange(share)
            sources_N[here_N], draws_N[here_N] = order[places_N[here_N]], before[places_N[here_N]]
        return sources_N, draws_N

    def _order(self, source: int, epoch: int) -> np.ndarray:
        key = (source, epoch)
        if key not in self._orders:
            self._orders[key] = permutation(self.stores[source].num_rows, self._seed, source, epoch).numpy()
        self._orders.move_to_end(key)
        # A batch may reach from one epoch into the next; older orders are not needed again.
        while len(self._orders) > 2 * len(self.stores):
            self._orders.popitem(last=False)
        return self._orders[key]


def period_counts(weights: Sequence[float], period: int) -> np.ndarray:
    """Slots of each source in a period, int64: proportional to the weights, by largest remainder, at least one each."""
    assert len(weights) <= period
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights) * period
    counts = np.floor(shares).astype(np.int64)
    remainders = np.argsort(-(shares - counts), kind="stable")
    counts[remainders[: period - counts.sum()]] += 1
    while (counts == 0).any():
        counts[np.argmax(counts)] -= 1
        counts[np.argmin(counts)] += 1
    return counts


@dataclass(frozen=True)
class Batch:
    """Some rows of the global batch of a step.

    x_0_BL, x_t_BL int64: clean and noised tokens. masked_BL bool: the targets. eligible_BL bool: what might have been masked.
    t_B float32: noise levels. segments_BL int64: document numbers, None where every row is one document.
    positions_BL int64: position ids. row_ids: (source, epoch, row) of each row, for error messages.
    """

    step: int
    x_0_BL: torch.Tensor
    x_t_BL: torch.Tensor
    masked_BL: torch.Tensor
    eligible_BL: torch.Tensor
    t_B: torch.Tensor
    segments_BL: torch.Tensor | None
    positions_BL: torch.Tensor
    row_ids: list[tuple[int, int, int]]


class BatchStream:
    """The noised batches of a stage.

    rows_per_step: rows of the global batch. corruption_kind: `masking`, or `none` (nothing is masked, every eligible token is
    a target, t = 1). eps, noise_levels: see `diffusion.schedules.noise_levels`. alignment: `shift` takes the first token of a
    document out of the eligible ones before masking, so it stays clean. isolated: position ids restart with each document.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        rows_per_step: int,
        seed: int,
        corruption_kind: str,
        eps: float,
        noise_levels: str,
        mask_token_id: int,
        alignment: str,
        isolated: bool,
    ):
        assert corruption_kind in ("masking", "none"), corruption_kind
        self.mixture = mixture
        self.rows_per_step = rows_per_step
        self._seed = seed
        self._kind = corruption_kind
        self._eps = eps
        self._noise_levels = noise_levels
        self._mask_token_id = mask_token_id
        self._alignment = alignment
        self._isolated = isolated
        # Decided once for all rows: the attention kernel must not change with what happens to be in a micro-batch.
        self._has_segments = any(store.has_segments for store in mixture.stores)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of the global batch of optimizer step `step` (both from 0)."""
        stop = self.rows_per_step if stop is None else stop
        assert 0 <= start < stop <= self.rows_per_step, (start, stop, self.rows_per_step)
        ids = self.mixture.slots(step * self.rows_per_step + start, stop - start)
        rows = self._read(*ids)
        eligible_BL = rows.eligible_BL & predictable(rows.segments_BL, self._alignment)
        if self._kind == "none":
            t_B = torch.ones(stop - start)
            x_t_BL, masked_BL = rows.tokens_BL, eligible_BL
        else:
            t_B = noise_levels(self._seed, step, self.rows_per_step, self._eps, self._noise_levels)[start:stop]
            source_B1, epoch_B1, row_B1 = (torch.from_numpy(column)[:, None] for column in ids)
            u_BL = counter_uniform(MASK, self._seed, source_B1, epoch_B1, row_B1, torch.arange(self.mixture.row_length))
            x_t_BL, masked_BL = mask_tokens(rows.tokens_BL, eligible_BL, t_B, u_BL, self._mask_token_id)
        return Batch(
            step=step,
            x_0_BL=rows.tokens_BL,
            x_t_BL=x_t_BL,
            masked_BL=masked_BL,
            eligible_BL=eligible_BL,
            t_B=t_B.to(torch.float32),
            segments_BL=rows.segments_BL if self._has_segments else None,
            positions_BL=positions(rows.segments_BL, self._isolated),
            row_ids=list(zip(*(column.tolist() for column in ids), strict=True)),
        )

    def num_eligible(self, step: int) -> int:
        """Eligible tokens of the whole global batch, the divisor of the loss; every rank computes the same, without tokens."""
        stores = self.mixture.stores
        if not self._has_segments and all(store.all_eligible for store in stores):
            return self.rows_per_step * (self.mixture.row_length - (self._alignment == "shift"))
        sources_N, _, rows_N = self.mixture.slots(step * self.rows_per_step, self.rows_per_step)
        total = 0
        for source in np.unique(sources_N):
            indices = rows_N[sources_N == source]
            allowed_BL = predictable(stores[source].segments(indices), self._alignment)
            total += int((stores[source].eligible(indices) & allowed_BL).sum())
        return total

    def _read(self, sources_B: np.ndarray, epochs_B: np.ndarray, rows_B: np.ndarray) -> Rows:
        shape = (len(rows_B), self.mixture.row_length)
        tokens_BL, eligible_BL = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.bool)
        segments_BL = torch.empty(shape, dtype=torch.int64)
        for source in np.unique(sources_B):
            here_B = sources_B == source
            rows = self.mixture.stores[source].rows(rows_B[here_B])
            places_B = torch.from_numpy(here_B)
            tokens_BL[places_B], eligible_BL[places_B] = rows.tokens_BL, rows.eligible_BL
            segments_BL[places_B] = rows.segments_BL
        return Rows(tokens_BL, eligible_BL, segments_BL)


def positions(segments_BL: torch.Tensor, isolated: bool) -> torch.Tensor:
    """Position ids, int64 (B, L): 0, 1, 2, ... along the row, or from the start of each segment when documents are isolated."""
    positions_BL = torch.arange(segments_BL.shape[1]).expand(segments_BL.shape).contiguous()
    if not isolated:
        return positions_BL
    begins_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    begins_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    return positions_BL - torch.cummax(positions_BL * begins_BL, dim=1).values
