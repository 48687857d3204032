"""The loop: forward, score, commit, until nothing is masked.

    x_hat^i ~ softmax(filters(logits^i / temperature))      for masked i, all independently given x_t
    commit the k positions with the highest scores          k from budget.py, scores from order.py, candidates from blocks.py

Order, budget and blocks are chosen independently. The state is the boolean array of still masked positions. Given and committed
tokens are never touched again. The prediction of a masked model does not depend on the noise level (arXiv 2406.03736), so a step
that commits nothing costs no forward.

A row that has its end token, with nothing masked left of it, is done: the rest of the row is given back.

Shapes: B rows, L positions of the canvas, N positions that are wanted (row-major), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..diffusion.randomness import SAMPLE_ORDER, counter_gumbel, counter_uniform
from .blocks import Blocks, check_blocks
from .budget import BUDGETS, READING, Plan, check_budget, default_budget, least
from .canvas import ROW, Canvas, Predictor, check_predictable
from .draw import draw_tokens
from .filters import ban, check_filters, penalise_repetition
from .order import BLIND_ORDERS, ORDERS, best, blind_scores, confidence, margin, negative_entropy, ranked
from .predictions import Hook, after_tokens_hook, ask, spread

_ORDER_NOISE = 1  # one more key, so that the noise on scores is another stream than u


@dataclass(frozen=True)
class Step:
    """What one step did. The tensors are copies: keep them, the loop goes on with its own.

    index: the step, from 0. tokens_BL: the mask token at masked positions. masked_BL: still masked after the step.
    committed_BL: filled by this step. confidence_BL: p(x_hat) at temperature 1 without filters where committed, else 0.
    given_back_BL: not filled, because they stand after the end of the text; the end token stands there from now on.
    nfe: forwards so far; a step with guidance is two.
    """

    index: int
    tokens_BL: torch.Tensor
    masked_BL: torch.Tensor
    committed_BL: torch.Tensor
    confidence_BL: torch.Tensor
    given_back_BL: torch.Tensor
    nfe: int


def denoise(
    predictor: Predictor,
    canvas: Canvas,
    *,
    num_steps: int | None = None,
    order: str = "random",
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    cfg_scale: float = 0.0,
    seed: int = 0,
    budget: str | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    entropy_bound: float | None = None,
    eps: float = 1e-3,
    block_length: int | None = None,
    order_temperature: float = 0.0,
    banned_ids: Sequence[int] = (),
    end_ids: Sequence[int] = (),
    tokens_hook: Hook | None = None,
    logits_hook: Hook | None = None,
) -> Iterator[Step]:
    """Fill the masked positions of the canvas in at most `num_steps` steps; one Step each, until nothing is masked.

    num_steps: None gives each row as many steps as it has masked positions.
    order: a name in order.py.
    budget: a counted budget of budget.py; None means ancestral for `random`, even otherwise. threshold, factor, entropy_bound: the
        bounds of the reading ones. At most one of these four is given. eps: the end of the time grid of `bernoulli` and `dream`.
    block_length: fill block after block, this many positions each; None is one block. The steps are shared by the blocks.
    temperature: of the drawn tokens; 0 takes the most probable one.
    repetition_penalty: 1 is none. cfg_scale: of the guidance; 0 is none, and above it each step costs two forwards.
    order_temperature: above 0, positions are drawn without replacement from softmax(score / order_temperature) (Dream's alg_temp);
        it changes nothing in the random orders.
    seed: the draws are a pure function of (seed, row key, step, position), whatever the batch.
    banned_ids: further ids that are never produced, besides the mask token and ids from vocab_size on.
    end_ids: a row is done when one of these was filled in and nothing left of it is masked.
    logits_hook(step, x, logits): returns logits to use. tokens_hook(step, x, logits): returns tokens to go on with. Both see x_BL
        and aligned logits_BLV (at positions not asked for: the token that stands there, for certain); they run at steps with a
        forward, the tokens hook once more before the first, as (None, x, None). A token that it changes counts as given, one that
        it sets to the mask token as masked.

    Raises ValueError at once, before the first step, for settings without meaning, for two budgets, and for a canvas that the
    alignment cannot fill.
    """
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"the number of steps is {num_steps}; it must be at least 1")
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; valid: {', '.join(ORDERS)}")
    counted, reading = check_budget(budget, {"threshold": threshold, "factor": factor, "entropy_bound": entropy_bound})
    if order == "first_hitting" and budget is None and reading is None and num_steps is not None:
        most = int(canvas.masked_BL.sum(dim=1).max())
        if num_steps < most:
            raise ValueError(
                f"first_hitting takes one step a token, here {most}, not {num_steps}: leave the steps out, or use the random order"
            )
    if not 0 <= eps < 1:
        raise ValueError(f"eps is {eps}; the end of the time grid must lie in [0, 1)")
    if not order_temperature >= 0:
        raise ValueError(f"the temperature of the order is {order_temperature}; it must be 0 or positive")
    if not cfg_scale >= 0:
        raise ValueError(f"cfg_scale is {cfg_scale}; it must be 0 (no guidance) or positive")
    check_filters(temperature, top_p, top_k, repetition_penalty)
    check_blocks(canvas.masked_BL, block_length, num_steps)
    check_predictable(canvas, predictor.alignment)
    return _steps(
        predictor,
        canvas,
        _Settings(
            num_steps=num_steps,
            block_length=block_length,
            eps=eps,
            order=order,
            order_temperature=0.0 if order in ("random", "first_hitting") else order_temperature,
            counted=None if reading else BUDGETS[counted or default_budget(order)],
            reading=reading,
            cfg_scale=cfg_scale,
            repetition_penalty=repetition_penalty,
            draw={"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed},
            banned_ids=tuple(banned_ids),
            end_ids=tuple(end_ids),
            tokens_hook=tokens_hook,
            logits_hook=logits_hook,
        ),
    )


@dataclass(frozen=True)
class _Settings:
    """The checked settings of `denoise`. Either `counted` or `reading` (name, bound) is set; `draw` goes to draw_tokens as it is."""

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


def _steps(predictor: Predictor, canvas: Canvas, settings: _Settings) -> Iterator[Step]:
    keys_BL = canvas.row_keys_B[:, None].expand(canvas.tokens_BL.shape)
    masked_BL = canvas.masked_BL.clone()
    tokens_BL = canvas.tokens_BL.masked_fill(masked_BL, predictor.mask_token_id)
    if settings.tokens_hook:
        tokens_BL, masked_BL = after_tokens_hook(settings.tokens_hook, None, tokens_BL, masked_BL, None, predictor.mask_token_id)
    blocks = Blocks(masked_BL, settings.block_length, settings.num_steps, settings.eps)
    hooked = settings.tokens_hook or settings.logits_hook
    nfe = 0
    for step in range(blocks.last_step + 1):
        if not bool(masked_BL.any()):
            return
        u_BL = counter_uniform(SAMPLE_ORDER, settings.draw["seed"], keys_BL, step, canvas.positions_BL)
        plan = blocks.plan(masked_BL, step, u_BL)
        scores_BL = _scores_before(plan, keys_BL, canvas.positions_BL, step, settings)
        count_B = settings.counted(plan) if settings.counted else None
        wanted_BL = plan.masked_BL
        if count_B is not None:
            # A known order with a known count needs no predictions to choose: the model is asked for the chosen positions only.
            wanted_BL = wanted_BL & (count_B > 0)[:, None] if scores_BL is None else best(scores_BL, wanted_BL, count_B)
        committed_BL = torch.zeros_like(masked_BL)
        confidence_BL = torch.zeros(masked_BL.shape, device=masked_BL.device)
        if bool(wanted_BL.any()):
            asked_BL = masked_BL if hooked else wanted_BL
            logits_NV, num_forwards = ask(predictor, canvas, tokens_BL, asked_BL, settings.cfg_scale)
            nfe += num_forwards
            logits_BLV = spread(logits_NV, asked_BL, tokens_BL) if hooked else None
            if settings.logits_hook:
                logits_BLV = settings.logits_hook(step, tokens_BL.clone(), logits_BLV)
            if hooked:
                logits_NV = logits_BLV[wanted_BL]
            logits_NV = ban(logits_NV, predictor.mask_token_id, predictor.vocab_size, settings.banned_ids)
            if settings.repetition_penalty != 1:
                visible_BL = ~masked_BL if canvas.segments_BL is None else ~masked_BL & (canvas.segments_BL == ROW)
                rows_N = wanted_BL.nonzero()[:, 0]
                logits_NV = penalise_repetition(logits_NV, rows_N, tokens_BL, visible_BL, settings.repetition_penalty)
            committed_BL, x_hat_BL, confidence_BL = _choose(
                logits_NV, wanted_BL, scores_BL, count_B, plan, keys_BL, canvas.positions_BL, step, settings
            )
            tokens_BL = torch.where(committed_BL, x_hat_BL, tokens_BL)
            masked_BL = masked_BL & ~committed_BL
            if settings.tokens_hook:
                tokens_BL, masked_BL = after_tokens_hook(
                    settings.tokens_hook, step, tokens_BL, masked_BL, logits_BLV, predictor.mask_token_id
                )
        given_back_BL = _after_end(tokens_BL, masked_BL, canvas.masked_BL, settings.end_ids)
        if settings.end_ids:
            tokens_BL, masked_BL = tokens_BL.masked_fill(given_back_BL, settings.end_ids[0]), masked_BL & ~given_back_BL
        committed_BL = committed_BL & ~masked_BL  # a hook may have masked some again
        yield Step(step, tokens_BL.clone(), masked_BL.clone(), committed_BL, confidence_BL, given_back_BL, nfe)


def _scores_before(plan: Plan, keys_BL: torch.Tensor, positions_BL: torch.Tensor, step: int, settings: _Settings) -> torch.Tensor | None:
    """scores_BL of an order that needs no predictions; None for the others."""
    if settings.order not in BLIND_ORDERS:
        return None
    scores_BL = blind_scores(settings.order, plan.u_BL, settings.draw["seed"], keys_BL, positions_BL)
    return _disturbed(scores_BL, keys_BL, positions_BL, step, settings)


def _choose(
    logits_NV: torch.Tensor,
    wanted_BL: torch.Tensor,
    scores_BL: torch.Tensor | None,
    count_B: torch.Tensor | None,
    plan: Plan,
    keys_BL: torch.Tensor,
    positions_BL: torch.Tensor,
    step: int,
    settings: _Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(committed_BL, x_hat_BL, confidence_BL): the best wanted positions of each row, and a token for each.

    scores_BL, count_B: None where they are still to be read from the predictions.
    """
    log_p_NV = torch.log_softmax(logits_NV, dim=-1)
    keys_N, positions_N = keys_BL[wanted_BL], positions_BL[wanted_BL]
    reading, bound = (READING[settings.reading[0]], settings.reading[1]) if settings.reading else (None, None)
    x_hat_N = c_N = None
    if settings.order == "confidence" or (reading and reading.reads_candidate):
        x_hat_N = draw_tokens(logits_NV, keys_N, positions_N, step=step, **settings.draw)
        c_N = confidence(log_p_NV, x_hat_N)

    def on_canvas(values_N: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        return torch.full(wanted_BL.shape, fill, dtype=values_N.dtype, device=values_N.device).masked_scatter(wanted_BL, values_N)

    if scores_BL is None:
        score_N = c_N if settings.order == "confidence" else (margin if settings.order == "margin" else negative_entropy)(log_p_NV)
        scores_BL = _disturbed(on_canvas(score_N), keys_BL, positions_BL, step, settings)
    if count_B is None:
        read_N = c_N if reading.reads_candidate else -negative_entropy(log_p_NV)
        best_first_BL = on_canvas(read_N, reading.fill).gather(1, ranked(scores_BL, wanted_BL))
        count_B = torch.maximum(reading.count(best_first_BL, bound), least(plan))
    committed_BL = best(scores_BL, wanted_BL, count_B)
    # Where neither score nor count reads the candidate, tokens are drawn for the committed positions only.
    kept_N = committed_BL[wanted_BL]
    if x_hat_N is None:
        x_hat_K = draw_tokens(logits_NV[kept_N], keys_N[kept_N], positions_N[kept_N], step=step, **settings.draw)
    else:
        x_hat_K = x_hat_N[kept_N]
    x_hat_BL = torch.zeros(wanted_BL.shape, dtype=torch.int64, device=logits_NV.device).masked_scatter(committed_BL, x_hat_K)
    confidence_BL = torch.zeros(wanted_BL.shape, device=logits_NV.device)
    return committed_BL, x_hat_BL, confidence_BL.masked_scatter(committed_BL, confidence(log_p_NV[kept_N], x_hat_K))


def _disturbed(scores_BL: torch.Tensor, keys_BL: torch.Tensor, positions_BL: torch.Tensor, step: int, settings: _Settings) -> torch.Tensor:
    """Gumbel noise on score / order_temperature: the best k are k draws without replacement from its softmax."""
    if settings.order_temperature == 0:
        return scores_BL
    noise_BL = counter_gumbel(SAMPLE_ORDER, settings.draw["seed"], keys_BL, step, positions_BL, _ORDER_NOISE)
    return scores_BL / settings.order_temperature + noise_BL


def _after_end(tokens_BL: torch.Tensor, masked_BL: torch.Tensor, fillable_BL: torch.Tensor, end_ids: tuple[int, ...]) -> torch.Tensor:
    """Masked positions of rows whose first filled-in end token has nothing masked left of it."""
    if not end_ids:
        return torch.zeros_like(masked_BL)
    ends = torch.tensor(end_ids, dtype=tokens_BL.dtype, device=tokens_BL.device)
    is_end_BL = torch.isin(tokens_BL, ends) & fillable_BL & ~masked_BL
    # First True of each row; a row without one has all zeros, and argmax 0.
    first_end_B = torch.where(is_end_BL.any(dim=1), is_end_BL.to(torch.int8).argmax(dim=1), masked_BL.shape[1])
    first_masked_B = torch.where(masked_BL.any(dim=1), masked_BL.to(torch.int8).argmax(dim=1), -1)
    return masked_BL & (first_end_B < first_masked_B)[:, None]


@dataclass(frozen=True)
class Generated:
    """tokens_BL: the filled canvas. nfe: forwards. history: tokens_BL after each step, when it was asked for."""

    tokens_BL: torch.Tensor
    nfe: int
    history: tuple[torch.Tensor, ...] | None = None


def generate(predictor: Predictor, canvas: Canvas, *, keep_history: bool = False, **settings) -> Generated:
    """Run `denoise` (same settings) to the end."""
    tokens_BL, nfe, history = canvas.tokens_BL, 0, []
    for step in denoise(predictor, canvas, **settings):
        tokens_BL, nfe = step.tokens_BL, step.nfe
        if keep_history:
            history.append(step.tokens_BL)
    return Generated(tokens_BL, nfe, tuple(history) if keep_history else None)
