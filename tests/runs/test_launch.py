"""Processes that are started and watched: whatever becomes of them is one outcome. Without training: the ranks here are short functions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dlmconvert.errors import EXIT_SAVED_RUN_AGAIN, Outcome
from dlmconvert.runs.hosts import Share, local_share
from dlmconvert.runs.launch import launch

LOST = Outcome(1, "another rank has gone", lost_peer=True)


def rank() -> int:
    return int(os.environ["RANK"])


def node(script: str) -> list[tuple[str, list[str]]]:
    """Another machine: a shell in place of ssh."""
    return [("gpu2", ["sh", "-c", script])]


def test_every_rank_knows_its_place(tmp_path):
    def work(leave):
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        (tmp_path / os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in names))

    assert launch(Share(2, 2, 6, "gpu1", 700), work) == Outcome()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"2": "2 0 6 2 gpu1 700", "3": "3 1 6 2 gpu1 700"}


def test_the_first_cause_is_told():
    """Rank 1 dies; rank 2 is ended by a library that noticed, a moment later; rank 0 only lost a peer."""

    def work(leave):
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        if rank() == 2:
            os.kill(os.getpid(), signal.SIGQUIT)
        leave(LOST)

    outcome = launch(local_share(3), work)
    assert (outcome.code, outcome.what) == (1, "rank 1 of 3 was killed by SIGKILL") and "memory" in outcome.why


def test_a_failure_is_told_with_its_rank_and_a_crash_with_its_last_words():
    def fails(leave):
        leave(Outcome(1, "the disk is full", "why", "next") if rank() == 1 else LOST)

    outcome = launch(local_share(2), fails)
    assert outcome == Outcome(1, "rank 1 of 2: the disk is full", "why", "next")

    def crashes(leave):
        if rank() == 1:
            os.write(2, b"a library said this\n")
            os._exit(3)
        leave(LOST)

    outcome = launch(local_share(2), crashes)
    assert outcome.code == 3 and outcome.what == "rank 1 of 2: it ended without a word" and outcome.why == "a library said this"


def test_one_that_stays_is_stopped(monkeypatch):
    monkeypatch.setattr("dlmconvert.runs.launch.GRACE_AFTER_FAILURE", 0.2)
    began = time.monotonic()
    outcome = launch(local_share(2), lambda leave: leave(Outcome(1, "no")) if rank() else time.sleep(60))
    assert outcome.what == "rank 1 of 2: no" and time.monotonic() - began < 10


SAYS = """echo 'Welcome to gpu2'; echo '{"outcome": %s}'; exit %d"""
TOLD = '{"code": 1, "what": "rank 3 of 4 was killed by SIGKILL", "why": "memory", "next_step": "again", "lost_peer": false, "told": false}'


def test_what_another_machine_tells():
    outcome = launch(Share(0, 2, 4, "127.0.0.1", 1), lambda leave: leave(LOST), node(SAYS % (TOLD, 1)))
    assert outcome == Outcome(1, "host gpu2: rank 3 of 4 was killed by SIGKILL", "memory", "again")


@pytest.mark.parametrize(
    ("nodes", "what", "why"),
    [
        (node("echo 'gpu2: Permission denied (publickey).' >&2; exit 255"), "ended with code 255 (that is ssh's own)", "Permission denied (publickey)"),
        (node("echo 'sh: python3: not found' >&2; exit 127"), "ended with code 127", "python3: not found"),
        ([("gpu2", ["/no/such/ssh", "gpu2"])], "ended with code 1", "/no/such/ssh: No such file or directory"),
    ],
)
def test_a_machine_that_cannot_be_started(nodes, what, why, monkeypatch):
    monkeypatch.setattr("dlmconvert.runs.launch.GRACE_OF_A_NODE", 0.2)
    monkeypatch.setattr("dlmconvert.runs.launch.GRACE_AFTER_FAILURE", 0.2)
    outcome = launch(Share(0, 1, 2, "127.0.0.1", 1), lambda leave: time.sleep(60), nodes)
    assert outcome.code == 1 and outcome.what.startswith("host gpu2: the command there") and what in outcome.what and why in outcome.why


def test_signals_reach_ranks_and_machines():
    saved = '{"code": 75, "what": "saved", "why": "", "next_step": "", "lost_peer": true, "told": true}'
    remote = node(f"read line; [ $line = SIGUSR1 ] || exit 3; {SAYS % (saved, 75)}")

    def work(leave):
        signal.signal(signal.SIGUSR1, lambda number, frame: leave(Outcome(EXIT_SAVED_RUN_AGAIN, "saved at step 3")))
        while True:
            time.sleep(0.05)

    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    before = signal.getsignal(signal.SIGUSR1)
    timer.start()
    assert launch(Share(0, 1, 2, "127.0.0.1", 1), work, remote) == Outcome(EXIT_SAVED_RUN_AGAIN, "saved at step 3")
    assert signal.getsignal(signal.SIGUSR1) == before


CONTROLLED = """
import os, signal, sys, time
from dlmconvert.errors import Outcome
from dlmconvert.runs.hosts import Share
from dlmconvert.runs.launch import launch

def work(leave):
    signal.signal(signal.SIGTERM, lambda number, frame: leave(Outcome(75, "saved")))
    open("rank", "w").write(str(os.getpid()))
    while True:
        time.sleep(0.05)  # one long sleep would sleep on when the signal comes just before it

sys.exit(launch(Share(1, 1, 2, "127.0.0.1", 1), work, controlled=True).code)
"""


@pytest.mark.parametrize(("words", "code"), [(b"SIGTERM\n", 75), (None, -signal.SIGKILL)])
def test_a_machine_that_another_has_started(words, code, tmp_path):
    """Signals arrive as words on stdin; when that ends, the other machine has gone, and everything here ends with it."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", CONTROLLED], stdin=subprocess.PIPE, cwd=tmp_path, env=environment)
    until = time.monotonic() + 20
    while not (tmp_path / "rank").exists() or not (tmp_path / "rank").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    if words:
        process.stdin.write(words)
        process.stdin.flush()
    else:
        process.stdin.close()
    assert process.wait(20) == code
    pid = (tmp_path / "rank").read_text()
    while Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
