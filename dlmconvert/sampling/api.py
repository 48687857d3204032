"""The functions that users call: `diffusion_generate` (Dream's signature, arXiv 2508.15487) and `infill`.

The command line, the evaluator and an exported model call the same two, with the same options (`Options`).

Shapes: B rows, P tokens of the prompts, L = P + max_new_tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch

from .blocks import SavedSteps
from .budget import READING
from .cache import is_block_model
from .canvas import Canvas, Predictor, build_canvas, canvas_after_prompts
from .denoise import denoise
from .length import STEPS_OF_A_CANDIDATE, Gap, choose_lengths
from .predictions import Hook
from .revise import POLISHING
from .step import Step
from .streaming import Follower, options_of

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
_OTHER_KINDS = ("draft_length", "helper", "revision", "revision_strength", "initial_length")
_WHOLE_NUMBERS = ("max_new_tokens", "steps", "top_k", "block_length", "draft_length", "initial_length", "seed")
_NUMBERS = (
    "temperature", "top_p", "repetition_penalty", "cfg_scale", "alg_temp", "threshold", "factor", "entropy_bound", "eps", "helper_weight",
    "revision_strength",
)  # fmt: skip
_CALL_OPTIONS = ("max_new_tokens", "output_history", "return_dict_in_generate")
_OWN_OPTIONS = {
    "diffusion_generate": (
        "inputs", "attention_mask", "max_new_tokens", "generation_config", "streamer", "stopping_criteria", "do_sample", "output_history",
        "return_dict_in_generate",
    ),
    "infill": ("rows", "device", "generation_config", "streamer", "do_sample", "output_history", "return_dict_in_generate"),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How to sample: the options that `diffusion_generate` and `infill` share.

    steps: forwards at most; None gives each row as many as it has positions to fill. Those that a generation_config.json holds beside
        max_new_tokens are a share: a row with other positions to fill takes as many in proportion (blocks.py, SavedSteps).
    temperature: 0, the default, takes the most probable token. top_p, top_k: of the drawn tokens; None, or 0 for top_k, keeps all.
    repetition_penalty: above 1, tokens that stand in the row already become less probable.
    cfg_scale: above 0, classifier-free guidance: away from what the model says without the given tokens; two forwards a step.
    alg: which positions come first, one of ALGORITHMS. None: `origin` (DiffuLLaMA's Algorithm 2), but `confidence` beside threshold
        or factor, and `entropy` beside entropy_bound.
    alg_temp: above 0, which positions come first is drawn with this temperature.
    budget, threshold, factor, entropy_bound: how many positions a step commits, at most one of them: a name in budget.py, or the
        bound of a budget that reads the predictions (threshold: commit what the model is at least this sure of). eps: the end of
        the time grid of the budgets `bernoulli` and `dream`, default 0.001.
    block_length: fill block after block from the left, this many positions each. None: a block model takes that of its training.
    cache: `none`, `prefix`, `dual` (approximate, for bidirectional models) or `block` (exact, for block models); None takes the exact
        one where there is one.
    draft_length: self-speculation, for models with an AR path: so many tokens drafted at once, verified by the causal pass; the text is
        the AR text. helper, helper_weight: APD, a small AR model (its `predict` is causal) beside a bidirectional one.
    revision, revision_strength: settled tokens may change again: `remdm`, `p2`, `wino`, `gidd`, `edits` (revise.py).
    initial_length: DAEDAL: begin with so many masks and let the answer grow to at most max_new_tokens.
    seed: the same seed (default 0) gives the same tokens; rows of one batch draw differently (row_keys, default 0 .. B-1).
    eos_token_id, pad_token_id: see the two functions.
    """

    steps: int | None = None
    temperature: float | None = None
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
    cache: str | None = None
    draft_length: int | None = None
    helper: Any = None
    helper_weight: float | None = None
    revision: str | None = None
    revision_strength: float | None = None
    initial_length: int | None = None
    generation_tokens_hook_func: Hook | None = None
    generation_logits_hook_func: Hook | None = None
    seed: int | None = None
    row_keys: Sequence[int] | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        check_numbers(vars(self))

    @property
    def ends(self) -> list[int]:
        ends = self.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    @property
    def may_change(self) -> bool:
        """Whether tokens that have settled may still change."""
        return self.generation_tokens_hook_func is not None or self.revision is not None

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
            "temperature": 0.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or None,  # 0 means no filter in transformers
            "repetition_penalty": 1.0 if self.repetition_penalty is None else self.repetition_penalty,
            "cfg_scale": self.cfg_scale or 0.0,
            "seed": self.seed or 0,
            "budget": self.budget,
            "threshold": self.threshold,
            "factor": self.factor,
            "entropy_bound": self.entropy_bound,
            "eps": 1e-3 if self.eps is None else self.eps,
            "block_length": self.block_length,
            "cache": self.cache,
            "draft_length": self.draft_length,
            "helper": self.helper,
            "helper_weight": 0.5 if self.helper_weight is None else self.helper_weight,
            "revision": self.revision,
            "revision_strength": self.revision_strength,
            "initial_length": self.initial_length,
            "order_temperature": self.alg_temp or 0.0,
            "tokens_hook": self.generation_tokens_hook_func,
            "logits_hook": self.generation_logits_hook_func,
        }


