"""Steps that are not finite: left out, counted, told with their rows; the run that goes on is the same after any interruption."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from deepspeed_engines import make_deepspeed, plain_weights
from memory_stream import SETTINGS, MemoryStream, Stop, make_engine, run
from tiny_models import denoiser, rewritten

from dlmconvert.errors import EXIT_FAILED, SavedAndLeft, UserError
from dlmconvert.training.checkpoint import CheckpointFolder
from dlmconvert.training.deepspeed import leave_zero_3
from dlmconvert.training.metrics import read_metrics

STEPS = dataclasses.replace(SETTINGS, steps=8, micro_batch=2, save_steps=1, skip_nonfinite=3)
ENGINES = {"single": make_engine, **{f"stage {stage}": lambda stage=stage: make_deepspeed(stage, micro_batch=2) for stage in (0, 1, 2, 3)}}


@pytest.fixture(autouse=True)
def torch_as_it_was():
    yield
    leave_zero_3()


def broken_at(*steps):
    """Micro-batch 1 of these steps (from 0) has a noise level of 0: its weight 1/t is infinite."""
    stream = MemoryStream()
    fetch = stream.batch

    def batch(step, start, stop):
        found = fetch(step, start, stop)
        if step in steps and start == 2:
            found.t_BL = torch.zeros_like(found.t_BL)
        return found

    stream.batch = batch
    return stream


def final(engine):
    return plain_weights(engine, lambda: denoiser(rewritten("gpt2")))


def skipped(lines):
    return [line for line in lines if "skipped" in line]


@pytest.mark.parametrize("kind", ENGINES)
def test_a_step_is_left_out_and_the_run_goes_on(kind, tmp_path):
    """Alike in every engine: no update, the schedule goes by steps, AdamW counts updates; killed after it and resumed to the last bit."""
    engine, lines = run(tmp_path / "straight", STEPS, ENGINES[kind](), broken_at(2))
    weights = final(engine)
    (told,) = skipped(lines)
    assert told["step"] == 3 and "loss" in told["skipped"] and "loss" not in told and told["skipped_steps"] == 1
    assert told["where"] == [{"rank": 0, "micro_batch": 1, "rows": MemoryStream().batch(2, 2, 4).row_ids}]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 5, 6, 7, 8]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"]) for line in lines if "loss" in line)
    assert lines[-1]["skipped_steps"] == 1 and engine.step == 8
    for at in (2, 4) if kind in ("single", "stage 2") else (4,):  # in the step that is left out, and after it
        leave_zero_3()
        folder = tmp_path / f"stopped {at}"
        stream = broken_at(2)
        with pytest.raises(SavedAndLeft):
            run(folder, STEPS, ENGINES[kind](), stream, Stop(stream, at))
        leave_zero_3()
        engine, again = run(folder, STEPS, ENGINES[kind](), broken_at(2))
        assert again == lines and all(torch.equal(t, weights[name]) for name, t in final(engine).items())
    leave_zero_3()
    if kind != "single":
        _, expected = run(tmp_path / "single", STEPS, make_engine(), broken_at(2))
        for line, other in zip(lines, expected, strict=True):
            assert line.get("skipped") == other.get("skipped") and line.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-5)


def test_the_update_that_is_left_out_leaves_no_trace(tmp_path):
    """A step without learning rate moves AdamW's moments; a step that is left out moves nothing."""
    engine, _ = run(tmp_path / "a", dataclasses.replace(STEPS, steps=3), make_engine(), broken_at(2))
    before, _ = run(tmp_path / "b", dataclasses.replace(STEPS, steps=2, learning_rate=STEPS.learning_rate), make_engine(), MemoryStream())
    assert engine.step == 3 and before.step == 2
    counts = {float(t) for name, t in engine.tensors().items() if name.startswith("optimizer/step/")}
    assert counts == {2.0}


