"""The loop: plan, ask, choose, commit; once a step.

The host waits for the device in one place (what is left, how many positions are asked for, in which part each row stands); the rest
of a step is queued, also above temperature 0 and where rows ask for different numbers of positions (transfer.py). Users' hooks may look at
tensors, and predictors that compute no windows are asked by a mask.

Shapes: B rows, L positions of the canvas, N positions asked for (row-major), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..diffusion.randomness import SAMPLE_ORDER, counter_gumbel, counter_uniform
from .blocks import Blocks, Layout, groups
from .budget import READING, READS_U, Plan, least
from .cache import Asked, Reader, is_block_model, open_reader
from .canvas import Canvas, Predictor
from .draw import draw_tokens
from .filters import ban, penalise_repetition
from .order import BLIND_ORDERS, best, blind_scores, confidence, first_of, margin, negative_entropy, ranked
from .predictions import Hook, after_tokens_hook, places, spread
from .step import Step
from .transfer import on_device, waits_for_counts

_ORDER_NOISE = 1  # one more key, so that the noise on scores is another stream than u


@dataclass(frozen=True)
class Settings:
    """The checked settings of `denoise`. Either `counted` or `reading` (name, bound) is set; `draw` goes to draw_tokens as it is."""

    cache: str
    num_steps: int | None
    block_length: int | None
    eps: float
    order: str
    order_temperature: float
    counted: Callable[[Plan], torch.Tensor] | None
    reading: tuple[str, float] | None
    cfg_scale: float
    repetition_penalty: float
    draw: dict
    banned_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    tokens_hook: Hook | None
    logits_hook: Hook | None


def steps_of(predictor: Predictor, canvas: Canvas, layout: Layout, settings: Settings, reader: Reader | None = None) -> Iterator[Step]:
    """reader: whoever answers, where that is not a new one (polish.py)."""
    keys_BL = canvas.row_keys_B[:, None].expand(canvas.tokens_BL.shape)
    masked_BL = canvas.masked_BL.clone()
    tokens_BL = canvas.tokens_BL.masked_fill(masked_BL, predictor.mask_token_id)
    if settings.tokens_hook:
        tokens_BL, masked_BL = after_tokens_hook(settings.tokens_hook, None, tokens_BL, masked_BL, None, predictor.mask_token_id)
        layout = groups(canvas, masked_BL, settings.block_length, settings.num_steps)
    blocks = Blocks(layout, steps_bound=settings.tokens_hook is not None, eps=settings.eps, together=settings.cache in ("prefix", "dual"))
    reader = reader or open_reader(
        predictor, canvas, layout, cache=settings.cache, block_length=settings.block_length, cfg_scale=settings.cfg_scale
    )
    hooked = settings.tokens_hook or settings.logits_hook
    draws = settings.order == "random" or settings.counted in READS_U
    computes_all = settings.cache == "none" and not is_block_model(predictor)
    nfe = 0
    for step in range(blocks.last_step + 1):
        own_step = blocks.own(step)
        u_BL = counter_uniform(SAMPLE_ORDER, settings.draw["seed"], keys_BL, own_step, canvas.positions_BL) if draws else None
        plan = blocks.plan(masked_BL, own_step, u_BL)
        scores_BL = _scores_before(plan, keys_BL, canvas.positions_BL, own_step, settings)
        count_B = settings.counted(plan) if settings.counted else None
        wanted_BL = plan.masked_BL
        if count_B is not None:
            # A known order with a known count needs no predictions to choose: the model is asked for the chosen positions only.
            wanted_BL = wanted_BL & (count_B > 0)[:, None] if scores_BL is None else best(scores_BL, wanted_BL, count_B)
        asked_BL = (masked_BL if computes_all else plan.masked_BL) if hooked else wanted_BL
        # The one place where the host waits for the device.
        left, num_wanted, num_asked, parts = torch.stack(
            [masked_BL.sum(1), wanted_BL.sum(1), asked_BL.sum(1), blocks.block_B]
        ).tolist()
        if not any(left):
            return
        committed_BL = torch.zeros_like(masked_BL)
        confidence_BL = torch.zeros(masked_BL.shape, device=masked_BL.device)
        if any(num_wanted):
            asked = Asked(asked_BL, places(asked_BL, sum(num_asked)), num_asked, parts, [count > 0 for count in left])
            wanted_N = places(wanted_BL, sum(num_wanted)) if hooked else asked.flat_N
            logits_NV = reader.read(tokens_BL, asked)
            nfe += 2 if settings.cfg_scale > 0 else 1
            logits_BLV = spread(logits_NV, asked, tokens_BL) if hooked else None
            if settings.logits_hook:
                logits_BLV = settings.logits_hook(step, tokens_BL.clone(), logits_BLV)
            if hooked:
                logits_NV = logits_BLV.flatten(0, 1)[wanted_N]
            logits_NV = ban(logits_NV, predictor.mask_token_id, predictor.vocab_size, settings.banned_ids)
            logits_NV = penalise_repetition(logits_NV, wanted_N, tokens_BL, canvas.visible(masked_BL), settings.repetition_penalty)
            committed_BL, x_hat_BL, confidence_BL = _choose(
                logits_NV, wanted_BL, wanted_N, scores_BL, count_B, plan, keys_BL, canvas.positions_BL, own_step, settings
            )
            tokens_BL = torch.where(committed_BL, x_hat_BL, tokens_BL)
            masked_BL = masked_BL & ~committed_BL
            if settings.tokens_hook:
                tokens_BL, masked_BL = after_tokens_hook(
                    settings.tokens_hook, step, tokens_BL, masked_BL, logits_BLV, predictor.mask_token_id
                )
        given_back_BL = after_end(tokens_BL, masked_BL, canvas.masked_BL, settings.end_ids)
        if settings.end_ids:
            tokens_BL, masked_BL = tokens_BL.masked_fill(given_back_BL, settings.end_ids[0]), masked_BL & ~given_back_BL
        committed_BL = committed_BL & ~masked_BL  # a hook may have masked some again
        confidence_BL = confidence_BL.masked_fill(~committed_BL, 0.0)
        yield Step(step, tokens_BL.clone(), masked_BL.clone(), committed_BL, confidence_BL, given_back_BL, nfe)


def _scores_before(plan: Plan, keys_BL: torch.Tensor, positions_BL: torch.Tensor, step: int | torch.Tensor, settings: Settings) -> torch.Tensor | None:
    """scores_BL of an order that needs no predictions; None for the others."""
    if settings.order not in BLIND_ORDERS:
        return None
    scores_BL = blind_scores(settings.order, plan.u_BL, settings.draw["seed"], keys_BL, positions_BL)
    return _disturbed(scores_BL, keys_BL, positions_BL, step, settings)


def _choose(
    logits_NV: torch.Tensor,
    wanted_BL: torch.Tensor,
    wanted_N: torch.Tensor,
    scores_BL: torch.Tensor | None,
    count_B: torch.Tensor | None,
    plan: Plan,
    keys_BL: torch.Tensor,
    positions_BL: torch.Tensor,
    step: int | torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(committed_BL, x_hat_BL, confidence_BL): the best wanted positions of each row, and a token for each.

    scores_BL, count_B: None where they are still to be read from the predictions.
    """
    log_p_NV = torch.log_softmax(logits_NV, dim=-1)
    keys_N, positions_N = keys_BL.flatten()[wanted_N], positions_BL.flatten()[wanted_N]
    step_N = step if isinstance(step, int) else step.expand(wanted_BL.shape).flatten()[wanted_N]
    reading, bound = (READING[settings.reading[0]], settings.reading[1]) if settings.reading else (None, None)
    x_hat_N = c_N = None
    if settings.order == "confidence" or (reading and reading.reads_candidate):
        x_hat_N = draw_tokens(logits_NV, keys_N, positions_N, step=step_N, **settings.draw)
        c_N = confidence(log_p_NV, x_hat_N)

    def on_canvas(values_N: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        return torch.full(wanted_BL.shape, fill, dtype=values_N.dtype, device=values_N.device).masked_scatter(wanted_BL, values_N)

    if scores_BL is None:
        score_N = c_N if settings.order == "confidence" else (margin if settings.order == "margin" else negative_entropy)(log_p_NV)
        scores_BL = _disturbed(on_canvas(score_N), keys_BL, positions_BL, step, settings)
    order_BL = ranked(scores_BL, wanted_BL)
    if count_B is None:
        read_N = c_N if reading.reads_candidate else -negative_entropy(log_p_NV)
        count_B = torch.maximum(reading.count(on_canvas(read_N, reading.fill).gather(1, order_BL), bound), least(plan))
    committed_BL = first_of(order_BL, wanted_BL, count_B)
    if x_hat_N is None and settings.draw["temperature"] == 0:
        x_hat_N = logits_NV.argmax(dim=-1)
    if x_hat_N is None and waits_for_counts(logits_NV.device):
        x_hat_N = draw_tokens(logits_NV, keys_N, positions_N, step=step_N, **settings.draw)
    if x_hat_N is None:
        # Where neither score nor count reads the candidate, tokens are drawn for the committed positions only.
        kept_N = committed_BL.flatten()[wanted_N].nonzero()[:, 0]
        step_K = step_N if isinstance(step_N, int) else step_N[kept_N]
        x_hat_K = draw_tokens(logits_NV[kept_N], keys_N[kept_N], positions_N[kept_N], step=step_K, **settings.draw)
        x_hat_N = torch.zeros_like(keys_N).index_copy(0, kept_N, x_hat_K)
    c_N = confidence(log_p_NV, x_hat_N) if c_N is None else c_N
    return committed_BL, on_canvas(x_hat_N), on_canvas(c_N).masked_fill(~committed_BL, 0.0)


def _disturbed(scores_BL: torch.Tensor, keys_BL: torch.Tensor, positions_BL: torch.Tensor, step: int | torch.Tensor, settings: Settings) -> torch.Tensor:
    """Gumbel noise on score / order_temperature: the best k are k draws without replacement from its softmax."""
    if settings.order_temperature == 0:
        return scores_BL
    noise_BL = counter_gumbel(SAMPLE_ORDER, settings.draw["seed"], keys_BL, step, positions_BL, _ORDER_NOISE)
    return scores_BL / settings.order_temperature + noise_BL


def after_end(tokens_BL: torch.Tensor, masked_BL: torch.Tensor, fillable_BL: torch.Tensor, end_ids: tuple[int, ...]) -> torch.Tensor:
    """Masked positions of rows whose first filled-in end token has nothing masked left of it."""
    if not end_ids:
        return torch.zeros_like(masked_BL)
    ends = on_device(end_ids, tokens_BL.device, tokens_BL.dtype)
    is_end_BL = torch.isin(tokens_BL, ends) & fillable_BL & ~masked_BL
    # First True of each row; a row without one has all zeros, and argmax 0.
    first_end_B = torch.where(is_end_BL.any(dim=1), is_end_BL.to(torch.int8).argmax(dim=1), masked_BL.shape[1])
    first_masked_B = torch.where(masked_BL.any(dim=1), masked_BL.to(torch.int8).argmax(dim=1), -1)
    return masked_BL & (first_end_B < first_masked_B)[:, None]
