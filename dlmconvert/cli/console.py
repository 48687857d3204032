"""The only module that prints: results to stdout, everything about them to stderr."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

console = Console(stderr=True, highlight=False)
_stdout = Console(highlight=False)


def out(renderable: Any = "") -> None:
    """A result: text as it is, or a rich table or panel."""
    if isinstance(renderable, str):
        sys.stdout.write(renderable + "\n")
        sys.stdout.flush()
    else:
        _stdout.print(renderable)


def show_error(what: str, why: str = "", next_step: str = "") -> None:
    console.print(f"[bold red]error:[/] {escape(what)}", soft_wrap=True)
    for line in why.splitlines():
        console.print(f"  {escape(line)}", soft_wrap=True)
    if next_step:
        console.print(f"[bold]next:[/] {escape(next_step)}", soft_wrap=True)


class ConsoleReporter:
    """Stages speak through this: bars on a terminal, plain lines with an estimate of the time left elsewhere."""

    def say(self, text: str) -> None:
        console.print(escape(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: float, done: float = 0):
        if console.is_terminal:
            with _bar() as bar:
                yield _Bar(bar, bar.add_task(label, total=total, completed=done, text=""))
        else:
            yield _PlainProgress(label, total, done)


def _bar():
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("  {task.description}"), BarColumn(bar_width=14), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True), TextColumn("left"), TextColumn("{task.fields[text]}"), console=console, transient=False,
    )  # fmt: skip


class _Bar:
    def __init__(self, bar: Any, task: Any):
        self.bar, self.task = bar, task

    def advance(self, amount: float, text: str = "") -> None:
        self.bar.update(self.task, advance=amount, **({"text": text} if text else {}))


class _PlainProgress:
    """A line every few seconds."""

    INTERVAL = 15.0

    def __init__(self, label: str, total: float, done: float):
        self.label, self.total, self.done = label, total, done
        self.first_done, self.began = done, time.monotonic()
        self.last_line = self.began

    def advance(self, amount: float, text: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        finished = self.done >= self.total
        if now - self.last_line < self.INTERVAL and not finished:
            return
        if finished and self.last_line < 0:
            return
        rate = (self.done - self.first_done) / max(now - self.began, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else 0
        console.print(f"  {self.label} {self.done:.0f}/{self.total:.0f}, {duration(left)} left  {escape(text)}", soft_wrap=True)
        self.last_line = -1.0 if finished else now


def duration(seconds: float) -> str:
    """3725 -> 1 h 02 min."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
