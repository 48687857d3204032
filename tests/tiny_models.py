"""Tiny models of many families, and where the shared known answers lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[1].parent / "shared"
VOCAB = 300
TEXT = [
    "def add(first, second):\n    return first + second\n",
    "The quick brown fox jumps over the lazy dog and the dog sleeps on.",
    "for index in range(10):\n    print(index, index * index)\n",
    "In the beginning there was a model that read from left to right.",
] * 4

_BASE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "vocab_size": VOCAB, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
# Windows of 4, so that a window which stays narrow shows.
FAMILIES = {
    "gpt2": _GPT2,
    "llama": _BASE | {"tie_word_embeddings": False},
    "qwen2": _BASE | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": _BASE | {"head_dim": 8},
    "mistral": _BASE | {"head_dim": 8, "sliding_window": 4},
    "phi3": _BASE,
    "olmo2": _BASE,
    "gpt_neox": _BASE,
    "opt": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "vocab_size": VOCAB, "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
    "gemma2": _BASE | {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": _BASE | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": _BASE | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 4},
    "qwen3_moe": _BASE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "olmoe": _BASE | {"num_experts": 4, "num_experts_per_tok": 2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB},
}  # fmt: skip
REFUSED = {
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB}, "left to right"),
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB}, "left to right"),
    "bart": ({"d_model": 32}, "decoder-only"),
    "t5": ({"d_model": 32}, "decoder-only"),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}, "attention mask"),
    "gpt_neo": (
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB, "attention_types": [[["global", "local"], 1]]},
        "probe",
    ),
    "stablelm": (_BASE, "probe"),
}


def config_of(family: str, **changes):
    from transformers import CONFIG_MAPPING

    values = REFUSED[family][0] if family in REFUSED else FAMILIES[family]
    return CONFIG_MAPPING[family](**{**values, **changes})


def build(family: str, seed: int = 0, attention: str | None = None, **changes):
    """A model with random weights, in eval mode; larger ones than a fresh model has, so that attention matters."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes), attn_implementation=attention).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif "bias" in name:
                parameter.normal_(std=0.05)
    return model


def rewritten(family: str, **kwargs):
    """A model as the loader builds it: its config rewritten first."""
    from transformers import AutoModelForCausalLM

    from dlmconvert.backbone.rewrite import rewrite_config

    config = config_of(family)
    rewrite_config(config)
    plain = build(family)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kwargs.get("attention")).float().eval()
    model.load_state_dict(plain.state_dict())
    return model


def denoiser(model, alignment="shift", attention="bidirectional", mask_token_id=VOCAB - 1, block_length=None):
    from dlmconvert.backbone.denoiser import Denoiser
    from dlmconvert.backbone.spec import DlmSpec

    spec = DlmSpec(attention=attention, alignment=alignment, block_length=block_length, mask_token_id=mask_token_id, vocab_size=VOCAB)
    return Denoiser(model, spec).eval()


def positions_of(tokens_BL):
    return torch.arange(tokens_BL.shape[1]).expand_as(tokens_BL)


def known_answers(name: str) -> dict:
    path = SHARED / "vectors" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text())
