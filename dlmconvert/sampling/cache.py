"""What is recomputed at a step, and what is read from stored keys and values.

A forward may compute any columns of the canvas, against stored keys of the others (`WindowPredictor`). The kinds of cache differ in
which columns a step computes, and so in what the stored keys mean:

| cache | columns of a step | the others' keys are | for |
| `none` | all (of a block model: from the row's start to the end of the block) | | every model |
| `prefix` | [s, end of the row) | of the last full forward | bidirectional; Fast-dLLM (2505.22618) |
| `dual` | [s, e) | of the last full forward | bidirectional; Fast-dLLM (2505.22618) |
| `block` | [s, e), and before it what is clean and not stored yet | exact | block models |

[s, e) is the part of the row that is being filled (blocks.py). `prefix` and `dual` begin each part with a full forward, which commits
as well; until the next one the keys of the other columns are those of that forward, though the part has changed since: an
APPROXIMATION, whose tokens may differ from the uncached ones. `block` is exact: the keys of clean columns never depend on what is
right of them (block_attention.py), they are stored by a forward over clean tokens, and those of a noised pass are written over
before anything else reads them. Storing a finished block costs no forward of its own: it rides along with the first one of the next.

Under `shift` token i is read from hidden state i-1: the columns of `prefix` and `dual` begin at s-1, and a block model reads the
first token of a block in the forward over the clean text before it, the one that stores it (blocks.py, `opens`).

Shapes: B rows, L columns of the canvas, Q columns of a forward, K keys, N positions asked for (row-major), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from ..diffusion.alignment import predicting_positions
from ..diffusion.block_attention import BLOCK_PATTERNS
from .blocks import Layout, row_lengths
from .canvas import Canvas, Predictor
from .transfer import on_device
from .windows import WindowPredictor, Windows

CACHES = ("none", "prefix", "dual", "block")


class Asked(NamedTuple):
    """Positions of the canvas whose predictions are wanted. flat_N: their places in the flattened canvas, row-major. counts: how
    many in each row. parts: the part in which each row stands. live: does the row still have anything to fill? The last three are
    known to the host, so that nothing below has to wait for the device."""

    mask_BL: torch.Tensor
    flat_N: torch.Tensor
    counts: list[int]
    parts: list[int]
    live: list[bool]


class Reader(Protocol):
    def read(self, tokens_BL: torch.Tensor, asked: Asked) -> torch.Tensor:
        """logits_NV: the prediction of each position asked for."""
        ...


class RefreshedReader:
    """`prefix` and `dual`: a full forward when a row comes to a new part, then windows against what that forward stored."""

    def __init__(self, predictor: WindowPredictor, canvas: Canvas, layout: Layout, kind: str):
        self.layout, self.kind, self.alignment = layout, kind, predictor.alignment
        self.before = int(predictor.alignment == "shift")
        self.rows = list(range(canvas.tokens_BL.shape[0]))
        self.ends = _ends(canvas, layout)
        self.part = [-1] * len(self.rows)
        self.windows = Windows(predictor, canvas, predictor.new_store(len(self.rows), canvas.tokens_BL.shape[1]))

    def read(self, tokens_BL: torch.Tensor, asked: Asked) -> torch.Tensor:
        live = forget_finished(self, asked)
        new = [row for row in live if asked.counts[row] and asked.parts[row] != self.part[row]]
        old = [row for row in live if row not in new and asked.counts[row]]
        if self.kind == "dual" and not new and 2 * len(old) > len(live):
            # Few rows wait for the others: their windows cost less than taking the other rows' keys out of the store.
            old = live
        logits, reading_BL = [], predicting_positions(asked.mask_BL, self.alignment)
        for rows in (new, old):
            if not rows:
                continue
            # A row that waits for the others (blocks.py) is computed where it stands, so that all windows are alike.
            parts = [asked.parts[row] if row in new or self.part[row] < 0 else self.part[row] for row in rows]
            windows = [self._window(row, part, rows is new) for row, part in zip(rows, parts, strict=True)]
            slots = None if rows == self.rows else [self.rows.index(row) for row in rows]
            reach = [self.ends[row] for row in rows]
            logits.append(self.windows.forward(rows, windows, reach, None, tokens_BL, reading_BL, asked.counts, slots))
        for row in new:
            self.part[row] = asked.parts[row]
        if len(logits) == 1:
            return logits[0]
        return torch.cat(logits)[_row_major(new + old, asked.counts, tokens_BL.device)]

    def _window(self, row: int, part: int, is_new: bool) -> tuple[int, int]:
        begin, end = self.layout.begins[row], self.ends[row]
        if is_new:
            return begin, end
        span = self.layout.spans[row][part]
        return max(span.first - self.before, begin), end if self.kind == "prefix" else span.end


class BlockReader:
    """Block models: with a store the exact block cache, without one everything from the row's start is computed again."""

    def __init__(self, predictor: WindowPredictor, canvas: Canvas, layout: Layout, block_length: int, is_cached: bool):
        self.layout, self.is_cached, self.alignment = layout, is_cached, predictor.alignment
        self.pattern, self.block_length = predictor.attention, block_length
        self.rows = list(range(canvas.tokens_BL.shape[0]))
        self.num_stored = list(layout.begins)  # columns left of here are clean and stored
        store = predictor.new_store(len(self.rows), canvas.tokens_BL.shape[1]) if is_cached else None
        self.windows = Windows(predictor, canvas, store)

    def read(self, tokens_BL: torch.Tensor, asked: Asked) -> torch.Tensor:
        rows = forget_finished(self, asked)
        spans = [self.layout.spans[row][asked.parts[row]] for row in rows]
        windows = [(self.num_stored[row], span.first if span.opens else span.end) for row, span in zip(rows, spans, strict=True)]
        if self.is_cached:
            for row, span in zip(rows, spans, strict=True):
                self.num_stored[row] = span.first
        # Noised columns alone, in one block: they see it and all that is left of it.
        sees_all = self.pattern != "causal_in_block" and all(
            first == span.first and not span.opens for (first, _), span in zip(windows, spans, strict=True)
        )
        rule = None if sees_all else (self.pattern, self.block_length, [self.layout.origins[row] for row in rows], [s.first for s in spans])
        reading_BL = predicting_positions(asked.mask_BL, self.alignment)
        return self.windows.forward(rows, windows, [end for _, end in windows], rule, tokens_BL, reading_BL, asked.counts)