OPTIONS = tuple(field.name for field in fields(Options))
# What a generation_config.json may set.
SAVED_OPTIONS = (
    "max_new_tokens", "steps", "temperature", "top_p", "top_k", "repetition_penalty", "cfg_scale", "alg", "alg_temp", *_BUDGETS, "eps",
    "block_length", "cache", "draft_length", "revision", "revision_strength", "initial_length", "eos_token_id", "pad_token_id",
)  # fmt: skip


def check_numbers(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options that are words where a number belongs, and for half a step."""
    for names, kind, what in ((_WHOLE_NUMBERS, Integral, "a whole number"), (_NUMBERS, Real, "a number")):
        for name in names:
            value = options.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                raise ValueError(f"{name} is {value!r}; it must be {what}")


def with_defaults(given: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The options of a call over those of a generation_config.json.

    A call that names a sampler (alg, or a budget) is not mixed with half of the saved one: the saved budget goes. With a budget that
    reads the predictions, or first_hitting, the saved steps go as well (such a sampler takes the steps that it needs), and with the
    former the saved alg. With a sampler of another kind (speculation, a helper, a growing answer, a revision that has its own steps)
    all of the saved one goes (beside a revision guidance and penalty stay, as temperature and filters always do), and a saved one of
    another kind goes when the call names any sampler.
    """
    saved = dict(saved)
    own = {name for name in _OTHER_KINDS if name != "revision_strength" and given.get(name) is not None}  # a strength is none by itself
    if own and given.get("revision") not in POLISHING:
        kept = () if given.get("revision") is None else ("cfg_scale", "repetition_penalty")
        for name in ("alg", "alg_temp", "steps", "block_length", "cache", "cfg_scale", "repetition_penalty", *_BUDGETS, *_OTHER_KINDS):
            if name not in kept:
                saved.pop(name, None)
    named = {name for name in ("alg", *_BUDGETS) if given.get(name) is not None}
    if named | (set(given) & {"cache", "steps"}):
        for name in _OTHER_KINDS:
            saved.pop(name, None)
    if named:
        for name in _BUDGETS:
            saved.pop(name, None)
    if named & set(READING):
        saved.pop("alg", None)
    if named & set(READING) or given.get("alg") == "first_hitting":
        saved.pop("steps", None)
    options = {**saved, **given}
    if isinstance(options.get("steps"), SavedSteps) and options.get("max_new_tokens"):
        options["steps"] = options["steps"].over(options["max_new_tokens"])
    return options


def saved_options(values: Any) -> dict[str, Any]:
    """The options that a generation_config.json sets: `values` is its content, or the GenerationConfig that was made of it.

    Its steps were chosen for its max_new_tokens, so for another length they are scaled (SavedSteps). Raises ValueError for what is no
    number."""
    options = {} if values is None else options_of(values, SAVED_OPTIONS)
    check_numbers(options)
    if "steps" in options and options.get("max_new_tokens"):
        options["steps"] = SavedSteps(options["steps"], options["max_new_tokens"])
    return options


def configured(function: str, given: dict[str, Any], generation_config: Any, saved: Any = None) -> dict[str, Any]:
    """The options of a call: those given by name, over its `generation_config`, over the model's own (`saved`).

    Raises ValueError for a setting of `generation_config` that no sampler has: a beam search that is asked for does not take place.
    """
    options = saved_options(saved)
    if generation_config is not None:

        def refuse(name: str) -> ValueError:
            return ValueError(f"{function} cannot do what generation_config.{name} asks for; {_nearest(name, OPTIONS)}")

        options = with_defaults(options_of(generation_config, OPTIONS + _CALL_OPTIONS, refuse), options)
    return with_defaults(given, options)


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
    generation_config: Any = None,
    streamer: Any = None,
    stopping_criteria: Any = None,
    **options: Any,
) -> torch.Tensor | DiffusionOutput:
    """Prompts and `max_new_tokens` generated tokens: int64 (B, P + max_new_tokens), padded on the side where the inputs were.

    inputs, attention_mask: (B, P) prompts padded on either side, 0 marks padding. Tokens of the prompt are all given, a mask token
        among them too: gaps are for `infill`.
    generation_config: a GenerationConfig with options; those given by name come first.
    streamer: of transformers (TextStreamer, TextIteratorStreamer), for one row. It is fed the text as it settles from the left.
    stopping_criteria: a list of transformers' StoppingCriteria; they are asked about the text that has settled from the left, and
        what follows a stop becomes `pad_token_id` (default: the end token).
    options: max_new_tokens, do_sample (False is temperature 0), output_history, return_dict_in_generate, and see Options.
        eos_token_id: when given, what follows the first end token of the generated part becomes `pad_token_id` (default: the end
        token), and a row is done as soon as it has its end token and nothing is masked left of it.
    Raises ValueError for unknown options, with the nearest name, and for options that contradict each other.
    """
    if generation_config is not None:
        options = configured("diffusion_generate", options, generation_config)
    check_numbers(options)
    max_new_tokens, output_history, return_dict = (options.pop(name, None) for name in _CALL_OPTIONS)
    how = _options("diffusion_generate", options)
    if max_new_tokens is None or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if stopping_criteria is not None and how.pad_token_id is None and not how.ends:
        raise ValueError("stopping_criteria need pad_token_id: something must stand after the place where a row stops")
    canvas = canvas_after_prompts(inputs, attention_mask, max_new_tokens, how.row_keys)
    steps = denoise(predictor, canvas, end_ids=how.ends, **how.of_the_loop())
    follower = None
    if streamer is not None or stopping_criteria is not None:
        follower = Follower(canvas, how.ends, streamer, stopping_criteria, how.may_change)
    tokens_BL, nfe, history = _followed(steps, canvas, follower, output_history)
    sequences_BL = _pad_after_end(tokens_BL, canvas, how.ends, how.pad_token_id)
    if follower is not None:
        sequences_BL = _pad_after_stop(sequences_BL, canvas, follower.close(tokens_BL), how)
    return DiffusionOutput(sequences_BL, nfe, history) if return_dict else sequences_BL


