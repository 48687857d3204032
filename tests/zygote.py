"""Real processes that start at once: this one imports the heavy libraries and forks for every command it is sent.

    python zygote.py        reads one JSON request a line, answers {"pid"} and, when asked to wait, {"status"}

A request {"words", "folder", "log", "die"} runs `dlmconvert WORDS` in the folder. `die` is [module, name, n, "before" | "after"]: the
process kills itself with SIGKILL around the n-th call of that function; what nobody can handle, at a place chosen beforehand.
`full` is [module, name, n, rank]: on that rank the n-th call finds the disk full.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass
class Child:
    """A running command. status: exit code, or minus the signal that killed it."""

    zygote: Zygote
    pid: int
    log: Path

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return self.zygote.ask({"wait": self.pid})["status"]

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, seen, seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while not seen():
            assert time.monotonic() < until, self.text()
            time.sleep(0.0005)


class Zygote:
    def __init__(self):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.number = 0

    def ask(self, request: dict) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder: Path, *words: object, die: tuple | None = None, full: tuple | None = None) -> Child:
        self.number += 1
        log = Path(folder) / f"log-{self.number}.txt"
        log.touch()
        answer = self.ask({"words": [str(word) for word in words], "folder": str(folder), "log": str(log), "die": die, "full": full})
        return Child(self, answer["pid"], log)

    def run(self, folder: Path, *words: object, die: tuple | None = None, full: tuple | None = None) -> tuple[int, str]:
        child = self.start(folder, *words, die=die, full=full)
        return child.wait(), child.text()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    import conftest  # noqa: F401  the same settings as in the tests
    import peft  # noqa: F401

    import dlmconvert.backbone.load  # noqa: F401
    import dlmconvert.cli.app  # noqa: F401
    import dlmconvert.runs.stages  # noqa: F401
    import dlmconvert.training.loop  # noqa: F401

    children = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"status": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                os._exit(child(request))
            children[pid] = request
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def child(request: dict) -> int:
    os.chdir(request["folder"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(0)
    if request["die"]:
        die_at(*request["die"])
    if request["full"]:
        full_at(*request["full"])
    from dlmconvert.cli.app import main

    sys.argv = ["dlmconvert", *request["words"]]
    code = 0
    try:
        main()
    except SystemExit as left:
        code = left.code
    sys.stdout.write(f"deepspeed imported: {'deepspeed' in sys.modules}\n")
    sys.stdout.flush()
    return code


def die_at(module: str, name: str, nth: int, when: str) -> None:
    def kill(number: int, at: str) -> None:
        if number == nth and at in (when, "after"):
            os.kill(os.getpid(), signal.SIGKILL)

    around(module, name, kill)


def full_at(module: str, name: str, nth: int, rank: int) -> None:
    def fail(number: int, at: str) -> None:
        if number == nth and at == "before" and int(os.environ.get("RANK", 0)) == rank:
            raise OSError(28, "No space left on device")

    around(module, name, fail)


def around(module: str, name: str, happens) -> None:
    """happens(number of the call, "before" | "after") is called around every call of that function."""
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        number = calls
        happens(number, "before")
        result = real(*args, **kwargs)
        happens(number, "after")
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    serve()
