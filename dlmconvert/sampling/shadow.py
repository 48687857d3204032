"""A second opinion on tokens that stand, in the forward that predicts the masked ones: what would stand there if it were masked?

Behind the columns of the canvas stands a shadow of the block, one mask for each of its settled tokens. The shadow of token i sees what
the block's own column sees, without column i, and nothing of the shadow but itself: so it answers with p(x_i without x_i). Under
`shift` it holds the place of i-1, whose hidden state predicts i. The canvas does not see the shadow. (WINO, arXiv 2507.18578.)

The canvas computes the columns that its cache says (cache.py): the shadow's keys have slots behind the canvas, and are written over at the
next step. Under `prefix` and `dual` it sees, like the block itself, the stored keys of the other columns.

Shapes: B rows of the canvas, R of them still open, L columns, C columns of a forward on the canvas, W behind it, Q = C + W, K keys, N
positions asked for (row-major), V vocabulary.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Protocol

import torch

from ..diffusion.alignment import predicting_positions
from ..diffusion.block_attention import BLOCK_PATTERNS, sees_at_inference
from .blocks import Layout, row_lengths
from .cache import GuidedReader, twice
from .canvas import Canvas
from .transfer import on_device, waits_for_counts
from .windows import WindowPredictor, places_in_rows


class Shadow(Protocol):
    def read(
        self, tokens_BL: torch.Tensor, open_BL: torch.Tensor, stands_BL: torch.Tensor, parts: list[int], num_open: list[int],
        num_standing: list[int],
    ) -> torch.Tensor:
        """logits_NV: of the masked positions of each row's part (open_BL) by the canvas, then of the settled ones by the shadow.

        parts: the part of each row; num_open, num_standing: how many there are in each row. A row with neither is done."""  # fmt: skip
        ...


class ShadowReader:
    """Who answers for canvas and shadow. block_length: of the parts, None for the whole row. cache: a name of cache.py."""

    def __init__(self, predictor: WindowPredictor, canvas: Canvas, layout: Layout, block_length: int | None, cache: str):
        self.predictor, self.canvas, self.layout, self.block_length = predictor, canvas, layout, block_length
        pattern = getattr(predictor, "attention", "bidirectional")
        self.pattern = pattern if pattern in BLOCK_PATTERNS else None
        self.lag = int(predictor.alignment == "shift")
        self.rows = list(range(canvas.tokens_BL.shape[0]))
        self.ends = [begin + length for begin, length in zip(layout.begins, row_lengths(canvas), strict=True)]
        self.cache = cache
        self.num_stored = list(layout.begins)  # of a block model: columns left of here are clean and stored
        self.part = [-1] * len(self.rows)  # of `prefix` and `dual`: the part whose full forward is stored
        self.nowhere = canvas.tokens_BL.shape[1] + (block_length or canvas.tokens_BL.shape[1])
        self.store = predictor.new_store(len(self.rows), self.nowhere) if cache != "none" else None

    def _window(self, row: int, part: int) -> tuple[int, int]:
        """The columns of the canvas that this row computes."""
        span, begin, end = self.layout.spans[row][part], self.layout.begins[row], self.ends[row]
        if self.pattern is not None:
            return self.num_stored[row], span.first if span.opens else span.end
        if self.store is None or self.part[row] != part:
            return begin, end
        return max(span.first - self.lag, begin), end if self.cache == "prefix" else span.end

    def read(
        self, tokens_BL: torch.Tensor, open_BL: torch.Tensor, stands_BL: torch.Tensor, parts: list[int], num_open: list[int],
        num_standing: list[int],
    ) -> torch.Tensor:
        device, length = tokens_BL.device, tokens_BL.shape[1]
        live = [row for row in self.rows if num_open[row] + num_standing[row]]
        if self.store is not None and live != self.rows:
            self.store.keep_rows(on_device([self.rows.index(row) for row in live], device))
        self.rows = live
        spans = [self.layout.spans[row][parts[row]] for row in live]
        windows = [self._window(row, parts[row]) for row in live]
        reach = [self.ends[row] if self.pattern is None else end for row, (_, end) in zip(live, windows, strict=True)]
        first_R1, end_R1 = on_device(windows, device).T[..., None]
        reach_R1 = on_device(reach, device)[:, None]
        stand = [(self.layout.begins[row], self.layout.origins[row], span.first) for row, span in zip(live, spans, strict=True)]
        begin_R1, origin_R1, noised_R1 = on_device(stand, device).T[..., None]
        width = max(end - first for first, end in windows)
        num_shadow = max(num_standing[row] for row in live)

        columns_RC = first_R1 + torch.arange(width, device=device)
        real_RC = columns_RC < end_R1
        columns_RC = torch.minimum(columns_RC, end_R1 - 1)  # of padding queries; some column that sees a key
        rows_R = on_device(live, device)
        stands_RL, rows_R1 = stands_BL[rows_R], rows_R[:, None]
        held_RW = places_in_rows(stands_RL, num_shadow)
        real_RW = torch.arange(num_shadow, device=device) < stands_RL.sum(dim=1, keepdim=True)
        place_RW = torch.where(real_RW, (held_RW - self.lag).clamp(min=0), end_R1 - 1)
        places_RQ = torch.cat([columns_RC, place_RW], dim=1)

        canvas_keys_RK = columns_RC if self.store is None else torch.arange(length, device=device).expand(len(live), -1)
        query, key = places_RQ[:, :, None], canvas_keys_RK[:, None, :]
        seen_RQK = (key >= begin_R1[..., None]) & (key < reach_R1[..., None])
        if self.store is None:
            seen_RQK = seen_RQK & real_RC[:, None, :]
        if self.pattern is not None:
            noised, origin = noised_R1[..., None], origin_R1[..., None]
            seen_RQK = seen_RQK & sees_at_inference(query, key, self.pattern, self.block_length, origin, noised)
        seen_RQK = seen_RQK.expand(-1, places_RQ.shape[1], -1).clone()
        seen_RQK[:, width:] &= (key != held_RW[:, :, None]) | ~real_RW[:, :, None]
        shadow_RQW = seen_RQK.new_zeros(len(live), places_RQ.shape[1], num_shadow)
        shadow_RQW[:, width:] = torch.eye(num_shadow, dtype=torch.bool, device=device)

        reading_BL = predicting_positions(open_BL, self.predictor.alignment)
        masks_RW = torch.full_like(held_RW, self.predictor.mask_token_id)
        slots_RC = columns_RC.masked_fill(~real_RC, self.nowhere)
        slots_RW = (length + torch.arange(num_shadow, device=device)).expand(len(live), -1).masked_fill(~real_RW, self.nowhere)
        kept_RQ = torch.cat([reading_BL[rows_R1, columns_RC] & real_RC, real_RW], dim=1)
        counts = [(num_open[row], num_standing[row]) for row in live]
        most, kept = max(map(sum, counts)), kept_RQ
        by_places = waits_for_counts(device)
        if by_places:
            kept = places_in_rows(kept_RQ, most)
        logits = self.predictor.forward_columns(
            torch.cat([tokens_BL[rows_R1, columns_RC], masks_RW], dim=1),
            self.canvas.positions_BL[rows_R1, places_RQ],
            kept,
            torch.cat([seen_RQK, shadow_RQW], dim=2),
            seen_RQK.shape[2] + num_shadow,
            self.store,
            torch.cat([slots_RC, slots_RW], dim=1),
            None,
        )
        if self.store is not None:
            for row, span in zip(live, spans, strict=True):
                self.num_stored[row], self.part[row] = span.first, parts[row]
        # Row after row the canvas's answers, then the shadow's; asked for are all of the canvas first.
        starts = [row * most for row in range(len(live))] if by_places else [0, *accumulate(map(sum, counts))]
        of_canvas = [start + i for start, (opened, _) in zip(starts, counts, strict=False) for i in range(opened)]
        of_shadow = [start + opened + i for start, (opened, standing) in zip(starts, counts, strict=False) for i in range(standing)]
        return (logits.flatten(0, 1) if by_places else logits)[on_device(of_canvas + of_shadow, device)]


class GuidedShadow:
    """The same under classifier-free guidance (cache.py, GuidedReader). `shadow` has each row twice."""

    def __init__(self, shadow: ShadowReader, guided: GuidedReader):
        self.shadow, self.guided = shadow, guided

    def read(
        self, tokens_BL: torch.Tensor, open_BL: torch.Tensor, stands_BL: torch.Tensor, parts: list[int], num_open: list[int],
        num_standing: list[int],
    ) -> torch.Tensor:
        both = torch.cat([tokens_BL, self.guided.unprompted(tokens_BL)])
        logits_NV = self.shadow.read(both, torch.cat([open_BL] * 2), torch.cat([stands_BL] * 2), parts * 2, num_open * 2, num_standing * 2)
        sizes = [sum(num_open)] * 2 + [sum(num_standing)] * 2
        cond_open, un_open, cond_shadow, un_shadow = logits_NV.to(torch.float32).split(sizes)
        return self.guided.mixed(torch.cat([cond_open, cond_shadow]), torch.cat([un_open, un_shadow]))


def open_shadow(predictor: WindowPredictor, canvas: Canvas, layout: Layout, *, cache: str, block_length: int | None, cfg_scale: float) -> Shadow:
    """Whoever answers WINO. block_length: of the parts."""
    if cfg_scale == 0:
        return ShadowReader(predictor, canvas, layout, block_length, cache)
    shadow = ShadowReader(predictor, twice(canvas), layout.twice(), block_length, cache)
    return GuidedShadow(shadow, GuidedReader(None, canvas, predictor.mask_token_id, cfg_scale))
