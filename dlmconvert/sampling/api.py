"""The functions that users call: `diffusion_generate` (Dream's signature, arXiv 2508.15487) and `infill`.

The command line, the evaluator and an exported model call the same two, with the same options (`Options`).

Shapes: B rows, P tokens of the prompts, L = P + max_new_tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from .budget import READING
from .canvas import Canvas, Predictor, build_canvas, canvas_after_prompts
from .denoise import generate
from .predictions import Hook

# Dream's names beside ours. `origin` is the ancestral sampler (random order).
ALGORITHMS = {
    "origin": "random",
    "random": "random",
    "maskgit_plus": "confidence",
    "confidence": "confidence",
    "topk_margin": "margin",
    "margin": "margin",
    "entropy": "entropy",
    "left_to_right": "left_to_right",
    "first_hitting": "first_hitting",
}
_BUDGETS = ("budget", *READING)
_OWN_OPTIONS = {
    "diffusion_generate": ("inputs", "attention_mask", "max_new_tokens", "output_history", "return_dict_in_generate"),
    "infill": ("rows", "device", "output_history", "return_dict_in_generate"),
}


@dataclass(frozen=True)
class Options:
    """How to sample: the options that `diffusion_generate` and `infill` share.

    steps: forwards at most; None gives each row as many as it has positions to fill.
    temperature: 0 takes the most probable token. top_p, top_k: of the drawn tokens; None, or 0 for top_k, keeps all.
    repetition_penalty: above 1, tokens that stand in the row already become less probable.
    cfg_scale: above 0, classifier-free guidance: away from what the model says without the given tokens; two forwards a step.
    alg: which positions come first, one of ALGORITHMS. None: `origin` (DiffuLLaMA's Algorithm 2), but `confidence` beside threshold
        or factor, and `entropy` beside entropy_bound.
    alg_temp: above 0, which positions come first is drawn with this temperature.
    budget, threshold, factor, entropy_bound: how many positions a step commits, at most one of them: a name in budget.py, or the
        bound of a budget that reads the predictions (threshold: commit what the model is at least this sure of). eps: the end of
        the time grid of the budgets `bernoulli` and `dream`, default 0.001.
    block_length: fill block after block from the left, this many positions each.
    seed: the same seed gives the same tokens; rows of one batch draw differently (row_keys, default 0 .. B-1).
    eos_token_id, pad_token_id: see the two functions.
    """

    steps: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    cfg_scale: float | None = None
    alg: str | None = None
    alg_temp: float | None = None
    budget: str | None = None
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    eps: float | None = None
    block_length: int | None = None
    generation_tokens_hook_func: Hook | None = None
    generation_logits_hook_func: Hook | None = None
    seed: int = 0
    row_keys: Sequence[int] | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None

    @property
    def ends(self) -> list[int]:
        ends = self.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def of_the_loop(self) -> dict[str, Any]:
        """The settings of `denoise` that they are. Raises ValueError for an unknown alg."""
        alg = self.alg
        if alg is None:
            alg = (
                "entropy"
                if self.entropy_bound is not None
                else "origin"
                if self.threshold is None and self.factor is None
                else "confidence"
            )
        if alg not in ALGORITHMS:
            raise ValueError(f"unknown alg {alg!r}; {_nearest(alg, ALGORITHMS)}")
        return {
            "num_steps": self.steps,
            "order": ALGORITHMS[alg],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or None,  # 0 means no filter in transformers
            "repetition_penalty": 1.0 if self.repetition_penalty is None else self.repetition_penalty,
            "cfg_scale": self.cfg_scale or 0.0,
            "seed": self.seed,
            "budget": self.budget,
            "threshold": self.threshold,
            "factor": self.factor,
            "entropy_bound": self.entropy_bound,
            "eps": 1e-3 if self.eps is None else self.eps,
            "block_length": self.block_length,
            "order_temperature": self.alg_temp or 0.0,
            "tokens_hook": self.generation_tokens_hook_func,
            "logits_hook": self.generation_logits_hook_func,
        }


OPTIONS = tuple(field.name for field in fields(Options))
# What a generation_config.json may set.
SAVED_OPTIONS = (
    "max_new_tokens", "steps", "temperature", "top_p", "top_k", "repetition_penalty", "cfg_scale", "alg", "alg_temp", *_BUDGETS, "eps",
    "block_length", "eos_token_id", "pad_token_id",
)  # fmt: skip


def with_defaults(given: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The options of a call over those of a generation_config.json.

    A call that names a sampler (alg, or a budget) is not mixed with half of the saved one: the saved budget goes. With a budget that
    reads the predictions, or first_hitting, the saved steps go as well (such a sampler takes the steps that it needs), and with the
    former the saved alg.
    """
    saved = dict(saved)
    named = {name for name in ("alg", *_BUDGETS) if given.get(name) is not None}
    if named:
        for name in _BUDGETS:
            saved.pop(name, None)
    if named & set(READING):
        saved.pop("alg", None)
    if named & set(READING) or given.get("alg") == "first_hitting":
        saved.pop("steps", None)
    return {**saved, **given}


@dataclass(frozen=True)
class DiffusionOutput:
    """sequences: what the call returns without return_dict_in_generate. nfe: forwards of the batch. history: tokens_BL after each
    step with the mask token where nothing stands yet, or None."""

    sequences: Any
    nfe: int
    history: tuple[torch.Tensor, ...] | None = None


def diffusion_generate(
    predictor: Predictor,
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    output_history: bool = False,
    return_dict_in_generate: bool = False,
    **options: Any,
) -> torch.Tensor | DiffusionOutput:
    """Prompts and `max_new_tokens` generated tokens: int64 (B, P + max_new_tokens), padded on the side where the inputs were.

    inputs, attention_mask: (B, P) prompts padded on either side, 0 marks padding. Tokens of the prompt are all given, a mask token
        among them too: gaps are for `infill`.
    options: see Options. eos_token_id: when given, what follows the first end token of the generated part becomes `pad_token_id`
        (default: the end token), and a row is done as soon as it has its end token and nothing is masked left of it.
    Raises ValueError for unknown options, with the nearest name, and for options that contradict each other.
    """
    how = _options("diffusion_generate", options)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    canvas = canvas_after_prompts(inputs, attention_mask, max_new_tokens, how.row_keys)
    done = generate(predictor, canvas, end_ids=how.ends, keep_history=output_history, **how.of_the_loop())
    sequences_BL = _pad_after_end(done.tokens_BL, canvas, how.ends, how.pad_token_id)
    return DiffusionOutput(sequences_BL, done.nfe, done.history) if return_dict_in_generate else sequences_BL


def infill(
    predictor: Predictor,
    rows: Sequence[Sequence[int | None]],
    *,
    device: torch.device | str | None = None,
    output_history: bool = False,
    return_dict_in_generate: bool = False,
    **options: Any,
) -> list[list[int]] | DiffusionOutput:
    """Fill the None of each row; rows may have any gaps and any lengths. Returns whole rows of tokens, without padding.

    device: of the canvas; default the predictor's.
    options: see Options. eos_token_id bans these tokens: text follows a gap, so it must not end there.
    """
    how = _options("infill", options)
    canvas = build_canvas(rows, how.pad_token_id or 0, device or getattr(predictor, "device", "cpu"), how.row_keys)
    done = generate(predictor, canvas, banned_ids=how.ends, keep_history=output_history, **how.of_the_loop())
    filled = canvas.rows(done.tokens_BL)
    return DiffusionOutput(filled, done.nfe, done.history) if return_dict_in_generate else filled


def _options(function: str, options: dict[str, Any]) -> Options:
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise ValueError(f"{function} has no option {unknown[0]!r}; {_nearest(unknown[0], _OWN_OPTIONS[function] + OPTIONS)}")
    return Options(**options)


def _nearest(word: str, choices: Sequence[str] | dict[str, str]) -> str:
    near = difflib.get_close_matches(str(word), list(choices), n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(name) for name in near) + "?"
    return "valid: " + ", ".join(choices)


def _pad_after_end(tokens_BL: torch.Tensor, canvas: Canvas, ends: list[int], pad_token_id: int | None) -> torch.Tensor:
    """What follows the first end token among the generated positions becomes padding, as transformers' generate leaves it."""
    if not ends:
        return tokens_BL
    end_BL = torch.isin(tokens_BL, torch.tensor(ends, device=tokens_BL.device)) & canvas.masked_BL
    after_BL = (end_BL.cumsum(dim=1) - end_BL.to(torch.int64) > 0) & canvas.masked_BL
    return tokens_BL.masked_fill(after_BL, ends[0] if pad_token_id is None else pad_token_id)
