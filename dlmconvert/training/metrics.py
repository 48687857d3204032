"""metrics.jsonl: one line a logging interval, the same lines whether or not the run was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLOCK = ("tokens_per_second", "seconds_per_step", "seconds_left", "mfu", "memory_bytes")  # what the machine decides, not the recipe


class Metrics:
    """Sums between two lines, and the file they go to. The sums travel in checkpoints, so that a resumed run writes the same line.

    listener: receives each line as it is written (progress bars, plain logs). writes: rank 0 alone does.
    """

    def __init__(self, path: Path, log_steps: int, listener: Callable[[dict[str, Any]], None] = lambda line: None, writes: bool = True):
        self.path = path
        self.writes = writes
        self.log_steps = log_steps
        self.listener = listener
        self.sums: dict[str, float] = {}
        self.num_steps = 0

    def state(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "num_steps": self.num_steps}

    def resume(self, state: dict[str, Any], step: int) -> None:
        """Take up the sums of a checkpoint and forget lines that were written after it (their steps are run again)."""
        self.sums, self.num_steps = dict(state["sums"]), state["num_steps"]
        if not self.writes:
            return
        lines = [line for line in read_metrics(self.path) if line["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(temporary, self.path)

    def record(self, step: int, sums: dict[str, float] | None, last: Callable[[], dict[str, Any]], is_final: bool) -> None:
        """Add one optimizer step's values; write a line when the interval is full. step: steps done so far.

        sums: averaged over the interval; None for a step that was left out. last: values of this very step (learning rate, ratio,
        speed), asked for when a line is written. An interval in which every step was left out has no line.
        """
        if sums is not None:
            for name, value in sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.num_steps += 1
        if (step % self.log_steps and not is_final) or not self.num_steps:
            return
        line = {"step": step, **{name: value / self.num_steps for name, value in self.sums.items()}, **last()}
        self.sums, self.num_steps = {}, 0
        self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        if not self.writes:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.listener(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
