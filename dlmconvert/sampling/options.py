"""What a call of the sampler may ask for (`Options`), and what a generation_config.json says for it: names, types, precedence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from .blocks import SavedSteps
from .budget import READING
from .predictions import Hook
from .revise import POLISHING
from .streaming import options_of

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
CALL_OPTIONS = ("max_new_tokens", "output_history", "return_dict_in_generate")
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

    @property
    def _order(self) -> str | None:
        """None: random, or of samplers that have one, their own."""
        if self.alg is not None:
            return ALGORITHMS[self.alg]
        if self.entropy_bound is not None:
            return "entropy"
        reads_confidence = self.factor is not None or (self.threshold is not None and self.initial_length is None and self.revision != "wino")
        return "confidence" if reads_confidence else None

    def of_the_loop(self) -> dict[str, Any]:
        """The settings of `denoise` that they are. Raises ValueError for an unknown alg."""
        if self.alg is not None and self.alg not in ALGORITHMS:
            raise ValueError(f"unknown alg {self.alg!r}; {_nearest(self.alg, ALGORITHMS)}")
        return {
            "num_steps": self.steps,
            "order": self._order,
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
            "helper_weight": self.helper_weight,
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
    for name in ("eos_token_id", "pad_token_id"):
        value = options.get(name)
        ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, Integral) for token in ids):
            raise ValueError(f"{name} is {value!r}; it must be the id of a token{', or a list of them' if name == 'eos_token_id' else ''}")


def with_defaults(given: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The options of a call over those of a generation_config.json.

    A call that names a sampler (alg, or a budget) is not mixed with half of the saved one: the saved budget goes. With a budget that
    reads the predictions, or first_hitting, the saved steps go as well (such a sampler takes the steps that it needs), and with the
    former the saved alg. With a sampler of another kind (speculation, a helper, a growing answer, a revision that has its own steps)
    all of the saved one goes (but for temperature, filters and penalty, and the guidance where it can act: not in self-speculation),
    and a saved one of another kind goes when the call names any sampler.
    """
    saved = dict(saved)
    # A strength names no sampler by itself, and polishing follows any.
    own = {name for name in _OTHER_KINDS if name != "revision_strength" and given.get(name) is not None}
    own -= {"revision"} if given.get("revision") in POLISHING else set()
    if own:
        for name in ("alg", "alg_temp", "steps", "block_length", "cache", *_BUDGETS, *_OTHER_KINDS):
            saved.pop(name, None)
    if given.get("revision") is not None:
        saved.pop("draft_length", None)  # what the AR path has verified is not revised
    if given.get("draft_length") is not None and given.get("helper") is None:
        saved.pop("cfg_scale", None)
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

        options = with_defaults(options_of(generation_config, OPTIONS + CALL_OPTIONS, refuse), options)
    return with_defaults(given, options)


def asked_options(function: str, options: dict[str, Any]) -> Options:
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
