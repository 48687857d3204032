"""Adapters that act on masks only: the source is still there, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import SMALL, SMALL_EXPORT, SMALL_SFT, curve, fails, stage_state, works, write_corpus
from memory_stream import SETTINGS, run
from safetensors.torch import load_file
from tiny_models import VOCAB, denoiser, rewritten
from transformers import AutoModelForCausalLM

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.backbone.gated import GatedAdapters
from dlmconvert.backbone.load import load_denoiser
from dlmconvert.backbone.rewrite import call_model
from dlmconvert.diffusion.attention import AttentionContext
from dlmconvert.training.engine import SingleDeviceEngine

MASK = VOCAB - 1
CONTEXTS = [AttentionContext(0.0), AttentionContext(1.0), AttentionContext(0.4, seed=1)]


def engine_of(family, **changes):
    model = rewritten(family).requires_grad_(False)
    adapters = GatedAdapters(model, rank=4, alpha=8.0, target_modules="all-linear", mask_token_id=MASK, seed=0)
    wrapped = Denoiser(model, denoiser(model).spec, adapters=adapters)
    values = {"precision": "fp32", "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0} | changes
    return SingleDeviceEngine(wrapped, device=torch.device("cpu"), **values)


def logits(model, tokens_BL, context):
    """As a model that is used: while training, GPT-2's activation is computed in one kernel, which rounds otherwise."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = call_model(model, tokens_BL, torch.arange(tokens_BL.shape[1]).expand_as(tokens_BL), context).logits
    model.train(was_training)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mixtral"])
def test_without_a_mask_the_model_is_the_source_to_the_last_bit(family, tmp_path):
    engine = engine_of(family)
    source = rewritten(family)
    tokens_BL = torch.randint(3, 200, (3, 16), generator=torch.Generator().manual_seed(0))
    masked_BL = tokens_BL.clone()
    masked_BL[:, 5] = MASK
    untrained = [torch.equal(logits(engine.denoiser.model, masked_BL, c), logits(source, masked_BL, c)) for c in CONTEXTS]
    assert all(untrained), "adapters start at nothing"
    _, lines = run(tmp_path, dataclasses.replace(SETTINGS, learning_rate=3e-2), engine)
    assert lines[-1]["loss"] != lines[0]["loss"] and set(engine.parameters) == {n for n, _ in engine.denoiser.named_parameters() if n.startswith("adapters.")}
    for context in CONTEXTS:
        assert torch.equal(logits(engine.denoiser.model, tokens_BL, context), logits(source, tokens_BL, context))
    trained, plain = (logits(m, masked_BL, CONTEXTS[0]) for m in (engine.denoiser.model, source))
    assert torch.equal(trained[:, :5], plain[:, :5]) and not torch.allclose(trained[:, 5:], plain[:, 5:], atol=1e-3), "from the mask on"


def test_the_masks_own_embedding_has_the_rate_of_embeddings():
    engine = engine_of("llama", rates={"embeddings": 0.5, "mlp": 0.25})
    rates = {id(p): group["rate"] for group in engine.optimizer.param_groups for p in group["params"]}
    assert rates[id(engine.denoiser.adapters.mask_row)] == 0.5
    assert {rates[id(p)] for name, p in engine.denoiser.adapters.named_parameters() if "mlp" in name} == {0.25}


def test_gradient_checkpointing_opens_the_same_gates(tmp_path):
    short = dataclasses.replace(SETTINGS, steps=3, learning_rate=2e-2)
    (_, a), (_, b) = run(tmp_path / "a", short, engine_of("llama")), run(tmp_path / "b", short, engine_of("llama", gradient_checkpointing=True))
    assert [line["loss"] for line in a] == pytest.approx([line["loss"] for line in b], rel=1e-5)


