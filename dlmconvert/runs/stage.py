"""What a stage is, and what it may use: declared inputs, a folder, a reporter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from dlmconvert.recipe.load import flat, safe_keys
from dlmconvert.recipe.schema import Recipe
from dlmconvert.runs.folder import RunFolder
from dlmconvert.training.ranks import Ranks, Solo


class Progress(Protocol):
    """One bar: `advance(n, text)` moves it and says what is going on."""

    def advance(self, amount: float, text: str = "") -> None: ...


class Reporter(Protocol):
    """How a stage speaks. The console implements it; tests pass a silent one."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def progress(self, label: str, total: float, done: float = 0) -> AbstractContextManager[Progress]: ...


class StopFlag:
    """Set by a signal handler. While `deferred`, the training loop saves and leaves when it sees it; elsewhere a signal leaves at
    once, because every other stage either continues from its parts or takes seconds."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self.deferred = False


@dataclass(frozen=True)
class StageContext:
    """Everything a stage runs with. ranks: the processes that train together; stages run on rank 0, which calls the others for training."""

    run: RunFolder
    recipe: Recipe
    reporter: Reporter
    stop: StopFlag
    ranks: Ranks | Solo = Solo()


@dataclass(frozen=True)
class Stage:
    """reads: sections or keys of the recipe that its numbers depend on (changes of them are refused once it has started).
    needs: stages that come first. work: does it; called again after an interruption, it continues. outputs: paths in the run folder
    that exist when it is finished. is_current: whether what it made is still what it would make (an export before a fine-tuning is not).
    """

    name: str
    title: str
    reads: tuple[str, ...]
    needs: Callable[[Recipe], tuple[str, ...]]
    work: Callable[[StageContext], dict[str, Any]]
    outputs: tuple[str, ...]
    is_current: Callable[[RunFolder, Recipe], bool] = lambda run, recipe: True

    def keys(self, recipe: Recipe) -> dict[str, Any]:
        """The flat keys that this stage reads, with their values."""
        values = flat(recipe.model_dump(mode="json"))
        safe = safe_keys()
        return {
            key: value
            for key, value in values.items()
            if key not in safe and any(key == name or key.startswith(name + ".") for name in self.reads)
        }

    def finished(self, run: RunFolder, recipe: Recipe) -> bool:
        done = run.stage_state(self.name).get("status") == "done" and all((run.path / output).exists() for output in self.outputs)
        return done and self.is_current(run, recipe)
