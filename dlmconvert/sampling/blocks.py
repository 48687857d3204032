"""Blocks: the masked positions of a row are filled part after part, from the left; each part has its share of the steps.

On a bidirectional model blocks are a choice of the sampler (`groups`): the masked positions counted from the left, so many at a
time (LLaDA, arXiv 2502.09992). The model sees the whole canvas. A group counts masked positions, not columns, so after a prompt the
first one begins at the first new token, and the gaps of an infill are cut from left to right.

On a block model they are the model's own (`model_blocks`): columns [s, e) of the row, of which nothing right of e is ever seen.
`block_causal` counts them from the row's first token, so the rest of a prompt stands clean in the first block that is filled;
`context_causal` and `causal_in_block` start at the end of the prompt. Under `shift` the first token of a block is predicted by the
clean text before it and settles alone, before the rest of its block: a part of its own, with one step (the sampler's side of
training block starts from the clean copy: arXiv 2503.09573's blocks, methods 6.4 P2).

A row moves to its next part by itself: rows of one batch may stand in different ones. Only where a part begins with a forward over whole
rows (the caches `prefix` and `dual`) do they begin it together: one such forward for all, and windows that are the same in all rows.

Shapes: B rows, L positions of the canvas, K parts at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..diffusion.block_attention import BLOCK_PATTERNS, FREE_BLOCKS
from .budget import Plan
from .canvas import ROW, Canvas


class Span(NamedTuple):
    """Where a part stands. first, end: columns of its block. opens: it is the first token of a block, read from the text before."""

    first: int
    end: int
    opens: bool = False


@dataclass(frozen=True)
class Layout:
    """number_BL: the part in which each masked position is filled, rising from the left. spans: of each row, by number.
    steps_BK: steps of each part. origins, begins: the columns of each row where block 0 and where the row itself begin."""

    number_BL: torch.Tensor
    spans: list[list[Span]]
    steps_BK: torch.Tensor
    origins: list[int]
    begins: list[int]

    def twice(self) -> Layout:
        """The layout of the batch with each of its rows twice, as guidance needs it."""
        return Layout(
            torch.cat([self.number_BL] * 2), self.spans * 2, torch.cat([self.steps_BK] * 2), self.origins * 2, self.begins * 2
        )


class SavedSteps(int):
    """The `steps` of a generation_config.json, which were chosen for rows of `length` tokens: a share of the length. Whoever wants a
    number reads those for `now` tokens."""

    def __new__(cls, steps: int, length: int, now: int | None = None) -> SavedSteps:
        number = super().__new__(cls, -(-steps * (now or length) // length))
        number.steps, number.length = steps, length
        return number

    def over(self, num_tokens: int) -> SavedSteps:
        return SavedSteps(self.steps, self.length, num_tokens)


def steps_of_row(num_steps: int | None, num_masked: int, num_parts: int) -> int:
    """S of a row. None: a step for each masked position. Saved steps: in proportion to these, and one for each part at least."""
    if isinstance(num_steps, SavedSteps):
        return max(num_steps.over(num_masked), num_parts)
    return num_masked if num_steps is None else num_steps


class Blocks:
    """Where each row stands. steps_bound: a row's last step takes everything that a hook may have masked again. together: the rows of a
    batch begin their parts together, those that are done with one wait for the others, and each counts its own steps."""

    def __init__(self, layout: Layout, steps_bound: bool, eps: float = 1e-3, together: bool = False):
        self.eps = eps
        self.number_BL, self.steps_BK = layout.number_BL, layout.steps_BK
        self.row_steps_B = self.steps_BK.sum(dim=1) if steps_bound else None
        steps = self.steps_BK.max(dim=0).values.sum() if together else self.steps_BK.sum(dim=1).max()
        self.last_step = int(steps) - 1
        self.block_B = torch.full_like(self.steps_BK[:, 0], -1)
        self.own_step_B = torch.zeros_like(self.block_B) if together else None
        self.began_B = self.num_masked_B = self.num_steps_B = torch.zeros_like(self.block_B)

    def own(self, step: int) -> int | torch.Tensor:
        """The step as each row counts it, (B, 1) where these differ: what a row draws does not depend on how long it has waited."""
        return step if self.own_step_B is None else self.own_step_B[:, None]

    def plan(self, masked_BL: torch.Tensor, step: int | torch.Tensor, u_BL: torch.Tensor | None) -> Plan:
        """The part of `masked_BL` that may be committed at this step (see `own`), and where its rows stand in it.

        Parts end in time by themselves. Only a hook that masks positions again can lead to a row's last step with more than its
        last part open: then that step takes everything, so that no mask is left.
        """
        nowhere, step = masked_BL.shape[1], step if isinstance(step, int) else step[:, 0]
        block_B = self.number_BL.masked_fill(~masked_BL, nowhere).min(dim=1).values
        current_BL = masked_BL & (self.number_BL == block_B[:, None])
        is_new_B = block_B != self.block_B
        self.block_B = block_B
        self.began_B = torch.where(is_new_B, step, self.began_B)
        self.num_masked_B = torch.where(is_new_B, current_BL.sum(dim=1), self.num_masked_B)
        part_B = block_B.clamp(max=self.steps_BK.shape[1] - 1)
        self.num_steps_B = torch.where(is_new_B, self.steps_BK.gather(1, part_B[:, None])[:, 0].clamp(min=1), self.num_steps_B)
        step_B, num_steps_B = step - self.began_B, self.num_steps_B
        if self.row_steps_B is not None:
            is_last_B = step >= self.row_steps_B - 1
            current_BL = torch.where(is_last_B[:, None], masked_BL, current_BL)
            num_steps_B = torch.where(is_last_B, step_B + 1, num_steps_B)
        if self.own_step_B is not None:
            goes_B = block_B == block_B.min()
            current_BL = current_BL & goes_B[:, None]
            self.own_step_B = self.own_step_B + goes_B
        return Plan(current_BL, self.num_masked_B, step_B, num_steps_B, u_BL, self.eps)


def groups(canvas: Canvas, masked_BL: torch.Tensor, block_length: int | None, num_steps: int | None) -> Layout:
    """`block_length` masked positions a part; None: all in one.

    A part has floor(S end / n) - floor(S first / n) of the row's S steps, end and first being its place among the n masked
    positions: LLaDA's steps / blocks where that divides. num_steps: see steps_of_row.
    Raises ValueError for a length without meaning and for fewer steps than parts.
    """
    if block_length is not None and block_length < 1:
        raise ValueError(f"block_length is {block_length}; it must be at least 1")
    length = masked_BL.shape[1] if block_length is None else block_length
    places = masked_places(masked_BL)
    most = max(map(len, places))
    if block_length is not None and steps_of_row(num_steps, most, -(-most // length)) < -(-most // length):
        raise ValueError(
            f"{most} positions in blocks of {length} are {-(-most // length)} blocks, and each takes a step at least: {num_steps} steps"
            " are too few; give more steps, or longer blocks"
        )
    spans, steps = [], []
    for row in places:
        parts = [row[start : start + length] for start in range(0, len(row), length)]
        n = max(len(row), 1)
        S = steps_of_row(num_steps, n, len(parts))
        spans.append([Span(part[0], part[-1] + 1) for part in parts])
        bounds = [(at * length, min((at + 1) * length, n)) for at in range(max(len(parts), 1))]
        steps.append([max(S * end // n - S * first // n, 1) for first, end in bounds])
    number_BL = (masked_BL.cumsum(dim=1) - 1).clamp(min=0) // length
    begins = row_begins(canvas)
    return Layout(number_BL, spans, _table(steps, masked_BL.device), begins, begins)


def model_blocks(canvas: Canvas, pattern: str, block_length: int, num_steps: int | None, alignment: str) -> Layout:
    """The blocks of a block model. The S steps of a row are shared in proportion to masked positions, after one for each part.

    Raises ValueError for tokens that stand right of a gap where the model cannot see them, and for too few steps.
    """
    assert pattern in BLOCK_PATTERNS, pattern
    begins, places = row_begins(canvas), masked_places(canvas.masked_BL)
    ends = [begin + count for begin, count in zip(begins, row_lengths(canvas), strict=True)]
    number_BL = torch.zeros(canvas.masked_BL.shape, dtype=torch.int64)
    origins, spans, steps = [], [], []
    for row, (begin, end, masked) in enumerate(zip(begins, ends, places, strict=True)):
        origin = masked[0] if masked and pattern in FREE_BLOCKS else begin
        _check_nothing_behind(row, masked, end, origin, pattern, block_length)
        parts: list[tuple[Span, int]] = []  # with its masked positions
        for first in range(origin, end, block_length):
            last = min(first + block_length, end)
            here = [column for column in masked if first <= column < last]
            if here and here[0] == first and alignment == "shift":
                number_BL[row, first] = len(parts)
                parts.append((Span(first, last, opens=True), 1))
                here = here[1:]
            if here:
                number_BL[row, here] = len(parts)
                parts.append((Span(first, last), len(here)))
        origins.append(origin)
        spans.append([span for span, _ in parts])
        steps.append(_shared_steps([count for _, count in parts], num_steps))
    return Layout(number_BL.to(canvas.tokens_BL.device), spans, _table(steps, canvas.tokens_BL.device), origins, begins)


def _check_nothing_behind(row: int, masked: list[int], end: int, origin: int, pattern: str, block_length: int) -> None:
    if not masked:
        return
    given = sorted(set(range(masked[0], end)) - set(masked))
    if not given:
        return
    in_one_block = (given[-1] - origin) // block_length == (masked[0] - origin) // block_length
    if pattern == "causal_in_block" or not in_one_block:
        raise ValueError(
            f"row {row} has text right of a gap, and this model ({pattern}, blocks of {block_length}) sees nothing right of the block"
            " that it fills: put the gap at the end of the text, or use a bidirectional model"
        )


def _shared_steps(counts: list[int], num_steps: int | None) -> list[int]:
    """Steps of parts with `counts` masked positions: one each, and the rest of num_steps in proportion to the positions left."""
    if not counts:
        return [1]
    spare, extra = sum(counts) - len(counts), steps_of_row(num_steps, sum(counts), len(counts)) - len(counts)
    if extra < 0:
        raise ValueError(
            f"this model fills {sum(counts)} positions in {len(counts)} parts (its blocks, and under alignment 'shift' their first"
            f" tokens by themselves), and each takes a step at least: {num_steps} steps are too few"
        )
    steps, before = [], 0
    for count in counts:
        after = before + count - 1
        steps.append(1 + (extra * after // spare - extra * before // spare if spare else 0))
        before = after
    return steps


def block_length_of(pattern: str, trained: int | None, asked: int | None) -> int:
    """The block length to decode a block model with. Raises ValueError when the training's cannot be changed."""
    if asked is not None and asked < 1:
        raise ValueError(f"block_length is {asked}; it must be at least 1")
    if trained is None and asked is None:
        raise ValueError(f"the model does not say its block length (dlm.block_length), and attention {pattern!r} needs one")
    if pattern not in FREE_BLOCKS and None not in (trained, asked) and trained != asked:
        raise ValueError(
            f"this model was trained with blocks of {trained}, and its attention ({pattern}) ties the text before a block to their"
            f" boundaries: block_length={asked} is not possible; leave it out"
        )
    return asked or trained


def masked_places(masked_BL: torch.Tensor) -> list[list[int]]:
    return [[column for column, masked in enumerate(row) if masked] for row in masked_BL.tolist()]


def row_begins(canvas: Canvas) -> list[int]:
    """The first column of each row that is no padding."""
    if canvas.segments_BL is None:
        return [0] * canvas.tokens_BL.shape[0]
    return (canvas.segments_BL == ROW).to(torch.int8).argmax(dim=1).tolist()


def row_lengths(canvas: Canvas) -> list[int]:
    if canvas.segments_BL is None:
        return [canvas.tokens_BL.shape[1]] * canvas.tokens_BL.shape[0]
    return (canvas.segments_BL == ROW).sum(dim=1).tolist()


def _table(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64, device=device)
