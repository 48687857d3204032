"""Rows become noised batches: a pure function of (settings, step).

A batch does not depend on the number of processes, on accumulation, or on where a run was interrupted. Global slot
n = step * rows_per_step + row decides which row of which source is read; the noise level comes from (seed, step), the mask
from (seed, source, epoch, row, position). In complementary pairs, rows 2j and 2j + 1 of the global batch share a slot.

Shapes: N slots, B rows, L tokens a row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dlmconvert.data.rows import Rows, RowStore
from dlmconvert.diffusion.alignment import predictable
from dlmconvert.diffusion.corruption import complement, draw_masks, edit_tokens, late_in_block
from dlmconvert.diffusion.gidd import Mixture as GiddMixture
from dlmconvert.diffusion.gidd import draw_tokens, random_tokens
from dlmconvert.diffusion.randomness import EDIT, MASK, NOISE_LEVEL, RANDOM_TOKEN, SOURCE_CHOICE, counter_uniform, permutation
from dlmconvert.diffusion.schedules import noise_levels, noise_share
from dlmconvert.diffusion.streams import block_starts

PERIOD = 1000
"""Slots in which every source of a mixture gets exactly its share."""

COUNTED_ROWS = 256
"""Rows whose masks are counted at a time."""

Ids = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Source, epoch and row index of each row of a batch, int64 (B,)."""


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

    x_0_BL, x_t_BL int64: clean and noised tokens. masked_BL bool: the targets (under `gidd` every eligible token, masked or not). eligible_BL bool: what is predicted in some noise;
    starts_BL bool: those of them that the clean copy predicts (first tokens of blocks under `shift`, see diffusion/streams.py).
    t_BL float32: noise levels, or what takes their place in the weight 1/t (see diffusion/corruption.py). segments_BL int64: document numbers, None where every row is one document.
    positions_BL int64: position ids. row_ids: (source, epoch, row) of each row, for error messages.
    x_edit_BL int64: the clean row with some tokens replaced, in the steps that train on edits; else None.
    """

    step: int
    x_0_BL: torch.Tensor
    x_t_BL: torch.Tensor
    masked_BL: torch.Tensor
    eligible_BL: torch.Tensor
    t_BL: torch.Tensor
    segments_BL: torch.Tensor | None
    positions_BL: torch.Tensor
    row_ids: list[tuple[int, int, int]]
    starts_BL: torch.Tensor | None = None
    x_edit_BL: torch.Tensor | None = None


class BatchStream:
    """The noised batches of a stage.

    rows_per_step: rows of the global batch. corruption_kind: `masking`, `gidd` (`diffusion.gidd`; levels in [eps, 1 - eps], every eligible
    token is a target), or `none` (nothing is masked, every eligible token is a target, t = 1). eps, band, noise_levels: levels in [eps, 1] or in the band, see `diffusion.schedules.noise_levels`. count:
    `bernoulli`, `at_least_one` or `exact` (levels from 0, where there is no band), see `diffusion.corruption.draw_masks`. views:
    `single`, or `complementary`: rows 2j and 2j + 1 are one row, and what one masks the other shows (levels in [eps, 1 - eps], so
    that both weights are bounded). alignment: `shift` takes the first token of a document out of the eligible ones before masking,
    so it stays clean. isolated: position ids restart with each document.

    levels_per: `row`, or `block`: a noise level for each block of `block_length(step)` tokens (counted from the start of a document where
    position ids are), spread over all blocks of the global batch. uniform_share: of `gidd`. vocab_size: tokens of text, from which random
    ones are drawn. rise_steps, rise_from: of `diffusion.schedules.noise_share`. piece_length: of a step, tokens of the pieces that rows are cut into; the noise stays that of the row. edit_share: largest share of a row that is replaced in x_edit_BL, from step `edit_from` on; 0 for no edits. half_life: of `diffusion.corruption.late_in_block`, None for uniform
    masks. block_length: None where there are no blocks. has_clean_copy: of a block pattern, that the clean copy of a row goes beside the noised one,
    so that under `shift` it predicts the first tokens of blocks.
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
        band: tuple[float, float] | None = None,
        count: str = "bernoulli",
        views: str = "single",
        levels_per: str = "row",
        half_life: float | None = None,
        block_length: Callable[[int], int] | None = None,
        has_clean_copy: bool = True,
        uniform_share: float = 0.1,
        vocab_size: int = 0,
        edit_share: float = 0.0,
        edit_from: int = 0,
        rise_steps: int = 0,
        rise_from: float = 1.0,
        piece_length: Callable[[int], int] | None = None,
    ):
        assert corruption_kind in ("masking", "gidd", "all_masked", "none"), corruption_kind
        assert levels_per == "row" or block_length is not None
        assert views == "single" or (views == "complementary" and rows_per_step % 2 == 0 and count == "bernoulli"), (views, rows_per_step, count)
        self.mixture = mixture
        self.rows_per_step = rows_per_step
        self._seed = seed
        self._kind = corruption_kind
        self._rows_per_slot = 2 if views == "complementary" else 1
        self.band = band  # a search sets it anew between steps (training/bands.py)
        self._range = (0.0 if count == "exact" else eps), (1.0 - eps if views == "complementary" or corruption_kind == "gidd" else 1.0)
        self._num_tokens = vocab_size - (0 <= mask_token_id < vocab_size)
        self._gidd = GiddMixture(uniform_share, self._num_tokens) if corruption_kind == "gidd" else None
        self._edit_share, self._edit_from = edit_share, edit_from
        self._rise_steps, self._rise_from = rise_steps, rise_from
        self._piece_length = piece_length
        self._count = count
        self._levels_per_block = levels_per == "block"
        self._half_life = half_life
        self.block_length = block_length  # of a step
        self._has_clean_copy = has_clean_copy
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
        ids = self._ids(step, start, stop)
        rows = self._read(*ids)
        whole_BL = rows.segments_BL
        rows = replace(rows, segments_BL=self._cut(step, whole_BL))
        eligible_BL = rows.eligible_BL & predictable(rows.segments_BL, self._alignment)
        positions_BL = positions(whole_BL, self._isolated)
        starts_BL = self._starts(step, eligible_BL, positions_BL)
        masked_BL, t_BL = self._masks(step, start, stop, ids, eligible_BL, starts_BL, positions_BL)
        x_t_BL = rows.tokens_BL
        if self._gidd is not None:
            u_BL, v_BL = (self._draws(purpose, ids) for purpose in (MASK, RANDOM_TOKEN))
            x_t_BL = draw_tokens(x_t_BL, masked_BL, t_BL, u_BL, v_BL, self._gidd, self._mask_token_id)
        elif self._kind != "none":
            x_t_BL = x_t_BL.masked_fill(masked_BL, self._mask_token_id)
        batch = Batch(
            step=step,
            x_0_BL=rows.tokens_BL,
            x_t_BL=x_t_BL,
            masked_BL=masked_BL,
            eligible_BL=eligible_BL,
            t_BL=t_BL.to(torch.float32),
            segments_BL=whole_BL if self._has_segments else None,
            positions_BL=positions_BL,
            row_ids=list(zip(*(column.tolist() for column in ids), strict=True)),
            starts_BL=starts_BL,
            x_edit_BL=self._edited(step, ids, rows.tokens_BL, eligible_BL if starts_BL is None else eligible_BL & ~starts_BL),
        )
        return batch if self._piece_length is None else in_pieces(batch, self._piece_length(step))

    def _cut(self, step: int, segments_BL: torch.Tensor) -> torch.Tensor:
        """The same with a document of its own for each piece: under `shift` nothing predicts its first token."""
        if self._piece_length is None:
            return segments_BL
        return segments_BL * segments_BL.shape[1] + torch.arange(segments_BL.shape[1]) // self._piece_length(step)

    def _edited(self, step: int, ids: Ids, tokens_BL: torch.Tensor, eligible_BL: torch.Tensor) -> torch.Tensor | None:
        """Clean rows with edits, a ~ U[0, edit_share) of those eligible tokens that may be noised."""
        if self._edit_share == 0 or step < self._edit_from:
            return None
        share_B = self._edit_share * counter_uniform(EDIT, self._seed, 1, *(torch.from_numpy(column) for column in ids))
        random_BL = random_tokens(self._draws(RANDOM_TOKEN, ids), self._num_tokens, self._mask_token_id)
        return edit_tokens(tokens_BL, eligible_BL, share_B, self._draws(EDIT, ids), random_BL)

    def _draws(self, purpose: int, ids: Ids) -> torch.Tensor:
        """Uniform draws (B, L) for each token of these rows, by row and epoch."""
        source_B1, epoch_B1, row_B1 = (torch.from_numpy(column)[:, None] for column in ids)
        return counter_uniform(purpose, self._seed, source_B1, epoch_B1, row_B1, torch.arange(self.mixture.row_length))

    def num_eligible(self, step: int) -> int:
        """Eligible tokens of the whole global batch, the divisor of the loss; every rank computes the same, without tokens."""
        stores = self.mixture.stores
        if not self._has_segments and all(store.all_eligible for store in stores):
            pieces = 1 if self._piece_length is None else self.mixture.row_length // self._piece_length(step)
            return self.rows_per_step * (self.mixture.row_length - pieces * (self._alignment == "shift"))
        return int(self._eligible(step, self._ids(step, 0, self.rows_per_step))[0].sum())

    def num_masked(self, step: int) -> int:
        """Targets of the whole global batch, a divisor of published losses; every rank draws all masks anew, without tokens."""
        total = 0
        for start in range(0, self.rows_per_step, COUNTED_ROWS):
            stop = min(start + COUNTED_ROWS, self.rows_per_step)
            ids = self._ids(step, start, stop)
            eligible_BL, segments_BL = self._eligible(step, ids)
            positions_BL = positions(segments_BL, self._isolated)
            starts_BL = self._starts(step, eligible_BL, positions_BL)
            masked_BL, _ = self._masks(step, start, stop, ids, eligible_BL, starts_BL, positions_BL)
            total += int(masked_BL.sum()) + (0 if starts_BL is None else int(starts_BL.sum()))
        return total

    def _ids(self, step: int, start: int, stop: int) -> Ids:
        """(source, epoch, row) of the rows [start, stop) of the global batch."""
        slots_B = (step * self.rows_per_step + np.arange(start, stop)) // self._rows_per_slot
        sources_N, epochs_N, rows_N = self.mixture.slots(int(slots_B[0]), int(slots_B[-1] - slots_B[0]) + 1)
        places_B = slots_B - slots_B[0]
        return sources_N[places_B], epochs_N[places_B], rows_N[places_B]

    def _starts(self, step: int, eligible_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor | None:
        """What the clean copy predicts: the first tokens of blocks under `shift`."""
        if self.block_length is None or not self._has_clean_copy or self._alignment != "shift":
            return None
        return eligible_BL & block_starts(positions_BL, self.block_length(step))

    def _masks(
        self,
        step: int,
        start: int,
        stop: int,
        ids: Ids,
        eligible_BL: torch.Tensor,
        starts_BL: torch.Tensor | None,
        positions_BL: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(masked_BL, t_BL): the noised targets of the rows [start, stop), and the t of their weight 1/t."""
        maskable_BL = eligible_BL if starts_BL is None else eligible_BL & ~starts_BL
        if self._kind in ("none", "all_masked"):
            return maskable_BL, torch.ones(eligible_BL.shape)
        rows_B = torch.arange(start, stop)
        groups_BL, levels_BG = self._levels(step, rows_B // self._rows_per_slot, positions_BL)
        if self._gidd is not None:
            return maskable_BL, levels_BG.gather(1, groups_BL)
        u_BL = self._draws(MASK, ids)
        if self._half_life is not None:
            masked_BL, t_BL = late_in_block(maskable_BL, levels_BG, u_BL, groups_BL, self._half_life)
        else:
            masked_BL, t_BL = draw_masks(maskable_BL, levels_BG, u_BL, self._count, groups_BL)
        if self._rows_per_slot == 1:
            return masked_BL, t_BL
        second_B1 = (rows_B % 2 == 1)[:, None]
        other_BL, other_t_BL = complement(maskable_BL, masked_BL, t_BL)
        return torch.where(second_B1, other_BL, masked_BL), torch.where(second_B1, other_t_BL, t_BL)

    def _levels(self, step: int, slots_B: torch.Tensor, positions_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(groups_BL, levels_BG): which level holds at each position, and the levels of these rows."""
        num_slots = self.rows_per_step // self._rows_per_slot
        low, high = self.band or self._range
        high = low + (high - low) * noise_share(step, self._rise_steps, self._rise_from)
        groups_BL = self.groups(step, positions_BL)
        if not self._levels_per_block:
            levels = noise_levels(self._seed, step, num_slots, low, self._noise_levels, high)
            return groups_BL, levels[slots_B][:, None]
        block_length = self.block_length(step)
        per_row = -(-positions_BL.shape[1] // block_length)
        levels = noise_levels(self._seed, step, num_slots * per_row, low, self._noise_levels, high).view(num_slots, per_row)
        more = int(groups_BL.max()) + 1 - per_row
        if more > 0:
            extra = counter_uniform(NOISE_LEVEL, self._seed, step, torch.arange(num_slots)[:, None], per_row + torch.arange(self.mixture.row_length))
            levels = torch.cat([levels, (high - low) * extra + low], dim=1)
        return groups_BL, levels[slots_B]

    def groups(self, step: int, positions_BL: torch.Tensor) -> torch.Tensor:
        """int64 (B, L): which noise level of its row each position has, from 0: one a row, or one a block."""
        if not self._levels_per_block:
            return torch.zeros_like(positions_BL)
        # Blocks are numbered along the row; documents that begin inside of it make more of them than the grid has.
        return block_starts(positions_BL, self.block_length(step)).cumsum(1) - 1

    def _eligible(self, step: int, ids: Ids) -> tuple[torch.Tensor, torch.Tensor]:
        """(eligible_BL, segments_BL) of these rows, without reading their tokens."""
        sources_B, _, rows_B = ids
        shape = (len(rows_B), self.mixture.row_length)
        eligible_BL, segments_BL = torch.empty(shape, dtype=torch.bool), torch.empty(shape, dtype=torch.int64)
        for source in np.unique(sources_B):
            here_B = sources_B == source
            store, indices = self.mixture.stores[source], rows_B[here_B]
            segments = store.segments(indices)
            eligible_BL[torch.from_numpy(here_B)] = store.eligible(indices) & predictable(self._cut(step, segments), self._alignment)
            segments_BL[torch.from_numpy(here_B)] = segments
        return eligible_BL, segments_BL

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


def in_pieces(batch: Batch, length: int) -> Batch:
    """The same tokens in row-major order, in rows of `length`; position ids stay. row_ids are those of the whole rows."""
    names = ("x_0_BL", "x_t_BL", "masked_BL", "eligible_BL", "t_BL", "segments_BL", "positions_BL", "x_edit_BL")
    values = {name: getattr(batch, name) for name in names}
    return replace(batch, **{name: None if value is None else value.expand(batch.x_0_BL.shape).reshape(-1, length) for name, value in values.items()})


def positions(segments_BL: torch.Tensor, isolated: bool) -> torch.Tensor:
    """Position ids, int64 (B, L): 0, 1, 2, ... along the row, or from the start of each segment when documents are isolated."""
    positions_BL = torch.arange(segments_BL.shape[1]).expand(segments_BL.shape).contiguous()
    if not isolated:
        return positions_BL
    begins_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    begins_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    return positions_BL - torch.cummax(positions_BL * begins_BL, dim=1).values
