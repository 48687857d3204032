"""Prepared rows for the stages of a run: which tokens stand between documents, where the cache is, what is held out."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlmconvert.errors import UserError
from dlmconvert.recipe.schema import text_sources
from dlmconvert.runs.inputs import require_conversations, require_text
from dlmconvert.runs.stage import StageContext


def cache_folder(context: StageContext) -> Path:
    """`data.cache`, else `.tokens` beside the run: shared by all runs there, named by content."""
    chosen = context.recipe.data.cache
    return Path(chosen).expanduser() if chosen else context.run.path.resolve().parent / ".tokens"


def text_rows(context: StageContext, tokenizer: Any, forbidden_id: int | None) -> tuple[list[Any], list[float], Any | None]:
    """(stores, weights, held-out store or None) of `data`. Made once; later calls open what is there.

    Raises UserError when `data.train` is empty.
    """
    from dlmconvert.data.packing import prepare_rows

    require_text(context.recipe)
    data = context.recipe.data
    sources = text_sources(data.train)
    prefix_id, separator_id = document_marks(tokenizer)
    validation = data.validation if isinstance(data.validation, float | int) else text_sources(data.validation)
    with told(context, "tokens") as progress:
        stores, held = prepare_rows(
            sources,
            tokenizer=tokenizer,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            row_length=data.row_length,
            cache_folder=cache_folder(context),
            documents=data.documents,
            prefix_id=prefix_id,
            separator_id=separator_id,
            forbidden_id=forbidden_id,
            max_tokens=data.max_tokens,
            validation=validation,
            workers=data.workers,
            progress=progress,
        )
    rows = sum(store.num_rows for store in stores)
    kept = f", {held.num_rows:,} held out" if held is not None else ", nothing held out"
    context.reporter.say(f"  {rows:,} rows of {data.row_length} tokens{kept}")
    return stores, [source.weight for source in sources], held


def chat_rows(context: StageContext, tokenizer: Any, forbidden_id: int | None) -> tuple[Any, Any | None]:
    """(training rows, held-out rows or None) of `sft.data`. The tokenizer gets the plain chat template when it has none."""
    from dlmconvert.data.chat import ensure_chat_template
    from dlmconvert.data.conversations import Layout, conversation_rows

    sft = context.recipe.sft
    data = require_conversations(context.recipe)
    if ensure_chat_template(tokenizer):
        context.reporter.say("  the tokenizer has no chat template: a plain one (User: ... Assistant: ...) is set and exported with the model")
    end_id = tokenizer.eos_token_id
    if end_id is None:
        raise UserError("the tokenizer has no end token", "answers could not be ended", "name a tokenizer that has one: source.tokenizer=...")
    prefix_id, _ = document_marks(tokenizer)
    layout = Layout(
        row_length=sft.row_length or context.recipe.data.row_length,
        end_id=end_id,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_id,
        prefix_id=prefix_id,
        pad_to=sft.pad_to,
        too_long=sft.too_long,
    )
    with told(context, "conversations") as progress:
        train, held = conversation_rows(
            data,
            tokenizer=tokenizer,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            layout=layout,
            cache_folder=cache_folder(context),
            prompt_field=sft.prompt_field,
            response_field=sft.response_field,
            split=sft.split,
            forbidden_id=forbidden_id,
            validation=sft.validation,
            progress=progress,
        )
    meta = train.meta
    context.reporter.say(
        f"  {train.num_rows:,} answers in rows of {layout.row_length} tokens ({held.num_rows if held else 0:,} held out); "
        f"{meta.get('num_prompts_truncated', 0)} prompts truncated, {meta.get('num_answers_cut', 0)} answers cut, {meta.get('num_skipped', 0)} skipped"
    )
    return train, held


def document_marks(tokenizer: Any) -> tuple[int | None, int | None]:
    """(token in front of a document, token behind it), as the source model knows documents: a tokenizer that begins every text
    with bos means bos in front; any other gets its end token behind."""
    if tokenizer.bos_token_id is not None:
        if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
            return tokenizer.bos_token_id, None
    return None, tokenizer.eos_token_id


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Changes with anything that changes the tokens of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
    else:
        text = repr(sorted(tokenizer.get_vocab().items())) + repr(tokenizer.init_kwargs)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@contextmanager
def told(context: StageContext, label: str):
    """A bar out of (count, fraction) reports; it appears with the first one, so that prepared rows open silently."""
    opened: list[Any] = []
    shown = 0.0

    def report(count: int, fraction: float | None) -> None:
        nonlocal shown
        if not opened:
            manager = context.reporter.progress(f"preparing {label}", 100)
            opened.extend([manager, manager.__enter__()])
        now = 100 * fraction if fraction is not None else shown
        opened[1].advance(max(0.0, now - shown), f"{count:,} {label}")
        shown = max(shown, now)

    try:
        yield report
    finally:
        if opened:
            opened[0].__exit__(None, None, None)
