"""SIGKILL at random moments of a run of several processes, and the same command again until it is done."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Kill:
    """victim: `rank 0`, ... or `all`. moment: how it was chosen. step: lines of metrics.jsonl then (a line a step). kept: newest whole
    checkpoint before the kill, and after it. seconds: from the kill to the end of the command."""

    victim: str
    moment: str
    step: int
    kept: tuple[int, int]
    seconds: float

    @property
    def lost(self) -> int:
        """Steps of a whole checkpoint that was there before and is not any more: must be 0."""
        return max(0, self.kept[0] - self.kept[1])


def ranks_of(child) -> list[int]:
    """Process ids of the ranks of a running command, once they have been started."""
    found = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    return [int(pid) for pid in found.read_text().split()] if found.exists() else []


def newest_whole(stage: Path) -> int:
    from dlmconvert.training.checkpoint import CheckpointFolder

    folder = CheckpointFolder(stage / "checkpoints")
    return folder.newest_whole() or 0


def newest_marked(stage: Path) -> int:
    """As `newest_whole`, without reading the files: a kill must not be late."""
    return max((int(path.parent.name.removeprefix("step-")) for path in (stage / "checkpoints").glob("step-*/COMPLETE")), default=0)


def lines_of(stage: Path) -> int:
    path = stage / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_once(zygote, place: Path, command: list, stage: Path, draw: random.Random, moment: str, processes: int = 2) -> Kill | None:
    """Start the command and kill a drawn victim: `save` as soon as a checkpoint is being written (a drawn one of the next three), `start` at
    a drawn time of the first seconds, `step` after a drawn number of further steps. None when the run was done before."""
    child = zygote.start(place, *command)
    victim = draw.choice([*range(processes), "all"])
    begun, shown = time.monotonic(), lines_of(stage)
    target = shown + draw.randint(1, 12)
    delay, wanted = draw.uniform(0.0, 4.0), draw.randint(1, 3)
    is_over = lambda: not Path(f"/proc/{child.pid}").exists() or Path(f"/proc/{child.pid}/stat").read_text().split()[2] == "Z"  # noqa: E731
    seen: set[str] = set()

    def reached() -> bool:
        if is_over():
            return True
        if moment == "start":
            return time.monotonic() - begun > delay
        if len(ranks_of(child)) < processes:
            return False
        if moment == "save":
            seen.update(path.name for path in (stage / "checkpoints").glob(".writing-*"))
            return len(seen) >= wanted
        return shown < target <= lines_of(stage)

    child.wait_for(reached, seconds=180)
    ranks, kept, step, killed_at = ranks_of(child), newest_marked(stage), lines_of(stage), time.monotonic()
    if victim == "all" or len(ranks) < processes:
        victim = "all"
        child.send(signal.SIGKILL)
    else:
        try:
            os.kill(ranks[victim], signal.SIGKILL)
        except ProcessLookupError:
            pass  # the run is ending
    status = child.wait()
    if status == 0:
        return None
    assert status == KILLED or f"rank {victim} of {processes} was killed by SIGKILL" in child.text(), child.text()
    wait_for_the_dead(ranks)
    name = victim if victim == "all" else f"rank {victim}"
    return Kill(name, moment, step, (kept, newest_whole(stage)), time.monotonic() - killed_at)


def wait_for_the_dead(pids: list[int], seconds: float = 10.0) -> None:
    """Ranks of a command that was killed die with it, a moment later."""
    until = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until, pids
        time.sleep(0.01)
