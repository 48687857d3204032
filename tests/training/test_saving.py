"""Checkpoints written while training goes on: the same bytes as those that training waits for, and the same protocol."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict

import pytest
import torch
from deepspeed_engines import make_deepspeed
from memory_stream import SETTINGS, MemoryStream, Stop, make_engine, run

from dlmconvert.errors import EXIT_FAILED, SavedAndLeft, UserError
from dlmconvert.training import engine as engine_module
from dlmconvert.training.checkpoint import CheckpointFolder
from dlmconvert.training.deepspeed import _WrittenLater, checkpoint_tensors, leave_zero_3
from dlmconvert.training.saving import host_copy

STEPS = dataclasses.replace(SETTINGS, steps=6, micro_batch=2, save_steps=2, overlap_saving=True)
ENGINES = {"single": make_engine, **{f"stage {stage}": lambda stage=stage: make_deepspeed(stage, micro_batch=2) for stage in (0, 2, 3)}}


@pytest.fixture(autouse=True)
def torch_as_it_was():
    yield
    leave_zero_3()
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint" and thread.is_alive()]


@pytest.fixture
def slow(monkeypatch):
    """Every part takes longer to write than a few steps."""
    events = []

    def slowed(real):
        def write(*args, **kwargs):
            events.append("begins")
            time.sleep(0.4)
            real(*args, **kwargs)
            events.append("written")

        return write

    monkeypatch.setattr(engine_module, "write_tensors", slowed(engine_module.write_tensors))
    monkeypatch.setattr(_WrittenLater, "write", slowed(_WrittenLater.write))
    return events


def saved(folder, kind, step):
    checkpoints = CheckpointFolder(folder / "checkpoints")
    assert checkpoints.damage(step) is None
    if kind == "single":
        return checkpoints.load(step).tensors
    return checkpoint_tensors(checkpoints.path(step), checkpoints.state(step)["zero_stage"])


@pytest.mark.parametrize("kind", ENGINES)
def test_what_is_written_later_is_what_was(kind, slow, tmp_path):
    """Training has moved on by the time that the file is written; then resumed from such a checkpoint, to the last bit."""
    _, expected = run(tmp_path / "waits", dataclasses.replace(STEPS, overlap_saving=False), ENGINES[kind]())
    leave_zero_3()
    stream = MemoryStream()
    fetch = stream.batch
    stream.batch = lambda step, start, stop: slow.append(step) or fetch(step, start, stop)
    _, lines = run(tmp_path / "overlaps", STEPS, ENGINES[kind](), stream)
    leave_zero_3()
    assert lines == expected
    begins = slow.index("begins", slow.index(0))
    assert {2, 3} & set(slow[begins : slow.index("written", begins)])  # steps went on meanwhile
    for step in (4, 6):
        waited, overlapped = (saved(tmp_path / name, kind, step) for name in ("waits", "overlaps"))
        assert waited.keys() == overlapped.keys() and all(torch.equal(t, overlapped[name]) for name, t in waited.items())
    stream = MemoryStream()
    with pytest.raises(SavedAndLeft):
        run(tmp_path / "stopped", STEPS, ENGINES[kind](), stream, Stop(stream, 2))
    leave_zero_3()
    assert CheckpointFolder(tmp_path / "stopped" / "checkpoints").steps() == [2, 3]  # both whole when the process leaves
    _, again = run(tmp_path / "stopped", STEPS, ENGINES[kind]())
    assert again == expected


@pytest.mark.parametrize("kind", ["single", "stage 2"])
def test_a_disk_that_is_full_stops_the_run_within_steps(kind, tmp_path, monkeypatch):
    owner, name = (engine_module, "write_tensors") if kind == "single" else (_WrittenLater, "write")
    real, calls = getattr(owner, name), []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    settings = dataclasses.replace(STEPS, steps=50)
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(UserError) as caught:
        run(tmp_path, settings, ENGINES[kind]())
    assert caught.value.exit_code == EXIT_FAILED and "checkpoint of step 4" in str(caught.value) and "step 2 stands" in str(caught.value)
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    assert checkpoints.steps() == [2] and not list(checkpoints.folder.glob(".writing-*"))


def test_a_run_that_fails_waits_for_its_thread(slow, tmp_path):
    """Else a second run in this process would find a folder that is still being written. What was begun is not published."""
    stream = MemoryStream()
    fetch = stream.batch

    def dies(step, start, stop):
        if step == 3:
            raise RuntimeError("something else")
        return fetch(step, start, stop)

    stream.batch = dies
    with pytest.raises(RuntimeError, match="something else"):
        run(tmp_path, STEPS, make_engine(), stream)
    assert CheckpointFolder(tmp_path / "checkpoints").steps() == []
    _, lines = run(tmp_path, STEPS, make_engine())
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_copies_are_apart_from_their_originals_and_tied_among_themselves():
    weight, other = torch.arange(6.0).reshape(2, 3), torch.zeros(0)
    state = OrderedDict(a=weight, tied=weight, row=weight[1], empty=other, nested=[{"x": (weight, 3, "word")}], parameter=torch.nn.Parameter(weight))
    state._metadata = {"version": 1}
    copied = host_copy(state)
    weight.zero_()
    assert torch.equal(copied["a"], torch.arange(6.0).reshape(2, 3)) and torch.equal(copied["row"], torch.tensor([3.0, 4.0, 5.0]))
    assert copied["a"] is copied["tied"] is copied["nested"][0]["x"][0] and copied._metadata == {"version": 1} and type(copied) is OrderedDict
    assert copied["nested"][0]["x"][1:] == (3, "word") and state["a"] is weight
