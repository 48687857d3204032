"""Adapters, the AR baseline, and real task data under the names that the recipe gives its fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import SMALL, SMALL_SFT, curve, stage_state, steps_kept, works
from safetensors.torch import load_file
from tiny_models import SHARED

RUN = Path("runs/one")
HERE = [*SMALL, "run.folder=runs/one"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_train_the_mask_row_and_are_merged(family, place, tiny_checkpoints):
    works("adapt", tiny_checkpoints[family], *HERE, "train.lora={rank: 4, alpha: 8, dropout: 0.1}")
    source, adapted = tensors(RUN / "source"), tensors(RUN / "adapt" / "model")
    assert source.keys() == adapted.keys(), "merged: the names of an ordinary checkpoint"
    (embedding,) = [name for name in source if name.endswith(("embed_tokens.weight", "wte.weight"))]
    moved = (source[embedding] != adapted[embedding]).any(1).nonzero().flatten().tolist()
    assert moved == [300], "of the embedding only the mask token's row"
    changed = {name for name in source if not torch.equal(source[name], adapted[name])} - {embedding}
    assert changed and not any("norm" in name or "ln_" in name or name.startswith("lm_head") for name in changed)
    saved = load_file(RUN / "adapt" / "adapter" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in saved) and any("token" in name for name in saved)
    config = json.loads((RUN / "adapt" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == str(tiny_checkpoints[family])

    works("sft", *SMALL_SFT, "sft.lora={rank: 2}")
    assert json.loads((RUN / "sft" / "adapter" / "adapter_config.json").read_text())["r"] == 2
    tuned = tensors(RUN / "sft" / "model")
    assert tuned.keys() == source.keys() and not torch.equal(tuned[embedding][300], adapted[embedding][300])
    assert torch.equal(tuned[embedding][:300], source[embedding][:300])
    works("sample", "--prompt", "the", "--max-new-tokens", 4)


def test_a_checkpoint_of_adapters_holds_adapters_only(place, tiny_checkpoints):
    works("adapt", tiny_checkpoints["llama"], *HERE, "train.lora={rank: 4}")
    whole = sum(t.numel() for t in tensors(RUN / "adapt" / "model").values())
    kept = load_file(RUN / "adapt" / "checkpoints" / "step-000008" / "tensors.safetensors")
    trained = sum(t.numel() for name, t in kept.items() if name.startswith("parameter/"))
    assert 0 < trained < whole / 4


def test_the_autoregressive_baseline(place, tiny_checkpoints):
    """The same rows under the AR objective, and everything behind it knows."""
    told = works("adapt", tiny_checkpoints["gpt2"], *HERE, "method={name: ar}")
    assert "attention causal" in told.err
    spec = json.loads((RUN / "adapt" / "model" / "config.json").read_text())["dlm"]
    assert (spec["attention"], spec["trained"], spec["corruption"]) == ("causal", "ar", "none")
    before, after = stage_state(RUN, "adapt")["facts"]["measured"]
    assert before["kind"] == after["kind"] == "nll" and after["nats_per_token"] < before["nats_per_token"]
    assert all(line["open_ratio"] == 0.0 for line in curve(RUN / "adapt"))
    (row, _) = json.loads(works("eval", "--json").out)
    assert row["what"].startswith("NLL") and row["nats_per_token"] == pytest.approx(after["nats_per_token"], abs=1e-5)
    told = works("sft", *SMALL_SFT)
    assert [one["kind"] for one in stage_state(RUN, "sft")["facts"]["measured"]] == ["nll", "nll"]
    assert "AR NLL of held-out answers after sft" in told.out


def test_nothing_held_out(place, tiny_checkpoints):
    told = works("adapt", tiny_checkpoints["gpt2"], *HERE, "data.validation=0")
    assert "nothing is measured" in told.err and "measured" not in stage_state(RUN, "adapt")["facts"]
    works("report")


def test_validation_while_training(place, tiny_checkpoints):
    works("adapt", tiny_checkpoints["gpt2"], *HERE, "train.validate_steps=3")
    lines = [line for line in curve(RUN / "adapt") if "validation_nelbo" in line]
    assert [line["step"] for line in lines] == [3, 6] and all(line["validation_nelbo_standard_error"] > 0 for line in lines)


def test_a_mixture_of_sources_and_a_validation_file(place, tiny_checkpoints):
    (place / "other.txt").write_text("in the beginning there was the word.\n" * 200)
    works(
        "adapt", tiny_checkpoints["gpt2"], *HERE, "data.train=[{path: text.jsonl, weight: 3}, other.txt]", "data.validation=text.jsonl",
        "data.train=[other.txt]",
    )  # fmt: skip
    assert len(stage_state(RUN, "adapt")["facts"]["measured"]) == 3


def test_gsm8k_on_a_real_checkpoint(place):
    """Two fields that the recipe names, answers longer than the row, a tokenizer without a chat template."""
    problems, checkpoint, corpus = (
        SHARED / path for path in ("benchmarks/gsm8k", "checkpoints/stories260K", "corpora/tinystories/validation.jsonl")
    )
    if not (problems.is_dir() and checkpoint.is_dir() and corpus.is_file()):
        pytest.skip("the shared data is not there")
    (file,) = [path for path in sorted(problems.iterdir()) if "train" in path.name and path.suffix == ".jsonl"]
    (place / "gsm8k.jsonl").write_text("".join(line + "\n" for line in file.read_text().splitlines()[:60]))
    works("adapt", checkpoint, *HERE, f"data.train={corpus}", "train.steps=4", "train.save_steps=2")
    told = works(
        "sft", *SMALL_SFT, "sft.data=gsm8k.jsonl", "sft.prompt_field=question", "sft.response_field=answer", "sft.row_length=256",
        "sft.validation=0.1", "sft.learning_rate=1e-3",
    )  # fmt: skip
    facts = stage_state(RUN, "sft")["facts"]
    assert facts["num_conversations"] + facts.get("num_skipped", 0) > 40 and facts["num_prompts_truncated"] > 0
    assert "plain one" in told.err and f"{facts['num_prompts_truncated']} prompts truncated" in told.err
    before, after = (row["nats_per_token"] for row in facts["measured"])
    assert after < before and steps_kept(RUN / "sft") == [4, 6]
    config = json.loads((RUN / "sft" / "model" / "tokenizer_config.json").read_text())
    template = RUN / "sft" / "model" / "chat_template.jinja"
    assert "assistant" in (template.read_text() if template.is_file() else config["chat_template"]).lower()
