"""Lengths that nobody gives: DAEDAL grows the answer while it is written, and a gap takes the length that fits best.

**DAEDAL** (arXiv 2508.00819, as released), for bidirectional models. W, E, tau: see `Growth`.

    EOS confidence = sum of p(end) over the last W positions whose most probable token is an end / W
    1  while it is below tau_eos and there is room: E more masks at the end of the answer
    2  block after block: settle all with c > tau_high, at least the best one; when the EOS confidence is below tau_expand, the least
       sure masked position of the block (not one that settles now) below tau_low becomes E masks

The paper writes the EOS confidence as the mean of p(end) over the last W positions; the program, whose numbers were published, counts
only positions that would be an end, and puts W // 2 end tokens behind the answer before stage 2. This is the program. Two things
differ on purpose: the mask token is never predicted, and a row is done when its text has come to its end.

A repetition penalty lowers what stands elsewhere in the row, but never an end token: end tokens stand behind every answer from stage 2
on, and how sure they are decides its length. Guidance hides the prompt from its second forward, never the answer. A revision that
polishes reads the answer as it was written, without what it might have become.

**A gap of unknown length** `[[MASK:4-24]]`: candidates between the bounds are filled (most confident first, in few steps), and the
one with the best mean log-probability a token is kept, over the gap's tokens as they were settled and the tokens that follow it (up
to FOLLOWING, predicted with each other masked). The gap alone would favour filler; what follows says whether the text joins.

Shapes: B rows, L positions of the canvas, G positions of an answer, N positions asked for (row-major), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from .blocks import masked_places, row_begins, row_lengths
from .cache import Asked, open_whole_reader
from .canvas import PADDING, ROW, Canvas, Predictor, build_canvas
from .draw import draw_tokens
from .filters import ban, penalise_repetition
from .order import confidence
from .step import Step
from .transfer import on_device

NUM_CANDIDATES, FOLLOWING, STEPS_OF_A_CANDIDATE = 8, 8, 8


@dataclass(frozen=True)
class Growth:
    """DAEDAL's settings; the defaults are its authors'. initial: masks at first. block: positions a block."""

    initial: int = 64
    block: int = 32
    factor: int = 8
    window: int = 32
    tau_eos: float = 0.5
    tau_expand: float = 0.9
    tau_high: float = 0.9
    tau_low: float = 0.1


def check_growth(canvas: Canvas, initial: int, block_length: int | None, threshold: float | None, end_ids: Sequence[int]) -> Growth:
    """DAEDAL's settings. Raises ValueError without an end token, for numbers without meaning, and for text behind a gap."""
    if not end_ids:
        raise ValueError(
            "an answer grows by how sure its end token is, and none may be written here: give eos_token_id, and no text behind a gap (infill"
            " bans the end)"
        )
    if initial < 1:
        raise ValueError(f"initial_length is {initial}; it must be at least 1")
    for row, places in enumerate(masked_places(canvas.masked_BL)):
        if places and places != list(range(places[0], places[0] + len(places))):
            raise ValueError(f"row {row} has several gaps; an answer grows behind a prompt")
        end = row_begins(canvas)[row] + row_lengths(canvas)[row]
        if places and places[-1] + 1 != end:
            raise ValueError(f"row {row} has text behind its gap; an answer grows behind a prompt")
    return Growth(initial=initial, block=block_length or 32, tau_high=0.9 if threshold is None else threshold)


def eos_confidence(p_end_G: Sequence[float], is_end_G: Sequence[bool], window: int) -> float:
    """The sum of p(end) over the last `window` positions whose most probable token is an end, divided by `window`."""
    return sum([p for p, is_end in zip(p_end_G, is_end_G, strict=True) if is_end][-window:]) / window


