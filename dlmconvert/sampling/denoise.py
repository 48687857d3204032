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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .apd import Helper, apd, check_apd
from .blocks import block_length_of, groups, model_blocks, steps_of_row
from .budget import BUDGETS, check_budget, default_budget
from .cache import Reader, cache_of, is_block_model, open_reader
from .canvas import Canvas, Predictor, check_length, check_predictable
from .filters import check_filters
from .length import check_growth, daedal, written
from .loop import Settings, steps_of
from .order import ORDERS
from .polish import RememberingHook, polished, polished_in_blocks
from .predictions import Hook
from .revise import POLISHING, Reviser, check_revision, p2, remdm, wino
from .shadow import open_shadow
from .speculate import check_speculation, speculate
from .step import Step


def denoise(
    predictor: Predictor,
    canvas: Canvas,
    *,
    num_steps: int | None = None,
    order: str | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    cfg_scale: float = 0.0,
    seed: int = 0,
    cache: str | None = None,
    budget: str | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    entropy_bound: float | None = None,
    eps: float = 1e-3,
    block_length: int | None = None,
    order_temperature: float = 0.0,
    draft_length: int | None = None,
    helper: Helper | None = None,
    helper_weight: float | None = None,
    revision: str | None = None,
    revision_strength: float | None = None,
    initial_length: int | None = None,
    banned_ids: Sequence[int] = (),
    end_ids: Sequence[int] = (),
    tokens_hook: Hook | None = None,
    logits_hook: Hook | None = None,
) -> Iterator[Step]:
    """Fill the masked positions of the canvas in at most `num_steps` steps; one Step each, until nothing is masked.

    num_steps: None gives each row as many steps as it has masked positions, SavedSteps (blocks.py) a share of them.
    order: a name in order.py; None is random, and left to the samplers that have an order of their own.
    budget: a counted budget of budget.py; None means ancestral for `random`, even otherwise. threshold, factor, entropy_bound: the
        bounds of the reading ones. At most one of these four is given. eps: the end of the time grid of `bernoulli` and `dream`.
    block_length: fill block after block, this many positions each. None is one block, and of a block model the training's. The steps
        are shared by the blocks.
    cache: a name in cache.py; None takes the exact one of a block model, and none otherwise.
    temperature: of the drawn tokens; 0 takes the most probable one.
    repetition_penalty: 1 is none. cfg_scale: of the guidance; 0 is none, and above it each step costs two forwards.
    order_temperature: above 0, positions are drawn without replacement from softmax(score / order_temperature) (Dream's alg_temp);
        it changes nothing in the random orders.
    draft_length: self-speculation (speculate.py): draft so many tokens with one diffusion step, verify them with the model's causal
        pass. It decides order, number and cache itself; temperature, filters, penalty and ends stay free.
    helper, helper_weight: adaptive parallel decoding (apd.py) with a small AR model beside a bidirectional one; draft_length positions
        a step, default 16. helper_weight: the share R of the diffusion model, default 0.5.
    revision, revision_strength: tokens that have settled may change again; a name in revise.py, which says what the strength is. In
        blocks, those of the block under work.
    initial_length: DAEDAL (length.py): begin with so many masks, and let the answer grow to at most the masked positions of the row.
        block_length (32) and threshold (0.9) are its own; filters, penalty, guidance and polishing revisions stay free.
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
    check_length(canvas, getattr(predictor, "longest", None))
    if order is not None and order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; valid: {', '.join(ORDERS)}")
    counted, reading = check_budget(budget, {"threshold": threshold, "factor": factor, "entropy_bound": entropy_bound})
    if order == "first_hitting" and budget is None and reading is None and num_steps is not None:
        most = int(canvas.masked_BL.sum(dim=1).max())
        if steps_of_row(num_steps, most, 1) < most:
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
    if revision is not None:
        strength = check_revision(revision, revision_strength, predictor)
    elif revision_strength is not None:
        raise ValueError("revision_strength belongs to a revision: name one, or leave it out")
    forwards_each = 2 if cfg_scale > 0 else 1
    draw = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    asked = {
        "order": order, "order_temperature": order_temperature or None, "steps": num_steps, "budget": budget, "threshold": threshold,
        "factor": factor, "entropy_bound": entropy_bound, "block_length": block_length, "cache": None if cache == "none" else cache,
        "cfg_scale": cfg_scale or None, "a tokens hook": tokens_hook, "a logits hook": logits_hook,
        "repetition_penalty": None if repetition_penalty == 1 else repetition_penalty, "revision": revision,
        "initial_length": initial_length, "draft_length": draft_length,
    }  # fmt: skip
    if helper is not None:
        _refuse_beside("the AR helper", asked, "draft_length", "repetition_penalty", "cfg_scale")
        lookahead = 16 if draft_length is None else draft_length
        _refuse_block_model(predictor, "an AR helper")
        check_predictable(canvas, predictor.alignment)
        weight = 0.5 if helper_weight is None else helper_weight
        check_apd(canvas, lookahead, weight)
        more = {"repetition_penalty": repetition_penalty, "cfg_scale": cfg_scale}
        return apd(predictor, helper, canvas, lookahead, weight, draw=draw, banned_ids=banned_ids, end_ids=end_ids, **more)
    if helper_weight is not None:
        raise ValueError("helper_weight is the share of the diffusion model beside a helper: name a helper, or leave it out")
    if draft_length is not None:
        _refuse_beside("draft_length (self-speculation)", asked, "draft_length", "repetition_penalty")
        check_speculation(predictor, canvas, draft_length)
        return speculate(predictor, canvas, draft_length, **draw, repetition_penalty=repetition_penalty, banned_ids=banned_ids, end_ids=end_ids)
    if initial_length is not None:
        if revision is not None and revision not in POLISHING:
            raise ValueError(
                f"revision {revision!r} has a schedule of its own over a canvas of known length, and a growing answer has neither: leave one of the"
                f" two out, or revise the finished answer with {' or '.join(POLISHING)}"
            )
        free = ("initial_length", "block_length", "threshold", "repetition_penalty", "cfg_scale", "revision")
        _refuse_beside("initial_length (a growing answer)", asked, *free)
        _refuse_block_model(predictor, "a growing answer")
        check_predictable(canvas, predictor.alignment)
        growth = check_growth(canvas, initial_length, block_length, threshold, end_ids)
        more = {"repetition_penalty": repetition_penalty, "cfg_scale": cfg_scale}
        steps = daedal(predictor, canvas, growth, draw=draw, banned_ids=banned_ids, end_ids=end_ids, **more)
        if revision is None:
            return steps
        layout = groups(canvas, canvas.masked_BL, None, None)

        def reader_of(last: Step) -> Reader:
            return open_reader(predictor, written(canvas, last), layout, cache="none", block_length=None, cfg_scale=cfg_scale)

        reviser = Reviser(predictor, canvas, layout, None, draw, banned_ids, repetition_penalty, forwards_each=forwards_each)
        return polished(steps, reviser, revision, strength, end_ids, reader_of=reader_of)
    if revision is not None and revision not in POLISHING:
        free = ("revision", "block_length", "cache", "cfg_scale", "repetition_penalty", "threshold" if revision == "wino" else "steps")
        _refuse_beside(f"revision {revision!r}", asked, *free)
    check_predictable(canvas, predictor.alignment)
    cache = cache_of(predictor, cache)
    if tokens_hook and (cache != "none" or is_block_model(predictor)):
        raise ValueError("a tokens hook may change any token, also such as a cache or a block model has settled: it needs a bidirectional model and cache 'none'")
    if is_block_model(predictor):
        block_length = block_length_of(predictor.attention, predictor.block_length, block_length)
        layout = model_blocks(canvas, predictor.attention, block_length, num_steps, predictor.alignment)
    else:
        layout = groups(canvas, canvas.masked_BL, block_length, num_steps)
    if revision in ("remdm", "p2", "wino"):
        reader = open_reader(predictor, canvas, layout, cache=cache, block_length=block_length, cfg_scale=cfg_scale)
        reviser = Reviser(predictor, canvas, layout, reader, draw, banned_ids, repetition_penalty, end_ids, forwards_each)
        if revision == "wino":
            shadow = open_shadow(predictor, canvas, layout, cache=cache, block_length=block_length, cfg_scale=cfg_scale)
            return wino(reviser, shadow, 0.6 if threshold is None else threshold, strength)
        return remdm(reviser, strength) if revision == "remdm" else p2(reviser)
    order = order or "random"
    settings = Settings(
        cache=cache,
        num_steps=num_steps,
        block_length=block_length,
        eps=eps,
        order=order,
        order_temperature=0.0 if order in ("random", "first_hitting") else order_temperature,
        counted=None if reading else BUDGETS[counted or default_budget(order)],
        reading=reading,
        cfg_scale=cfg_scale,
        repetition_penalty=repetition_penalty,
        draw=draw,
        banned_ids=tuple(banned_ids),
        end_ids=tuple(end_ids),
        tokens_hook=tokens_hook,
        logits_hook=logits_hook,
    )
    if revision is None:
        return steps_of(predictor, canvas, layout, settings)
    # A finished text of a bidirectional model is read whole, whatever cache filled it.
    in_blocks = is_block_model(predictor)
    reader = open_reader(predictor, canvas, layout, cache=cache if in_blocks else "none", block_length=block_length, cfg_scale=cfg_scale)
    reviser = Reviser(predictor, canvas, layout, reader, draw, banned_ids, repetition_penalty, forwards_each=forwards_each, logits_hook=logits_hook)
    if in_blocks:
        return polished_in_blocks(reviser, settings, revision, strength)
    hook = None if tokens_hook is None else RememberingHook(tokens_hook, canvas, predictor.mask_token_id)
    steps = steps_of(predictor, canvas, layout, replace(settings, tokens_hook=hook))
    return polished(steps, reviser, revision, strength, end_ids, hook=hook)


def _refuse_beside(what: str, asked: dict[str, object], *allowed: str) -> None:
    named = [name for name, value in asked.items() if value is not None and name not in allowed]
    if not named:
        return
    if named[0] in ("cfg_scale", "a tokens hook", "a logits hook"):
        raise ValueError(f"{what} does not go with {named[0]}: leave one of the two out")
    raise ValueError(f"{what} decides by itself what {named[0]} would: leave one of the two out")


def _refuse_block_model(predictor: Predictor, what: str) -> None:
    if is_block_model(predictor):
        raise ValueError(f"{what} needs a bidirectional model; this one has attention {predictor.attention!r}")


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