def infill(
    predictor: Predictor,
    rows: Sequence[Sequence[int | None | Gap]],
    *,
    device: torch.device | str | None = None,
    generation_config: Any = None,
    streamer: Any = None,
    **options: Any,
) -> list[list[int]] | DiffusionOutput:
    """Fill the None of each row; rows may have any gaps and any lengths. Returns whole rows of tokens, without padding.

    rows: instead of None, (low, high) is a gap of so many tokens as fit best (length.py).
    device: of the canvas; default the predictor's. generation_config: as in `diffusion_generate`.
    streamer: as there, for one row. It is fed the text left of the first gap, then what follows as far as it has no hole.
    options: do_sample, output_history, return_dict_in_generate, and see Options. eos_token_id bans these tokens: text follows a gap,
        so it must not end there.
    """
    if generation_config is not None:
        options = configured("infill", options, generation_config)
        options.pop("max_new_tokens", None)
    output_history, return_dict = (options.pop(name, None) for name in _CALL_OPTIONS[1:])
    how = _options("infill", options)
    if torch.is_tensor(rows) or not all(isinstance(row, Sequence) for row in rows):
        raise ValueError("rows must be lists of tokens with None where one is to be filled, such as [[5, None, 7]]")
    device = device or getattr(predictor, "device", "cpu")
    canvas = build_canvas(with_lengths(predictor, rows, how.ends, device), how.pad_token_id or 0, device, how.row_keys)
    steps = denoise(predictor, canvas, banned_ids=how.ends, **how.of_the_loop())
    follower = None if streamer is None else Follower(canvas, (), streamer, may_change=how.may_change)
    tokens_BL, nfe, history = _followed(steps, canvas, follower, output_history)
    if follower is not None:
        follower.close(tokens_BL)
    filled = canvas.rows(tokens_BL)
    return DiffusionOutput(filled, nfe, history) if return_dict else filled


