"""The sampler that a model folder names in its generation_config.json, and the one that an export names in its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlmconvert.errors import UserError
from dlmconvert.recipe.schema import Export, Recipe

_SAMPLER_FIELDS = ("max_new_tokens", "temperature", "top_p", "block_length", "cache", "threshold", "factor", "entropy_bound")


def saved_settings(folder: Path) -> dict[str, Any]:
    """What the folder's generation_config.json, which `tune-sampler` writes, sets of the sampler; empty when there is none.

    Raises UserError for a file that cannot be read.
    """
    from dlmconvert.sampling.options import saved_options

    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no settings by name")
        return saved_options(values)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read", str(error), "repair it, or remove it: then the defaults hold") from error


def saved_sampler(folder: Path) -> dict[str, Any]:
    """These without the ids of tokens, which are the tokenizer's."""
    return {name: value for name, value in saved_settings(folder).items() if name not in ("eos_token_id", "pad_token_id")}


def exported_sampler(recipe: Recipe, saved: dict[str, Any]) -> dict[str, Any]:
    """The defaults of the export's generation_config.json: the recipe's `export` section, or what a recipe says there that is not the
    default over the `saved` ones. A bound decides how many steps there are, and so does first_hitting."""
    from dlmconvert.diffusion.block_attention import BLOCK_PATTERNS
    from dlmconvert.sampling.options import with_defaults

    settings = recipe.export
    if saved:
        fields = Export.model_fields
        given = {name: getattr(settings, name) for name in (*_SAMPLER_FIELDS, "steps", "order") if getattr(settings, name) != fields[name].default}
        if "order" in given:
            given["alg"] = given.pop("order")
        chosen = with_defaults(given, saved)
        return chosen | ({"steps": int(chosen["steps"])} if "steps" in chosen else {})  # a plain number, for the length that goes out
    chosen = {name: getattr(settings, name) for name in _SAMPLER_FIELDS if getattr(settings, name) is not None}
    is_bound = any(name in chosen for name in ("threshold", "factor", "entropy_bound"))
    # A fixed number may be too few for the blocks of a block model; without one a row takes what it needs.
    if not is_bound and settings.order != "first_hitting" and recipe.method.attention.pattern not in BLOCK_PATTERNS:
        chosen["steps"] = settings.steps
    if not (is_bound and settings.order == "random"):  # by the reading of the bound, then
        chosen["alg"] = settings.order
    return chosen
