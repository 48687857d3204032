"""The loop: forward, score, commit, until nothing is masked.

    x_hat^i ~ softmax(filters(logits^i / temperature))      for masked i, all independently given x_t
    commit the k_j positions with the highest scores        k_j from budget.py, scores from order.py

The state is the boolean array of still masked positions. Given and committed tokens are never touched again. The prediction of a
masked model does not depend on the noise level (arXiv 2406.03736), so a step that commits nothing costs no forward.

Shapes: B rows, L positions of the canvas, N positions that the model is asked for (row-major), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..diffusion.randomness import SAMPLE_ORDER, counter_gumbel, counter_uniform
from .budget import BUDGETS, default_budget
from .canvas import Canvas, Predictor, check_predictable
from .draw import draw_tokens
from .filters import ban, check_filters
from .order import ORDERS, best, confidence, margin, negative_entropy

Hook = Callable[[int | None, torch.Tensor, torch.Tensor | None], torch.Tensor]

_ORDER_NOISE = 1  # one more key, so that the noise on scores is another stream than u


@dataclass(frozen=True)
class Step:
    """What one step did. The tensors are copies: keep them, the loop goes on with its own.

    index: the step, from 0. tokens_BL: the mask token at masked positions. masked_BL: still masked after the step.
    committed_BL: filled by this step. confidence_BL: p(x_hat) at temperature 1 without filters where committed, else 0.
    nfe: forwards so far.
    """

    index: int
    tokens_BL: torch.Tensor
    masked_BL: torch.Tensor
    committed_BL: torch.Tensor
    confidence_BL: torch.Tensor
    nfe: int


def denoise(
    predictor: Predictor,
    canvas: Canvas,
    *,
    num_steps: int,
    order: str = "random",
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    budget: str | None = None,
    order_temperature: float = 0.0,
    banned_ids: Sequence[int] = (),
    tokens_hook: Hook | None = None,
    logits_hook: Hook | None = None,
) -> Iterator[Step]:
    """Fill the masked positions of the canvas in at most `num_steps` forwards; one Step each, until nothing is masked.

    order, budget: names in order.py and budget.py; budget None means ancestral for `random`, even otherwise.
    temperature: of the drawn tokens; 0 takes the most probable one.
    order_temperature: above 0, positions are drawn without replacement from softmax(score / order_temperature) (Dream's alg_temp).
    seed: the draws are a pure function of (seed, row key, step, position), whatever the batch.
    banned_ids: further ids that are never produced, besides the mask token and ids from vocab_size on.
    logits_hook(step, x, logits): returns logits to use. tokens_hook(step, x, logits): returns tokens to go on with. Both see x_BL
        and aligned logits_BLV (at positions not asked for: the token that stands there, for certain); they run at steps with a
        forward, the tokens hook once more before the first, as (None, x, None). A token that it changes counts as given, one that
        it sets to the mask token as masked.

    Raises ValueError at once, before the first step, for settings without meaning and a canvas that the alignment cannot fill.
    """
    if num_steps < 1:
        raise ValueError(f"the number of steps is {num_steps}; it must be at least 1")
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; valid: {', '.join(ORDERS)}")
    budget = default_budget(order) if budget is None else budget
    if budget not in BUDGETS:
        raise ValueError(f"unknown budget {budget!r}; valid: {', '.join(BUDGETS)}")
    if order_temperature < 0:
        raise ValueError(f"the temperature of the order is {order_temperature}; it must be 0 or positive")
    check_filters(temperature, top_p, top_k)
    check_predictable(canvas, predictor.alignment)
    draw = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    settings = _Settings(num_steps, order, BUDGETS[budget], order_temperature, tuple(banned_ids), draw, tokens_hook, logits_hook)
    return _steps(predictor, canvas, settings)


@dataclass(frozen=True)
class _Settings:
    """The checked settings of `denoise`; `draw` goes to draw_tokens as it is."""

    num_steps: int
    order: str
    budget: Callable
    order_temperature: float
    banned_ids: tuple[int, ...]
    draw: dict
    tokens_hook: Hook | None
    logits_hook: Hook | None


def _steps(predictor: Predictor, canvas: Canvas, settings: _Settings) -> Iterator[Step]:
    positions_BL, keys_BL = canvas.positions_BL, canvas.row_keys_B[:, None].expand(canvas.tokens_BL.shape)
    masked_BL = canvas.masked_BL.clone()
    tokens_BL = canvas.tokens_BL.masked_fill(masked_BL, predictor.mask_token_id)
    if settings.tokens_hook:
        tokens_BL, masked_BL = _after_hook(settings.tokens_hook, None, tokens_BL, masked_BL, None, predictor.mask_token_id)
    num_masked_B = masked_BL.sum(dim=1)
    hooked = settings.tokens_hook or settings.logits_hook
    nfe = 0
    for step in range(settings.num_steps):
        if not bool(masked_BL.any()):
            return
        u_BL = counter_uniform(SAMPLE_ORDER, settings.draw["seed"], keys_BL, step, positions_BL)
        count_B = settings.budget(masked_BL, num_masked_B, u_BL, step, settings.num_steps)
        committed_BL = torch.zeros_like(masked_BL)
        confidence_BL = torch.zeros(masked_BL.shape, device=masked_BL.device)
        if bool(count_B.any()):
            # The random order needs no logits to choose, so the model is asked for the chosen positions only.
            wanted_BL = best(-u_BL, masked_BL, count_B) if settings.order == "random" else masked_BL & (count_B > 0)[:, None]
            asked_BL = masked_BL if hooked else wanted_BL
            with torch.no_grad():
                logits_NV = predictor.predict(tokens_BL, asked_BL, positions_BL, canvas.segments_BL)
            nfe += 1
            logits_BLV = _spread(logits_NV, asked_BL, tokens_BL) if hooked else None
            if settings.logits_hook:
                logits_BLV = settings.logits_hook(step, tokens_BL.clone(), logits_BLV)
            if hooked:
                logits_NV = logits_BLV[wanted_BL]
            logits_NV = ban(logits_NV, predictor.mask_token_id, predictor.vocab_size, settings.banned_ids)
            committed_BL, x_hat_BL, confidence_BL = _choose(logits_NV, wanted_BL, count_B, keys_BL, positions_BL, step, settings)
            tokens_BL = torch.where(committed_BL, x_hat_BL, tokens_BL)
            masked_BL = masked_BL & ~committed_BL
            if settings.tokens_hook:
                tokens_BL, masked_BL = _after_hook(settings.tokens_hook, step, tokens_BL, masked_BL, logits_BLV, predictor.mask_token_id)
        yield Step(step, tokens_BL.clone(), masked_BL.clone(), committed_BL & ~masked_BL, confidence_BL, nfe)


def _choose(
    logits_NV: torch.Tensor,
    wanted_BL: torch.Tensor,
    count_B: torch.Tensor,
    keys_BL: torch.Tensor,
    positions_BL: torch.Tensor,
    step: int,
    settings: _Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(committed_BL, x_hat_BL, confidence_BL): the best `count_B` wanted positions of each row, and a token for each."""
    log_p_NV = torch.log_softmax(logits_NV, dim=-1)
    keys_N, positions_N = keys_BL[wanted_BL], positions_BL[wanted_BL]
    x_hat_N, scores_N = None, None
    if settings.order == "confidence":
        x_hat_N = draw_tokens(logits_NV, keys_N, positions_N, step=step, **settings.draw)
        scores_N = confidence(log_p_NV, x_hat_N)
    elif settings.order == "entropy":
        scores_N = negative_entropy(log_p_NV)
    elif settings.order == "margin":
        scores_N = margin(log_p_NV)
    committed_BL = wanted_BL
    if scores_N is not None:
        scores_BL = torch.zeros(wanted_BL.shape, device=logits_NV.device).masked_scatter(wanted_BL, scores_N)
        if settings.order_temperature > 0:
            noise_BL = counter_gumbel(SAMPLE_ORDER, settings.draw["seed"], keys_BL, step, positions_BL, _ORDER_NOISE)
            scores_BL = scores_BL / settings.order_temperature + noise_BL
        committed_BL = best(scores_BL, wanted_BL, count_B)
    # Where the score does not read the candidate, tokens are drawn for the committed positions only.
    kept_N = committed_BL[wanted_BL]
    if x_hat_N is None:
        x_hat_K = draw_tokens(logits_NV[kept_N], keys_N[kept_N], positions_N[kept_N], step=step, **settings.draw)
    else:
        x_hat_K = x_hat_N[kept_N]
    x_hat_BL = torch.zeros(wanted_BL.shape, dtype=torch.int64, device=logits_NV.device).masked_scatter(committed_BL, x_hat_K)
    confidence_BL = torch.zeros(wanted_BL.shape, device=logits_NV.device)
    return committed_BL, x_hat_BL, confidence_BL.masked_scatter(committed_BL, confidence(log_p_NV[kept_N], x_hat_K))


def _after_hook(hook, step, tokens_BL, masked_BL, logits_BLV, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens_BL, masked_BL) as the tokens hook leaves them: where it changed nothing, the state stays."""
    changed_BL = hook(step, tokens_BL.clone(), logits_BLV)
    return changed_BL, torch.where(changed_BL == tokens_BL, masked_BL, changed_BL == mask_token_id)


def _spread(logits_NV: torch.Tensor, asked_BL: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
    """logits_BLV for hooks: elsewhere than asked, all probability on the token that stands there."""
    logits_BLV = logits_NV.new_full((*asked_BL.shape, logits_NV.shape[1]), torch.finfo(logits_NV.dtype).min)
    known_BL = tokens_BL.clamp(max=logits_NV.shape[1] - 1)
    logits_BLV.scatter_(-1, known_BL[..., None], 0.0)
    logits_BLV[asked_BL] = logits_NV
    return logits_BLV


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
