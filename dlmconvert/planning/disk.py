"""Disk that a run takes, and how many tokens its text holds, as far as that can be known without reading it."""

from __future__ import annotations

import json
from pathlib import Path

from dlmconvert.planning.architecture import Architecture
from dlmconvert.planning.settings import EngineSetting
from dlmconvert.recipe.schema import Recipe, text_sources

BYTES_PER_TOKEN_OF_TEXT = 4  # of plain English or code, for the estimate of the tokens in a local file


def unique_tokens_of(recipe: Recipe) -> tuple[int | None, str]:
    """Tokens of `data.train`, and what that number is: the prepared rows where they are there already, else an estimate from the size of
    the files, else the bound that `data.max_tokens` sets."""
    from dlmconvert.data.sources import total_bytes
    from dlmconvert.errors import UserError
    from dlmconvert.planning.text import size

    sources = text_sources(recipe.data.train)
    if not sources:
        return None, "data.train is empty"
    prepared = prepared_tokens(recipe)
    if prepared is not None:
        return prepared
    bound = recipe.data.max_tokens * len(sources) if recipe.data.max_tokens else None
    try:
        found = total_bytes(sources)
    except UserError as error:
        return bound, f"{error.what}; data.max_tokens bounds it" if bound else error.what
    if found is None:
        return bound, "at most: data.max_tokens for each source" if bound else "unknown until `prepare` has read the text: give --unique-tokens"
    estimate = found // BYTES_PER_TOKEN_OF_TEXT
    if bound is not None and bound < estimate:
        return bound, "at most: data.max_tokens for each source"
    return estimate, f"an estimate: {size(found)} of text, {BYTES_PER_TOKEN_OF_TEXT} bytes a token"


def prepared_tokens(recipe: Recipe) -> tuple[int, str] | None:
    """Tokens of the newest prepared rows of this text in the cache, and where they are; None when there are none."""
    data = recipe.data
    cache = Path(data.cache).expanduser() if data.cache else Path(recipe.run.folder or f"runs/{recipe.name}").resolve().parent / ".tokens"
    names = [source.path for source in text_sources(data.train)]
    found = []
    for folder in cache.glob("*"):
        files = [folder / f"train-{number}" / "meta.json" for number in range(len(names))]
        if not all(file.is_file() for file in files) or (folder / f"train-{len(names)}").exists():
            continue
        metas = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        same = all(
            (meta.get("source"), meta.get("row_length"), meta.get("documents")) == (name, data.row_length, data.documents) for meta, name in zip(metas, names, strict=True)
        )
        if same:
            found.append((files[0].stat().st_mtime, sum(meta["num_tokens"] for meta in metas), folder))
    if not found:
        return None
    _, num_tokens, folder = max(found)
    return num_tokens, f"counted: the rows prepared in {folder.parent.name}/{folder.name}"


def checkpoint_bytes(num_trainable: int, setting: EngineSetting, precision: str) -> int:
    """One checkpoint of all processes: float32 weights and two moments; ZeRO 1 and 2 keep the weights in the compute type besides."""
    besides = (4 if precision == "fp32" else 2) if setting.name == "deepspeed" and setting.stage in (1, 2) else 0
    return (12 + besides) * num_trainable


def disk_of(recipe: Recipe, shape: Architecture, stages: list[tuple[str, int, EngineSetting]], unique_tokens: int | None) -> dict[str, int]:
    """Bytes in the run folder and its cache. stages: (name, trained parameters, engine). Checkpoints: those kept and the one being written."""
    token_bytes = 2 if shape.vocab_size <= 1 << 16 else 4
    folders = 1 + sum(name != "pretrain" for name, _, _ in stages) + ("export" in recipe.stages)
    sections = {"pretrain": recipe.pretrain, "adapt": recipe.train, "sft": recipe.sft}
    return {
        "tokens": (unique_tokens or 0) * token_bytes,
        "checkpoints": sum((sections[name].keep_checkpoints + 1) * checkpoint_bytes(trained, setting, recipe.engine.precision) for name, trained, setting in stages),
        "models": folders * 4 * shape.num_parameters,
    }
