"""The stage `prepare` through the command line: tensor by tensor where it can, as a whole where transformers converts the tensors, and it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import SMALL, stage_state, works
from safetensors.torch import load_file
from tiny_models import build


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_how_the_source_is_read(family, place, tiny_tokenizer):
    model = build(family)
    model.save_pretrained("source")
    tiny_tokenizer.save_pretrained("source")
    told = works("adapt", "source", *SMALL, "train.steps=2", "train.warmup_steps=1", "method.attention.anneal_steps=1", "name=one")
    assert ("loading the model as a whole" in told.text) is (family == "mixtral")
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in ("source", "runs/one/source"))
    grown = {"model.embed_tokens.weight", "lm_head.weight"}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name][: len(t)], t) and (len(after[name]) == len(t) + (name in grown)) for name, t in before.items())
    facts = stage_state(Path("runs/one"), "prepare")["facts"]
    assert facts["parameters"] == sum(p.numel() for p in model.parameters()) + 2 * 32
    assert json.loads(Path("runs/one/source/config.json").read_text())["vocab_size"] == 301 == facts["mask_token_id"] + 1
