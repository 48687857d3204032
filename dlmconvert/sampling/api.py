"""The functions that users call: `diffusion_generate` (Dream's signature, arXiv 2508.15487) and `infill`.

The command line, the evaluator and an exported model call the same two.

Shapes: B rows, P tokens of the prompts, L = P + max_new_tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .canvas import Canvas, Predictor, build_canvas, canvas_after_prompts
from .denoise import Hook, generate

# Dream's names beside ours. `origin` is the ancestral sampler (random order).
ALGORITHMS = {
    "origin": "random",
    "random": "random",
    "maskgit_plus": "confidence",
    "confidence": "confidence",
    "topk_margin": "margin",
    "margin": "margin",
    "entropy": "entropy",
}

# Every option of both functions, for the nearest name of an unknown one.
_SHARED = ("steps", "temperature", "top_p", "top_k", "alg", "alg_temp", "output_history", "return_dict_in_generate")
_HOOKS = ("generation_tokens_hook_func", "generation_logits_hook_func")
_ENDS = ("seed", "row_keys", "eos_token_id", "pad_token_id")
GENERATE_OPTIONS = ("inputs", "attention_mask", "max_new_tokens", *_SHARED, *_HOOKS, *_ENDS)
INFILL_OPTIONS = ("rows", "device", *_SHARED, *_HOOKS, *_ENDS)


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
    steps: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg: str = "origin",
    alg_temp: float | None = None,
    output_history: bool = False,
    return_dict_in_generate: bool = False,
    generation_tokens_hook_func: Hook | None = None,
    generation_logits_hook_func: Hook | None = None,
    seed: int = 0,
    row_keys: Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    **unknown: Any,
) -> torch.Tensor | DiffusionOutput:
    """Prompts and `max_new_tokens` generated tokens: int64 (B, P + max_new_tokens), padded on the side where the inputs were.

    inputs, attention_mask: (B, P) prompts padded on either side, 0 marks padding. Tokens of the prompt are all given, a mask token
        among them too: gaps are for `infill`.
    steps: forwards at most; default max_new_tokens. alg: one of ALGORITHMS; `origin` is DiffuLLaMA's Algorithm 2.
    alg_temp: above 0, which positions come first is drawn with this temperature.
    eos_token_id: when given, what follows the first end token of the generated part becomes `pad_token_id` (default: the end token).
    seed: the same seed gives the same tokens; rows of one batch draw differently (row_keys, default 0 .. B-1).
    Raises ValueError for unknown options, with the nearest name.
    """
    _refuse("diffusion_generate", unknown, GENERATE_OPTIONS)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    canvas = canvas_after_prompts(inputs, attention_mask, max_new_tokens, row_keys)
    done = generate(
        predictor,
        canvas,
        num_steps=max_new_tokens if steps is None else steps,
        order=_order(alg),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k or None,  # 0 means no filter in transformers
        seed=seed,
        order_temperature=alg_temp or 0.0,
        tokens_hook=generation_tokens_hook_func,
        logits_hook=generation_logits_hook_func,
        keep_history=output_history,
    )
    sequences_BL = _pad_after_end(done.tokens_BL, canvas, eos_token_id, pad_token_id)
    return DiffusionOutput(sequences_BL, done.nfe, done.history) if return_dict_in_generate else sequences_BL


def infill(
    predictor: Predictor,
    rows: Sequence[Sequence[int | None]],
    *,
    steps: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg: str = "origin",
    alg_temp: float | None = None,
    output_history: bool = False,
    return_dict_in_generate: bool = False,
    generation_tokens_hook_func: Hook | None = None,
    generation_logits_hook_func: Hook | None = None,
    seed: int = 0,
    row_keys: Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    device: torch.device | str | None = None,
    **unknown: Any,
) -> list[list[int]] | DiffusionOutput:
    """Fill the None of each row; rows may have any gaps and any lengths. Returns whole rows of tokens, without padding.

    steps: default the number of None in the row that has most. The other options are those of `diffusion_generate`, except
    eos_token_id, which bans these tokens: text follows a gap, so it must not end there.
    device: of the canvas; default the predictor's.
    """
    _refuse("infill", unknown, INFILL_OPTIONS)
    canvas = build_canvas(rows, pad_token_id or 0, device or getattr(predictor, "device", "cpu"), row_keys)
    longest_gap = max(sum(token is None for token in row) for row in rows)
    done = generate(
        predictor,
        canvas,
        num_steps=max(1, longest_gap) if steps is None else steps,
        order=_order(alg),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k or None,  # 0 means no filter in transformers
        seed=seed,
        order_temperature=alg_temp or 0.0,
        banned_ids=[] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id),
        tokens_hook=generation_tokens_hook_func,
        logits_hook=generation_logits_hook_func,
        keep_history=output_history,
    )
    filled = canvas.rows(done.tokens_BL)
    return DiffusionOutput(filled, done.nfe, done.history) if return_dict_in_generate else filled


def _order(alg: str) -> str:
    if alg not in ALGORITHMS:
        raise ValueError(f"unknown alg {alg!r}; {_nearest(alg, ALGORITHMS)}")
    return ALGORITHMS[alg]


def _refuse(function: str, unknown: dict[str, Any], known: Sequence[str]) -> None:
    if unknown:
        name = next(iter(unknown))
        raise ValueError(f"{function} has no option {name!r}; {_nearest(name, known)}")


def _nearest(word: str, choices: Sequence[str] | dict[str, str]) -> str:
    near = difflib.get_close_matches(str(word), list(choices), n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(name) for name in near) + "?"
    return "valid: " + ", ".join(choices)


def _pad_after_end(
    tokens_BL: torch.Tensor, canvas: Canvas, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None
) -> torch.Tensor:
    """What follows the first end token among the generated positions becomes padding, as transformers' generate leaves it."""
    if eos_token_id is None:
        return tokens_BL
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    end_BL = torch.isin(tokens_BL, torch.tensor(ends, device=tokens_BL.device)) & canvas.masked_BL
    after_BL = (end_BL.cumsum(dim=1) - end_BL.to(torch.int64) > 0) & canvas.masked_BL
    return tokens_BL.masked_fill(after_BL, ends[0] if pad_token_id is None else pad_token_id)