def with_lengths(
    predictor: Predictor, rows: Sequence[Sequence[int | None | Gap]], banned_ids: Sequence[int], device: torch.device | str
) -> Sequence[Sequence[int | None]]:
    """The rows with every gap of bounds (low, high) as long as fits best: None for each of its tokens.

    Raises ValueError for bounds without meaning, and for block models: they do not see what follows a gap.
    """
    if not any(isinstance(item, tuple) for row in rows for item in row):
        return rows
    if is_block_model(predictor):
        raise ValueError("a gap takes the length that fits what follows, and a block model does not see that: give one length")

    def fill(tried: list[list[int | None]]) -> tuple[list[list[int]], list[list[float]]]:
        canvas = build_canvas(tried, 0, device)
        tokens_BL, c_BL = canvas.tokens_BL, torch.ones(canvas.tokens_BL.shape, device=canvas.tokens_BL.device)
        for step in denoise(predictor, canvas, order="confidence", num_steps=STEPS_OF_A_CANDIDATE, banned_ids=banned_ids):
            tokens_BL, c_BL = step.tokens_BL, torch.where(step.committed_BL, step.confidence_BL, c_BL)
        return canvas.rows(tokens_BL), [c_L[: len(row)].tolist() for c_L, row in zip(c_BL, tried, strict=True)]

    return choose_lengths(predictor, rows, fill, device)


def _followed(
    steps: Iterator[Step], canvas: Canvas, follower: Follower | None, keep_history: bool | None
) -> tuple[torch.Tensor, int, tuple[torch.Tensor, ...] | None]:
    """(tokens_BL after the last step that was needed, forwards, tokens_BL after each step when they are asked for)."""
    tokens_BL, nfe, history = canvas.tokens_BL, 0, []
    for step in steps:
        tokens_BL, nfe = step.tokens_BL, step.nfe
        if keep_history:
            history.append(tokens_BL)
        if follower is not None and follower.see(step.tokens_BL, step.masked_BL):
            break
    return tokens_BL, nfe, tuple(history) if keep_history else None


def _options(function: str, options: dict[str, Any]) -> Options:
    do_sample = options.pop("do_sample", None)
    if do_sample is not None:
        options["temperature"] = (options.get("temperature") or 1.0) if do_sample else 0.0
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


def _pad_after_stop(tokens_BL: torch.Tensor, canvas: Canvas, kept: list[int | None], how: Options) -> torch.Tensor:
    """What follows the first `kept` generated tokens of a row becomes padding; None keeps them all."""
    number_BL = canvas.masked_BL.cumsum(dim=1)  # of each generated token in its row, from 1
    most_B = torch.tensor([canvas.masked_BL.shape[1] if count is None else count for count in kept], device=tokens_BL.device)
    behind_BL = canvas.masked_BL & (number_BL > most_B[:, None])
    return tokens_BL.masked_fill(behind_BL, how.ends[0] if how.pad_token_id is None else how.pad_token_id) if bool(behind_BL.any()) else tokens_BL
