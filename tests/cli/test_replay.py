"""dlmconvert replay: a step of a finished, a broken and a dealt-out run, run again without a trace in it; and what status shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import SMALL, curve, fails, stage_state, works, write_corpus

RUN = Path("run")
EVERY = [*SMALL, "train.log_steps=1", "run.folder=run"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def test_a_step_is_run_again_without_a_trace(place, tiny_checkpoints):
    """Bit for bit the numbers of metrics.jsonl, from the start and from a checkpoint; rows add up to the loss, layers to the norm."""
    works("adapt", tiny_checkpoints["llama"], *EVERY)
    before, lines = contents(RUN), curve(RUN / "adapt")
    for step, begun in ((1, 0), (3, 0), (8, 6)):
        told = json.loads(works("replay", "run", step, "--json").out)
        found = told["found"]
        assert (told["stage"], told["step"], told["begun"]) == ("adapt", step, begun)
        assert found["loss"] == lines[step - 1]["loss"] and found["learning_rate"] == lines[step - 1]["learning_rate"]
        assert found["gradient_norm"] == pytest.approx(lines[step - 1]["gradient_norm"], rel=1e-5)
        assert sum(row["loss"] for row in found["rows"]) == pytest.approx(found["loss"], rel=1e-5) and len(found["rows"]) == 4
        assert any("layers.1" in layer for layer in found["gradient_norms"]) and found["first_nonfinite"] is None
    assert contents(RUN) == before
    text = works("replay", "run", 5).out
    assert "everything is finite" in text and "of source 0 (epoch 0)" in text and "layers.0" in text
    assert "its steps are 1 to 8" in fails(2, "replay", "run", 9)
    assert "has not trained a stage 'sft'" in fails(2, "replay", "run", 1, "--stage", "sft")
    (place / "text.jsonl").write_text("".join((place / "text.jsonl").read_text().splitlines(True)[:30]))
    assert "the text changed" in fails(2, "replay", "run", 5)


def test_a_run_that_breaks_says_how_to_look_at_it(place, tiny_checkpoints):
    """A learning rate that no run survives; the command of the message names the module."""
    words = ["adapt", tiny_checkpoints["gpt2"], *EVERY, "train.learning_rate=1e25", "train.clip_norm=null", "train.save_steps=1", "train.skip_nonfinite=1"]
    text = fails(1, *words)
    assert "the loss is nan at step 3, 2 steps in a row (train.skip_nonfinite=1)" in text and "last good checkpoint: step 1" in text
    assert "step 2 is left out" in text and "dlmconvert replay run 3 --stage adapt" in text and "train.skip_nonfinite=4" in text
    assert stage_state(RUN, "adapt")["status"] == "started"
    told = works("replay", "run", 3, "--stage", "adapt").out
    assert "first output that is not finite: transformer" in told and "rows whose loss is not finite, 4 of 4" in told
    found = json.loads(works("replay", "run", 3, "--json").out, parse_constant=lambda name: pytest.fail(name))["found"]
    assert found["loss"] == "nan" and found["nonfinite_gradients"]
    state = json.loads(works("status", "run", "--json").out)["stages"]["adapt"]
    assert state["status"] == "interrupted" and state["skipped_steps"] == 2 and state["process"]["ranks"] == 1
    text = works("status", "run").out
    assert "2 steps left out (not finite)" in text and "has ended; the same command continues from step-000001" in text
    # More patience may be given to a run that has begun; this one is beyond help, and still keeps its last good checkpoint.
    assert "4 steps in a row (train.skip_nonfinite=3)" in fails(1, *words[:-1], "train.skip_nonfinite=3")
    assert [path.name for path in (RUN / "adapt" / "checkpoints").iterdir()] == ["step-000001"]


@pytest.fixture
def torch_as_it_was():
    yield
    from dlmconvert.training.deepspeed import leave_zero_3

    leave_zero_3()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_of_a_deepspeed_run(stage, place, tiny_checkpoints, torch_as_it_was):
    words = [*EVERY, "engine.name=deepspeed", f"engine.zero_stage={stage}"]
    works("adapt", tiny_checkpoints["gpt2"], *words)
    before, lines = contents(RUN), curve(RUN / "adapt")
    told = json.loads(works("replay", "run", 8, "--json").out)
    assert told["begun"] == 6 and told["found"]["loss"] == pytest.approx(lines[7]["loss"], rel=1e-6)
    assert told["found"]["gradient_norm"] == pytest.approx(lines[7]["gradient_norm"], rel=1e-4)
    if stage == 3:  # what does not fit into one GPU
        told = json.loads(works("replay", "run", 8, "engine.offload_optimizer=cpu", "engine.offload_parameters=cpu", "--json").out)
        assert told["found"]["loss"] == pytest.approx(lines[7]["loss"], rel=1e-6)
        assert "not on replay, which runs the step as it was" in fails(2, "replay", "run", 8, "train.learning_rate=1")
    assert contents(RUN) == before