@pytest.mark.parametrize("allowed", [0, 2])
def test_too_many_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(allowed, tmp_path):
    settings = dataclasses.replace(STEPS, skip_nonfinite=allowed)
    bad = tuple(range(3, 3 + allowed + 1))
    with pytest.raises(UserError) as caught:
        run(tmp_path, settings, make_engine(), broken_at(*bad, 1))  # the one before is not in a row
    told = str(caught.value)
    # With 0 allowed the very first one is too many.
    last, at = (1, 2) if allowed == 0 else (3, 6)
    assert caught.value.exit_code == EXIT_FAILED and f"at step {at}" in told and f"last good checkpoint: step {last}" in told
    assert f"dlmconvert replay RUN {at}" in told and "micro-batch 1" in told and "row " in told
    assert CheckpointFolder(tmp_path / "checkpoints").steps()[-1] == last
    assert [line["step"] for line in skipped(read_metrics(tmp_path / "metrics.jsonl"))][-1] == at
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=lambda name: pytest.fail(name))  # strict JSON
    # The same command with more patience goes on from there.
    _, lines = run(tmp_path, dataclasses.replace(settings, skip_nonfinite=9), make_engine(), broken_at(*bad, 1))
    _, straight = run(tmp_path / "straight", dataclasses.replace(settings, skip_nonfinite=9), make_engine(), broken_at(*bad, 1))
    assert lines == straight and lines[-1]["step"] == 8


def test_the_count_of_steps_in_a_row_survives_a_resume(tmp_path):
    stream = broken_at(2, 3, 4)
    with pytest.raises(SavedAndLeft):
        run(tmp_path, dataclasses.replace(STEPS, skip_nonfinite=2), make_engine(), stream, Stop(stream, 3))
    with pytest.raises(UserError, match="at step 5, 3 steps in a row"):
        run(tmp_path, dataclasses.replace(STEPS, skip_nonfinite=2), make_engine(), broken_at(2, 3, 4))


FP16 = {"single": lambda: make_engine(precision="fp16"), "stage 1": lambda: make_deepspeed(0, micro_batch=2, precision="fp16"), "stage 3": lambda: make_deepspeed(3, micro_batch=2, precision="fp16")}


@pytest.fixture
def half_on_this_cpu(monkeypatch):
    """DeepSpeed refuses float16 on CPUs without instructions for it; torch computes it on all."""
    from dlmconvert.training.deepspeed import load_deepspeed
    from dlmconvert.training.ranks import Solo

    accelerator = load_deepspeed(Solo()).accelerator.get_accelerator()
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: True)
    monkeypatch.setattr(accelerator, "supported_dtypes", lambda: [torch.float, torch.half, torch.bfloat16])


@pytest.mark.parametrize("kind", FP16)
def test_fp16_finds_its_loss_scale(kind, half_on_this_cpu, tmp_path, monkeypatch):
    """A scale that is too high costs steps that are counted apart; close to fp32; the scale is in the checkpoint."""
    for module in ("engine", "deepspeed_config"):
        monkeypatch.setattr(f"dlmconvert.training.{module}.INITIAL_LOSS_SCALE", 2.0**20)
    settings = dataclasses.replace(STEPS, steps=10, skip_nonfinite=0)
    engine, lines = run(tmp_path / "straight", settings, FP16[kind]())
    overflows = skipped(lines)
    assert overflows and all("loss scale" in line["skipped"] for line in overflows)
    last = lines[-1]
    assert last["skipped_steps"] == 0 and last["overflow_steps"] == len(overflows) and last["loss_scale"] == 2.0 ** (20 - len(overflows))
    leave_zero_3()
    stream = MemoryStream()
    with pytest.raises(SavedAndLeft):
        run(tmp_path / "stopped", settings, FP16[kind](), stream, Stop(stream, 3))
    leave_zero_3()
    _, again = run(tmp_path / "stopped", settings, FP16[kind]())
    assert again == lines
    leave_zero_3()
    broken = broken_at(*(line["step"] - 1 for line in overflows))
    _, full = run(tmp_path / "fp32", dataclasses.replace(settings, skip_nonfinite=10), make_engine(), broken)
    pairs = [(line["loss"], other["loss"]) for line, other in zip(lines, full, strict=True) if "loss" in line]
    assert len(pairs) == 10 - len(overflows) and all(half == pytest.approx(whole, rel=0.01) for half, whole in pairs)


def test_fp16_whose_loss_is_not_finite_is_no_overflow(tmp_path):
    with pytest.raises(UserError, match="the loss is nan at step 3"):
        run(tmp_path, dataclasses.replace(STEPS, skip_nonfinite=0), make_engine(precision="fp16"), broken_at(2))


def test_deepspeed_refuses_fp16_where_it_cannot(monkeypatch):
    from dlmconvert.training.deepspeed import load_deepspeed
    from dlmconvert.training.ranks import Solo

    monkeypatch.setattr(load_deepspeed(Solo()).accelerator.get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(UserError, match="engine.precision=fp16"):
        make_deepspeed(2, precision="fp16")
