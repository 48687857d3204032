"""The job script: what it asks SLURM for, and what it does when bash runs it. Fake srun, scontrol and sbatch write down their words."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import SMALL, dlmconvert, fails, works, write_corpus

from dlmconvert.errors import UserError
from dlmconvert.runs.slurm import grouped, job_script, write_script


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_checkpoints):
    """A folder with texts; bin/ is first on PATH. Gives the words of a small adaptation."""
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    return ["adapt", str(tiny_checkpoints["gpt2"]), *SMALL, "name=it's me"]


def fake(name: str, text: str) -> None:
    path = Path("bin") / name
    path.write_text(f'#!/bin/bash\necho "{name} $*" >> {Path.cwd()}/calls\n{text}\n')
    path.chmod(0o755)


def directives(path: Path) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in path.read_text().splitlines() if line.startswith("#SBATCH")]


def test_what_the_script_asks_for(here):
    told = works(*here, "--slurm", "--processes", 4, "--nodes", 2, "run.folder=runs/mine", "--", "-p", "gpu", "--time=24:00:00", "--comment", "two words")
    script = Path("runs/mine/slurm-adapt.sh").resolve()
    assert told.out.strip() == str(script) and f"next: sbatch {script}" in told.err
    lines = directives(script)
    for line in (
        "--nodes=2", "--ntasks-per-node=2", "--requeue", "--open-mode=append", "--signal=B:USR1@120", f"--output={script.parent}/slurm-%j.log",
        f"--chdir={Path.cwd()}", "--job-name=mine", "-p gpu", "--time=24:00:00", '--comment "two words"',
    ):  # fmt: skip
        assert line in lines, lines
    assert not any("gpu" in line and line.startswith("--gpus") for line in lines)  # engine.device=cpu
    assert "name=it's me" not in script.read_text() and "run.folder=runs/mine --processes 4 &" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert not Path("runs/mine/run.json").exists()  # nothing has started


def test_gpus_and_options_that_win_over_ours(here):
    words = [word for word in here if word != "engine.device=cpu"]
    works(*words, "--slurm", "--processes", 4)
    script = Path("runs/it's me/slurm-adapt.sh")
    assert "--gpus-per-node=4" in directives(script) and "--job-name=it-s-me" in directives(script)
    told = works(*words, "--slurm", "--processes", 4, "--", "--gres=gpu:a100:4", "--signal=B:USR1@600", "-N", "1")
    lines = directives(script)
    assert "--gres=gpu:a100:4" in lines and "-N 1" in lines and sum("signal" in line for line in lines) == 1
    assert not any(line.startswith(("--gpus", "--nodes")) for line in lines)
    assert "kept as" in told.err and Path("runs/it's me/slurm-adapt-1.sh").exists()  # somebody may have edited it


def test_submitting(here):
    assert "sbatch is not on this machine" in fails(1, *here, "--slurm", "--submit")
    fake("sbatch", "echo Submitted batch job 42")
    assert "Submitted batch job 42" in works(*here, "--slurm", "--submit").out
    assert Path("calls").read_text() == f"sbatch {Path('runs').resolve()}/it's me/slurm-adapt.sh\n"
    fake("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    assert "invalid partition specified" in fails(1, *here, "--slurm", "--submit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--submit"], "--submit without --slurm"),
        (["--slurm", "--hostfile", "hosts"], "--hostfile beside --slurm"),
        (["--slurm", "--processes", "3", "--nodes", "2", "train.rows_per_step=6"], "cannot be dealt to 2 machines"),
        (["--slurm", "--processes", "3"], "train.rows_per_step=4 cannot be dealt to 3 processes"),
        (["--slurm", "--", "gpu"], "'gpu' is not an option of sbatch"),
        (["--processes", "2", "--", "--partition=gpu"], "nothing to give --partition=gpu to"),
        (["--node-rank", "1", "--processes", "2"], "--node-rank without --nodes"),
        (["--nodes", "2", "--processes", "2"], "--nodes 2 without --node-rank and --master"),
        (["--hostfile", "absent"], "cannot read the hostfile absent"),
    ],
)
def test_what_cannot_be_meant(here, words, message):
    assert message in fails(2, *here, *words)
    assert not Path("runs").exists()


def script_around(command: str, tmp_path: Path) -> Path:
    """The job script with another command in place of the training."""
    text = job_script(title="t", name="n", words=["adapt"], log=tmp_path / "log", nodes=1, processes_per_node=2, gpus=True)
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    path = tmp_path / "job.sh"
    write_script(path, text.replace(line, f"srun bash -c '{command}' &"))
    return path


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("CANCELLED by 1000", False)])
def test_a_saved_job_goes_back_into_the_queue_unless_it_was_cancelled(here, tmp_path, state, requeued):
    """USR1 reaches the step through srun; the script waits for it, however often a signal comes."""
    fake("srun", 'exec "$@"')
    fake("scontrol", f'[ "$1" = show ] && echo "JobId=7 JobState={state} Reason=None"; true')
    job = script_around('trap "echo USR1 >> got" USR1; trap "sleep 0.3; exit 75" TERM; touch ready; while :; do sleep 0.05; done', tmp_path)
    process = subprocess.Popen(["bash", str(job)], env=os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"})
    until = time.monotonic() + 20
    for number, seen in ((signal.SIGUSR1, "got"), (signal.SIGTERM, None)):
        while not Path("ready").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(number)
        while seen and not Path(seen).exists():
            assert time.monotonic() < until
            time.sleep(0.01)
    assert process.wait(20) == 75
    assert ("scontrol requeue 7" in Path("calls").read_text()) is requeued


@pytest.mark.parametrize("code", [0, 1, 137])
def test_other_ends_are_final(here, tmp_path, code):
    fake("srun", 'exec "$@"')
    fake("scontrol", "")
    done = subprocess.run(["bash", str(script_around(f"exit {code}", tmp_path))], env=os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}, capture_output=True)
    assert done.returncode == code and "requeue" not in Path("calls").read_text()


def test_options_and_their_values():
    assert grouped(["-p", "gpu", "--time=1:00", "--exclude", "n1"]) == [["-p", "gpu"], ["--time=1:00"], ["--exclude", "n1"]]
    with pytest.raises(UserError, match="line break"):
        grouped(["--comment=a\n#SBATCH --account=other"])


def test_the_deepspeed_launchers_argument_is_taken(here):
    assert dlmconvert("--local_rank=1", "recipes").code == 0
