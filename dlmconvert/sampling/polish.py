"""Polishing: a text that is finished, or the finished block of a block model, is read again as a whole, and tokens that the model doubts
are changed (revise.py: `gidd`, `edits`).

A bidirectional model polishes the whole text, with full forwards, whatever cache filled it, and a growing answer (length.py) as far as
it was written. A block model polishes each block before the next one is begun: it is read as a noised block behind clean text, which is
how such a model was trained to doubt, and its keys are stored afterwards, clean. So the exact cache stays exact.

Shapes: B rows, L positions of the canvas, K parts, N positions asked for (row-major), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from .cache import Asked, Reader
from .canvas import Canvas
from .loop import Settings, after_end, steps_of
from .order import best, confidence
from .predictions import Hook
from .revise import Reviser
from .step import Step
from .transfer import on_device

MOST_ROUNDS, PATIENCE = 128, 32  # GIDD's settings


def polish(reviser: Reviser, revision: str, strength: float, first_step: int, num_rounds: int) -> Iterator[Step]:
    """Rounds of gidd or edits on a finished canvas (reviser.masked_BL is all False), until nothing changes in any row.

    gidd stops a row as well when its self-accuracy (the share of tokens that are the model's first choice) has not grown for PATIENCE
    rounds.
    """
    rows = reviser.open_BL.shape[0]
    active_B = torch.ones(rows, dtype=torch.bool, device=reviser.open_BL.device)
    best_B, since_B = torch.full((rows,), -1.0, device=active_B.device), torch.zeros(rows, dtype=torch.int64, device=active_B.device)
    own = {"temperature": strength} if revision == "gidd" else {"temperature": 0.0}
    num_open, is_active = reviser.open_BL.sum(dim=1).tolist(), [True] * rows
    for round_number in range(num_rounds):
        # Draws are keyed by the round: when the canvas was finished depends on the other rows.
        counts = [count if active else 0 for count, active in zip(num_open, is_active, strict=True)]
        answer = reviser.ask(reviser.open_BL & active_B[:, None], -1 - round_number, counts=counts, index=first_step + round_number, **own)
        if answer is None:
            return
        log_p_NV, x_hat_N, flat_N = answer
        zeros_BL = torch.zeros(reviser.open_BL.shape, device=flat_N.device)
        c_BL = reviser.spread(confidence(log_p_NV, x_hat_N), flat_N, zeros_BL)
        wanted_BL = reviser.spread(x_hat_N, flat_N, reviser.tokens_BL)
        differs_BL = wanted_BL != reviser.tokens_BL
        if revision == "gidd":
            is_first_BL = reviser.spread(log_p_NV.argmax(dim=-1), flat_N, torch.full_like(reviser.tokens_BL, -1)) == reviser.tokens_BL
            accuracy_B = (is_first_BL & reviser.open_BL).sum(dim=1) / reviser.open_BL.sum(dim=1).clamp(min=1)
            since_B = torch.where(accuracy_B > best_B, 0, since_B + 1)
            best_B = torch.maximum(best_B, accuracy_B)
            changes_BL = best(c_BL, differs_BL, torch.ones_like(since_B)) & (since_B < PATIENCE)[:, None]
        else:
            changes_BL = differs_BL & (c_BL >= strength)
        active_B = changes_BL.any(dim=1)
        is_active = active_B.tolist()  # the one place of a round where the host waits
        if not any(is_active):
            return
        yield reviser.settle(first_step + round_number, torch.where(changes_BL, wanted_BL, reviser.tokens_BL), reviser.masked_BL, c_BL, torch.zeros_like(reviser.open_BL))


class RememberingHook:
    """A tokens hook, and which positions hold what it gave: those are not polished."""

    def __init__(self, hook: Hook, canvas: Canvas, mask_token_id: int):
        self.hook, self.mask_token_id, self.given_BL = hook, mask_token_id, torch.zeros_like(canvas.masked_BL)

    def __call__(self, step: int | None, x_BL: torch.Tensor, logits_BLV: torch.Tensor | None) -> torch.Tensor:
        changed_BL = self.hook(step, x_BL.clone(), logits_BLV)
        self.given_BL = torch.where(changed_BL == x_BL, self.given_BL, changed_BL != self.mask_token_id)
        return changed_BL


def polished(
    steps: Iterator[Step], reviser: Reviser, revision: str, strength: float, end_ids: Sequence[int], *, hook: RememberingHook | None = None,
    reader_of: Callable[[Step], Reader] | None = None,
) -> Iterator[Step]:
    """The steps that fill the canvas, then rounds of polishing on what they made, up to each row's end token and without it.

    hook: of the user, in these steps. reader_of: who reads the finished text, where that depends on it (length.py)."""  # fmt: skip
    last = None
    for last in steps:
        yield last
    if last is None:
        return
    reviser.tokens_BL, reviser.masked_BL, reviser.nfe = last.tokens_BL, last.masked_BL, last.nfe
    if reader_of is not None:
        reviser.reader = reader_of(last)
    reviser.open_BL = _before_end(last.tokens_BL, reviser.open_BL, end_ids)
    if hook is not None:
        reviser.open_BL = reviser.open_BL & ~hook.given_BL
    reviser.banned_ids = (*reviser.banned_ids, *end_ids)  # no new end in the middle
    yield from polish(reviser, revision, strength, last.index + 1, MOST_ROUNDS)


def polished_in_blocks(reviser: Reviser, settings: Settings, revision: str, strength: float) -> Iterator[Step]:
    """Of a block model: each block is filled (loop.py) and then polished, before the next one reads it.

    The rows of a batch take their parts together, so that a part's steps and rounds have the numbers that they have in a row alone.
    The first token of a block under `shift` was read from clean text, as in training: it has no noised copy, and is not polished.
    """
    canvas, layout, end_ids = reviser.canvas, reviser.layout, settings.end_ids
    reader = reviser.reader = TogetherReader(reviser.reader)
    index, fillable_BL, reviser.banned_ids = 0, canvas.masked_BL, (*reviser.banned_ids, *end_ids)
    for part in range(layout.steps_BK.shape[1]):
        part_BL = reviser.masked_BL & (layout.number_BL == part)
        later_BL = reviser.masked_BL & ~part_BL
        reader.begin(part, part_BL.any(dim=1).tolist())
        if not any(reader.live):
            return
        steps_BK = torch.zeros_like(layout.steps_BK)
        steps_BK[:, part] = layout.steps_BK[:, part]
        nfe, first = reviser.nfe, index
        own = replace(settings, logits_hook=settings.logits_hook and (lambda step, *seen, first=first: settings.logits_hook(first + step, *seen)))
        here = replace(canvas, tokens_BL=reviser.tokens_BL, masked_BL=part_BL)
        for step in steps_of(reviser.predictor, here, replace(layout, steps_BK=steps_BK), own, reader):
            masked_BL = step.masked_BL | later_BL
            given_back_BL = after_end(step.tokens_BL, masked_BL, fillable_BL, end_ids)
            tokens_BL = step.tokens_BL.masked_fill(given_back_BL, end_ids[0]) if end_ids else step.tokens_BL
            reviser.tokens_BL, reviser.masked_BL, reviser.nfe = tokens_BL, masked_BL & ~given_back_BL, nfe + step.nfe
            yield replace(
                step, index=index, tokens_BL=tokens_BL.clone(), masked_BL=reviser.masked_BL.clone(), nfe=reviser.nfe,
                given_back_BL=step.given_back_BL | given_back_BL,
            )  # fmt: skip
            index += 1
        opens = [part < len(spans) and spans[part].opens for spans in layout.spans]
        reviser.open_BL = _before_end(reviser.tokens_BL, part_BL, end_ids) & ~on_device(opens, part_BL.device)[:, None]
        for step in polish(reviser, revision, strength, index, MOST_ROUNDS):
            yield step
            index += 1


class TogetherReader:
    """A reader whose rows all stand in one part: a row that waits for others still lives, and keeps its stored keys."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def begin(self, part: int, live: list[bool]) -> None:
        """live: the rows that have this part; none of them comes back after a part that it had not."""
        self.part, self.live = part, live

    def read(self, tokens_BL: torch.Tensor, asked: Asked) -> torch.Tensor:
        return self.reader.read(tokens_BL, asked._replace(parts=[self.part] * len(self.live), live=self.live))


def _before_end(tokens_BL: torch.Tensor, open_BL: torch.Tensor, end_ids: Sequence[int]) -> torch.Tensor:
    """Those of the open positions that stand left of the first end token among them."""
    if not end_ids:
        return open_BL
    is_end_BL = torch.isin(tokens_BL, on_device(list(end_ids), tokens_BL.device)) & open_BL
    return open_BL & (is_end_BL.cumsum(dim=1) == 0)
