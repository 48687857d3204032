"""Several processes for one run: starting those of this machine (and one command on each other machine), watching them, and one
message for whatever becomes of them."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any, NoReturn

from dlmconvert.errors import EXIT_FAILED, EXIT_SAVED_RUN_AGAIN, Interrupted, Outcome
from dlmconvert.runs.hosts import Share
from dlmconvert.training.lifeline import AGAIN

GRACE = {0: 15.0, EXIT_SAVED_RUN_AGAIN: 60.0}  # seconds that the others get when one rank has ended with this code
GRACE_AFTER_FAILURE = 5.0  # they wait for one that will not come
GRACE_OF_A_NODE = 20.0  # another machine gives its own ranks theirs first
OUTCOME = '{"outcome": '  # how the line begins by which the command of another machine tells how it ended
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

Leave = Callable[[Outcome], NoReturn]


@dataclass
class _Child:
    """A rank of this machine, or the command on another machine. told: where it writes its outcome. log: what else it says."""

    name: str
    pid: int
    told: IO[bytes]
    log: IO[bytes]
    is_first: bool = False
    node: subprocess.Popen | None = None
    status: int | None = None  # exit code, or minus the signal
    ended: float = field(default=0.0)
    stopped_by_us: bool = False
    outcome: Outcome | None = None


def launch(share: Share, work: Callable[[Leave], None], nodes: Sequence[tuple[str, list[str]]] = (), controlled: bool = False) -> Outcome:
    """Run `work` in the processes of this machine, as ranks; return the one outcome to tell.

    work: called in every rank with a function that ends the process with an outcome; returns when all is well. nodes: (host, command)
    of the other machines. controlled: another machine has started this one; signals come on stdin, and its end is ours.

    Signals reach every rank. When one ends, the others have seconds to follow. They die with this process, whatever kills it.
    """
    shared = {"MASTER_ADDR": share.address, "MASTER_PORT": str(share.port), "WORLD_SIZE": str(share.total), "LOCAL_WORLD_SIZE": str(share.count)}
    shared.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // share.count))))
    sys.stdout.flush()
    sys.stderr.flush()
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # a parent may have closed stdin: no file of ours shall be number 0
        pass
    os.close(descriptor)
    children = [_start(share, local, shared, work) for local in range(share.count)]
    children += [_start_node(name, command) for name, command in nodes]

    def forward(number: int, frame: Any) -> None:
        _signal(children, number)

    before = {number: signal.signal(number, forward) for number in _SIGNALS}
    if controlled:
        threading.Thread(target=_obey_stdin, daemon=True).start()
    try:
        _watch(children)
    finally:
        _signal(children, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
    return _verdict(children)


def _start(share: Share, local_rank: int, shared: dict[str, str], work: Callable[[Leave], None]) -> _Child:
    told, log = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - they live as long as the child
    rank, parent = share.first + local_rank, os.getpid()
    pid = os.fork()
    if pid:
        return _Child(f"rank {rank} of {share.total}", pid, told, log, is_first=rank == 0)

    def leave(outcome: Outcome) -> NoReturn:
        try:
            told.write(json.dumps(asdict(outcome)).encode())
            told.flush()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(outcome.code)

    try:
        os.setpgid(0, 0)  # Ctrl-C in a terminal goes to the parent alone, which passes it on
        _die_with_parent()
        if os.getppid() != parent:
            os._exit(EXIT_FAILED)
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(local_rank))
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        if rank:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR1, _leave_at_once)
        signal.signal(signal.SIGTERM, _leave_at_once)
        work(leave)
        leave(Outcome())
    finally:
        os._exit(EXIT_FAILED)


def _start_node(name: str, command: list[str]) -> _Child:
    told, log = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=told, stderr=log, process_group=0, preexec_fn=_die_with_parent)
    except OSError as error:
        log.write(f"{command[0]}: {error.strerror}\n".encode())
        process = subprocess.Popen(["false"], stdin=subprocess.PIPE, stdout=told)
    return _Child(f"host {name}", process.pid, told, log, node=process)


def _die_with_parent() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _leave_at_once(number: int, frame: Any) -> None:
    raise Interrupted(signal.Signals(number).name)


def _obey_stdin() -> None:
    """Names of signals, a line each, from the machine that started this one. When they end, that one has gone."""
    received = b""
    while data := os.read(0, 4096):
        *lines, received = (received + data).split(b"\n")
        for line in lines:
            if line.decode() in {number.name for number in _SIGNALS}:
                os.kill(os.getpid(), signal.Signals[line.decode()])
    os.kill(os.getpid(), signal.SIGKILL)


def _signal(children: list[_Child], number: int) -> None:
    for child in children:
        if child.status is not None:
            continue
        if child.node is not None and number != signal.SIGKILL:
            with suppress(OSError):
                os.write(child.node.stdin.fileno(), signal.Signals(number).name.encode() + b"\n")
            continue
        with suppress(ProcessLookupError):
            os.kill(child.pid, number)


def _watch(children: list[_Child]) -> None:
    deadline = float("inf")
    several = any(child.node is not None for child in children)
    while any(child.status is None for child in children):
        for child in children:
            if child.status is not None:
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if not pid:
                continue
            child.status, child.ended = os.waitstatus_to_exitcode(status), time.monotonic()
            if child.node is not None:
                child.node.returncode = child.status
                child.node.stdin.close()
            if child.status != 0 or child.is_first:
                grace = GRACE.get(child.status, GRACE_AFTER_FAILURE)
                deadline = min(deadline, time.monotonic() + (max(grace, GRACE_OF_A_NODE) if several else grace))
        if time.monotonic() > deadline:
            for child in children:
                child.stopped_by_us = child.stopped_by_us or child.status is None
            _signal(children, signal.SIGKILL)
        time.sleep(0.02)
    for child in children:
        child.outcome = _outcome_of(child)


def _outcome_of(child: _Child) -> Outcome | None:
    child.told.seek(0)
    text = child.told.read().decode(errors="replace")
    with suppress(ValueError, TypeError):
        if child.node is None:
            return Outcome(**json.loads(text))
        lines = [line for line in text.splitlines() if line.startswith(OUTCOME)]  # a login shell may have its say before
        outcome = Outcome(**json.loads(lines[-1])["outcome"]) if lines else None
        return replace(outcome, what=f"{child.name}: {outcome.what}") if outcome is not None and not outcome.lost_peer and outcome.what else outcome
    return None


def _verdict(children: list[_Child]) -> Outcome:
    """The first cause: a rank that was killed or failed by itself, before those that only lost it."""
    ended = sorted((child for child in children if not child.stopped_by_us), key=lambda child: child.ended)
    failed = [child for child in ended if child.status not in (0, EXIT_SAVED_RUN_AGAIN)]
    causes = [child for child in failed if child.outcome is None or not child.outcome.lost_peer]
    # A rank that lost the first one may know its reason all the same, from another machine.
    for child in causes or [child for child in failed if child.is_first] or failed:
        if child.outcome is None and child.status is not None and child.status < 0:
            name = signal.Signals(-child.status).name
            why = "the system does that when memory runs out" if name == "SIGKILL" else _last_words(child)
            return Outcome(EXIT_FAILED, f"{child.name}{'' if child.node is None else ': the ssh to it'} was killed by {name}", why, AGAIN)
        if child.outcome is None and child.node is not None:
            what = f"{child.name}: the command there ended with code {child.status}" + (" (that is ssh's own)" if child.status == 255 else "")
            return Outcome(EXIT_FAILED, what, _last_words(child), "try by hand: ssh HOST true; it must answer without a password")
        outcome = child.outcome or Outcome(child.status or EXIT_FAILED, "it ended without a word", _last_words(child), AGAIN)
        where = "" if child.is_first or child.node is not None or outcome.lost_peer else f"{child.name}: "
        return replace(outcome, what=where + outcome.what, told=False)
    left = [child for child in children if not child.stopped_by_us and child.status == EXIT_SAVED_RUN_AGAIN and child.outcome is not None]
    if left:
        return replace(left[0].outcome or Outcome(), told=False)
    stuck = [child for child in children if child.stopped_by_us]
    if stuck:
        return Outcome(EXIT_FAILED, f"{stuck[0].name} did not end with the others and was stopped", _last_words(stuck[0]), AGAIN)
    return Outcome()


def _last_words(child: _Child) -> str:
    if child.is_first:
        return ""  # on the screen already
    child.log.seek(0)
    lines = [line for line in child.log.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-3:])
