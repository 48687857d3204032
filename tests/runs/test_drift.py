"""A run is one experiment: what a started stage has read cannot change under it, everything else can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import SMALL, SMALL_SFT, curve, dlmconvert, fails, stage_state, steps_kept, weights, works

RUN = Path("runs/one")
HERE = [*SMALL, "run.folder=runs/one"]


def recipe():
    return yaml.safe_load((RUN / "recipe.yaml").read_text())


@pytest.fixture
def stopped(place, tiny_checkpoints, monkeypatch):
    """An adaptation that ended in the middle, after the checkpoint of step 6; returns the checkpoint it came from."""
    stop_at(monkeypatch, 7)
    assert dlmconvert("adapt", tiny_checkpoints["llama"], *HERE).code == 75
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert steps_kept(RUN / "adapt") == [3, 6]
    return tiny_checkpoints["llama"]


def stop_at(monkeypatch, step):
    from dlmconvert.errors import Interrupted
    from dlmconvert.training import loop

    real = loop.context_of

    def leaves(settings, now):
        if now == step:
            raise Interrupted("SIGTERM")
        return real(settings, now)

    monkeypatch.setattr(loop, "context_of", leaves)


def test_a_changed_key_is_refused_with_a_diff_and_nothing_is_touched(stopped):
    before = (RUN / "recipe.yaml").read_bytes(), (RUN / "run.json").read_bytes()
    text = fails(2, "adapt", stopped, *HERE, "train.learning_rate=1e-5", "data.row_length=16")
    assert "train.learning_rate: 0.003 -> 1e-05   (read by adapt)" in text
    assert "data.row_length: 32 -> 16   (read by adapt)" in text
    assert "--fresh" in text
    assert before == ((RUN / "recipe.yaml").read_bytes(), (RUN / "run.json").read_bytes())
    text = fails(2, "sft", *SMALL_SFT, "method.objective.weight=unweighted")
    assert "method.objective.weight: elbo -> unweighted   (read by adapt)" in text
    assert "read by prepare" in fails(2, "adapt", stopped, *HERE, "source.mask_init=normal")


def test_safe_keys_may_change(stopped):
    told = works("adapt", stopped, *HERE, "train.save_steps=1", "train.log_steps=4", "train.keep_checkpoints=5", "train.save_minutes=1", "engine.threads=1")
    assert "continuing from the checkpoint of step 6" in told.err
    assert steps_kept(RUN / "adapt") == [3, 6, 7, 8] and recipe()["train"]["save_steps"] == 1


def test_keys_of_later_stages_may_be_set_on_any_command_and_are_not_forgotten(stopped):
    stop = fails(2, "adapt", stopped, *HERE, "sft.data=nowhere.jsonl", "data.max_tokens=5")
    assert "data.max_tokens" in stop
    works("adapt", stopped, *HERE, *SMALL_SFT, "sft.lora={rank: 3}", "export.steps=5")
    assert recipe()["sft"]["steps"] == 6 and recipe()["sft"]["lora"]["rank"] == 3 and recipe()["export"]["steps"] == 5
    works("sft", "sft.log_steps=2")
    assert stage_state(RUN, "sft")["keys"]["sft.lora.rank"] == 3
    assert (RUN / "sft" / "adapter" / "adapter_model.safetensors").is_file()
    works("adapt", stopped, *HERE)
    assert recipe()["sft"]["data"] == "chat.jsonl" and recipe()["sft"]["lora"]["rank"] == 3


def test_adapt_after_an_interrupted_sft_does_not_forget_it(place, tiny_checkpoints, monkeypatch):
    """The sections of a started stage are those it was started with, also where they are sections in a section."""
    works("adapt", tiny_checkpoints["llama"], *HERE)
    stop_at(monkeypatch, 3)
    assert dlmconvert("sft", *SMALL_SFT, "sft.lora={rank: 3}").code == 75
    monkeypatch.undo()
    monkeypatch.chdir(place)
    text = fails(2, "adapt", tiny_checkpoints["llama"], *HERE, "sft.learning_rate=1")
    assert "sft.learning_rate: 0.003 -> 1.0   (read by sft)" in text
    from dlmconvert.recipe.load import load_recipe
    from dlmconvert.runs.folder import RunFolder
    from dlmconvert.runs.runner import combine, order_of

    again = combine(RunFolder(RUN), load_recipe(str(tiny_checkpoints["llama"]), HERE), order_of(["adapt"], load_recipe("tiny")), HERE)
    assert again.sft.data == "chat.jsonl" and again.sft.lora.rank == 3 and again.sft.steps == 6
    told = works("sft")
    assert "continuing from the checkpoint of step 2" in told.err


def test_a_stage_that_failed_before_its_first_checkpoint_takes_other_values(place, tiny_checkpoints):
    """A wrong value must not lock the run."""
    (place / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    source = tiny_checkpoints["llama"]
    text = fails(2, "adapt", source, *HERE, "data.train=broken.jsonl")
    assert "broken.jsonl, line 2" in text
    assert stage_state(RUN, "adapt")["status"] == "failed" and "failed" in works("status").out
    text = fails(2, "adapt", source, *HERE, "data.row_length=128")
    assert "64 positions" in text
    text = fails(2, "adapt", source, *HERE, "source.mask_token=100000")
    assert "read by prepare" in text  # that stage has succeeded
    works("adapt", source, *HERE)
    text = fails(2, "sft", *SMALL_SFT, "sft.prompt_field=question")
    assert "chat.jsonl, line 1" in text and "prompt" in text
    works("sft", *SMALL_SFT, "sft.prompt_field=prompt")


def test_fresh_starts_beside_and_later_commands_continue_there(stopped, place):
    name = stopped.name
    here = [word for word in SMALL]
    works("adapt", stopped, *here)
    before = {path: path.stat().st_mtime_ns for path in (place / "runs" / name).rglob("*")}
    fails(2, "adapt", stopped, *here, "train.learning_rate=1e-3")
    works("adapt", stopped, *here, "train.learning_rate=1e-3", "--fresh")
    second = Path("runs") / f"{name}-2"
    assert stage_state(second, "adapt")["status"] == "done" and (second / "source" / "config.json").is_file()
    assert {path: path.stat().st_mtime_ns for path in (place / "runs" / name).rglob("*")} == before
    told = works("adapt", stopped, *here, "train.learning_rate=1e-3")
    assert f"run folder runs/{name}-2" in told.err and "everything is done already" in told.out
    told = works("sft", *SMALL_SFT)
    assert f"runs/{name}-2" in told.err and stage_state(second, "sft")["status"] == "done"
    works("adapt", stopped, *here, "train.steps=3", "--fresh")
    assert stage_state(Path("runs") / f"{name}-3", "adapt")["facts"]["steps"] == 3
    assert weights(Path("runs") / name / "adapt" / "model") != weights(second / "adapt" / "model")


def test_a_damaged_newest_checkpoint_is_passed_over(stopped):
    straight = works("adapt", stopped, *SMALL, "run.folder=runs/straight")
    assert straight.code == 0
    file = RUN / "adapt" / "checkpoints" / "step-000006" / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    told = works("adapt", stopped, *HERE)
    assert "step-000006 is damaged (tensors.safetensors has other content" in told.err
    assert curve(RUN / "adapt") == curve(Path("runs/straight/adapt"))
    assert weights(RUN / "adapt" / "model") == weights(Path("runs/straight/adapt/model"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)")])
def test_a_full_disk_during_a_checkpoint(place, tiny_checkpoints, monkeypatch, error):
    import safetensors.torch

    real, calls = safetensors.torch.save_file, 0

    def full(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    text = fails(1, "adapt", tiny_checkpoints["gpt2"], *HERE)
    assert "could not be written" in text and "No space left" in text and "the checkpoint of step 3 stands" in text
    assert "free some space" in text and not list((RUN / "adapt" / "checkpoints").glob(".writing*"))
    assert "continuing from the checkpoint of step 3" in works("adapt", tiny_checkpoints["gpt2"], *HERE).err


def test_a_full_disk_elsewhere(place, tiny_checkpoints, monkeypatch):
    from dlmconvert.training import metrics

    def full(self, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.Metrics, "write", full)
    text = fails(1, "adapt", tiny_checkpoints["gpt2"], *HERE)
    assert "the disk is full" in text and "run the same command again" in text
    monkeypatch.undo()
    monkeypatch.chdir(place)
    works("adapt", tiny_checkpoints["gpt2"], *HERE)


def test_a_run_file_that_is_no_json_is_named(stopped):
    (RUN / "run.json").write_text("{")
    assert "runs/one/run.json is not valid JSON" in fails(2, "status", RUN)


def test_the_cache_of_rows_may_vanish(stopped, place):
    """It is made again from the same text, and the run goes on."""
    import shutil

    shutil.rmtree(place / "runs" / ".tokens")
    assert "continuing from the checkpoint of step 6" in works("adapt", stopped, *HERE).err
    assert json.loads((RUN / "run.json").read_text())["stages"]["adapt"]["status"] == "done"


def test_a_key_that_a_later_version_brings_is_no_drift(stopped):
    """An upgrade in the middle of a run: keys that did not exist when it started stand at their defaults."""
    path = RUN / "run.json"
    state = json.loads(path.read_text())
    for key in ("train.clip_norm", "method.corruption.noise_levels"):
        del state["stages"]["adapt"]["keys"][key]
    path.write_text(json.dumps(state))
    assert "train.clip_norm: null -> 0.5" in fails(2, "adapt", stopped, *HERE, "train.clip_norm=0.5")
    checkpoints = RUN / "adapt" / "checkpoints"
    for file in checkpoints.glob("step-*/COMPLETE"):  # those of the older version carry the identity of fewer keys
        file.unlink()
    works("adapt", stopped, *HERE)
    assert "train.clip_norm" not in stage_state(RUN, "adapt")["keys"]
