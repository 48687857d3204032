"""`dlmconvert plan` and `--dry-run`: exit codes and output."""

from __future__ import annotations

import json

import pytest
from command_line import SMALL, fails, works, write_corpus

from dlmconvert.cli.app import app, guarded

CLUSTER = ("--processes", "64", "--nodes", "8", "--gpu", "h100-80gb")


def dlmconvert(*words):
    return guarded(lambda: app(list(words), standalone_mode=False))


def test_it_fits(capsys):
    assert dlmconvert("plan", "tiny", "--memory", "8", "--tflops", "0.1") == 0
    out = capsys.readouterr().out
    assert "peak memory" in out and "estimate" in out and "1.072M" in out


def test_exit_code_3_when_it_cannot_fit(capsys):
    assert dlmconvert("plan", "llama2-7b", "--memory", "80", "--tflops", "300") == 3
    captured = capsys.readouterr()
    assert "NO (needs" in captured.out and "train.lora" in captured.err


def test_exit_code_3_with_the_words_that_would_fit(capsys):
    assert dlmconvert("plan", "llama2-7b", "--gpu", "h100-80gb") == 3
    captured = capsys.readouterr()
    assert "next: it fits with engine.name=deepspeed engine.offload_optimizer=cpu" in captured.err and "host memory" in captured.err


def test_a_cluster_and_a_price(capsys):
    assert dlmconvert("plan", "llama2-7b", *CLUSTER, "--price", "2.5", "--unique-tokens", "1e9") == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("GPU hours", "at 2.5 a GPU hour", "ZeRO-3", "assumed: MFU 0.4", "how exact", "2305.16264", "epochs 65", "2511.03276"):
        assert words in out, words


def test_json_and_overrides(capsys):
    assert dlmconvert("plan", "tiny", "train.steps=100", "--json", "--memory", "8", "--tflops", "0.1") == 0
    values = json.loads(capsys.readouterr().out)
    adapt = next(stage for stage in values["stages"] if stage["name"] == "adapt")
    assert values["fits"] is True and adapt["steps"] == 100 and adapt["tokens_per_step"] == 16 * 128
    assert values["resolved"]["train"]["steps"] == 100
    assert {"engine", "micro_batch", "gradient_checkpointing", "memory", "fits", "cost"} == set(adapt["options"][0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tiny", "train.stepz=10"), "steps"),
        (("tiny", "--gpu", "h100-81gb"), "h100-80gb"),
        (("tiny", "--mfu", "0.3", "--tflops", "1"), "give one of them"),
        (("tiny", "--nodes", "2"), "--nodes 2 without --processes"),
    ],
)
def test_wrong_input_is_2(words, message, capsys):
    assert dlmconvert("plan", *words) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_folder(capsys, tiny_checkpoints):
    assert dlmconvert("plan", str(tiny_checkpoints["llama"]), "data.row_length=32", "--json", "--tflops", "0.1") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["architecture"]["family"] == "llama" and values["config_from"].endswith("config.json")


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch, tiny_checkpoints):
    """Of run, adapt and sft; with --slurm too no script is written. Then the rows of a real run are counted, not estimated."""
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)

    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = files()
    for words in (["adapt"], ["run", "--processes", "2"], ["adapt", "--slurm", "--nodes", "2", "--processes", "4"]):
        told = works(words[0], tiny_checkpoints["gpt2"], *SMALL, "--dry-run", *words[1:])
        assert "peak memory" in told.out and "an estimate:" in told.out and files() == before
    assert "4 on 2 nodes" in told.out and "ZeRO-2" in told.out
    assert "rows_per_step=4 cannot be dealt to 3" in fails(2, "adapt", tiny_checkpoints["gpt2"], *SMALL, "--dry-run", "--processes", "3")
    works("adapt", tiny_checkpoints["gpt2"], *SMALL, "train.steps=2", "train.warmup_steps=0", "run.folder=run")
    again = works("adapt", tiny_checkpoints["gpt2"], *SMALL, "train.steps=2", "train.warmup_steps=0", "run.folder=run", "--dry-run")
    assert "counted: the rows prepared in" in " ".join(again.out.split())
    before = files()
    told = works("sft", "run", "sft.data=chat.jsonl", "--dry-run")
    assert "peak memory" in told.out and files() == before
