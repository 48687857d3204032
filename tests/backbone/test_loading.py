"""Checkpoints in and out: strict about tensors, bit-equal on the way back, ties kept, experts under their published names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, build, denoiser, positions_of, rewritten

from dlmconvert.backbone import load
from dlmconvert.backbone.load import (
    load_config,
    load_denoiser,
    load_model,
    load_tokenizer,
    resolve_checkpoint,
    save_model_folder,
    scratch_config,
)
from dlmconvert.backbone.spec import DlmSpec, spec_from_config
from dlmconvert.errors import EXIT_WRONG_INPUT, UserError

SPEC = DlmSpec(mask_token_id=VOCAB - 1, vocab_size=VOCAB, trained="adapt", annealing={"open_ratio": 1.0})


def names_in(folder):
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


@pytest.fixture
def changed(tiny_checkpoints, tmp_path):
    """A copy of a checkpoint whose tensors went through `change`."""

    def make(family, change):
        folder = tmp_path / family
        shutil.copytree(tiny_checkpoints[family], folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


WRONG_TENSORS = [
    (lambda t: t.pop("model.norm.weight"), "missing from the file: model.norm.weight"),
    (lambda t: t.update({"model.extra.weight": torch.zeros(3)}), "not used by the model: model.extra.weight"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), "of another shape: model.norm.weight [7] instead of [32]"),
    (lambda t: t.pop("lm_head.weight"), "missing from the file: lm_head.weight"),
]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *WRONG_TENSORS,
        (lambda t: [t.pop("model.norm.weight"), t.update({"x": torch.zeros(1)})], "1 missing from the file: model.norm.weight; 1 not used by the model: x"),
    ],
)
def test_another_set_of_tensors_is_refused_by_name(changed, change, said):
    folder = changed("llama", change)
    with pytest.raises(UserError) as caught:
        load_model(folder, load_config(folder))
    assert said in str(caught.value) and str(folder) in caught.value.what and caught.value.exit_code == EXIT_WRONG_INPUT


def test_computed_buffers_of_old_checkpoints_are_accepted(changed):
    folder = changed("gpt2", lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64), "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}))
    load_model(folder, load_config(folder))
    shutil.rmtree(folder.parent / "llama", ignore_errors=True)
    folder = changed("llama", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    load_model(folder, load_config(folder))


def test_no_weights_and_no_config(tmp_path, tiny_checkpoints):
    with pytest.raises(UserError, match="no such folder"):
        resolve_checkpoint(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="it has no config.json"):
        resolve_checkpoint(str(tmp_path))
    shutil.copy(tiny_checkpoints["llama"] / "config.json", tmp_path)
    with pytest.raises(UserError, match="weights cannot be loaded"):
        load_model(tmp_path, load_config(tmp_path))
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="not a converted model"):
        load_denoiser(tiny_checkpoints["llama"], device="cpu")


@pytest.mark.parametrize("alignment", ["shift", "in_place"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_round_trip_is_bit_equal(family, alignment, tmp_path, tiny_tokenizer):
    model = rewritten(family)
    spec = DlmSpec(**(SPEC.to_dict() | {"alignment": alignment}))
    save_model_folder(tmp_path / "model", model, tiny_tokenizer, spec)
    again = load_denoiser(tmp_path / "model", device="cpu")
    assert again.spec == spec and not again.training
    before, after = model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    tokens_BL = torch.arange(20)[None] + 9
    targets_BL = torch.arange(20)[None] % 3 == 1
    first = denoiser(model, alignment).predict(tokens_BL, targets_BL)
    assert torch.equal(first, again.predict(tokens_BL, targets_BL)) and first.shape == (int(targets_BL.sum()), VOCAB)
    # A second pass through the folder writes the same bytes.
    save_model_folder(tmp_path / "second", again.model, again.tokenizer, again.spec)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert json.loads((tmp_path / "model/config.json").read_text()) == json.loads((tmp_path / "second/config.json").read_text())


def test_stock_transformers_loads_the_folder_bidirectional(tmp_path):
    from transformers import AutoModelForCausalLM

    model = rewritten("qwen2")
    save_model_folder(tmp_path / "model", model, None, SPEC)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens_BL = torch.arange(24)[None] + 9
    expected = denoiser(model, "in_place").predict(tokens_BL, torch.ones_like(tokens_BL).bool())
    torch.testing.assert_close(stock(tokens_BL, position_ids=positions_of(tokens_BL)).logits[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", False), ("qwen2", True), ("gemma3_text", True)])
def test_ties(family, tied, tmp_path):
    model = rewritten(family)
    save_model_folder(tmp_path / "model", model, None, SPEC)
    assert ("lm_head.weight" in names_in(tmp_path / "model")) is not tied
    again = load_model(tmp_path / "model", load_config(tmp_path / "model"))
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) is tied


@pytest.mark.parametrize(
    ("family", "experts"),
    [("mixtral", "block_sparse_moe.experts.3.w2.weight"), ("qwen3_moe", "mlp.experts.3.down_proj.weight"), ("olmoe", "mlp.experts.3.down_proj.weight")],
)
def test_experts_go_back_to_their_published_names(family, experts, tmp_path):
    """transformers fuses them in memory. Both a fresh model and a loaded one are written as its own files are."""
    from transformers import AutoModelForCausalLM

    model = rewritten(family)
    tokens_BL = torch.arange(15)[None] + 9
    expected = model(tokens_BL, is_causal=True).logits
    for turn in range(2):
        folder = tmp_path / str(turn)
        save_model_folder(folder, model, None, None)
        assert f"model.layers.1.{experts}" in names_in(folder)
        assert not any("gate_up_proj" in name for name in names_in(folder))
        stock = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(stock(tokens_BL, is_causal=True).logits, expected)
        model = load_model(folder, load_config(folder)).eval()
        assert torch.equal(model(tokens_BL, is_causal=True).logits, expected)


def test_saved_dtype_and_generation_config(tmp_path):
    model = build("llama")
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False  # as Llama-2 publishes it
    save_model_folder(tmp_path / "model", model, None, SPEC, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"
    assert not (tmp_path / "model/generation_config.json").exists()  # an AR model's sampling defaults say nothing about a denoiser
    save_model_folder(tmp_path / "plain", model, None, None)
    assert json.loads((tmp_path / "plain/generation_config.json").read_text())["temperature"] == 0.6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert load_denoiser_without_tokenizer(tmp_path / "model").model.dtype == torch.bfloat16


def load_denoiser_without_tokenizer(folder):
    from unittest import mock

    with mock.patch.object(load, "load_tokenizer", return_value=None):
        return load_denoiser(folder, device="cpu")


def test_an_ordinary_checkpoint_is_read_as_the_ar_model_that_it_is(tiny_checkpoints):
    denoiser = load_denoiser(tiny_checkpoints["llama"], device="cpu", attention="causal")
    tokens_BL = torch.arange(12)[None] + 5
    targets_BL = torch.arange(12)[None] > 0
    expected = build("llama")(tokens_BL).logits[0, :-1]
    torch.testing.assert_close(denoiser.predict(tokens_BL, targets_BL), expected)


def test_the_spec_is_checked():
    class Config:
        dlm = SPEC.to_dict() | {"colour": "blue"}

    with pytest.raises(UserError, match="colour"):
        spec_from_config(Config, "folder")
    assert SPEC.banned_ids == [VOCAB - 1]
    assert DlmSpec(mask_token_id=VOCAB, vocab_size=VOCAB).banned_ids == []


def test_scratch_configs():
    assert scratch_config({"model_type": "gpt2", "n_layer": 3}).num_hidden_layers == 3
    with pytest.raises(UserError, match="'gpt2'"):
        scratch_config({"model_type": "gpt22"})
    with pytest.raises(UserError, match="hidden_size"):
        scratch_config({"model_type": "llama", "hiden_size": 3})


def test_deepspeed_is_not_imported_on_one_device(tmp_path, tiny_tokenizer):
    """Load, adapt with LoRA, one training step, save: in a fresh process, DeepSpeed (where installed) stays outside."""
    save_model_folder(tmp_path / "model", rewritten("gpt2"), tiny_tokenizer, SPEC)
    program = f"""
