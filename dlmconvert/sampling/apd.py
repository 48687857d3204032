"""Adaptive parallel decoding (APD, arXiv 2506.00413): a small AR model beside a bidirectional one says how many tokens to trust.

From the left, with m the last settled position and g_i one Gumbel noise vector a position:

    x_i = argmax(log p_i + g_i)                            for the next G masked positions, from one diffusion forward
    y_i = argmax(R log p_i + (1 - R) log p_AR(. | x_<i) + g_i)      from one forward of the AR model over the text with x in place
    settle x up to the first i where x_i and y_i differ; the first one always

The target is the product p_i^R p_AR^(1-R), and the shared noise makes x and y agree as often as two draws can. Nothing is trained,
and nothing is exact: the text follows neither model's distribution. R = 1 trusts the diffusion model alone.

A repetition penalty lowers in each model's prediction what that model has read: the tokens that have settled, and for the AR model
those drafted left of the position too. The diffusion model drafts all positions at once, so only the AR model can see a draft that
repeats itself, and there it is cut.

A causal model's keys depend on nothing right of them, so an AR model that computes windows is read against stored keys, exactly: all
that has settled was stored when it was drafted, but for the last token, whose hidden state predicts the next one. Keys of drafts that
did not settle are written over by the next step. A step is then one forward of the AR model over as many columns as are drafted.

Shapes: B rows, L positions of the canvas, N positions asked for (row-major), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import torch

from ..diffusion.alignment import predicting_positions
from ..diffusion.randomness import SAMPLE_TOKEN, counter_gumbel
from .blocks import row_begins, row_lengths
from .cache import Asked, forget_finished, open_whole_reader
from .canvas import ROW, Canvas, Predictor, check_predictable
from .draw import draw_tokens
from .filters import ban, count_tokens, penalise, penalise_repetition
from .order import confidence
from .predictions import places
from .step import Step
from .transfer import on_device
from .windows import WindowPredictor, Windows


class Helper(Protocol):
    """The small AR model, over the same vocabulary. One with attention `causal` that computes windows (WindowPredictor) is read against
    stored keys instead."""

    def predict(
        self, tokens_BL: torch.Tensor, wanted_BL: torch.Tensor, positions_BL: torch.Tensor, segments_BL: torch.Tensor | None
    ) -> torch.Tensor:
        """logits_NV: the causal prediction of each wanted token."""
        ...


def check_apd(canvas: Canvas, lookahead: int, weight: float) -> None:
    """Raises ValueError for numbers without meaning, for gaps with text behind them, and for rows without a first token."""
    if lookahead < 1:
        raise ValueError(f"draft_length is {lookahead}; a step looks at 1 position at least")
    if not 0 <= weight <= 1:
        raise ValueError(f"helper_weight is {weight}; the share of the diffusion model must lie in [0, 1]")
    real_BL = torch.ones_like(canvas.masked_BL) if canvas.segments_BL is None else canvas.segments_BL == ROW
    given_behind_BL = real_BL & ~canvas.masked_BL & (canvas.masked_BL.cumsum(dim=1) > 0)
    if bool(given_behind_BL.any()):
        row = int(given_behind_BL.any(dim=1).nonzero()[0])
        raise ValueError(f"row {row} has text right of a gap, and the AR model beside reads from the left: put the gap at the end")
    check_predictable(canvas, "shift")  # the AR model reads a token from the one before it, whatever the diffusion model does


class _StoredHelper:
    """An AR model read against its stored keys: after the first forward, those of all that has settled."""

    def __init__(self, helper: WindowPredictor, canvas: Canvas, begins: list[int]):
        self.alignment, self.begins, self.is_empty = helper.alignment, begins, True
        self.rows = list(range(canvas.tokens_BL.shape[0]))
        self.windows = Windows(helper, canvas, helper.new_store(*canvas.tokens_BL.shape))

    def read(self, tokens_BL: torch.Tensor, asked: Asked, firsts: list[int]) -> torch.Tensor:
        """logits_NV of the positions asked for. firsts: the first of them in each row; all left of it has settled."""
        rows = forget_finished(self, asked)
        windows = [(self.begins[row] if self.is_empty else firsts[row] - 1, firsts[row] + asked.counts[row] - 1) for row in rows]
        self.is_empty = False
        causal = ("causal_in_block", 1, [self.begins[row] for row in rows], [end for _, end in windows])
        reading_BL = predicting_positions(asked.mask_BL, self.alignment)
        return self.windows.forward(rows, windows, [end for _, end in windows], causal, tokens_BL, reading_BL, asked.counts)


def _drafted_left(x_N: torch.Tensor, counts: Sequence[int], num_ids: int) -> torch.Tensor:
    """int32 (N, V): how often each id was drafted left of a position, in its row. counts: drafted positions of each row."""
    drafted_NV = torch.zeros(len(x_N), num_ids, dtype=torch.int32, device=x_N.device).scatter_(1, x_N[:, None].clamp(max=num_ids - 1), 1)
    before_NV = drafted_NV.cumsum(dim=0) - drafted_NV
    starts = [start for start, count in zip(accumulate(counts, initial=0), counts, strict=False) for _ in range(count)]
    return before_NV - before_NV[on_device(starts, x_N.device)]


def apd(
    predictor: Predictor, helper: Helper, canvas: Canvas, lookahead: int, weight: float, *, draw: dict, repetition_penalty: float = 1.0,
    cfg_scale: float = 0.0, banned_ids: Sequence[int] = (), end_ids: Sequence[int] = (),
) -> Iterator[Step]:
    """A Step for each diffusion forward (the helper's forwards are not counted). draw: arguments of draw_tokens. cfg_scale: of the diffusion model's guidance."""  # fmt: skip
    masked_BL = canvas.masked_BL.clone()
    tokens_BL = canvas.tokens_BL.masked_fill(masked_BL, predictor.mask_token_id)
    keys_BL = canvas.row_keys_B[:, None].expand(masked_BL.shape)
    ends = on_device(list(end_ids), tokens_BL.device, torch.int64)
    hot, forwards_each = draw["temperature"] > 0, 2 if cfg_scale > 0 else 1
    whole = [(begin, begin + length) for begin, length in zip(row_begins(canvas), row_lengths(canvas), strict=True)]
    reader, stored = open_whole_reader(predictor, canvas, whole, cfg_scale), None
    if getattr(helper, "attention", None) == "causal" and hasattr(helper, "forward_columns"):
        stored = _StoredHelper(helper, canvas, [begin for begin, _ in whole])
    step = 0
    while True:
        wanted_BL = masked_BL & (masked_BL.cumsum(dim=1) <= lookahead)
        # The one place of a step where the host waits, but for a helper that is asked by a mask.
        counts, left = torch.stack([wanted_BL.sum(dim=1), masked_BL.sum(dim=1)]).tolist()
        if not any(counts):
            return
        asked = Asked(wanted_BL, places(wanted_BL, sum(counts)), counts, [0] * len(counts), [count > 0 for count in counts])
        flat_N = asked.flat_N
        keys_N, positions_N = keys_BL.flatten()[flat_N], canvas.positions_BL.flatten()[flat_N]
        logits_NV = reader.read(tokens_BL, asked)
        logits_NV = ban(logits_NV, predictor.mask_token_id, predictor.vocab_size, banned_ids)
        visible_BL = canvas.visible(masked_BL)
        logits_NV = penalise_repetition(logits_NV, flat_N, tokens_BL, visible_BL, repetition_penalty)
        x_N = draw_tokens(logits_NV, keys_N, positions_N, step=step, **draw)
        drafted_BL = tokens_BL.flatten().scatter(0, flat_N, x_N).view(tokens_BL.shape)
        if stored is None:
            seen_BL = drafted_BL.masked_fill(masked_BL & ~wanted_BL, 0)  # behind the draft: a causal model never sees it
            ar_NV = helper.predict(seen_BL, wanted_BL, canvas.positions_BL, canvas.segments_BL)
        else:
            ar_NV = stored.read(drafted_BL, asked, [end - num_left for (_, end), num_left in zip(whole, left, strict=True)])
        ar_NV = ban(ar_NV, predictor.mask_token_id, predictor.vocab_size, banned_ids)
        if repetition_penalty != 1:
            standing_NV = count_tokens(tokens_BL, visible_BL, ar_NV.shape[1])[flat_N // tokens_BL.shape[1]]
            ar_NV = penalise(ar_NV, standing_NV + _drafted_left(x_N, counts, ar_NV.shape[1]) > 0, repetition_penalty)
        width = min(ar_NV.shape[1], logits_NV.shape[1])
        log_p_NV = torch.log_softmax(logits_NV, dim=-1)
        log_ar_NV = torch.log_softmax(ar_NV[:, :width], dim=-1)
        # What is impossible stays so (0 times minus infinity has no value).
        target_NV = torch.where(log_p_NV[:, :width].isinf(), float("-inf"), weight * log_p_NV[:, :width] + (1 - weight) * log_ar_NV.clamp(min=-1e30))
        if hot:
            ids_V = torch.arange(width, device=tokens_BL.device)
            noise_NV = counter_gumbel(SAMPLE_TOKEN, draw["seed"], keys_N[:, None], step, positions_N[:, None], ids_V)
            target_NV = target_NV.to(noise_NV.dtype) / draw["temperature"] + noise_NV
        differs_BL = torch.zeros_like(masked_BL).flatten().scatter(0, flat_N, target_NV.argmax(dim=-1) != x_N).view(masked_BL.shape)
        first_BL = wanted_BL & (masked_BL.cumsum(dim=1) == 1)
        settled_BL = wanted_BL & (((differs_BL & ~first_BL).cumsum(dim=1) == 0) | first_BL)
        is_end_BL = torch.isin(drafted_BL, ends) & settled_BL
        settled_BL = settled_BL & (is_end_BL.cumsum(dim=1) - is_end_BL.to(torch.int64) == 0)
        has_ended_B = is_end_BL.any(dim=1)
        masked_BL = masked_BL & ~settled_BL
        given_back_BL = masked_BL & has_ended_B[:, None]
        tokens_BL = torch.where(settled_BL, drafted_BL, tokens_BL)
        if end_ids:
            tokens_BL, masked_BL = tokens_BL.masked_fill(given_back_BL, end_ids[0]), masked_BL & ~given_back_BL
        c_BL = torch.zeros(masked_BL.shape, device=tokens_BL.device).flatten().scatter(0, flat_N, confidence(log_p_NV, x_N)).view(masked_BL.shape)
        yield Step(step, tokens_BL.clone(), masked_BL.clone(), settled_BL, c_BL.masked_fill(~settled_BL, 0.0), given_back_BL, (step + 1) * forwards_each)
        step += 1