@pytest.fixture
def code_cache(tmp_path, monkeypatch):
    """Code from a model folder is loaded into this test's own folder, and forgotten with it."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    forget()
    yield
    forget()


def test_from_the_command_line(tmp_path, monkeypatch, tiny_checkpoints, code_cache):
    """Trained, scored, sampled and exported; the weights in the folder are the source's."""
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["adapt", tiny_checkpoints["llama"], *SMALL, "run.folder=run", "method.name=i-dlm", "train.lora={rank: 4, alpha: 8, gated: true}"]
    works(*words)
    run_folder = Path("run")
    assert "ar_nll" not in curve(run_folder / "adapt")[0], "no loss on a path that adapters do not touch"
    source, adapted = (load_file(run_folder / part / "model.safetensors") for part in ("source", "adapt/model"))
    assert source.keys() == adapted.keys() and all(torch.equal(source[name], adapted[name]) for name in source)
    spec = json.loads((run_folder / "adapt/model/config.json").read_text())["dlm"]
    assert spec["gated_adapter"] == {"rank": 4, "alpha": 8.0, "target_modules": "all-linear"}
    before, after = (found["nats_per_token"] for found in stage_state(run_folder, "adapt")["facts"]["measured"][1:])
    assert after < before
    loaded = load_denoiser(run_folder / "adapt/model", "cpu")
    assert any(float(p.abs().max()) > 0 for name, p in loaded.adapters.named_parameters() if name.startswith("up."))
    works("sample", run_folder / "adapt/model", "--prompt", "the", "--max-new-tokens", 4)
    export_of_both_models(run_folder, loaded, tiny_checkpoints["llama"])
    assert "train the same adapters on: sft.lora={gated: true" in fails(2, "sft", "run", *SMALL_SFT)


def test_gated_fine_tuning_of_a_model_with_an_ar_loss_says_that_it_has_none(tmp_path, monkeypatch, tiny_checkpoints):
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    works("adapt", tiny_checkpoints["llama"], *SMALL, "run.folder=run", "train.steps=2", "method.name=i-dlm", "method.objective.ar_weight=0.5")
    assert "ar_nll" in curve(Path("run/adapt"))[0]
    told = works("sft", "run", *SMALL_SFT, "sft.steps=1", "sft.lora={gated: true}")
    assert "this stage has no AR loss" in told.text and "ar_nll" not in curve(Path("run/sft"))[0]


def export_of_both_models(run_folder: Path, trained: Denoiser, checkpoint: Path) -> None:
    """The folder, loaded with its own code, is the source where no mask is and the trained denoiser where masks are."""
    words = ["run.folder=run", *SMALL_EXPORT]
    assert "verified" in works("export", "run", *words[1:]).text
    folder = run_folder / "export/native"
    checks = json.loads((folder / "dlmconvert.json").read_text())["checks"]
    assert checks["logits_exact"] and "bit for bit" in checks["autoregressive_logits"]
    assert "AutoModel" not in json.loads((folder / "config.json").read_text())["auto_map"]
    assert "`gated.*`" in (folder / "README.md").read_text()
    exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    source = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()  # as it was before anything was done to it
    source.resize_token_embeddings(exported.config.vocab_size, mean_resizing=False)  # by the mask's row, whose logit is not compared
    mask_id, length = exported.config.mask_token_id, 12
    tokens_BL = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), exported.as_source():
        assert torch.equal(exported(tokens_BL).logits[..., :mask_id], source(tokens_BL).logits[..., :mask_id])
    ours, plain = (m.generate(tokens_BL, max_new_tokens=6, eos_token_id=None, pad_token_id=0) for m in (exported, source))
    assert torch.equal(ours, plain) and ours.shape == (2, length + 6)
    masked_BL = torch.arange(length).expand(2, -1) >= length - 4
    state = (tokens_BL.masked_fill(masked_BL, mask_id), torch.arange(length).expand(2, -1), masked_BL, torch.ones(2, length, length, dtype=torch.bool).tril(), length)
    with torch.no_grad():
        theirs, expected = (m.forward_columns(*state, None, torch.arange(length)[None], None) for m in (_predictor(exported), trained))
        with exported.as_source():
            ungated = exported(tokens_BL).logits[masked_BL]
    assert torch.equal(theirs, expected) and not torch.allclose(theirs, ungated, atol=1e-3)
    assert torch.equal(load_denoiser(folder, "cpu").adapters.mask_row, trained.adapters.mask_row), "an export is read as a trained model is"


def _predictor(exported):
    """The model as its own sampler sees it."""
    (mixin,) = (kind for kind in type(exported).__mro__ if kind.__name__ == "DiffusionMixin")
    return sys.modules[mixin.__module__]._Predictor(exported)
