"""Several processes for one run: starting them on this machine, watching them, and what the ranks beside the first do.

Rank 0 runs the stages as ever and speaks; the others wait until it calls them to train. One failure becomes one message.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dlmconvert import __version__
from dlmconvert.errors import EXIT_FAILED, EXIT_SAVED_RUN_AGAIN, Outcome, UserError
from dlmconvert.runs.folder import RunFolder
from dlmconvert.runs.stage import StageContext, StopFlag
from dlmconvert.training.ranks import Place, Ranks, Solo

GRACE = {0: 15.0, EXIT_SAVED_RUN_AGAIN: 60.0}  # seconds that the others get when one rank has ended with this code
GRACE_AFTER_FAILURE = 5.0  # they wait for one that will not come


@dataclass
class _Child:
    rank: int
    pid: int
    pipe: int
    log: IO[bytes]
    status: int | None = None  # exit code, or minus the signal
    stopped_by_us: bool = False
    outcome: Outcome | None = None


def launch(count: int, work: Callable[[], Outcome]) -> Outcome:
    """Run `work` in `count` processes of this machine, as ranks; return the one outcome to tell.

    Signals reach every rank. When one ends, the others have seconds to follow. They die with this process, whatever kills it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {name: value for name, value in {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}.items() if name not in os.environ}
    sys.stdout.flush()
    sys.stderr.flush()
    children = [_start(rank, shared, work) for rank in range(count)]

    def forward(number: int, frame: Any) -> None:
        _signal(children, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        _watch(children)
    finally:
        _signal(children, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
    return _verdict(children)


def _start(rank: int, shared: dict[str, str], work: Callable[[], Outcome]) -> _Child:
    reader, writer = os.pipe()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(writer)
        return _Child(rank, pid, reader, log)
    code = EXIT_FAILED
    try:
        os.close(reader)
        os.setpgid(0, 0)  # Ctrl-C in a terminal goes to the parent alone, which passes it on
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(EXIT_FAILED)
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        if rank:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR1, _leave)
        signal.signal(signal.SIGTERM, _leave)
        outcome = work()
        os.write(writer, json.dumps(asdict(outcome)).encode()[:60_000])
        code = outcome.code
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _leave(number: int, frame: Any) -> None:
    from dlmconvert.errors import Interrupted

    raise Interrupted(signal.Signals(number).name)


def _signal(children: list[_Child], number: int) -> None:
    for child in children:
        if child.status is None:
            with suppress(ProcessLookupError):
                os.kill(child.pid, number)


def _watch(children: list[_Child]) -> None:
    deadline = float("inf")
    while any(child.status is None for child in children):
        for child in children:
            if child.status is not None:
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if not pid:
                continue
            child.status = os.waitstatus_to_exitcode(status)
            if child.status != 0 or child.rank == 0:
                deadline = min(deadline, time.monotonic() + GRACE.get(child.status, GRACE_AFTER_FAILURE))
        if time.monotonic() > deadline:
            for child in children:
                child.stopped_by_us = child.stopped_by_us or child.status is None
            _signal(children, signal.SIGKILL)
        time.sleep(0.02)
    for child in children:
        text = b"".join(iter(lambda pipe=child.pipe: os.read(pipe, 65536), b""))
        os.close(child.pipe)
        with suppress(ValueError, TypeError):
            child.outcome = Outcome(**json.loads(text))


def _verdict(children: list[_Child]) -> Outcome:
    count = len(children)
    again = "the same command continues from the newest checkpoint"
    for child in children:
        if child.status is not None and child.status < 0 and not child.stopped_by_us:
            name = signal.Signals(-child.status).name
            why = "the system does that when memory runs out" if name == "SIGKILL" else _last_words(child)
            return Outcome(EXIT_FAILED, f"rank {child.rank} of {count} was killed by {name}", why, again)
    ended = [child for child in children if not child.stopped_by_us]
    failed = [child for child in ended if child.status not in (0, EXIT_SAVED_RUN_AGAIN)]
    told = [child for child in failed if child.outcome is not None and not child.outcome.lost_peer]
    for child in told or failed:
        outcome = child.outcome or Outcome(child.status or EXIT_FAILED, "it ended without a word", _last_words(child), again)
        where = "" if child.rank == 0 else f"rank {child.rank} of {count}: "
        return Outcome(outcome.code, where + outcome.what, outcome.why, outcome.next_step)
    left = [child for child in ended if child.status == EXIT_SAVED_RUN_AGAIN and child.outcome is not None]
    if left:
        return left[0].outcome or Outcome()
    stuck = [child.rank for child in children if child.stopped_by_us]
    if stuck:
        return Outcome(EXIT_FAILED, f"rank {stuck[0]} of {count} did not end with the others and was stopped", _last_words(children[stuck[0]]), again)
    return Outcome()


def _last_words(child: _Child) -> str:
    if child.rank == 0:
        return ""
    child.log.seek(0)
    lines = [line for line in child.log.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-3:])


# inside a rank


@contextmanager
def joined(place: Place, asked: str):
    """The ranks of this run; on rank 0 everything in the block runs while the others `follow`.

    asked: what this process was asked to do. Raises UserError when a rank was asked something else or runs another version.
    """
    if place.count == 1:
        yield Solo()
        return
    ranks = Ranks(place)
    mine = {"version": __version__, "asked": asked}
    first = ranks.share(mine)
    for name, value in mine.items():
        if first[name] != value:
            what = f"version {value} of dlmconvert, rank 0 runs {first[name]}" if name == "version" else "another recipe or other keys than rank 0"
            raise UserError(f"rank {place.rank} of {place.count} was started with {what}", _first_difference(first[name], value), "start every rank with the same command", exit_code=EXIT_FAILED)
    ranks.barrier()
    yield ranks
    ranks.tell({"end": True})
    ranks.leave()


def _first_difference(one: str, other: str) -> str:
    for a, b in zip(one.splitlines(), other.splitlines(), strict=False):
        if a != b:
            return f"rank 0: {a.strip()}; here: {b.strip()}"
    return ""


def follow(ranks: Ranks) -> None:
    """What ranks beside the first do: train when rank 0 says so, until it says that all is done."""
    from dlmconvert.runs.runner import signals_set

    stop = StopFlag()
    with signals_set(stop):
        while "train" in (order := ranks.listen()):
            from dlmconvert.runs.stages import JOBS
            from dlmconvert.runs.training import train_together

            run = RunFolder(Path(order["run"]))
            context = StageContext(run, run.recipe(), SilentReporter(), stop, ranks)
            train_together(context, JOBS[order["train"]](context))


class SilentReporter:
    """Rank 0 alone speaks."""

    def say(self, text: str) -> None:
        pass

    warn = say

    @contextmanager
    def progress(self, label: str, total: float, done: float = 0):
        yield self

    def advance(self, amount: float, text: str = "") -> None:
        pass
