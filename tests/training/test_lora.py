"""Adapters: what trains, what is kept, what comes out."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from memory_stream import SETTINGS, make_engine, run, weights
from safetensors.torch import load_file
from tiny_models import VOCAB, denoiser, rewritten

from dlmconvert.backbone.adapters import attach_lora, merge_lora, save_adapter
from dlmconvert.diffusion.attention import AttentionContext
from dlmconvert.errors import UserError
from dlmconvert.training.checkpoint import CheckpointFolder

MASK = VOCAB - 1
FAMILIES = ["gpt2", "llama", "qwen2", "qwen3"]
SHORT = dataclasses.replace(SETTINGS, steps=3, learning_rate=2e-2)


def attached(family, mask_token_id=MASK, **changes):
    values = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear", "seed": 0} | changes
    return attach_lora(rewritten(family), mask_token_id=mask_token_id, **values)


def trained(family, folder, **changes):
    engine = make_engine(model=attached(family, **changes))
    before = {name: p.detach().clone() for name, p in engine.denoiser.named_parameters()}
    run(folder, SHORT, engine)
    return engine, before


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_and_the_mask_row_train(family, tmp_path):
    engine, before = trained(family, tmp_path)
    changed = {name for name, p in engine.denoiser.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name or "trainable_tokens_delta" in name for name in changed)
    assert any("trainable_tokens_delta" in name for name in changed) and set(engine.parameters) == {n for n, p in engine.denoiser.named_parameters() if p.requires_grad}
    for name, p in before.items():  # base weights: the very bits
        if "lora_" not in name and "trainable_tokens" not in name:
            assert torch.equal(dict(engine.denoiser.named_parameters())[name], p), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_holds_only_what_trains(family, tmp_path):
    engine, _ = trained(family, tmp_path)
    saved = CheckpointFolder(tmp_path / "checkpoints").load_newest().tensors
    names = {name.removeprefix("parameter/") for name in saved if name.startswith("parameter/")}
    assert names == set(engine.parameters)
    assert sum(t.numel() for t in saved.values()) < 4 * sum(p.numel() for p in engine.parameters.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_gives_the_same_predictions(family, tmp_path):
    """Under every pattern; other embedding rows keep their bits, and ties stay ties."""
    engine, _ = trained(family, tmp_path)
    wrapped = engine.denoiser.eval()
    tokens_BL = torch.arange(20)[None] + 5
    tokens_BL[:, 3::4] = MASK
    targets_BL = tokens_BL == MASK
    contexts = [AttentionContext(0.0), AttentionContext(0.5, seed=1), AttentionContext(1.0)]
    with torch.no_grad():
        expected = [wrapped(tokens_BL, targets_BL, torch.arange(20)[None], context) for context in contexts]
    plain = rewritten(family)
    merged = merge_lora(wrapped.model)
    with torch.no_grad():
        results = [denoiser(merged)(tokens_BL, targets_BL, torch.arange(20)[None], context) for context in contexts]
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert type(merged) is type(plain) and merged.state_dict().keys() == plain.state_dict().keys()
    old, new = plain.get_input_embeddings().weight, merged.get_input_embeddings().weight
    assert torch.equal(old[:MASK], new[:MASK]) and not torch.equal(old[MASK], new[MASK])
    assert (merged.get_output_embeddings().weight is new) is (plain.get_output_embeddings().weight is old)


def test_a_word_as_mask_trains_no_row(tmp_path):
    engine, _ = trained("llama", tmp_path, mask_token_id=None)
    assert all("lora_" in name for name in engine.parameters)


def test_the_mask_row_does_not_decay():
    """It would shrink to 0, where gradients explode at high noise. peft holds the whole row, not a difference."""
    engine = make_engine(model=attached("llama"))
    decayed, kept = engine.optimizer.param_groups
    names = {id(p): name for name, p in engine.parameters.items()}
    assert any("trainable_tokens" in names[id(p)] for p in kept["params"])
    assert all("lora_" in names[id(p)] for p in decayed["params"])


def test_attaching_is_seeded_and_starts_at_the_source():
    a, b, c = (dict(attached("llama", seed=seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(p, b[name]) for name, p in a.items()) and any(not torch.equal(p, c[name]) for name, p in a.items())
    tokens_BL = torch.arange(12)[None] + 5
    wanted_BL = torch.ones_like(tokens_BL).bool()
    assert torch.equal(denoiser(attached("llama"), "in_place").predict(tokens_BL, wanted_BL), denoiser(rewritten("llama"), "in_place").predict(tokens_BL, wanted_BL))


def test_target_modules():
    names = {name for name, p in attached("llama", target_modules=["q_proj"]).named_parameters() if p.requires_grad}
    assert all("q_proj" in name or "tokens" in name for name in names)
    everything = {name for name, p in attached("gpt2").named_parameters() if "lora_" in name}
    assert not any("lm_head" in name for name in everything) and {"c_attn", "c_proj", "c_fc"} <= {name.split(".lora_")[0].split(".")[-1] for name in everything}
    with pytest.raises(UserError, match="no adapter fits"):
        attached("llama", target_modules=["no_such_layer"])


def test_gradient_checkpointing_reaches_the_adapters(tmp_path):
    plain = make_engine(model=attached("llama"))
    frugal = make_engine(model=attached("llama"), gradient_checkpointing=True)
    (_, a), (_, b) = run(tmp_path / "a", SHORT, plain), run(tmp_path / "b", SHORT, frugal)
    assert [line["loss"] for line in a] == pytest.approx([line["loss"] for line in b], rel=1e-5)
    assert all(line["gradient_norm"] > 0 for line in b)


def test_the_adapter_folder_loads_with_peft(tmp_path):
    from peft import PeftModel

    engine, _ = trained("llama", tmp_path / "run")
    save_adapter(engine.denoiser.model, tmp_path / "adapter", base="some/model")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model" and config["r"] == 4
    assert load_file(tmp_path / "adapter/adapter_model.safetensors")
    again = PeftModel.from_pretrained(rewritten("llama"), tmp_path / "adapter")
    tokens_BL = torch.full((1, 12), MASK)
    wanted_BL = torch.ones_like(tokens_BL).bool()
    expected = denoiser(engine.denoiser.model.eval(), "in_place").predict(tokens_BL, wanted_BL)
    torch.testing.assert_close(denoiser(again, "in_place").predict(tokens_BL, wanted_BL), expected, rtol=1e-5, atol=1e-6)
    assert all(t.dtype == torch.float32 for t in weights(engine).values())
