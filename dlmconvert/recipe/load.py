"""From a name, a file or a checkpoint to one validated recipe; all mistakes at once, each with the nearest valid name."""

from __future__ import annotations

import copy
import json
import os
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dlmconvert.errors import UserError, nearest
from dlmconvert.methods import METHODS
from dlmconvert.recipe.schema import Recipe


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for text; everyone who writes a learning rate means a number (as YAML 1.2 does)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def recipes_folder() -> Path:
    """Where the shipped recipes lie: inside the wheel, or beside the package in a source tree."""
    inside = Path(__file__).parents[1] / "_recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The text of a shipped recipe, comments and all. Raises UserError with the nearest names."""
    path = recipes_folder() / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"there is no recipe {name!r}", nearest(name, recipe_names()), "dlmconvert recipes lists them all")
    return path.read_text(encoding="utf-8")


def load_recipe(what: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe from a shipped name, a YAML file, or a checkpoint (a folder or Hub id: `default` with source.model set).

    overrides: `key=value` words of the command line; they win over the file, the file over the method's row, the row over the
    schema's defaults. Raises UserError that lists every mistake.
    """
    values = _read(what)
    words = overrides or []
    named = [word.partition("=")[2] for word in words if word.startswith("method.name=")]
    method = values.get("method")
    if named and isinstance(method, dict) and method.get("name", "diffullama") != named[-1]:
        # Another method: the choices that the file made for its own (an annealing schedule, say) do not carry over.
        values["method"] = {}
    said: dict[str, Any] = {}
    for word in words:
        set_key(values, word)
        set_key(said, word)
    _drop_leftovers(values.get("method"), said.get("method"))
    if _is_gated(said):
        _drop_ar_loss(values.get("method"), said.get("method"))
    return validate(values, what)


def _read(what: str) -> dict[str, Any]:
    path = Path(what).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"no such recipe file: {what}", nearest(path.stem, recipe_names()), "dlmconvert recipes copy NAME writes one to start from")
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if what in recipe_names():
        return parse_yaml(recipe_text(what), what)
    if path.is_dir() or "/" in what:
        values = parse_yaml(recipe_text("default"), "default")
        values["name"] = Path(os.path.abspath(path)).name if path.is_dir() else what.rsplit("/", 1)[-1]
        values.setdefault("source", {})["model"] = what
        longest = _positions(path / "config.json")
        data = values.setdefault("data", {})
        if longest is not None and longest < data.get("row_length", longest):
            data["row_length"] = longest
        return values
    raise UserError(
        f"{what!r} is neither a recipe, nor a recipe file, nor a checkpoint folder",
        nearest(what, recipe_names()),
        "dlmconvert recipes lists the recipes; a Hub model has its owner in front, as in openai-community/gpt2",
    )


def _positions(config: Path) -> int | None:
    """The longest row of a checkpoint folder, from its config.json; None when it does not say."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = [values[name] for name in ("max_position_embeddings", "n_positions") if isinstance(values.get(name), int)]
    return found[0] if found else None


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML", str(getattr(error, "problem", error)), "") from error
    if not isinstance(values, dict):
        raise UserError(f"{where} is empty or not a mapping of keys", "", "dlmconvert recipes show default prints a complete one")
    return values


def set_key(values: dict[str, Any], word: str) -> None:
    """Apply one `a.b.c=value`; the value is YAML (numbers, lists, null)."""
    key, sign, text = word.partition("=")
    if not sign or not key:
        raise UserError(f"{word!r} is not key=value", "", "as in train.steps=200 or source.model=gpt2")
    try:
        value = yaml.load(text, Loader=_Loader) if text != "" else None
    except yaml.YAMLError:
        value = text
    section = values
    *path, last = key.split(".")
    for name in path:
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise UserError(f"{word!r}: {name} is a value, not a section", "", "dlmconvert recipes keys lists every key")
    section[last] = value


def validate(values: dict[str, Any], where: str) -> Recipe:
    """Fill in the method's row, then check everything against the schema."""
    values = copy.deepcopy(values)
    method = values.get("method")
    method = {"name": method} if isinstance(method, str) else method if method is not None else {}
    name = method.get("name", "diffullama") if isinstance(method, dict) else "diffullama"
    if isinstance(name, str) and name not in METHODS:
        raise UserError(f"{where}: method.name={name!r} is not a published method", nearest(name, METHODS), "")
    if isinstance(method, dict) and isinstance(name, str):
        row = copy.deepcopy(METHODS[name].choices)
        _drop_leftovers(row, method)
        if _is_gated(values):
            _drop_ar_loss(row, method)
        values["method"] = _merge(row, {"name": name, **method})
    lines: list[str] = []
    while True:
        try:
            recipe = Recipe.model_validate(values)
            break
        except ValidationError as error:
            problems = error.errors()
        lines += [_explain(problem) for problem in problems]
        # Values that are wrong by themselves are taken out, so that those that contradict each other are told at the same time.
        if not all([_take_out(values, problem["loc"]) for problem in problems]):
            break
    if not lines:
        return recipe
    what = f"{where}: {len(lines)} mistakes" if len(lines) > 1 else f"{where}: {lines[0]}"
    why = "\n".join(f"  {line}" for line in lines) if len(lines) > 1 else ""
    raise UserError(what, why, "dlmconvert recipes keys lists every key with its meaning")


def _take_out(values: Any, location: tuple[Any, ...]) -> bool:
    """Remove the value at a location of pydantic's; False when there is nothing to remove."""
    section: Any = values
    keys = [key for key in location if isinstance(key, int) or str(key).isidentifier()]
    for depth, key in enumerate(keys):
        # A mistake inside a list takes the whole list with it.
        inside = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and key in section and (depth == len(keys) - 1 or not isinstance(inside, dict)):
            del section[key]
            return True
        section = inside
        if section is None:
            # Taken out already, together with another mistake.
            return depth > 0
    return False


LEFTOVERS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("attention.anneal", lambda anneal: anneal == "none", ("attention.anneal_steps",)),
    ("attention.anneal", lambda anneal: anneal != "warm_up_stable_decay", ("attention.decay_steps",)),
    ("attention.anneal", lambda anneal: anneal != "block_growth", ("attention.block_stages",)),
    (
        "attention.pattern", lambda pattern: pattern in ("bidirectional", "causal"),
        ("attention.block_length", "attention.block_stages", "corruption.levels_per", "corruption.half_life"),
    ),
    ("corruption.kind", lambda kind: kind != "gidd", ("corruption.uniform_share",)),
    ("corruption.kind", lambda kind: kind != "masking", tuple(f"corruption.{name}" for name in ("count", "views", "half_life"))),
    (
        "corruption.kind", lambda kind: kind in ("all_masked", "none"),
        tuple(f"corruption.{name}" for name in ("band", "noise_levels", "levels_per", "rise_steps", "rise_from")),
    ),
    ("corruption.rise_steps", lambda steps: steps is None, ("corruption.rise_from",)),
    ("corruption.edit_share", lambda share: share == 0, ("corruption.edit_steps",)),
    ("objective.weight", lambda weight: weight != "cart", ("objective.cart_p",)),
)  # fmt: skip
"""(a choice, when it makes others meaningless, which) of the `method` section."""


