"""Block models: the export carries the block cache, and a process without dlmconvert decodes with it as training does."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from export_models import facts, spec_of, write_model
from transformers import AutoModelForCausalLM

from dlmconvert.backbone.load import load_denoiser
from dlmconvert.errors import UserError
from dlmconvert.exporting.package import export_folder
from dlmconvert.sampling.api import diffusion_generate, infill


@pytest.fixture
def code_cache(tmp_path, monkeypatch):
    """Code from a model folder is loaded into this test's own folder, and forgotten with it."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    folder = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    forget()
    yield folder
    forget()


@pytest.mark.parametrize(
    "family, pattern, alignment", [("llama", "block_causal", "in_place"), ("gpt2", "context_causal", "shift"), ("qwen2", "causal_in_block", "shift")]
)
def test_a_block_model_is_verified_in_a_fresh_process(family, pattern, alignment, tmp_path, code_cache):
    spec = spec_of(family, attention=pattern, block_length=4, alignment=alignment)
    model = write_model(tmp_path / "model", family, spec)
    generation = {"max_new_tokens": 12, "temperature": 0.0, "threshold": 0.4}
    report = export_folder(model, tmp_path / "out", "native", card=facts(), generation=generation, verify=family == "llama")
    saved = json.loads((report.target / "generation_config.json").read_text())
    assert saved["threshold"] == 0.4 and saved["alg"] == "maskgit_plus" and "steps" not in saved
    if family == "llama":
        assert report.checks["logits_exact"] and report.checks["states"] == ["clean text", "a padded batch of clean text"]
    assert {"cache.py", "windows.py", "key_values.py", "block_attention.py", "speculate.py"} <= set(report.files)
    exported = AutoModelForCausalLM.from_pretrained(report.target, trust_remote_code=True).eval()
    prompts = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    ours = diffusion_generate(load_denoiser(model, device="cpu"), prompts, max_new_tokens=12, threshold=0.4)
    for cache in (None, "none"):
        assert torch.equal(exported.diffusion_generate(prompts, cache=cache, eos_token_id=None), ours)
    with pytest.raises(NotImplementedError, match="one block after clean text"):
        exported.predict(prompts)
    if pattern != "block_causal":  # over clean text it is the AR model, and speculation gives its text
        with torch.no_grad():
            stock = AutoModelForCausalLM.from_pretrained(model).eval()
            stock.config.is_causal = True
            torch.testing.assert_close(exported(prompts).logits, stock(prompts, is_causal=True).logits, atol=1e-5, rtol=1e-5)
        tokens = exported.diffusion_generate(prompts, draft_length=3, eos_token_id=None)
        assert torch.equal(tokens, diffusion_generate(load_denoiser(model, device="cpu"), prompts, max_new_tokens=12, draft_length=3))


def test_saved_steps_of_an_export_are_a_share_of_the_length(tmp_path, code_cache):
    """4 of 8 tokens; a block takes two steps at least under shift."""
    model = write_model(tmp_path / "model", "llama", spec_of("llama", attention="context_causal", block_length=4, alignment="shift"))
    generation = {"max_new_tokens": 8, "temperature": 0.0, "alg": "confidence", "steps": 4}
    report = export_folder(model, tmp_path / "out", "native", card=facts(), generation=generation, verify=False)
    exported = AutoModelForCausalLM.from_pretrained(report.target, trust_remote_code=True).eval()
    how = {"eos_token_id": None, "return_dict_in_generate": True}
    prompts = torch.tensor([[5, 6, 7, 8, 9]])

    def nfe(**more):
        return exported.diffusion_generate(prompts, **how, **more).nfe

    assert nfe() == 4 and nfe(max_new_tokens=20) == 10 and nfe(max_new_tokens=20, steps=12) == 12 and nfe(max_new_tokens=20, threshold=0.0) <= 10
    assert exported.infill([[5, 6, *[None] * 12]], **how).nfe == 6
    with pytest.raises(ValueError, match="too few"):
        nfe(max_new_tokens=20, steps=4)


def test_contradicting_defaults_are_refused(tmp_path):
    model = write_model(tmp_path / "model", "qwen2")
    with pytest.raises(UserError, match="threshold and factor"):
        export_folder(model, tmp_path / "out", "native", card=facts(), generation={"threshold": 0.9, "factor": 1.0}, verify=False)


@pytest.mark.parametrize("pattern", ["block_causal", "context_causal", "causal_in_block"])
def test_a_row_without_a_prompt_is_decoded_as_here(pattern, tmp_path, code_cache):
    """Its first block is noised and whole: nothing of what clean text sees is put upon it, with or without stored keys."""
    model = write_model(tmp_path / "model", "llama", spec_of("llama", attention=pattern, block_length=4, alignment="in_place"))
    report = export_folder(model, tmp_path / "out", "native", card=facts(), generation={"max_new_tokens": 10}, verify=False)
    exported = AutoModelForCausalLM.from_pretrained(report.target, trust_remote_code=True).eval()
    rows, how = [[None] * 10], {"alg": "maskgit_plus", "temperature": 0.0, "steps": 10}
    ours = infill(load_denoiser(model, device="cpu"), rows, **how)
    for cache in ("block", "none"):
        assert exported.infill(rows, cache=cache, **how) == ours
