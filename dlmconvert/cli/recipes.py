"""`dlmconvert recipes`: what is shipped, what it says, a copy to change, and every key with its meaning."""

from __future__ import annotations

from typing import Annotated, Any

import typer

recipes = typer.Typer(help="List the shipped recipes; show or copy one; explain the keys.", no_args_is_help=False)


@recipes.callback(invoke_without_command=True)
def listing(context: typer.Context, json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    if context.invoked_subcommand is not None:
        return
    from dlmconvert.cli.console import out
    from dlmconvert.recipe.load import recipe_names, recipe_text

    found = {name: summary(recipe_text(name)) for name in recipe_names()}
    if json:
        _out_json([{"name": name, "summary": text} for name, text in found.items()])
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in found.items():
        table.add_row(name, escape(text))
    out(table)


@recipes.command()
def show(name: Annotated[str, typer.Argument(help="Recipe name.")]) -> None:
    """Print a recipe, comments and all."""
    from dlmconvert.cli.console import out
    from dlmconvert.recipe.load import recipe_text

    out(recipe_text(name).rstrip("\n"))


@recipes.command()
def copy(
    name: Annotated[str, typer.Argument(help="Recipe name.")],
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help="Where to (default: NAME.yaml here).")] = None,
) -> None:
    """Write a recipe to a file of your own. Never overwrites."""
    from pathlib import Path

    from dlmconvert.cli.console import console
    from dlmconvert.errors import EXIT_FAILED, UserError
    from dlmconvert.recipe.load import recipe_text

    text = recipe_text(name)
    path = Path(file or f"{name}.yaml").expanduser()
    if path.is_dir():
        path = path / f"{name}.yaml"
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: a recipe file ends in .yaml", "", f"dlmconvert recipes copy {name} {path.with_name(path.name + '.yaml')}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as target:  # x: fails where a file is, without a moment between looking and writing
            target.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists already and stays as it is", "", f"give another name: dlmconvert recipes copy {name} FILE") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written", error.strerror or str(error), "", exit_code=EXIT_FAILED) from None
    console.print(f"wrote {path}; run it: dlmconvert run {path}", markup=False, soft_wrap=True)


@recipes.command()
def keys(
    prefix: Annotated[str, typer.Argument(help="Only keys below this one, as in train or method.attention.")] = "",
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Every key of a recipe: type, default, meaning."""
    from dlmconvert.cli.console import out
    from dlmconvert.errors import UserError, nearest

    every = list(recipe_keys())
    chosen = [row for row in every if not prefix or row["key"] == prefix or row["key"].startswith(prefix + ".")]
    if not chosen:
        sections = {row["key"].rsplit(".", 1)[0] for row in every if "." in row["key"]}
        raise UserError(f"no key begins with {prefix!r}", nearest(prefix, sorted(sections | {row["key"] for row in every})), "dlmconvert recipes keys lists them all")
    if json:
        _out_json(chosen)
        return
    for row in chosen:
        safe = "; may change while a run is under way" if row["safe_to_change"] else ""
        out(f"{row['key']}: {row['type']} = {row['default']}{safe}")
        if row["meaning"]:
            out(f"    {row['meaning']}")


def summary(text: str) -> str:
    """The first comment line of a recipe."""
    first = text.lstrip().partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def recipe_keys():
    """Every key of the schema in order: {key, type, default, meaning, safe_to_change}. Lists of sections show as `data.train[].path`."""
    from dlmconvert.recipe.schema import Recipe, TextSource

    yield from _keys_of(Recipe, "")
    yield from _keys_of(TextSource, "data.train[].")


def _keys_of(section: Any, prefix: str):
    from pydantic import BaseModel

    for name, field in section.model_fields.items():
        inner = next((a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if inner is not None:
            if not isinstance(field.default, BaseModel):  # a section that may be absent
                yield _key(prefix + name, "section or null", field)
            yield from _keys_of(inner, f"{prefix}{name}.")
            continue
        yield _key(prefix + name, _type_name(section, name, field), field)


def _key(key: str, kind: str, field: Any) -> dict[str, Any]:
    from pydantic_core import PydanticUndefined

    default = "required" if field.default is PydanticUndefined else _yaml(field.default)
    meaning = " ".join((field.description or "").split())
    return {"key": key, "type": kind, "default": default, "meaning": meaning, "safe_to_change": bool((field.json_schema_extra or {}).get("safe_to_change"))}


def _yaml(value: Any) -> str:
    import json

    return json.dumps(value)


def _type_name(section: Any, name: str, field: Any) -> str:
    """The declared type in words, with its bounds: `int > 0`, `masking | none`, `number or null`."""
    schema = section.model_json_schema()["properties"][name]
    return _describe(schema)


_WORDS = {"integer": "int", "number": "number", "string": "text", "boolean": "true or false", "object": "mapping", "array": "list", "null": "null"}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def _describe(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_describe(part) for part in schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "$ref" in schema:
        return "section"
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return "list of " + ", ".join(_describe(part) for part in schema["prefixItems"])
        return f"list of ({_describe(schema.get('items', {}))})"
    bounds = [f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema]
    return " ".join([_WORDS.get(schema.get("type", ""), "any"), " and ".join(bounds)]).strip()


def _out_json(value: Any) -> None:
    import json

    from dlmconvert.cli.console import out

    out(json.dumps(value, indent=1))