import sys, torch
torch.set_num_threads(1)
from dlmconvert.backbone.adapters import attach_lora, merge_lora
from dlmconvert.backbone.load import load_denoiser, save_model_folder
from dlmconvert.backbone.rewrite import probe_family
from dlmconvert.diffusion.attention import BIDIRECTIONAL
from dlmconvert.training import checkpoint, engine, loop, metrics, optimizer
denoiser = load_denoiser({str(tmp_path / "model")!r}, device="cpu")
probe_family(denoiser.model.config, "x")
denoiser.model = attach_lora(denoiser.model, rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", mask_token_id=299, seed=0)
single = engine.SingleDeviceEngine(denoiser, device=torch.device("cpu"), precision="fp32", betas=(.9, .999), eps=1e-8, weight_decay=0.0, clip_norm=1.0)
tokens = torch.arange(12)[None]
single.backward(denoiser(tokens, tokens > 3, tokens, BIDIRECTIONAL).float().logsumexp(-1).sum())
single.update(1e-3)
save_model_folder(__import__("pathlib").Path({str(tmp_path / "out")!r}), merge_lora(denoiser.model), denoiser.tokenizer, denoiser.spec)
print("deepspeed" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=load.__file__.split("/dlmconvert/")[0])
    assert done.stdout.strip().splitlines()[-1:] == ["False"], done.stderr[-2000:]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_tokenizer_of_its_own_is_taken_as_it_is(family, tiny_checkpoints, tiny_tokenizer):
    """AutoTokenizer would give one that lies beside a qwen2 config Qwen's normaliser and splitting rules."""
    text = "def  foo(a):\n    return 'e\u0301' + a_b 12345"
    again = load_tokenizer(tiny_checkpoints[family])
    assert again(text)["input_ids"] == tiny_tokenizer(text)["input_ids"] and again.decode(again(text)["input_ids"]) == text
    assert again.backend_tokenizer.to_str() == tiny_tokenizer.backend_tokenizer.to_str()
