"""Tensor by tensor: the folder that loading the whole model gives, bit for bit, with one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import WRONG_TENSORS
from tiny_models import VOCAB, build
from transformers import AutoTokenizer

from dlmconvert.backbone import streaming
from dlmconvert.backbone.load import load_config, load_denoiser, load_model, save_model_folder
from dlmconvert.backbone.mask_token import choose_mask_token, install_mask_token
from dlmconvert.backbone.rewrite import rewrite_config
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.backbone.streaming import CannotStream, open_source
from dlmconvert.errors import UserError


@pytest.fixture
def both(tiny_tokenizer_folder, tmp_path):
    """both(checkpoint, requested, init) -> (streamed folder, folder of the model that was loaded whole)."""

    def make(checkpoint, requested=None, init="mean"):
        folders = []
        for way in ("streamed", "whole"):
            config, tokenizer = load_config(checkpoint), AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
            rewrite_config(config)
            tensors = open_source(checkpoint, config) if way == "streamed" else None
            model = tensors.model if tensors else load_model(checkpoint, config)
            choice = choose_mask_token(requested, tokenizer, model.get_input_embeddings().weight.shape[0], config.model_type)
            spec = DlmSpec(mask_token_id=choice.id, vocab_size=VOCAB, mask_is_word=choice.is_word)
            folders.append(tmp_path / way)
            shutil.rmtree(folders[-1], ignore_errors=True)
            if tensors:
                tensors.write(folders[-1], tokenizer, spec, choice, init, 3)
            else:
                install_mask_token(model, tokenizer, choice, init, 3)
                save_model_folder(folders[-1], model, tokenizer, spec)
        return folders

    return make


def saved(folder, family, **changes):
    dtype = changes.pop("dtype", torch.float32)
    build(family, **changes).to(dtype).save_pretrained(folder)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gemma3_text", "opt", "falcon", "phi3"])
def test_the_folder_of_the_whole_model(family, both, tmp_path):
    streamed, whole = both(saved(tmp_path / "source", family))
    assert files_of(streamed) == files_of(whole)


@pytest.mark.parametrize(
    ("changes", "requested", "init"),
    [
        ({"dtype": torch.bfloat16}, None, "mean"),
        ({"dtype": torch.float16, "vocab_size": VOCAB + 7}, None, "normal"),
        ({"vocab_size": VOCAB + 7}, None, "keep"),
        ({}, VOCAB, "keep"),
        ({}, 77, "mean"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_mask_tokens_of_every_kind(family, changes, requested, init, both, tmp_path):
    streamed, whole = both(saved(tmp_path / "source", family, **changes), requested, init)
    assert files_of(streamed) == files_of(whole)


def test_names_without_the_base_model_and_buffers_of_old_files(both, tmp_path):
    """As gpt2 lies on the Hub."""
    source = saved(tmp_path / "source", "gpt2")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(source / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    streamed, whole = both(source)
    assert files_of(streamed) == files_of(whole)


def test_shards(both, tmp_path, monkeypatch):
    source = tmp_path / "source"
    build("llama").save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    streamed, whole = both(source)
    assert files_of(streamed) == files_of(whole)
    monkeypatch.setattr(streaming, "SHARD_BYTES", 30_000)
    streamed, _ = both(source)
    shards = sorted(streamed.glob("model-*.safetensors"))
    assert len(shards) > 2 and all(path.stat().st_size < 50_000 for path in shards)
    index = json.loads((streamed / "model.safetensors.index.json").read_text())
    expected = load_file(whole / "model.safetensors")
    assert index["weight_map"].keys() == expected.keys() and index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    found = load_denoiser(streamed, device="cpu").model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kept", ["both", "head"])
def test_tied_tensors_are_written_once(kept, both, tmp_path):
    source = saved(tmp_path / "source", "qwen2")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if kept == "head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    streamed, whole = both(source)
    assert files_of(streamed) == files_of(whole) and "lm_head.weight" not in load_file(streamed / "model.safetensors")
    if kept == "both":
        tensors["lm_head.weight"] += 1
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CannotStream, match="should be tied and differ"):
            open_source(source, load_config(source))


@pytest.mark.parametrize(("change", "said"), WRONG_TENSORS)
def test_another_set_of_tensors_is_refused_before_anything_is_read(change, said, tmp_path):
    source = saved(tmp_path / "source", "llama")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        open_source(source, load_config(source))
    assert said in str(caught.value) and str(source) in caught.value.what


def test_what_only_transformers_can_read(tmp_path):
    source = saved(tmp_path / "mixtral", "mixtral")
    with pytest.raises(CannotStream, match="mixtral under other names or fused"):
        open_source(source, load_config(source))
    source = saved(tmp_path / "llama", "llama")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(CannotStream, match="no safetensors"):
        open_source(source, load_config(source))


def test_one_tensor_at_a_time(both, tmp_path, monkeypatch):
    """Bytes of the tensors that are alive, watched while the folder is written: never more than a few times the largest."""
    source = saved(tmp_path / "source", "llama", num_hidden_layers=12)
    alive, peak, largest, total = 0, 0, 0, 0
    real = streaming.SourceTensors.tensor

    def watched(self, name):
        nonlocal alive, peak, largest, total
        found = real(self, name).clone()
        size = found.nbytes

        def gone():
            nonlocal alive
            alive -= size

        weakref.finalize(found, gone)
        alive, total = alive + size, total + size
        peak, largest = max(peak, alive), max(largest, size)
        return found

    monkeypatch.setattr(streaming.SourceTensors, "tensor", watched)
    both(source)
    assert total > 8 * largest and peak <= 2 * largest and alive == 0