def _drop_leftovers(below: Any, above: Any) -> None:
    """Take out of a method what only belonged to a choice that is made anew above it (on the command line, in the file): `anneal=none` means
    no schedule at all, not a leftover number of steps, and `pattern=bidirectional` no blocks. What is said above stays, to be refused."""

    for key, is_meaningless, gone in LEFTOVERS:
        part, _, name = key.partition(".")
        if name not in _inside(above, part) or not is_meaningless(_inside(above, part)[name]):
            continue
        for other in gone:
            part, _, name = other.partition(".")
            if name not in _inside(above, part):
                _inside(below, part).pop(name, None)


def _drop_ar_loss(below: Any, above: Any) -> None:
    """Adapters that act on masks only leave the next-token path as it is, so the loss that holds it belongs to the other trainings."""
    for name in ("ar_weight", "ar_schedule"):
        if name not in _inside(above, "objective"):
            _inside(below, "objective").pop(name, None)


def _is_gated(values: dict[str, Any]) -> bool:
    return _inside(_inside(values, "train"), "lora").get("gated") is True


def _inside(values: Any, name: str) -> dict[str, Any]:
    """A section of unchecked values; an empty one where there is none."""
    found = values.get(name) if isinstance(values, dict) else None
    return found if isinstance(found, dict) else {}


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _explain(problem: Any) -> str:
    # Branches of a union (`int`, `function-before[...]`) stand in the location as well; only keys help.
    keys = [str(part) for part in problem["loc"] if isinstance(part, int) or str(part).isidentifier()]
    keys = [k for k in keys if k not in ("str", "int", "float", "bool")]
    key = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        section = section_at(keys[:-1])
        choices = list(section.model_fields) if section else []
        return f"{key}: no such key; {nearest(keys[-1], choices)}"
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return "\n  ".join(message.split("; ")) if not key else f"{key}: {message}"
    return f"{key}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def section_at(path: list[str]) -> type[BaseModel] | None:
    """The schema class of a section such as ["method", "attention"], or None."""
    section: Any = Recipe
    for name in path:
        if name.isdigit():  # an item of a list: its section was found with the list
            continue
        field = section.model_fields.get(name)
        found = _sections_in(field.annotation) if field is not None else []
        if not found:
            return None
        section = found[0]
    return section


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The schema classes that a type is made of, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in typing.get_args(annotation) for section in _sections_in(inner)]


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.steps": 100, ...}: what two recipes are compared by."""
    result = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in ("source.scratch",):
            result.update(flat(value, name + "."))
        else:
            result[name] = value
    return result


def safe_keys() -> set[str]:
    """Keys without influence on the numbers: they may change while a run is under way."""
    found: set[str] = set()

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            if (field.json_schema_extra or {}).get("safe_to_change"):
                found.add(prefix + name)
            inner = section_at([*prefix.rstrip(".").split("."), name] if prefix else [name])
            if inner is not None:
                walk(inner, f"{prefix}{name}.")

    walk(Recipe, "")
    return found
