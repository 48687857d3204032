"""Tiny converted models of several families, written to disk as a stage writes them."""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dlmconvert.backbone.load import save_model_folder, scratch_config
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.exporting.card import CardFacts, Measured

# 256 bytes, begin, end, pad, mask.
BOS, EOS, PAD, MASK = 256, 257, 258, 259
VOCAB = 260
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
FAMILIES = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", **SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", **SMALL, "tie_word_embeddings": True},
    # Local windows (widened), a rotary base a kind of layer, and a window that would be seen by the comparison if it stayed.
    "gemma3": {
        "model_type": "gemma3_text", **SMALL, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    # transformers fuses the experts in memory and names them otherwise in files.
    "mixtral": {"model_type": "mixtral", **SMALL, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4, "tie_word_embeddings": False},
}  # fmt: skip
VERIFIED = ("gpt2", "llama", "gemma3")  # each verification is a process; qwen2 has its own in test_export_refusals.py, and stranger.py visits all
ALIGNMENTS = {"qwen2": "in_place"}
GENERATION = {"steps": 8, "max_new_tokens": 12, "temperature": 0.9, "top_p": 0.9, "order": "random"}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_special_tokens({"mask_token": "<|mask|>"})
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id, fast.mask_token_id) == (BOS, EOS, PAD, MASK)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def spec_of(family: str, **changes) -> DlmSpec:
    values = {"alignment": ALIGNMENTS.get(family, "shift"), "mask_token_id": MASK, "vocab_size": VOCAB, "trained": "adapt"}
    return DlmSpec(**(values | changes))


def write_model(folder, family: str, spec: DlmSpec | None = None, **changes):
    """A stage's model folder, as backbone writes it."""
    # More rows than tokens: the rest is padding that no sampler may produce.
    config = scratch_config(FAMILIES[family] | {"vocab_size": VOCAB + 4, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD} | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():  # larger weights, so that differences show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    spec = spec or spec_of(family)
    if family == "mixtral":
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"dlm": spec.to_dict(), "is_causal": False}))
    else:
        save_model_folder(folder, model, byte_tokenizer(), spec)
    return folder


def facts(**changes) -> CardFacts:
    values = {
        "name": "tiny-dlm",
        "source": "/home/somebody/models/tiny-ar",
        "license": "apache-2.0",
        "recipe": {"name": "tiny", "source": {"model": "/home/somebody/models/tiny-ar"}, "train": {"steps": 10}},
        "training": {"optimizer steps": 10, "tokens seen": 123456, "hours": None},
        "measured": [Measured("NELBO after adaptation", 2.5, "nats a token", 0.01, "64 held-out rows"), Measured("AR NLL", None, "nats a token")],
    }
    return CardFacts(**(values | changes))
