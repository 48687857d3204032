"""`dlmconvert plan`: exit codes and output."""

from __future__ import annotations

import json

from dlmconvert.cli.app import app, guarded


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


def test_json_and_overrides(capsys):
    assert dlmconvert("plan", "tiny", "train.steps=100", "--json", "--memory", "8", "--tflops", "0.1") == 0
    values = json.loads(capsys.readouterr().out)
    adapt = next(stage for stage in values["stages"] if stage["name"] == "adapt")
    assert values["fits"] is True and adapt["steps"] == 100 and adapt["tokens_per_step"] == 16 * 128
    assert values["resolved"]["train"]["steps"] == 100


def test_wrong_input_is_2(capsys):
    assert dlmconvert("plan", "tiny", "train.stepz=10") == 2
    assert "steps" in capsys.readouterr().err


def test_a_checkpoint_folder(capsys, tiny_checkpoints):
    assert dlmconvert("plan", str(tiny_checkpoints["llama"]), "data.row_length=32", "--json", "--tflops", "0.1") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["architecture"]["family"] == "llama" and values["config_from"].endswith("config.json")
