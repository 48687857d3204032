"""A checkpoint is whole or does not exist."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from dlmconvert.errors import EXIT_FAILED, UserError
from dlmconvert.training import checkpoint as module
from dlmconvert.training.checkpoint import COMPLETE, Checkpoint, CheckpointFolder, write_tensors


def make(step):
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "parameter/a": torch.randn(7, 5, generator=generator), "parameter/b": torch.randn(3, generator=generator).bfloat16(),
        "optimizer/step/a": torch.tensor(float(step)), "empty": torch.zeros(0, 4), "transposed": torch.randn(4, 6, generator=generator).T,
    }  # fmt: skip
    return Checkpoint(step, tensors, {"identity": "x", "metrics": {"sums": {"loss": 0.1 + 0.2}, "num_steps": 1}})


def save(folder, checkpoint):
    """As the single-device engine does it."""
    return folder.write(checkpoint.step, checkpoint.state, lambda temporary: write_tensors(temporary, checkpoint.tensors))


@pytest.fixture
def store(tmp_path):
    warnings = []
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2, warn=warnings.append)
    folder.warnings = warnings
    return folder


def equal(a, b):
    assert a.step == b.step and a.state == b.state and a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype and torch.equal(tensor, b.tensors[name]), name
    return True


def test_nothing_there(store):
    assert store.load_newest() is None and store.steps() == []
    store.clear_unfinished()


def test_bit_equal_and_pruned(store):
    for step in (5, 10, 15, 20):
        save(store, make(step))
    assert store.steps() == [15, 20] and sorted(p.name for p in store.folder.iterdir()) == ["step-000015", "step-000020"]
    assert equal(store.load_newest(), make(20)) and equal(store.load(15), make(15))
    listing = json.loads((store.path(20) / COMPLETE).read_text())
    assert listing.keys() == {"tensors.safetensors", "state.json"}


def test_saving_a_step_twice_is_harmless(store):
    path = save(store, make(5))
    stamp = (path / COMPLETE).stat().st_mtime_ns
    assert save(store, make(5)) == path and (path / COMPLETE).stat().st_mtime_ns == stamp


def truncate(path):
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def flip(path):
    file = path / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


DAMAGE = {
    "truncated": (truncate, "bytes"),
    "one bit": (flip, "other content"),
    "state": (lambda p: (p / "state.json").write_text("{}"), "state.json has"),
    "file gone": (lambda p: (p / "state.json").unlink(), "is missing"),
    "mark": (lambda p: (p / COMPLETE).write_text("{"), "COMPLETE cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_falls_back_with_a_warning(store, kind):
    for step in (5, 10):
        save(store, make(step))
    DAMAGE[kind][0](store.path(10))
    assert equal(store.load_newest(), make(5))
    assert len(store.warnings) == 1 and "step-000010" in store.warnings[0] and DAMAGE[kind][1] in store.warnings[0]


def test_a_damaged_checkpoint_is_written_anew_and_never_pushes_out_a_whole_one(store):
    for step in (5, 10):
        save(store, make(step))
    flip(store.path(10))
    store.load_newest()
    save(store, make(7))  # saved by time, before step 10 is reached again
    assert store.steps() == [5, 7]
    save(store, make(10))
    assert store.steps() == [7, 10] and store.damage(10) is None and equal(store.load_newest(), make(10))


def test_when_all_are_damaged_it_is_said_once_what_happens(store):
    for step in (5, 10):
        truncate(save(store, make(step)))
    assert store.newest_whole() is None and store.newest_whole() is None
    first, second = store.warnings
    assert "step-000010 is damaged" in first and first.endswith("falling back to the one before it")
    assert "step-000005 is damaged" in second and second.endswith("so this starts from the beginning")


def test_a_damaged_checkpoint_is_replaced_by_the_same_step(store):
    save(store, make(5))
    save(store, make(10))
    flip(store.path(10))
    store.load_newest()
    save(store, make(10))
    assert equal(store.load_newest(), make(10)) and store.steps() == [5, 10]


def test_without_complete_it_does_not_exist(store):
    save(store, make(5))
    save(store, make(10))
    (store.path(10) / COMPLETE).unlink()
    assert store.steps() == [5] and equal(store.load_newest(), make(5)) and store.warnings == []
    save(store, make(10))
    assert equal(store.load_newest(), make(10))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("function", ["file_hash", "_flush", "os.rename", "shutil.rmtree"])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_killed_in_the_middle_of_a_save(store, monkeypatch, function, call):
    """At whatever point: the older checkpoint or the new one, whole; and the next save works."""
    save(store, make(5))
    real = {"file_hash": module.file_hash, "_flush": module._flush, "os.rename": module.os.rename, "shutil.rmtree": shutil.rmtree}[function]
    calls = 0

    def dies(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(f"{module.__name__}.{function}", dies)
        try:
            save(store, make(10))
        except Killed:
            pass
    fresh = CheckpointFolder(store.folder, keep=2, warn=store.warnings.append)
    newest = fresh.load_newest()
    assert equal(newest, make(newest.step)) and newest.step in (5, 10) and store.warnings == []
    fresh.clear_unfinished()
    assert not list(store.folder.glob(".writing-*"))
    save(fresh, make(10))
    assert equal(fresh.load_newest(), make(10))


def test_killed_while_pruning(store, monkeypatch):
    for step in (5, 10):
        save(store, make(step))
    real = shutil.rmtree

    def dies(path, **kwargs):
        if "step-000005" in str(path):
            raise Killed
        real(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", dies)
        with pytest.raises(Killed):
            save(store, make(15))
    assert store.steps() == [10, 15] and equal(store.load_newest(), make(15))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_a_full_disk(store, monkeypatch, error):
    import safetensors.torch

    save(store, make(5))

    def full(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(UserError) as caught:
            save(store, make(10))
    assert caught.value.exit_code == EXIT_FAILED == 1
    assert "No space left" in str(caught.value) and "checkpoint of step 5 stands" in str(caught.value)
    assert equal(store.load_newest(), make(5)) and not list(store.folder.glob(".writing-*"))
    save(store, make(10))
    assert equal(store.load_newest(), make(10))
