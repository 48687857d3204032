"""Several machines, played by network namespaces where the system allows it (else by several local addresses); and other launchers.

Whatever starts the processes, the run is that of `--processes 2`, to the last bit.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import SMALL, curve, steps_kept, weights, write_corpus

ROOT = Path(__file__).parents[2]
WORDS = [*SMALL, "train.adam_eps=1e-4", "train.steps=12", "train.save_steps=4", "train.log_steps=1", "engine.name=deepspeed", "run.folder=run"]
PYTHON = [sys.executable, "-m", "dlmconvert"]
NETWORK = """
mount -t tmpfs none /run && mkdir /run/netns && ip netns add a && ip netns add b || exit 99
ip link add va netns a type veth peer name vb netns b
ip -n a addr add 10.9.0.1/24 dev va; ip -n b addr add 10.9.0.2/24 dev vb
for n in a b; do ip -n $n link set lo up; ip -n $n link set v$n up; done
"""

# Starts the command as two tasks of a step (in forks, so that the libraries are imported once), passes signals on, ends with the highest code.
SRUN = f"""#!{sys.executable}
import os, signal, sys
import peft, transformers, dlmconvert.backbone.load, dlmconvert.runs.stages, dlmconvert.training.loop
from dlmconvert.cli.app import main
words = sys.argv[sys.argv.index("dlmconvert") + 1 :]
tasks = []
for rank in "01":
    pid = os.fork()
    if not pid:
        os.environ.update(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS="2", SLURM_STEP_ID="0", SLURM_STEP_NODELIST="localhost", SLURM_NODEID="0")
        sys.argv = ["dlmconvert", *words]
        main()
    tasks.append(pid)
signal.signal(signal.SIGUSR1, lambda number, frame: [os.kill(pid, number) for pid in tasks])
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in tasks))
"""


@pytest.fixture(scope="module")
def zygote():
    from zygote import Zygote

    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def straight(zygote, tiny_checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    write_corpus(folder)
    status, text = zygote.run(folder, "adapt", tiny_checkpoints["gpt2"], *WORDS, "--processes", 2)
    assert status == 0, text
    return folder / "run" / "adapt"


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(name: str, text: str) -> None:
    path = Path("bin") / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def steps_done(run: Path) -> int:
    path = run / "adapt" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(seen, process, log: Path, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < until and process.poll() is None, log.read_text()
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def same(stage: Path, expected: Path) -> bool:
    return curve(stage) == curve(expected) and weights(stage / "model") == weights(expected / "model")


@pytest.fixture
def two_hosts(place):
    """(hosts, how to run a command on the first): with a fake ssh that runs its command on the second."""
    probe = subprocess.run(["unshare", "-n", "-m", "bash", "-c", NETWORK], capture_output=True)
    if probe.returncode:
        program("ssh", 'for last; do :; done; exec sh -c "$last"')
        return ["localhost", "127.0.0.2"], []
    program("ssh", 'for last; do :; done; exec nsenter --net=/run/netns/b sh -c "$last"')
    program("on_a", NETWORK + 'exec nsenter --net=/run/netns/a "$@"')
    return ["10.9.0.1", "10.9.0.2"], ["unshare", "-n", "-m", str(place / "bin" / "on_a")]


def test_a_hostfile_and_ssh(two_hosts, straight, tiny_checkpoints):
    """SIGTERM reaches the other machine, and all save; the same command finishes."""
    hosts, on_first = two_hosts
    Path("hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    command = [*on_first, *PYTHON, "adapt", str(tiny_checkpoints["gpt2"]), *WORDS, "--hostfile", "hosts", "--", "-p", "2222"]
    log, run = Path("log"), Path("run")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    wait_for(lambda: steps_done(run) >= 2, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, log.read_text()
    (saved,) = steps_kept(run / "adapt")
    assert f"error: SIGTERM: saved at step {saved} and left" in log.read_text() and log.read_text().count("error:") == 1
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "continuing from the checkpoint" in done.stderr, done.stderr
    assert done.stdout.count("run/adapt/model") == 1 and same(run / "adapt", straight)


def test_numbered_nodes_and_a_rank_that_is_killed(zygote, place, straight, tiny_checkpoints):
    """No common parent: every command ends within seconds, and the one beside the dead rank says how it died."""
    command = ["adapt", tiny_checkpoints["gpt2"], *WORDS, "--processes", 2, "--nodes", 2, "--master", f"127.0.0.1:{free_port()}"]
    nodes = [zygote.start(place, *command, "--node-rank", number) for number in (0, 1)]
    nodes[0].wait_for(lambda: steps_done(place / "run") >= 5 or "error:" in nodes[0].text(), seconds=120)
    assert "error:" not in nodes[0].text() + nodes[1].text(), nodes[0].text() + nodes[1].text()
    (victim,) = Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split()
    os.kill(int(victim), signal.SIGKILL)
    assert nodes[0].wait() == nodes[1].wait() == 1
    assert "rank 1 of 2 was killed by SIGKILL" in nodes[1].text() and f"rank 1 of 2 on {socket.gethostname()} ended without a word" in nodes[0].text()
    assert all(node.text().count("error:") == 1 for node in nodes)
    command[-1] = f"127.0.0.1:{free_port()}"
    nodes = [zygote.start(place, *command, "--node-rank", number) for number in (1, 0)]
    assert [node.wait() for node in nodes] == [0, 0], [node.text() for node in nodes]
    assert same(place / "run" / "adapt", straight) and "run/adapt/model" not in nodes[0].text()


def test_another_recipe_on_one_node(zygote, place, tiny_checkpoints):
    command = ["adapt", tiny_checkpoints["gpt2"], *WORDS, "--processes", 2, "--nodes", 2, "--master", f"127.0.0.1:{free_port()}"]
    nodes = [zygote.start(place, *command, "--node-rank", 0), zygote.start(place, *command, "--node-rank", 1, "train.seed=7")]
    assert [node.wait() for node in nodes] == [1, 1]
    for node in nodes:
        assert "rank 1 of 2 on" in node.text() and "another recipe than rank 0" in node.text(), node.text()
        assert "train.seed: 7 there, 0 at rank 0" in node.text() and node.text().count("error:") == 1
    assert not (place / "run" / "adapt").exists()


def test_another_version_on_one_rank(place, tiny_checkpoints):
    Path("older.py").write_text(
        "import os\n"
        "import dlmconvert.runs.follow as follow\n"
        "real = follow._version\n"
        "follow._version = lambda package: '0.0.1' if package == 'torch' and os.environ.get('RANK') == '1' else real(package)\n"
        "from dlmconvert.cli.app import main\n"
        "main()\n"
    )
    words = ["adapt", str(tiny_checkpoints["gpt2"]), *WORDS, "--processes", "2"]
    done = subprocess.run([sys.executable, "older.py", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("error:") == 1, done.stderr
    assert "rank 1 of 2 on" in done.stderr and "torch 0.0.1, rank 0 with torch 2." in done.stderr


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        (("absent.yaml", "absent.yaml"), "error: no such recipe file: absent.yaml"),
        (("tiny", "absent.yaml"), "error: rank 1 of 2 on"),
    ],
)
def test_the_ranks_of_another_launcher_speak_with_one_voice(place, recipes, message):
    """As torchrun starts them. Whatever is wrong, and on whichever rank: rank 0 says it, once."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen([*PYTHON, "adapt", recipe], env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank, recipe in enumerate(recipes)
    ]
    first, second = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert message in first and first.count("error:") == 1 and second == "", first + second
    assert [rank.returncode for rank in ranks] == [2, 2]


