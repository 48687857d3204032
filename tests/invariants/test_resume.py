"""Kill at any point and resume: the losses and the final weights of the straight run, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from memory_stream import SETTINGS, MemoryStream, Stop, lines, make_engine, run, same, weights
from tiny_models import VOCAB, rewritten

from dlmconvert.backbone.adapters import attach_lora
from dlmconvert.errors import EXIT_FAILED, SavedAndLeft, UserError
from dlmconvert.training.checkpoint import CheckpointFolder

LONG = dataclasses.replace(SETTINGS, steps=9, save_steps=3)


class Killed(BaseException):
    pass


def lora_engine():
    """With dropout in the adapters: its draws are keyed by the step."""
    model = attach_lora(rewritten("llama"), rank=4, alpha=8.0, dropout=0.3, target_modules="all-linear", mask_token_id=VOCAB - 1, seed=0)
    return make_engine(model=model)


ENGINES = {
    "full": make_engine,
    "llama, bf16": lambda: make_engine("llama", precision="bf16"),
    "LoRA with dropout": lora_engine,
    "gradient checkpointing": lambda: make_engine(gradient_checkpointing=True),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    results = {}

    def get(kind):
        if kind not in results:
            folder = tmp_path_factory.mktemp("straight")
            engine, curve = run(folder, LONG, ENGINES[kind](), log_steps=2)
            results[kind] = weights(engine), curve
        return results[kind]

    return get


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("killed_at", [0, 2, 4, 7])
def test_killed_at_any_step(kind, killed_at, straight, tmp_path):
    """Killed while the batch of a step is fetched: half a step of gradients, metrics lines after the last checkpoint."""
    stream = MemoryStream()
    fetch = stream.batch

    def dies(step, start, stop):
        if step == killed_at and start > 0:
            raise Killed
        return fetch(step, start, stop)

    stream.batch = dies
    with pytest.raises(Killed):
        run(tmp_path, LONG, ENGINES[kind](), stream, log_steps=2)
    engine, curve = run(tmp_path, LONG, ENGINES[kind](), log_steps=2)
    final, expected = straight(kind)
    assert same(weights(engine), final) and curve == expected


def test_killed_again_and_again(straight, tmp_path):
    for at in (1, 4, 5, 8, 8):
        stream = MemoryStream()
        fetch = stream.batch

        def dies(step, start, stop, at=at, fetch=fetch):
            if step == at:
                raise Killed
            return fetch(step, start, stop)

        stream.batch = dies
        with pytest.raises(Killed):
            run(tmp_path, dataclasses.replace(LONG, save_steps=1), make_engine(), stream, log_steps=2)
    engine, curve = run(tmp_path, LONG, make_engine(), log_steps=2)
    final, expected = straight("full")
    assert same(weights(engine), final) and curve == expected


@pytest.mark.parametrize("at", [0, 4, 5, 8])
def test_a_signal_saves_and_leaves(at, straight, tmp_path):
    """SIGTERM in the middle of a step: the step is finished, saved, and nothing is run twice."""
    stream = MemoryStream()
    stop = Stop(stream, at)
    if at == LONG.steps - 1:  # in the last step there is nothing left to leave
        engine, curve = run(tmp_path, LONG, make_engine(), stream, stop, log_steps=2)
    else:
        with pytest.raises(SavedAndLeft) as caught:
            run(tmp_path, LONG, make_engine(), stream, stop, log_steps=2)
        assert caught.value.step == at + 1
        assert CheckpointFolder(tmp_path / "checkpoints").steps()[-1] == at + 1
        seen = []
        again = MemoryStream()
        fetch = again.batch
        again.batch = lambda step, start, stop: seen.append(step) or fetch(step, start, stop)
        engine, curve = run(tmp_path, LONG, make_engine(), again, log_steps=2)
        assert min(seen) == at + 1
    final, expected = straight("full")
    assert same(weights(engine), final) and curve == expected


def test_another_save_interval_and_split_of_time_changes_nothing(straight, tmp_path):
    engine, curve = run(tmp_path, dataclasses.replace(LONG, save_steps=1, save_minutes=1e-9), make_engine(), log_steps=2)
    final, expected = straight("full")
    assert same(weights(engine), final) and curve == expected


def test_a_finished_run_does_nothing(tmp_path):
    engine, curve = run(tmp_path, LONG, make_engine())
    stream = MemoryStream()
    stream.batch = None  # would fail when asked
    again, lines_again = run(tmp_path, LONG, make_engine(), stream)
    assert same(weights(engine), weights(again)) and curve == lines_again


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(straight, tmp_path):
    run(tmp_path, LONG, make_engine(), log_steps=2)
    newest = sorted((tmp_path / "checkpoints").glob("step-*"))[-1] / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    warnings = []
    engine, curve = run(tmp_path, LONG, make_engine(), warn=warnings.append, log_steps=2)
    final, expected = straight("full")
    assert same(weights(engine), final) and curve == expected and len(warnings) == 1
    assert CheckpointFolder(tmp_path / "checkpoints").damage(9) is None  # mended


def test_a_full_disk_loses_nothing(straight, tmp_path, monkeypatch):
    import safetensors.torch

    real, calls = safetensors.torch.save_file, 0

    def full(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError) as caught:
        run(tmp_path, LONG, make_engine(), log_steps=2)
    assert caught.value.exit_code == EXIT_FAILED and "step 3 stands" in str(caught.value)
    engine, curve = run(tmp_path, LONG, make_engine(), log_steps=2)
    final, expected = straight("full")
    assert same(weights(engine), final) and curve == expected


@pytest.mark.parametrize("kind", ENGINES)
def test_engine_state_is_restored_bit_for_bit(kind, tmp_path):
    engine, _ = run(tmp_path, dataclasses.replace(LONG, steps=3), ENGINES[kind]())
    tensors = weights(engine)
    other = ENGINES[kind]()
    other.load_tensors({name: t.clone() for name, t in tensors.items()}, 3)
    assert other.step == 3 and same(weights(other), tensors)
    assert any(name.startswith("optimizer/exp_avg_sq/") for name in tensors)
    assert lines(tmp_path)[-1]["step"] == 3
    assert not any(torch.equal(t, torch.zeros_like(t)) for name, t in tensors.items() if name.startswith("optimizer/step/"))
