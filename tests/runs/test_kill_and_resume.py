"""kill -9 at any moment and the same command again: the curve and the weights of the run that nobody touched, bit for bit."""

from __future__ import annotations

import random
import signal
import time

import pytest
from command_line import SMALL, SMALL_EXPORT, SMALL_SFT, curve, steps_kept, weights, write_corpus

KILLED = -signal.SIGKILL
CHAIN = [*SMALL, *SMALL_SFT, *SMALL_EXPORT, "stages=[adapt,sft,export]", "run.folder=run"]
LONG = [*SMALL, "train.steps=80", "train.save_steps=7", "run.folder=run"]

# In the order in which a run comes by: every place where a file takes its name, and some between.
PLACES = {
    "adapt": [
        ("dlmconvert.runs.folder", "RunFolder.write_recipe", 1, "before"),
        ("dlmconvert.runs.folder", "RunFolder.update_stage", 1, "before"),
        ("dlmconvert.backbone.streaming", "_write_shards", 1, "after"),
        ("dlmconvert.runs.preparing", "replace_folder", 1, "after"),
        ("dlmconvert.data.tokenising", "write_shard", 1, "before"),
        ("dlmconvert.data.packing", "_tokenise", 1, "after"),
        ("dlmconvert.data.packing", "_concatenate", 2, "before"),
        ("dlmconvert.data.packing", "_write_stores", 1, "after"),
        ("dlmconvert.runs.training", "fingerprint", 1, "after"),
        ("dlmconvert.training.metrics", "Metrics.write", 1, "after"),
        ("safetensors.torch", "save_file", 1, "after"),
        ("dlmconvert.training.checkpoint", "_flush", 3, "before"),
        ("dlmconvert.training.checkpoint", "_flush", 4, "before"),
        ("dlmconvert.training.checkpoint", "CheckpointFolder._prune", 2, "before"),
        ("dlmconvert.training.metrics", "Metrics.resume", 1, "before"),
        ("dlmconvert.runs.training", "_loop", 1, "after"),
        ("dlmconvert.runs.training", "write_model", 1, "after"),
        ("dlmconvert.runs.stages", "measure", 1, "after"),
    ],
    "sft": [
        ("dlmconvert.data.conversations", "published", 1, "before"),
        ("dlmconvert.training.loop", "batch_loss", 7, "after"),
        ("dlmconvert.training.checkpoint", "CheckpointFolder.write", 1, "after"),
        ("dlmconvert.training.checkpoint", "CheckpointFolder._remove", 1, "before"),
        ("dlmconvert.runs.training", "run_training", 1, "after"),
    ],
    "export": [
        ("dlmconvert.exporting.package", "_workplace", 1, "after"),
        ("dlmconvert.exporting.package", "verify_export", 1, "before"),
        ("dlmconvert.exporting.package", "export_folder", 1, "after"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(zygote, tiny_checkpoints, tmp_path_factory):
    """{name: folder} of runs that nobody touched."""
    folders = {}
    for name, words in (("chain", ["run", tiny_checkpoints["llama"], *CHAIN]), ("long", ["adapt", tiny_checkpoints["gpt2"], *LONG])):
        folder = tmp_path_factory.mktemp(name)
        write_corpus(folder)
        status, text = zygote.run(folder, *words)
        assert status == 0, text
        assert "deepspeed imported: False" in text
        folders[name] = folder / "run"
    return folders


def same_stage(run, expected, stage):
    return curve(run / stage) == curve(expected / stage) and weights(run / stage / "model") == weights(expected / stage / "model")


def test_killed_at_every_place_of_the_whole_chain(zygote, straight, place, tiny_checkpoints):
    commands = {
        "adapt": ["adapt", tiny_checkpoints["llama"], *CHAIN],
        "sft": ["sft", "run"],
        "export": ["export", "--hf", "run"],
    }
    for verb, command in commands.items():
        for at in PLACES[verb]:
            status, text = zygote.run(place, *command, die=at)
            assert status == KILLED, (at, text)
        if verb != "export":
            status, text = zygote.run(place, *command)
            assert status == 0, text
    command = ["run", tiny_checkpoints["llama"], *CHAIN]
    status, text = zygote.run(place, *command, die=("dlmconvert.runs.report", "write_report", 1, "before"))
    assert status == KILLED, text
    status, text = zygote.run(place, *command)
    assert status == 0, text
    expected = straight["chain"]
    assert weights(place / "run" / "source") == weights(expected / "source")
    assert same_stage(place / "run", expected, "adapt") and same_stage(place / "run", expected, "sft")
    assert weights(place / "run" / "export" / "native") == weights(expected / "export" / "native")
    left = [p for p in (place / "run").rglob("*") if p.name.startswith(".writing") or ".tmp" in p.name or "unfinished" in p.name]
    assert not left
    assert sorted(p.name for p in (place / "run" / "export").iterdir() if not p.name.startswith(".")) == ["native"]
    status, text = zygote.run(place, *command)
    assert status == 0 and "everything is done already" in text


def test_killed_at_random_moments(zygote, straight, place, tiny_checkpoints):
    command, draw, kills = ["adapt", tiny_checkpoints["gpt2"], *LONG], random.Random(0), 0
    for attempt in range(8):
        child = zygote.start(place, *command)
        time.sleep(draw.uniform(0, 0.1 * (attempt + 1)))
        child.send(signal.SIGKILL)
        kills += child.wait() == KILLED
    assert kills >= 2
    status, text = zygote.run(place, *command)
    assert status == 0, text
    assert same_stage(place / "run", straight["long"], "adapt")


def test_killed_while_a_checkpoint_is_written(zygote, straight, place, tiny_checkpoints):
    """From outside, as soon as the folder under its temporary name appears."""
    command = ["adapt", tiny_checkpoints["gpt2"], *LONG]
    checkpoints = place / "run" / "adapt" / "checkpoints"
    for _ in range(3):
        child = zygote.start(place, *command)
        child.wait_for(lambda: list(checkpoints.glob(".writing-*")) or (place / "run" / "adapt" / "model").exists())
        child.send(signal.SIGKILL)
        child.wait()
    status, text = zygote.run(place, *command)
    assert status == 0, text
    assert same_stage(place / "run", straight["long"], "adapt") and not list(checkpoints.glob(".writing-*"))


def test_killed_while_a_checkpoint_is_written_in_the_background(zygote, straight, place, tiny_checkpoints):
    """Before and after the thread has written the tensors, before it marks them, before it removes the oldest."""
    command = ["adapt", tiny_checkpoints["gpt2"], *LONG, "train.overlap_saving=true"]
    newest = 0
    for at in (
        ("dlmconvert.training.engine", "write_tensors", 2, "before"),
        ("dlmconvert.training.engine", "write_tensors", 2, "after"),
        ("dlmconvert.training.checkpoint", "CheckpointFolder.publish", 2, "before"),
        ("dlmconvert.training.checkpoint", "CheckpointFolder._prune", 1, "before"),
    ):
        status, text = zygote.run(place, *command, die=at)
        assert status == KILLED, (at, text)
        kept = steps_kept(place / "run" / "adapt")
        assert kept[-1] > newest or at[1] == "CheckpointFolder._prune", (at, kept)
        newest = kept[-1]
    status, text = zygote.run(place, *command)
    assert status == 0 and f"continuing from the checkpoint of step {newest}" in text, text
    assert same_stage(place / "run", straight["long"], "adapt") and not list((place / "run" / "adapt" / "checkpoints").glob(".writing-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(zygote, straight, place, tiny_checkpoints, number):
    command = ["adapt", tiny_checkpoints["gpt2"], *LONG, "train.save_steps=100", "train.log_steps=1"]
    run = place / "run"
    child = zygote.start(place, *command)
    child.wait_for(lambda: (run / "adapt" / "metrics.jsonl").exists() and (run / "adapt" / "metrics.jsonl").read_text())
    child.send(number)
    assert child.wait() == 75, child.text()
    (step,) = steps_kept(run / "adapt")
    assert 0 < step < 80 and f"{number.name}: saved at step {step}" in child.text() and "same command continues" in child.text()
    assert curve(run / "adapt")[-1]["step"] == step
    # `train.log_steps` and `train.save_steps` may be other ones now: they have no influence on the numbers.
    status, text = zygote.run(place, *command)
    assert status == 0 and f"continuing from the checkpoint of step {step}" in text
    assert weights(run / "adapt" / "model") == weights(straight["long"] / "adapt" / "model")
    assert [line["step"] for line in curve(run / "adapt")] == list(range(1, 81))


def test_a_signal_outside_the_training_loop_leaves_at_once(zygote, straight, place, tiny_checkpoints):
    command = ["adapt", tiny_checkpoints["gpt2"], *LONG]
    child = zygote.start(place, *command)
    child.wait_for(lambda: "prepare the source" in child.text())
    child.send(signal.SIGTERM)
    assert child.wait() == 75 and "the same command continues" in child.text()
    status, text = zygote.run(place, *command)
    assert status == 0, text
    assert same_stage(place / "run", straight["long"], "adapt")


def test_two_processes_cannot_hold_one_run(zygote, place, tiny_checkpoints):
    command = ["adapt", tiny_checkpoints["gpt2"], *SMALL, "train.steps=100000", "train.save_steps=20", "train.keep_checkpoints=100000", "run.folder=runs/one"]
    run = place / "runs" / "one"
    child = zygote.start(place, *command)
    child.wait_for(lambda: (run / "adapt" / "checkpoints" / "step-000020" / "COMPLETE").exists())
    for words in (command, ["sft", run, *SMALL_SFT], ["export", run, "--to", "out"]):
        status, text = zygote.run(place, *words)
        assert status == 1 and f"is in use by process {child.pid}" in text and "error:" in text, text
    status, text = zygote.run(place, "export", run, *SMALL_EXPORT, "--to", "early", "--checkpoint", "20")
    assert status == 0 and (place / "early" / "model.safetensors").is_file(), text  # nothing in the run is written for it
    status, text = zygote.run(place, "status")
    assert status == 0 and f"held by process {child.pid}" in text and "running" in text and " left  last line " in text
    assert f"process {child.pid} on " in text and "1 process" in text and "MFU" in text
    child.send(signal.SIGTERM)
    assert child.wait() == 75
    status, text = zygote.run(place, "status")
    assert "interrupted" in text and "held by" not in text and "has ended; the same command continues from step-" in text


def test_a_text_that_changes_under_an_interrupted_run_is_refused(zygote, place, tiny_checkpoints):
    command = ["adapt", tiny_checkpoints["gpt2"], *LONG]
    before = (place / "text.jsonl").read_bytes()
    status, _ = zygote.run(place, *command, die=("dlmconvert.training.checkpoint", "CheckpointFolder.write", 1, "before"))
    assert status == KILLED
    write_corpus(place, seed=1)  # nothing was saved yet: the new text is simply taken
    status, _ = zygote.run(place, *command, die=("dlmconvert.training.checkpoint", "CheckpointFolder.write", 2, "after"))
    assert status == KILLED and steps_kept(place / "run" / "adapt") == [7, 14]
    after = (place / "text.jsonl").read_bytes()
    (place / "text.jsonl").write_bytes(before)
    status, text = zygote.run(place, *command)
    assert status == 2 and "the text changed while adapt was interrupted" in text and "step 14" in text and "--fresh" in text
    assert steps_kept(place / "run" / "adapt") == [7, 14]
    (place / "text.jsonl").write_bytes(after)
    status, text = zygote.run(place, *command)
    assert status == 0 and "continuing from the checkpoint of step 14" in text
