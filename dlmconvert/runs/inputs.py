"""What the stages of a command read from outside, looked at before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dlmconvert.errors import UserError
from dlmconvert.recipe.schema import Recipe, text_sources


def check_inputs(recipe: Recipe, stages: Iterable[str]) -> None:
    """Raise UserError for a text, conversations or a checkpoint folder that these stages need and that are not there.

    Only names are looked at: what is wrong inside a file is told, with its line, when it is read.
    """
    stages = set(stages)
    paths = []
    if stages & {"pretrain", "adapt"}:
        require_text(recipe)
        paths += [source.path for source in text_sources(recipe.data.train) + text_sources(recipe.data.validation)]
    if "sft" in stages:
        paths.append(require_conversations(recipe))
        paths += [recipe.sft.validation] if isinstance(recipe.sft.validation, str) else []
    model = recipe.source.model
    if "prepare" in stages and model is not None and recipe.source.if_missing == "error":
        if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).expanduser().is_dir():
            from dlmconvert.backbone.load import resolve_checkpoint

            resolve_checkpoint(model)  # raises, naming the neighbours
    from dlmconvert.data.sources import is_local, local_files

    for path in paths:
        if not path.startswith("builtin:") and is_local(path):
            local_files(path)


def require_text(recipe: Recipe) -> None:
    if not text_sources(recipe.data.train):
        raise UserError("data.train is empty: there is no text to train on", "", "add data.train=FILE (.txt, .jsonl, .parquet), a folder, or a Hub dataset")


def require_conversations(recipe: Recipe) -> str:
    """`sft.data`, which must be set."""
    if recipe.sft.data is None:
        raise UserError("sft.data is empty: there are no conversations to train on", "", "add sft.data=CHAT.jsonl (records with `messages`, or a prompt and a response field)")
    return recipe.sft.data