class GuidedReader:
    """Classifier-free guidance: logits = un + (s + 1) (cond - un), un with the given tokens masked (2410.18514). `reader` has
    each row twice."""

    def __init__(self, reader: Reader | None, canvas: Canvas, mask_token_id: int, scale: float):
        self.reader, self.mask_token_id, self.scale = reader, mask_token_id, scale
        self.given_BL = canvas.visible(canvas.masked_BL)

    def read(self, tokens_BL: torch.Tensor, asked: Asked) -> torch.Tensor:
        both = Asked(
            torch.cat([asked.mask_BL] * 2), torch.cat([asked.flat_N, asked.flat_N + tokens_BL.numel()]), asked.counts * 2,
            asked.parts * 2, asked.live * 2,
        )  # fmt: skip
        return self.mixed(*self.reader.read(torch.cat([tokens_BL, self.unprompted(tokens_BL)]), both).to(torch.float32).chunk(2))

    def unprompted(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        return tokens_BL.masked_fill(self.given_BL, self.mask_token_id)

    def mixed(self, cond_NV: torch.Tensor, un_NV: torch.Tensor) -> torch.Tensor:
        return un_NV + (self.scale + 1) * (cond_NV - un_NV)


class WholeReader:
    """No cache: a forward over whole rows, of those rows that have a question. Of a bidirectional model that computes windows a whole row
    is one; other predictors are asked by a mask, and the host waits until its positions are counted. whole: (begin, end) of each row."""

    def __init__(self, predictor: Predictor, canvas: Canvas, whole: list[tuple[int, int]]):
        self.predictor, self.canvas, self.whole = predictor, canvas, whole
        self.windows = None
        if getattr(predictor, "attention", None) == "bidirectional" and hasattr(predictor, "forward_columns"):
            self.windows = Windows(predictor, canvas, None)

    def read(self, tokens_BL: torch.Tensor, asked: Asked) -> torch.Tensor:
        if self.windows is not None:
            rows = [row for row, count in enumerate(asked.counts) if count]
            windows = [self.whole[row] for row in rows]
            reading_BL = predicting_positions(asked.mask_BL, self.predictor.alignment)
            return self.windows.forward(rows, windows, [end for _, end in windows], None, tokens_BL, reading_BL, asked.counts)
        segments_BL, positions_BL, asked_BL = self.canvas.segments_BL, self.canvas.positions_BL, asked.mask_BL
        if not all(asked.counts):
            rows = on_device([row for row, count in enumerate(asked.counts) if count], tokens_BL.device)
            tokens_BL, asked_BL, positions_BL = tokens_BL[rows], asked_BL[rows], positions_BL[rows]
            segments_BL = None if segments_BL is None else segments_BL[rows]
        with torch.no_grad():
            return self.predictor.predict(tokens_BL, asked_BL, positions_BL, segments_BL)


def open_whole_reader(predictor: Predictor, canvas: Canvas, whole: list[tuple[int, int]], cfg_scale: float) -> Reader:
    """A WholeReader, under guidance when cfg_scale is above 0: then the given tokens are those that `canvas` does not mask."""
    if cfg_scale > 0:
        return GuidedReader(WholeReader(predictor, twice(canvas), whole * 2), canvas, predictor.mask_token_id, cfg_scale)
    return WholeReader(predictor, canvas, whole)


def open_reader(
    predictor: Predictor, canvas: Canvas, layout: Layout, *, cache: str, block_length: int | None, cfg_scale: float
) -> Reader:
    """Whoever answers what the loop asks. block_length: of a block model's blocks."""
    plain = canvas
    if cfg_scale > 0:
        canvas, layout = twice(canvas), layout.twice()
    if is_block_model(predictor):
        reader: Reader = BlockReader(predictor, canvas, layout, block_length, is_cached=cache == "block")
    elif cache == "none":
        reader = WholeReader(predictor, canvas, list(zip(layout.begins, _ends(canvas, layout), strict=True)))
    else:
        reader = RefreshedReader(predictor, canvas, layout, cache)
    return GuidedReader(reader, plain, predictor.mask_token_id, cfg_scale) if cfg_scale > 0 else reader


def is_block_model(predictor: Predictor) -> bool:
    return getattr(predictor, "attention", "bidirectional") in BLOCK_PATTERNS


def cache_of(predictor: Predictor, cache: str | None) -> str:
    """The cache to use: None means the exact one where there is one, else none. Raises ValueError for one that does not fit."""
    if cache is not None and cache not in CACHES:
        raise ValueError(f"unknown cache {cache!r}; valid: {', '.join(CACHES)}")
    if is_block_model(predictor):
        if cache in ("prefix", "dual"):
            raise ValueError(f"cache {cache!r} is an approximation for bidirectional models; this block model has an exact one: 'block'")
        return cache or "block"
    if cache == "block":
        raise ValueError("cache 'block' is exact for block models only; a bidirectional model has 'prefix' and 'dual', both approximate")
    if cache in ("prefix", "dual") and not hasattr(predictor, "forward_columns"):
        raise ValueError(f"cache {cache!r}: this predictor cannot compute single columns")
    return cache or "none"


def forget_finished(reader: RefreshedReader | BlockReader, asked: Asked) -> list[int]:
    """The rows that still have something to fill; the store keeps only those."""
    live = [row for row in reader.rows if asked.live[row]]
    store = reader.windows.store
    if store is not None and live != reader.rows:
        store.keep_rows(on_device([reader.rows.index(row) for row in live], asked.mask_BL.device))
    reader.rows = live
    return live


def _row_major(rows: Sequence[int], counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where the answers to each row stand when the rows were answered in this order."""
    starts, at = {}, 0
    for row in rows:
        starts[row] = at
        at += counts[row]
    return on_device([starts[row] + i for row in sorted(rows) for i in range(counts[row])], device)


def _ends(canvas: Canvas, layout: Layout) -> list[int]:
    return [begin + length for begin, length in zip(layout.begins, row_lengths(canvas), strict=True)]


def twice(canvas: Canvas) -> Canvas:
    both = {name: None if value is None else torch.cat([value] * 2) for name, value in vars(canvas).items()}
    return Canvas(**both)
