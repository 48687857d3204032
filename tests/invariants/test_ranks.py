"""Several processes give the run of one, whatever is done to them: through the command line, over gloo, on the CPU.

The order of additions is another one: losses and weights agree within 1e-5. AdamW's first steps divide by second moments near 0, which
would blow up the last bits of a few weights: hence the larger eps.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import SMALL, SMALL_EXPORT, SMALL_SFT, curve, steps_kept, weights, write_corpus
from kills import kill_once, ranks_of
from safetensors.torch import load_file

from dlmconvert.runs.folder import RunFolder

KILLED = -signal.SIGKILL
LONG = [*SMALL, "train.weight_decay=0.1", "train.adam_eps=1e-4", "train.steps=20", "train.save_steps=5", "train.log_steps=1", "engine.name=deepspeed", "run.folder=run"]
EVERYTHING_IN_PARTS = ["engine.zero_stage=3", "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"]


@pytest.fixture(scope="module")
def zygote():
    from zygote import Zygote

    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def straight(zygote, tiny_checkpoints, tmp_path_factory):
    """Runs that nobody touched, by name: the single engine, one and two processes."""
    done = {}
    kinds = {
        "single": ["engine.name=single"],
        "two": ["--processes", "2"],
        "two, stage 3": [*EVERYTHING_IN_PARTS, "--processes", "2"],
    }

    def get(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp("straight")
            write_corpus(folder)
            status, text = zygote.run(folder, "adapt", tiny_checkpoints["gpt2"], *LONG, *kinds[kind])
            assert status == 0, text
            done[kind] = folder / "run" / "adapt"
        return done[kind]

    return get


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same(stage, expected):
    return curve(stage) == curve(expected) and weights(stage / "model") == weights(expected / "model")


def close(stage, expected, loss=1e-5, weight=1e-5):
    for line, other in zip(curve(stage), curve(expected), strict=True):
        for name in ("loss", "nelbo", "cross_entropy", "masked_fraction", "learning_rate"):
            assert line[name] == pytest.approx(other[name], rel=loss, abs=loss), (line["step"], name)
    ours, theirs = load_file(stage / "model" / "model.safetensors"), load_file(expected / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < weight


def steps_done(run) -> int:
    path = run / "adapt" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("kind", ["two", "two, stage 3"])
def test_two_processes_agree_with_the_single_engine(kind, straight):
    close(straight(kind), straight("single"))


def test_the_model_folder_of_zero_3_is_a_plain_one(straight):
    """Tied embeddings and an added mask row included: stock transformers loads it, and the tie is written once."""
    from transformers import AutoModelForCausalLM

    folder = straight("two, stage 3") / "model"
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.shape[0] == 301
    other = AutoModelForCausalLM.from_pretrained(straight("single") / "model")
    tokens = torch.arange(20)[None] + 5
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=0, atol=5e-3)


@pytest.mark.parametrize("victim", [1])  # rank 0, and all: the random moments below
def test_one_rank_is_killed(victim, zygote, straight, place, tiny_checkpoints):
    """The run ends within seconds with one message; the same command gives the straight run to the last bit."""
    command = ["adapt", tiny_checkpoints["gpt2"], *LONG, "--processes", "2"]
    child = zygote.start(place, *command)
    child.wait_for(lambda: steps_done(place / "run") >= 7, seconds=120)
    ranks = ranks_of(child)
    os.kill(ranks[victim], signal.SIGKILL)
    assert child.wait() == 1
    assert f"rank {victim} of 2 was killed by SIGKILL" in child.text() and child.text().count("error:") == 1, child.text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    status, text = zygote.run(place, *command)
    assert status == 0 and "continuing from the checkpoint of step" in text, text
    assert same(place / "run" / "adapt", straight("two"))


def test_all_are_killed_while_a_checkpoint_is_written(zygote, straight, place, tiny_checkpoints):
    """The command itself dies by SIGKILL: its ranks die with it, and let go of the run."""
    command = ["adapt", tiny_checkpoints["gpt2"], *LONG, "--processes", "2"]
    checkpoints = place / "run" / "adapt" / "checkpoints"
    child = zygote.start(place, *command)
    child.wait_for(lambda: list(checkpoints.glob(".writing-step-000010")) or (checkpoints / "step-000010").exists(), seconds=120)
    child.send(signal.SIGKILL)
    assert child.wait() == KILLED
    status, text = zygote.run(place, *command)
    assert status == 0, text
    assert same(place / "run" / "adapt", straight("two")) and not list(checkpoints.glob(".*"))


@pytest.mark.parametrize(("numbers", "words"), [((2, 1), []), ((2, 1, 4), EVERYTHING_IN_PARTS)], ids=["stage 2", "stage 3"])
def test_another_number_of_processes_continues(numbers, words, zygote, straight, place, tiny_checkpoints):
    """The same batches, and the loss equal but for the order of additions."""
    command = ["adapt", tiny_checkpoints["gpt2"], *LONG, *words]
    for processes, step in zip(numbers[:-1], (5, 12), strict=False):
        child = zygote.start(place, *command, "--processes", processes)
        child.wait_for(lambda step=step: steps_done(place / "run") >= step, seconds=120)
        child.send(signal.SIGTERM)
        assert child.wait() == 75, child.text()
        (*_, saved) = steps_kept(place / "run" / "adapt")
        assert f"SIGTERM: saved at step {saved} and left" in child.text() and child.text().count("error:") == 1, child.text()
    status, text = zygote.run(place, *command, "--processes", numbers[-1])
    assert status == 0 and f"continuing from the checkpoint of step {saved}" in text, text
    close(place / "run" / "adapt", straight("single"))


@pytest.mark.parametrize("kind", ["two, stage 3"])  # stage 2: benchmarks/kills.py
def test_killed_at_random_moments_with_overlapped_saving(kind, zygote, straight, place, tiny_checkpoints):
    """benchmarks/kills.py does the same twenty times."""
    words = EVERYTHING_IN_PARTS if "3" in kind else []
    command = ["adapt", tiny_checkpoints["gpt2"], *LONG, *words, "train.save_steps=2", "train.overlap_saving=true", "--processes", "2"]
    draw, kills = random.Random(kind), []
    for moment in ("save", "step") if words else ("step", "save", "save"):
        kills.append(kill_once(zygote, place, command, place / "run" / "adapt", draw, moment))
    assert None not in kills and not any(kill.lost for kill in kills), kills
    status, text = zygote.run(place, *command)
    assert status == 0, text
    assert same(place / "run" / "adapt", straight(kind)) and not list((place / "run" / "adapt" / "checkpoints").glob(".*"))


def test_a_truncated_shard_falls_back_and_says_so(zygote, straight, place, tiny_checkpoints):
    """First that a checkpoint is damaged, then from which step the run really goes on. And a text that is another one is refused."""
    shutil.copytree(straight("two").parent, place / "run")
    (place / "run" / "adapt" / "model").rename(place / "gone")
    (shard,) = (place / "run" / "adapt" / "checkpoints" / "step-000020").rglob("zero_pp_rank_1*optim_states.pt")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    command = ["adapt", tiny_checkpoints["gpt2"], *LONG, "--processes", "2"]
    mine = (place / "text.jsonl").read_bytes()
    write_corpus(place, seed=1)
    status, text = zygote.run(place, *command)
    assert status == 2 and "the text changed while adapt was interrupted" in text and text.count("error:") == 1, text
    (place / "text.jsonl").write_bytes(mine)
    status, text = zygote.run(place, *command)
    assert status == 0, text
    assert text.index("step-000020 is damaged") < text.index("continuing from the checkpoint of step 15") and "of step 20" not in text
    assert same(place / "run" / "adapt", straight("two")) and steps_kept(place / "run" / "adapt") == [15, 20]


@pytest.mark.parametrize(("rank", "overlaps"), [(1, "false"), (0, "true")])
def test_a_disk_that_is_full_on_one_rank(rank, overlaps, zygote, straight, place, tiny_checkpoints):
    """The run stops with one message, the checkpoint before stands, and nothing but the steps since then is done again."""
    command = ["adapt", tiny_checkpoints["gpt2"], *LONG, f"train.overlap_saving={overlaps}", "--processes", "2"]
    where = ("dlmconvert.training.deepspeed", "_WrittenLater.write" if overlaps == "true" else "DeepSpeedEngine.capture", 2, rank)
    status, text = zygote.run(place, *command, full=where)
    assert status == 1 and "No space left on device" in text and "the checkpoint of step 5 stands" in text and text.count("error:") == 1, text
    assert steps_kept(place / "run" / "adapt") == [5]
    status, text = zygote.run(place, *command)
    assert status == 0 and "continuing from the checkpoint of step 5" in text, text
    assert same(place / "run" / "adapt", straight("two")) and not list((place / "run" / "adapt" / "checkpoints").glob(".*"))


def test_what_cannot_be_meant_is_refused_in_one_message(zygote, straight, place, tiny_checkpoints):
    shutil.copytree(straight("two").parent, place / "run")
    (place / "run" / "adapt" / "model").rename(place / "gone")
    source = tiny_checkpoints["gpt2"]
    for words, message in (
        (["--processes", "3", "run.folder=other"], "train.rows_per_step=4 cannot be dealt to 3 processes"),
        (["--processes", "2", "run.folder=other", "engine.deepspeed.gradient_clipping=9"], "gradient_clipping=9 contradicts 1.0"),
        (["--processes", "2", "run.folder=other", "engine.name=single"], "engine.name=single"),
        (["--processes", "2", "engine.zero_stage=3"], "engine.zero_stage: 2 -> 3"),
        (["engine.name=single"], "add --processes 2, or --processes 1 to go on with one"),
        (["--processes", "2", "data.train=absent.jsonl", "run.folder=other"], "absent.jsonl"),
    ):
        status, text = zygote.run(place, "adapt", source, *LONG, *words)
        assert status == 2 and message in text and text.count("error:") == 1, text


def test_a_failure_of_another_rank_is_told_with_its_number(zygote, place, tiny_checkpoints, monkeypatch):
    """Here by a checkpoint folder in which only rank 1 cannot write."""
    log = place / "fail.py"
    log.write_text(
        "import sys, os\n"
        f"sys.path[:0] = {[str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]!r}\n"
        "import conftest, torch\n"
        "import dlmconvert.training.loop as loop\n"
        "real = loop.batch_loss\n"
        "def fails(engine, batch, *rest):\n"
        "    if engine.ranks.rank == 1 and batch.step == 3: raise OSError(28, 'No space left on device')\n"
        "    return real(engine, batch, *rest)\n"
        "loop.batch_loss = fails\n"
        "from dlmconvert.cli.app import main\n"
        "main()\n"
    )
    words = ["adapt", tiny_checkpoints["gpt2"], *LONG, "--processes", "2"]
    done = subprocess.run([sys.executable, str(log), *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "rank 1 of 2: the disk is full" in done.stderr and done.stderr.count("error:") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_on_one_rank(place, tiny_checkpoints):
    """All ranks leave the step out; too many in a row end the run with one message that names the rank and its rows."""
    script = place / "breaks.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = {[str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]!r}\n"
        "import conftest, torch\n"
        "import dlmconvert.training.loop as loop\n"
        "real = loop.batch_loss\n"
        "def breaks(engine, batch, *rest, **more):\n"
        "    loss, values = real(engine, batch, *rest, **more)\n"
        "    if engine.ranks.rank == 1 and batch.step in (3, 8, 9): values['loss'] = float('inf')\n"
        "    return loss, values\n"
        "loop.batch_loss = breaks\n"
        "from dlmconvert.cli.app import main\n"
        "main()\n"
    )
    words = ["adapt", tiny_checkpoints["gpt2"], *LONG, "train.skip_nonfinite=1", "--processes", "2"]
    done = subprocess.run([sys.executable, str(script), *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr
    assert "the loss is nan at step 10, 2 steps in a row" in done.stderr and "rank 1, micro-batch 0: row " in done.stderr
    assert "last good checkpoint: step 5" in done.stderr and "dlmconvert replay run 10" in done.stderr
    lines = [json.loads(line) for line in (place / "run" / "adapt" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["where"][0]["rank"]) for line in lines if "skipped" in line] == [(4, 1), (9, 1), (10, 1)]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 5, 6, 7, 8]


@pytest.mark.parametrize("kind", ["two", "two, stage 3"])
def test_a_step_of_two_processes_is_replayed_in_one_and_in_two(kind, zygote, straight, place):
    shutil.copytree(straight(kind).parent, place / "run")
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file() and path.name != ".lock"}
    line = curve(place / "run" / "adapt")[17]
    reports = []
    for words in ([], ["--processes", 2]):
        status, text = zygote.run(place, "replay", "run", 18, "--json", *words)
        assert status == 0, text
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
        assert found["begun"] == 15 and found["found"]["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert found["found"]["gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-4)
        reports.append(found["found"])
    assert [row["row_id"] for row in reports[0]["rows"]] == [row["row_id"] for row in reports[1]["rows"]]
    assert [row["loss"] for row in reports[0]["rows"]] == pytest.approx([row["loss"] for row in reports[1]["rows"]], rel=1e-4, abs=1e-6)
    assert reports[0]["gradient_norms"] == pytest.approx(reports[1]["gradient_norms"], rel=1e-3)
    status, text = zygote.run(place, "replay", "run", 18, "--processes", 3)
    assert status == 2 and text.count("error:") == 1 and "3 processes, but adapt was last trained in 2" in text, text
    assert before == {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file() and path.name != ".lock"}


def test_torchrun_is_recognised(straight, place, tiny_checkpoints):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m", "dlmconvert", "adapt", tiny_checkpoints["gpt2"], *LONG]
    words[words.index("--master-port") : words.index("--master-port") + 2] = ["--standalone"]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run/adapt/model") == 1  # rank 0 alone prints
    assert same(place / "run" / "adapt", straight("two"))


def test_adapters_on_two_processes_and_then_on_one(zygote, place, tiny_checkpoints):
    """ZeRO-3, embeddings tied, the mask token's row among what is trained; then a fine-tuning on two processes after an adaptation on one device."""
    lora = ["train.lora.rank=4", "train.adam_eps=1e-4", "train.learning_rate=1e-2"]
    command = ["adapt", tiny_checkpoints["qwen2"], *SMALL, *lora, "train.log_steps=1"]
    status, text = zygote.run(place, *command, "run.folder=single")
    assert status == 0, text
    zero = [*command, "run.folder=run", "engine.name=deepspeed", *EVERYTHING_IN_PARTS]
    child = zygote.start(place, *zero, "train.save_steps=2", "--processes", 2)
    child.wait_for(lambda: steps_done(place / "run") >= 3, seconds=120)
    os.kill(ranks_of(child)[1], signal.SIGKILL)
    assert child.wait() == 1, child.text()
    status, text = zygote.run(place, *zero)
    assert status == 0 and "continuing from the checkpoint" in text, text
    close(place / "run" / "adapt", place / "single" / "adapt")
    training = RunFolder(place / "run")
    training.hold()  # as one that goes on
    status, text = zygote.run(place, "export", "run", "--hf", "--checkpoint", "8", *SMALL_EXPORT)
    training.release()
    assert status == 0 and "verified" in text, text
    status, text = zygote.run(place, "sft", "single", *SMALL_SFT, "--processes", 2)
    assert status == 0 and "2 processes: engine.name=deepspeed" in text and (place / "single" / "sft" / "model").is_dir(), text
