"""The stage `prepare`: load, check, choose the mask token, probe, write source/; and models from nothing before it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from dlmconvert.errors import UserError
from dlmconvert.recipe.schema import text_sources
from dlmconvert.runs.stage import StageContext


def build_scratch(context: StageContext, folder: Path) -> None:
    """A checkpoint folder with random weights and a tokenizer, from `source.scratch`."""
    from dlmconvert.backbone.load import build_model, load_tokenizer, save_model_folder, scratch_config
    from dlmconvert.backbone.scratch import train_tokenizer
    from dlmconvert.data.sources import read_documents

    source = context.recipe.source
    assert source.scratch is not None
    config = scratch_config(source.scratch)
    vocab_size = config.get_text_config().vocab_size
    if source.tokenizer:
        tokenizer = load_tokenizer(source.tokenizer)
    else:
        if source.scratch_tokenizer == "bpe":
            context.reporter.say(f"  training a byte-level BPE tokenizer of {vocab_size} tokens on data.train")
        texts = (document.text for one in text_sources(context.recipe.data.train) for document in read_documents(one))
        tokenizer = train_tokenizer(texts, vocab_size, source.scratch_tokenizer)
    if len(tokenizer) > vocab_size:
        raise UserError(f"source.scratch.vocab_size={vocab_size} is smaller than the tokenizer's {len(tokenizer)} tokens", "", f"set source.scratch.vocab_size={len(tokenizer)}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.get_text_config(), name, getattr(tokenizer, name))
    model = build_model(config, source.seed)
    replace_folder(folder, lambda temporary: save_model_folder(temporary, model, tokenizer, spec=None))


# prepare: load, check, choose the mask token, probe, write source/


def prepare(context: StageContext) -> dict[str, Any]:
    from dlmconvert.backbone.load import load_config, load_model, load_tokenizer, save_model_folder
    from dlmconvert.backbone.mask_token import choose_mask_token, install_mask_token
    from dlmconvert.backbone.rewrite import probe_family, rewrite_config
    from dlmconvert.backbone.spec import DlmSpec
    from dlmconvert.backbone.streaming import CannotStream, open_source

    run, reporter, source = context.run, context.reporter, context.recipe.source
    checkpoint, origin = source_folder(context)
    config = load_config(checkpoint, source.trust_remote_code)
    probe_family(config, origin, source.trust_remote_code)
    reporter.say(f"  {config.model_type}: attention follows every pattern that training will ask for (probed)")
    for note in rewrite_config(config):
        reporter.say(f"  {note}")
    tokenizer = load_tokenizer(source.tokenizer or checkpoint, source.trust_remote_code)
    tensors = None
    try:
        tensors = open_source(checkpoint, config, source.trust_remote_code)
        model = tensors.model
    except CannotStream as reason:
        reporter.say(f"  loading the model as a whole: {reason}")
        model = load_model(checkpoint, config, "auto", source.trust_remote_code)
    embedding_rows = model.get_input_embeddings().weight.shape[0]
    choice = choose_mask_token(source.mask_token, tokenizer, embedding_rows, config.model_type)
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # of ordinary text: the mask token and fillers before it are never produced
    reporter.say(f"  mask token {choice.text!r}, id {choice.id}: {choice.reason}")
    spec = DlmSpec(
        alignment=context.recipe.method.alignment,
        mask_token_id=choice.id,
        mask_is_word=choice.is_word,
        vocab_size=vocab_size,
        method=context.recipe.method.name,
        trained="ar",
    )

    def write(folder: Path) -> None:
        if tensors is not None:
            tensors.write(folder, tokenizer, spec, choice, source.mask_init, source.seed)
        else:
            install_mask_token(model, tokenizer, choice, source.mask_init, source.seed)
            save_model_folder(folder, model, tokenizer, spec)

    replace_folder(run.model_folder("prepare"), write)
    parameters = sum(p.numel() for p in model.parameters())
    return {"origin": origin, "parameters": parameters, "mask_token_id": choice.id, "mask_token": choice.text, "mask_reason": choice.reason}


def source_folder(context: StageContext) -> tuple[Path, str]:
    """(checkpoint folder, its name for people)."""
    from dlmconvert.backbone.load import NotFound, resolve_checkpoint

    run, source = context.run, context.recipe.source
    if source.model is not None:
        try:
            return resolve_checkpoint(source.model, source.revision), source.model
        except NotFound as error:
            if source.if_missing != "scratch":
                raise
            context.reporter.warn(
                f"  !!! {error.what}\n  !!! source.if_missing=scratch: going on with RANDOM WEIGHTS of the same architecture. "
                "This checks that everything runs; the model that comes out knows nothing."
            )
    elif context.recipe.pretrain is not None:
        return run.model_folder("pretrain"), f"the AR model trained in {run.stage_folder('pretrain')}"
    folder = run.path / "scratch"
    if not (folder / "config.json").is_file():
        build_scratch(context, folder)
    return folder, "random weights (source.scratch)"


def replace_folder(folder: Path, write: Any) -> None:
    """write(temporary), then rename: the folder is whole or not there."""
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
