"""Block models, caches, speculation, revision and lengths through the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_line import fails, works
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dlmconvert.backbone.load import save_model_folder, scratch_config
from dlmconvert.backbone.spec import DlmSpec

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 96, "vocab_size": 260, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip


def write(folder, pattern, alignment, block_length):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: i for i, token in enumerate([*letters, "<end>", "<mask>"])}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", mask_token="<mask>")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(scratch_config({"model_type": "llama", **SHAPE})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    spec = DlmSpec(attention=pattern, alignment=alignment, block_length=block_length, mask_token_id=257, vocab_size=258)
    save_model_folder(folder, model, tokenizer, spec)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("blocks")
    kinds = {"block_causal": ("in_place", 4), "context_causal": ("shift", 4), "bidirectional": ("shift", None)}
    return {pattern: write(root / pattern, pattern, *rest) for pattern, rest in kinds.items()}


def samples(*words):
    return [json.loads(line) for line in works(*words, "--json").out.splitlines()]


@pytest.mark.parametrize("pattern", ["block_causal", "context_causal"])
def test_a_block_model_decodes_with_its_cache_and_without_the_same_text(folders, pattern):
    prompts = ["-p", "once", "-p", "ab"]
    cached, plain = (
        samples("sample", folders[pattern], *prompts, "--max-new-tokens", 40, "--temperature", 0, *cache) for cache in ((), ("--cache", "none"))
    )
    assert [s["text"] for s in cached] == [s["text"] for s in plain] and all(s["num_tokens"] <= 40 for s in cached)
    (fast,) = samples("sample", folders[pattern], "-p", "once", "--max-new-tokens", 40, "--temperature", 0, "--threshold", 0)
    assert fast["nfe"] <= (11 if pattern == "block_causal" else 20)  # a forward a block, two under shift


@pytest.mark.parametrize("pattern", ["block_causal", "context_causal", "bidirectional"])
def test_steps_that_were_tuned_for_a_short_text_do_for_a_long_one(folders, pattern, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders[pattern], folder)
    saved = {"steps": 4, "max_new_tokens": 8, "temperature": 0.0, "alg": "confidence", "eos_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(saved | ({"block_length": 4} if pattern == "bidirectional" else {})))
    how = ["sample", folder, "-p", "once", "--max-new-tokens", 40]
    for length, steps in ((8, 4), (40, 20), (42, 22 if pattern == "context_causal" else 21)):  # under shift a block takes two: 11 blocks
        (found,) = samples(*how[:-1], length)
        assert found["nfe"] <= steps and (found["nfe"] == steps or found["num_tokens"] < length), (length, found["nfe"])
    assert "too few" in fails(2, *how, "--steps", 4)


@pytest.mark.parametrize("penalty", [(), ("--repetition-penalty", 1.2)])
def test_speculation_gives_the_ar_text(folders, penalty):
    how = ["sample", folders["context_causal"], "-p", "once", "--max-new-tokens", 20, "--temperature", 0, *penalty]
    (ar,), (speculated,) = samples(*how, "--order", "left_to_right", "--block-length", 1), samples(*how, "--draft-length", 3)
    assert speculated["text"] == ar["text"] and speculated["nfe"] <= 2 * ar["nfe"]
    assert "AR model over clean text" in fails(2, "sample", folders["block_causal"], "-p", "once", "--draft-length", 3)


def test_infilling_a_block_model_is_done_at_the_end_and_refused_in_the_middle(folders):
    (end,) = samples("infill", folders["block_causal"], "abc[[MASK:9]]", "--temperature", 0)
    assert end["text"].startswith("abc")
    told = fails(2, "infill", folders["block_causal"], "abc[[MASK:9]] and more text behind it")
    assert "right of a gap" in told and "bidirectional" in told
    assert "trained with blocks of 4" in fails(2, "sample", folders["block_causal"], "-p", "once", "--block-length", 8)


def test_lengths_that_the_model_chooses(folders):
    (gap,) = samples("infill", folders["bidirectional"], "ab[[MASK:2-5]]cd", "--temperature", 0)
    assert gap["text"].startswith("ab") and gap["text"].endswith("cd") and 2 <= gap["num_tokens"] <= 5
    (grown,) = samples("sample", folders["bidirectional"], "-p", "ab", "--max-new-tokens", 24, "--initial-length", 4, "--temperature", 0)
    assert grown["num_tokens"] <= 24
    how = ["sample", folders["bidirectional"], "-p", "ab", "--max-new-tokens", 24, "--initial-length", 4, "--temperature", 0]
    (other,) = samples(*how, "--repetition-penalty", 2)
    assert other["settings"]["repetition_penalty"] == 2 and other["text"] != grown["text"]


def test_a_growing_answer_with_guidance_and_polish(folders, tmp_path):
    how = ["-p", "ab", "--max-new-tokens", 24, "--initial-length", 4, "--temperature", 0, "--cfg-scale", 1]
    (guided,) = samples("sample", folders["bidirectional"], *how)
    assert guided["settings"]["cfg_scale"] == 1 and guided["nfe"] % 2 == 0
    folder = tmp_path / "doubts"
    shutil.copytree(folders["bidirectional"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["dlm"]["corruption"] = "gidd"
    (folder / "config.json").write_text(json.dumps(config))
    (polished,) = samples("sample", folder, *how, "--revision", "edits", "--revision-strength", 0.01)
    assert polished["text"] != guided["text"] and polished["nfe"] > guided["nfe"]
    assert "schedule of its own" in fails(2, "sample", folder, *how, "--revision", "p2")


def test_revision_changes_the_text_and_repeats_with_its_seed(folders):
    how = ["sample", folders["bidirectional"], "-p", "ab", "--max-new-tokens", 12, "--seed", 4]
    (revised,), (again,), (plain,) = samples(*how, "--revision", "remdm"), samples(*how, "--revision", "remdm"), samples(*how, "--order", "random")
    assert revised["text"] == again["text"] != plain["text"]
    assert "doubt" in fails(2, *how, "--revision", "gidd")