def test_the_deepspeed_launcher(place, straight, tiny_checkpoints):
    """It puts --local_rank=N in front of our words."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*launcher, "--module", "dlmconvert", "adapt", str(tiny_checkpoints["gpt2"]), *WORDS], capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("run/adapt/model") == 1 and same(place / "run" / "adapt", straight)


def test_a_slurm_job_is_pre_empted_and_goes_on(place, straight, tiny_checkpoints):
    """The script that --slurm writes, run by bash: srun starts two tasks; SIGUSR1 saves; the job is requeued, and the next start finishes."""
    Path("bin/srun").write_text(SRUN)
    Path("bin/srun").chmod(0o755)
    program("scontrol", "echo scontrol $* >> calls")
    made = subprocess.run([*PYTHON, "adapt", str(tiny_checkpoints["gpt2"]), *WORDS, "--processes", "2", "--slurm"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    environment = os.environ | {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    log = Path("log")
    with log.open("w") as file:
        job = subprocess.Popen(["bash", made.stdout.strip()], stdout=file, stderr=file, env=environment)
    wait_for(lambda: steps_done(Path("run")) >= 3, job, log)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 75, log.read_text()
    (saved,) = steps_kept(Path("run") / "adapt")
    assert f"error: SIGUSR1: saved at step {saved} and left" in log.read_text() and log.read_text().count("error:") == 1
    assert f"scontrol requeue {os.getpid()}" in Path("calls").read_text()
    again = subprocess.run(["bash", made.stdout.strip()], capture_output=True, text=True, env=environment | {"SLURM_RESTART_COUNT": "1"})
    assert again.returncode == 0 and f"continuing from the checkpoint of step {saved}" in again.stderr, again.stderr
    assert again.stdout.count("run/adapt/model") == 1 and same(Path("run") / "adapt", straight)
    assert Path("calls").read_text().count("requeue") == 1