@dataclass
class _Answer:
    """A row that grows. first: its first column of the canvas. tokens: None where masked, without the prompt. start: where its current block begins."""

    row: int
    first: int
    prompt: list[int]
    most: int
    tokens: list[int | None]
    confidence: list[float]
    start: int = 0
    is_growing: bool = True
    is_done: bool = False
    settled: set[int] = field(default_factory=set)  # columns of the canvas that this step has settled

    def lengthen(self, at: int, count: int, replaced: int) -> None:
        self.tokens[at : at + replaced] = [None] * count
        self.confidence[at : at + replaced] = [0.0] * count
        del self.tokens[self.most :], self.confidence[self.most :]


def daedal(
    predictor: Predictor, canvas: Canvas, growth: Growth, *, draw: dict, banned_ids: Sequence[int], end_ids: Sequence[int],
    repetition_penalty: float = 1.0, cfg_scale: float = 0.0, stops: bool = True,
) -> Iterator[Step]:
    """Answers behind the prompts of the canvas, as long as they become and at most as long as their masked positions.

    In a Step an answer stands at the left end of its masked positions; what is right of it holds the end token and counts as given
    back. Tokens right of a place that grows move. draw: arguments of draw_tokens. stops: a row is done when its text has ended.
    """
    answers = _answers(canvas, growth)
    step, nfe = 0, 0
    while any(not answer.is_done for answer in answers):
        live = [answer for answer in answers if not answer.is_done]
        grown = build_canvas([[*answer.prompt, *answer.tokens] for answer in live], end_ids[0], canvas.tokens_BL.device)
        wanted_BL = torch.zeros_like(grown.masked_BL)
        for place, answer in enumerate(live):
            wanted_BL[place, len(answer.prompt) : len(answer.prompt) + len(answer.tokens)] = True
        tokens_BL = grown.tokens_BL.masked_fill(grown.masked_BL, predictor.mask_token_id)
        counts, width = [len(answer.tokens) for answer in live], wanted_BL.shape[1]
        flat_N = on_device([place * width + len(answer.prompt) + i for place, answer in enumerate(live) for i in range(counts[place])], tokens_BL.device)
        whole = [(0, len(answer.prompt) + len(answer.tokens)) for answer in live]
        # What has settled of an answer is no prompt.
        reader = open_whole_reader(predictor, replace(grown, masked_BL=wanted_BL), whole, cfg_scale)
        logits_NV = reader.read(tokens_BL, Asked(wanted_BL, flat_N, counts, [0] * len(live), [True] * len(live)))
        logits_NV = ban(logits_NV, predictor.mask_token_id, predictor.vocab_size, banned_ids)
        ends = on_device(list(end_ids), tokens_BL.device)
        repeatable_BL = grown.visible(grown.masked_BL) & ~torch.isin(tokens_BL, ends)
        logits_NV = penalise_repetition(logits_NV, flat_N, tokens_BL, repeatable_BL, repetition_penalty)
        nfe += 2 if cfg_scale > 0 else 1
        keys_BL = canvas.row_keys_B[on_device([answer.row for answer in live], tokens_BL.device)][:, None].expand(wanted_BL.shape)
        x_hat_N = draw_tokens(logits_NV, keys_BL.flatten()[flat_N], grown.positions_BL.flatten()[flat_N], step=step, **draw)
        log_p_NV = torch.log_softmax(logits_NV, dim=-1)
        is_end_N = torch.isin(log_p_NV.argmax(dim=-1), ends)
        # One copy to the host; float32 holds every token id below 2^24.
        told = torch.stack([x.to(torch.float32) for x in (confidence(log_p_NV, x_hat_N), log_p_NV[:, ends].exp().sum(dim=-1), is_end_N, x_hat_N)]).tolist()
        c_N, p_end_N, is_end_N, x_hat = *told[:3], list(map(int, told[3]))
        at = 0
        for answer in live:
            here = slice(at, at + len(answer.tokens))
            at = here.stop
            answer.settled = set()
            sure = eos_confidence(p_end_N[here], is_end_N[here], growth.window)
            _advance(answer, x_hat[here], c_N[here], sure, growth, end_ids, stops)
        yield _step(canvas, answers, predictor.mask_token_id, end_ids[0], step, nfe)
        step += 1


