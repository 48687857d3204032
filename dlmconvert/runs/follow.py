"""What a rank says about itself, who may take part, and what the ranks beside the first do.

Rank 0 runs the stages as ever and speaks; the others wait until it calls them to train.
"""

from __future__ import annotations

import platform
import socket
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dlmconvert import __version__
from dlmconvert.errors import EXIT_FAILED, Outcome, UserError
from dlmconvert.recipe.load import flat
from dlmconvert.recipe.schema import Recipe
from dlmconvert.runs.folder import RunFolder
from dlmconvert.runs.stage import StageContext, StopFlag
from dlmconvert.training.ranks import Ranks

SHARED_FOLDER_SECONDS = 40.0  # a network file system may remember for so long that there was nothing
_PACKAGES = ("torch", "transformers", "deepspeed", "peft")  # what the numbers, or the files of 

def about(recipe: Recipe) -> dict[str, Any]:
    """The versions and the recipe with which this process was started."""
    return {"versions": {"dlmconvert": __version__, "python": ".".join(platform.python_version_tuple()[:2])} | {name: _version(name) for name in _PACKAGES}, "recipe": flat(recipe.model_dump(mode="json"))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def refusal_by(mine: dict[str, Any], count: int):
    """(rank, host, what it says about itself) -> why rank 0, which says `mine`, cannot train with it; None when it can."""

    def refusal(rank: int, host: str, theirs: dict[str, Any]) -> Outcome | None:
        if "failed" in theirs:
            outcome = Outcome(**theirs["failed"])
            return Outcome(outcome.code, f"rank {rank} of {count} on {host}: {outcome.what}", outcome.why, outcome.next_step)
        who = f"rank {rank} of {count} on {host} was started with"
        for package, here in mine["versions"].items():
            there = theirs["versions"].get(package, "none")
            if there != here:
                return Outcome(EXIT_FAILED, f"{who} {package} {there}, rank 0 with {package} {here}", f"rank 0 is on {socket.gethostname()}", "install the same versions on every machine")
        lines = [
            f"{key}: {theirs['recipe'].get(key)} there, {mine['recipe'].get(key)} at rank 0"
            for key in sorted(set(mine["recipe"]) | set(theirs["recipe"]))
            if mine["recipe"].get(key) != theirs["recipe"].get(key)
        ]
        if lines:
            more = [f"and {len(lines) - 5} more keys"] if len(lines) > 5 else []
            return Outcome(EXIT_FAILED, f"{who} another recipe than rank 0", "\n".join([*lines[:5], *more]), "start every rank with the same command")
        return None

    return refusal


def follow(ranks: Ranks) -> None:
    """What ranks beside the first do: train when rank 0 says so, until it says that all is done."""
    from dlmconvert.runs.runner import signals_set

    stop = StopFlag()
    with signals_set(stop):
        while "train" in (order := ranks.listen()):
            from dlmconvert.runs.stages import JOBS
            from dlmconvert.runs.training import train_together

            run = RunFolder(Path(order["run"]))
            until = time.monotonic() + SHARED_FOLDER_SECONDS
            while not (run.path / "recipe.yaml").is_file() and time.monotonic() < until:
                time.sleep(0.5)
            if not (run.path / "recipe.yaml").is_file():
                raise UserError(f"{run.path} is not there", "every machine must see the run folder under the same path", "put it on a shared file system: run.folder=...", exit_code=EXIT_FAILED)
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
