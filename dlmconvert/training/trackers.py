"""Where the lines of metrics.jsonl go besides: TensorBoard, Weights & Biases. Both are optional packages, imported when asked for.

A resumed run runs the steps after its checkpoint again: TensorBoard forgets what it saw of them, and Weights & Biases, which takes a
step once, keeps what it has (the numbers are the same).
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from dlmconvert.errors import EXIT_FAILED, UserError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Tracker(Protocol):
    def write(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Iterable[str]) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    missing = [PACKAGES[name] for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        raise UserError(
            f"run.trackers asks for {' and '.join(missing)}, not installed here",
            "metrics.jsonl is written in any case",
            f"pip install {' '.join(missing)}, or leave run.trackers out",
            exit_code=EXIT_FAILED,
        )


def open_trackers(names: Iterable[str], folder: Path, step: int, title: str, recipe: dict[str, Any]) -> list[Tracker]:
    """folder: of the stage, where their files go. step: steps done, of the checkpoint that the run goes on from (0: it starts)."""
    makers = {"tensorboard": lambda: TensorBoard(folder / "tensorboard", step), "wandb": lambda: WeightsAndBiases(folder, title, recipe)}
    return [makers[name]() for name in dict.fromkeys(names)]


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line, without the step. A step that was left out becomes `skipped: 1`."""
    values = {name: 1.0 if name == "skipped" else value for name, value in line.items() if name != "step"}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


class TensorBoard:
    """Event files in `folder`, one more each time the run is resumed. Steps after `step` of an earlier file are purged."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)

    def write(self, line: dict[str, Any]) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run a stage: its id is kept in the stage folder, so that a resumed run goes on in it. WANDB_PROJECT, WANDB_ENTITY and
    WANDB_MODE are heard."""

    def __init__(self, folder: Path, title: str, recipe: dict[str, Any]):
        import wandb

        note = folder / "wandb-run-id.txt"
        if not note.is_file() or not note.read_text().strip():
            folder.mkdir(parents=True, exist_ok=True)
            note.write_text(secrets.token_hex(8) + "\n")
        project = os.environ.get("WANDB_PROJECT", "dlmconvert")
        try:
            self._run = wandb.init(project=project, id=note.read_text().strip(), resume="allow", name=title, dir=str(folder), config=recipe)
        except Exception as error:  # no network, no login: theirs to name
            what = f"Weights & Biases did not start: {error}"
            raise UserError(what, "", "wandb login, or WANDB_MODE=offline, or leave run.trackers out", exit_code=EXIT_FAILED) from error

    def write(self, line: dict[str, Any]) -> None:
        self._run.log(scalars(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()