def _answers(canvas: Canvas, growth: Growth) -> list[_Answer]:
    answers = []
    for row, (tokens, masked) in enumerate(zip(canvas.tokens_BL.tolist(), canvas.masked_BL.tolist(), strict=True)):
        real = [True] * len(tokens) if canvas.segments_BL is None else (canvas.segments_BL[row] == 0).tolist()
        prompt = [token for token, m, r in zip(tokens, masked, real, strict=True) if r and not m]
        most = sum(masked)
        first, start = min(growth.initial, most), masked.index(True) if most else 0
        answers.append(_Answer(row, start, prompt, most, [None] * first, [0.0] * first, is_done=most == 0))
    return answers


def _advance(answer: _Answer, x_hat: list[int], c: list[float], sure: float, growth: Growth, end_ids: Sequence[int], stops: bool) -> None:
    """One forward's decisions for one row: in stage 1 its length, in stage 2 what settles and what grows."""
    if answer.is_growing:
        if sure < growth.tau_eos and len(answer.tokens) < answer.most:
            answer.lengthen(len(answer.tokens), growth.factor, 0)
            return
        answer.is_growing = False
        ends = min(growth.window // 2, answer.most - len(answer.tokens))
        answer.tokens += [end_ids[0]] * ends
        answer.confidence += [1.0] * ends
        return
    stop = min(answer.start + growth.block, len(answer.tokens))
    masked = [i for i in range(answer.start, stop) if answer.tokens[i] is None]
    settles = [i for i in masked if c[i] > growth.tau_high] or [max(masked, key=lambda i: c[i])]
    for i in settles:
        answer.tokens[i], answer.confidence[i] = x_hat[i], c[i]
    answer.settled = set(settles)
    doubtful = [i for i in masked if i not in answer.settled and c[i] < growth.tau_low]
    if sure < growth.tau_expand and len(answer.tokens) < answer.most and doubtful:
        at = min(doubtful, key=lambda i: c[i])
        answer.lengthen(at, growth.factor, 1)
        answer.settled = {i if i < at else i + growth.factor - 1 for i in answer.settled}
    while answer.start < len(answer.tokens) and None not in answer.tokens[answer.start : answer.start + growth.block]:
        answer.start += growth.block
    first_hole = answer.tokens.index(None) if None in answer.tokens else len(answer.tokens)
    has_ended = stops and any(token in end_ids for token in answer.tokens[:first_hole])
    answer.is_done = has_ended or first_hole == len(answer.tokens)


def _step(canvas: Canvas, answers: list[_Answer], mask_token_id: int, end_id: int, step: int, nfe: int) -> Step:
    rows, length = canvas.masked_BL.shape
    held, masked, committed, given_back, sure = ([[fill] * length for _ in range(rows)] for fill in (end_id, False, False, False, 0.0))
    for answer in answers:
        row = answer.row
        for i in range(answer.most):
            column, is_there = answer.first + i, i < len(answer.tokens)
            if is_there and answer.tokens[i] is not None:
                held[row][column] = answer.tokens[i]
            elif answer.is_done:
                given_back[row][column] = True
            elif is_there:
                held[row][column], masked[row][column] = mask_token_id, True
            if is_there and i in answer.settled:
                committed[row][column], sure[row][column] = True, answer.confidence[i]
        if answer.is_done:
            answer.settled = set()
    device = canvas.tokens_BL.device
    tokens_BL = torch.where(canvas.masked_BL, on_device(held, device), canvas.tokens_BL)
    masked_BL, committed_BL, given_back_BL = (on_device(x, device, torch.bool) for x in (masked, committed, given_back))
    return Step(step, tokens_BL, masked_BL, committed_BL, on_device(sure, device, torch.float32), given_back_BL, nfe)


def written(canvas: Canvas, last: Step) -> Canvas:
    """The canvas of the answers alone: what stands behind the last filled column of each row after the `last` step is padding."""
    column_L = torch.arange(canvas.tokens_BL.shape[1], device=canvas.tokens_BL.device)
    real_BL = canvas.visible(torch.zeros_like(canvas.masked_BL))
    last_B = column_L.masked_fill(~real_BL | last.given_back_BL, 0).max(dim=1).values
    return replace(canvas, segments_BL=torch.where(real_BL & (column_L <= last_B[:, None]), ROW, PADDING))


# --- gaps whose length the model chooses

Gap = tuple[int, int]
Fill = Callable[[list[list[int | None]]], tuple[list[list[int]], list[list[float]]]]


def candidates(low: int, high: int) -> list[int]:
    """At most NUM_CANDIDATES lengths from low to high, both among them, evenly spread. Raises ValueError for empty bounds."""
    if not 1 <= low <= high:
        raise ValueError(f"a gap of {low} to {high} tokens: the bounds must rise from 1 at least")
    count = min(NUM_CANDIDATES, high - low + 1)
    return sorted({low + round((high - low) * at / max(count - 1, 1)) for at in range(count)})


def choose_lengths(predictor: Predictor, rows: Sequence[Sequence[int | None | Gap]], fill: Fill, device: torch.device | str) -> list[list[int | None]]:
    """The rows with each gap of bounds (low, high) replaced by as many None as fit best.

    fill: fills rows and tells the confidence of each settled position (1 where given). Gaps of a row are chosen from the left, the
    later ones standing at the middle of their bounds. Each row by itself, so a batch changes nothing.
    """
    return [_chosen(predictor, list(row), fill, device) for row in rows]


def _chosen(predictor: Predictor, row: list[int | None | Gap], fill: Fill, device: torch.device | str) -> list[int | None]:
    while any(isinstance(item, tuple) for item in row):
        at = next(i for i, item in enumerate(row) if isinstance(item, tuple))
        lengths = candidates(*row[at])
        behind: list[int | None] = []
        for item in row[at + 1 :]:
            behind += [None] * candidates(*item)[len(candidates(*item)) // 2] if isinstance(item, tuple) else [item]
        tried = [[*row[:at], *[None] * length, *behind] for length in lengths]
        scores = _scores(predictor, tried, at, lengths, fill, device) if len(tried) > 1 else [0.0]
        length = max(zip(scores, (-length for length in lengths), lengths, strict=True))[2]  # of equals the shortest
        row = [*row[:at], *[None] * length, *row[at + 1 :]]
    return row


def _scores(predictor: Predictor, tried: list[list[int | None]], at: int, lengths: list[int], fill: Fill, device: torch.device | str) -> list[float]:
    filled, sure = fill(tried)
    follows = []  # of each candidate, the given tokens behind the gap that are predicted once more
    for row, length in zip(tried, lengths, strict=True):
        behind = range(at + length, min(at + length + FOLLOWING, len(row)))
        follows.append([i for i in behind if row[i] is not None])
    log_p = [[] for _ in tried]
    if follows[0]:
        masked = [[None if i in places else token for i, token in enumerate(row)] for row, places in zip(filled, follows, strict=True)]
        canvas = build_canvas(masked, 0, device)
        tokens_BL = canvas.tokens_BL.masked_fill(canvas.masked_BL, predictor.mask_token_id)
        logits_NV = predictor.predict(tokens_BL, canvas.masked_BL, canvas.positions_BL, canvas.segments_BL)
        logits_NV = ban(logits_NV, predictor.mask_token_id, predictor.vocab_size)
        truth = [row[i] for row, places in zip(filled, follows, strict=True) for i in places]
        log_p_N = torch.log_softmax(logits_NV, -1).gather(1, torch.tensor(truth, device=logits_NV.device)[:, None])[:, 0].tolist()
        for number, places in enumerate(follows):
            log_p[number] = [log_p_N.pop(0) for _ in places]
    scores = []
    for number, (c, length) in enumerate(zip(sure, lengths, strict=True)):
        of_gap = torch.tensor(c[at : at + length], dtype=torch.float64).clamp(min=1e-30).log().tolist()
        parts = of_gap + log_p[number]
        scores.append(sum(parts) / len(parts))
    return scores
