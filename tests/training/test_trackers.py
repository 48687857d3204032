"""TensorBoard and Weights & Biases beside metrics.jsonl: a resumed run goes on in them, without doubled steps."""

from __future__ import annotations

import importlib.util
import json

import pytest
from command_line import SMALL, fails, works, write_corpus

from dlmconvert.errors import EXIT_FAILED, UserError
from dlmconvert.training import trackers
from dlmconvert.training.trackers import check_trackers, open_trackers, scalars


def write(found, steps, base=0.0):
    for step in steps:
        found.write({"step": step, "loss": base + step, "open_ratio": 1.0, "where": [{"rows": [1]}]})
    found.write({"step": steps[-1], "validation_nelbo": 2.0})


def test_numbers_only():
    line = {"step": 3, "skipped": "loss is nan", "skipped_steps": 1, "where": [{"rank": 0}], "mfu": 0.5}
    assert scalars(line) == {"skipped": 1.0, "skipped_steps": 1.0, "mfu": 0.5}


def test_a_package_that_is_not_there_is_named_with_the_command(monkeypatch, tmp_path, tiny_checkpoints):
    real = importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name in ("wandb", "tensorboard") else real(name))
    with pytest.raises(UserError) as caught:
        check_trackers(["tensorboard", "wandb"])
    assert "pip install tensorboard wandb" in str(caught.value) and caught.value.exit_code == EXIT_FAILED
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    assert "pip install wandb" in fails(1, "adapt", tiny_checkpoints["gpt2"], *SMALL, "run.trackers=[wandb]", "run.folder=run")
    assert not (tmp_path / "run" / "adapt").exists()
    assert "'tensorboard' or 'wandb'" in fails(2, "adapt", tiny_checkpoints["gpt2"], *SMALL, "run.trackers=[tensorboards]", "run.folder=run")


def scalars_of(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def test_tensorboard_has_no_doubled_steps(tmp_path):
    pytest.importorskip("tensorboard")
    (first,) = open_trackers(["tensorboard"], tmp_path, 0, "run/adapt", {})
    write(first, [1, 2, 3, 4, 5])
    first.close()
    (again,) = open_trackers(["tensorboard"], tmp_path, 3, "run/adapt", {})  # its newest checkpoint was of step 3
    write(again, [4, 5, 6], base=0.5)
    again.close()
    assert scalars_of(tmp_path / "tensorboard", "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert scalars_of(tmp_path / "tensorboard", "validation_nelbo") == [(6, 2.0)]


def test_tensorboard_on_the_command_line(tmp_path, monkeypatch, tiny_checkpoints):
    """What it shows is what metrics.jsonl holds. `run.trackers` may be set on any command of a run."""
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    works("adapt", tiny_checkpoints["gpt2"], *SMALL, "train.log_steps=1", "train.validate_steps=4", "run.trackers=[tensorboard]", "run.folder=run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "adapt" / "metrics.jsonl").read_text().splitlines()]
    for tag in ("loss", "cross_entropy", "mfu", "validation_nelbo"):
        expected = [(line["step"], pytest.approx(line[tag], abs=1e-4)) for line in lines if tag in line]
        assert expected and scalars_of(tmp_path / "run" / "adapt" / "tensorboard", tag) == expected


def test_weights_and_biases_goes_on_in_the_same_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (first,) = open_trackers(["wandb"], tmp_path, 0, "run/adapt", {"train": {"steps": 6}})
    write(first, [1, 2, 3, 4])
    first.close()
    note = (tmp_path / "wandb-run-id.txt").read_text().strip()
    (again,) = open_trackers(["wandb"], tmp_path, 2, "run/adapt", {"train": {"steps": 6}})
    assert wandb.run.id == note and wandb.run.name == "run/adapt" and wandb.config["train"]["steps"] == 6
    write(again, [3, 4, 5, 6])
    again.close()
    assert (tmp_path / "wandb-run-id.txt").read_text().strip() == note
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{note}"))) >= 1
