"""A tiny converted model, and its AR source, as folders on disk: for the verbs that decode."""

from __future__ import annotations

import json
from pathlib import Path

END, MASK, VOCAB = 256, 257, 258


def byte_tokenizer():
    """256 bytes, `<end>`, `<mask>`; no chat template, no bos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: i for i, token in enumerate([*letters, "<end>", "<mask>"])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", mask_token="<mask>")


def write_folder(folder: Path, *, converted: bool, positions: int = 128, seed: int = 1, generation: dict | None = None, **spec) -> Path:
    """Random weights, two layers. converted: with a `dlm` section; else an ordinary AR checkpoint."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from dlmconvert.backbone.load import save_model_folder
    from dlmconvert.backbone.spec import DlmSpec

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=260, n_positions=positions, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=END)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that predictions differ from place to place
    values = {"mask_token_id": MASK, "vocab_size": VOCAB, "trained": "sft", **spec}
    save_model_folder(folder, model, byte_tokenizer(), DlmSpec(**values) if converted else None)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
