"""The sampler's options on the command line: one list for every verb that decodes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dlmconvert.errors import UserError, nearest

# Names of sampling/order.py, budget.py, cache.py and revise.py, without importing torch for --help.
ORDERS = ("random", "confidence", "entropy", "margin", "left_to_right", "first_hitting")
CACHES = ("none", "prefix", "dual", "block")
REVISIONS = ("remdm", "p2", "wino", "gidd", "edits")
BUDGETS = ("even", "ancestral", "bernoulli", "dream", "llada")
# Where neither the command line nor the folder's generation_config.json says anything: DiffuGPT's (arXiv 2410.17891).
DEFAULTS = {"max_new_tokens": 64, "steps": 64, "alg": "random", "temperature": 0.95, "top_p": 0.9, "top_k": None}


def _option(kind: type, text: str, **more: Any) -> Any:
    return Annotated[kind | None, typer.Option(help=text, rich_help_panel="Sampler", **more)]


# Option of the command line -> its type and help. The sampler's own name is the same, but for those of _SPELLED.
SAMPLER = {
    "steps": _option(int, "Denoising steps; fewer are faster and coarser.", min=1),
    "order": _option(str, f"Which positions settle first: {', '.join(ORDERS)}."),
    "budget": _option(str, f"How many settle at a step, whatever the model says: {', '.join(BUDGETS)}."),
    "threshold": _option(float, "Settle all that the model is at least this sure of (0.9), instead of fixed steps.", min=0.0),
    "factor": _option(float, "Fast-dLLM's factor rule (0.7 to 1.9; larger is faster), instead of fixed steps.", min=0.0),
    "entropy_bound": _option(float, "EB-Sampler's bound in nats (0.001 to 1), instead of fixed steps.", min=0.0),
    "block_length": _option(int, "Fill block after block from the left, this many tokens each.", min=1),
    "cache": _option(str, "prefix or dual: keep the keys of other blocks, approximately (bidirectional models); block: exactly (block models); none."),
    "draft_length": _option(int, "Self-speculation: draft so many tokens at once, verify them by the causal pass (models with an AR path).", min=1),
    "revision": _option(str, f"Settled tokens may change again: {', '.join(REVISIONS)}."),
    "revision_strength": _option(float, "Of the revision: how often (remdm), from which probability on (wino, edits), at which temperature (gidd).", min=0.0),
    "initial_length": _option(int, "Begin with so many masks and let the answer grow to --max-new-tokens (DAEDAL).", min=1),
    "helper": _option(str, "APD: a small AR model beside the converted one.", metavar="MODEL"),
    "helper_weight": _option(float, "The diffusion model's share beside the helper, 0 to 1; 0.5.", min=0.0, max=1.0),
    "temperature": _option(float, "0 takes the most probable token.", min=0.0),
    "top_p": _option(float, "Keep the most probable tokens that together have this probability; 1 keeps all."),
    "top_k": _option(int, "Keep this many of the most probable tokens; 0 keeps all.", min=0),
    "repetition_penalty": _option(float, "Above 1, tokens that stand in the text already become less probable."),
    "cfg_scale": _option(float, "Classifier-free guidance, 0 is off; twice the forwards.", min=0.0),
}
_SPELLED = {"order": "alg"}
_CHOICES = {"order": ORDERS, "budget": BUDGETS, "cache": CACHES, "revision": REVISIONS}
_ONCE = ("helper",)  # a model is named when the command starts, and not changed while `chat` runs


def with_sampler(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of SAMPLER; it receives those that were typed as one dict, `asked`, under the sampler's own names."""
    own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "asked"]

    def command(**values: Any) -> None:
        typed = {name: values.pop(name) for name in SAMPLER}
        verb(**values, asked=asked_options(typed))

    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in SAMPLER.items()]
    command.__signature__ = inspect.Signature([*own, *more])
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *more]}
    command.__name__, command.__doc__, command.__module__ = verb.__name__, verb.__doc__, verb.__module__
    return command


def asked_options(typed: dict[str, Any]) -> dict[str, Any]:
    """The sampler's names of the options that were typed (None: not typed). Raises UserError for an order or budget that does not exist."""
    for option, valid in _CHOICES.items():
        value = typed.get(option)
        if value is not None and value not in valid:
            raise UserError(f"--{option} {value} is no {option}", nearest(value, valid))
    return {_SPELLED.get(name, name): value for name, value in typed.items() if value is not None}


def parse_setting(text: str, *, may_name_helper: bool = False) -> tuple[str, Any]:
    """`threshold=0.9` -> (the sampler's name, the value). Raises UserError for a name or a value that does not fit."""
    name, equals, value = (part.strip() for part in text.partition("="))
    name = name.replace("-", "_").removeprefix("__")
    own = {theirs: ours for ours, theirs in _SPELLED.items()}
    known = {**{name: kind for name, kind in SAMPLER.items() if may_name_helper or name not in _ONCE}, "max_new_tokens": Annotated[int | None, None], "seed": Annotated[int | None, None]}
    name = own.get(name, name)
    if name in known and not equals:
        raise UserError(f"{text!r} has no value", "", f"write it as {name}=...")
    if name not in known:
        raise UserError(f"{text!r} is no setting of the sampler", nearest(name, known), "write it as threshold=0.9")
    if value.lower() in ("", "none", "null"):
        return _SPELLED.get(name, name), None
    kind = next(part for part in known[name].__origin__.__args__ if part is not type(None))
    try:
        typed = kind(value)
    except ValueError as error:
        raise UserError(f"{name}={value}: not {'a whole number' if kind is int else 'a number'}") from error
    least = next((getattr(part, "min", None) for part in known[name].__metadata__ if part is not None), 1 if name == "max_new_tokens" else None)
    if typed != typed:
        raise UserError(f"{name}={value}: not a number")
    if least is not None and typed < least:
        raise UserError(f"{name}={value} is below {least:g}")
    ((spelled, typed),) = asked_options({name: typed}).items()
    return spelled, typed
