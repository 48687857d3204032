"""The run folder: where it is, what is done in it, and who holds it. Nothing heavy is imported here.

runs/<name>/ recipe.yaml run.json environment.json source/ adapt/ sft/ export/<profile>/ report.html
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlmconvert.errors import EXIT_FAILED, UserError, nearest
from dlmconvert.recipe.load import dump_recipe, parse_yaml, validate
from dlmconvert.recipe.schema import Recipe

RUNS = "runs"
MODEL_STAGES = ("adapt", "sft")


class RunFolder:
    """A folder with a run.json. Reading needs no lock; `hold()` takes it for one process."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = None

    @property
    def name(self) -> str:
        return self.path.name

    def state(self) -> dict[str, Any]:
        """run.json: {"created", "stages": {name: {"status", "keys", ...}}}; empty for a folder that is not a run yet."""
        path = self.path / "run.json"
        if not path.is_file():
            return {"stages": {}}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON", str(error), "restore it, or start anew beside it with --fresh") from error

    def write_state(self, state: dict[str, Any]) -> None:
        write_atomically(self.path / "run.json", json.dumps(state, indent=1) + "\n")

    def stage_state(self, stage: str) -> dict[str, Any]:
        return self.state()["stages"].get(stage, {})

    def update_stage(self, stage: str, **values: Any) -> None:
        state = self.state()
        state["stages"].setdefault(stage, {}).update(values)
        state["updated"] = time.time()
        self.write_state(state)

    def recipe(self) -> Recipe:
        """The recipe of the run as it stands."""
        path = self.path / "recipe.yaml"
        if not path.is_file():
            raise UserError(f"{self.path} is not a run folder: it has no recipe.yaml", "", "dlmconvert status lists the runs here")
        return validate(parse_yaml(path.read_text(encoding="utf-8"), str(path)), str(path))

    def write_recipe(self, recipe: Recipe) -> None:
        write_atomically(self.path / "recipe.yaml", dump_recipe(recipe))

    def stage_folder(self, stage: str) -> Path:
        return self.path / stage

    def model_folder(self, stage: str) -> Path:
        """The model that a stage leaves: source/ for prepare, <stage>/model otherwise."""
        return self.path / "source" if stage == "prepare" else self.path / stage / "model"

    def hold(self) -> None:
        """Take the run for this process. Raises UserError when another process has it; a dead process's lock is free."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115 - held until the process ends
        try:
            _lock_within(self._lock, seconds=0.5)
        except OSError:
            holder = (self.path / ".lock").read_text().strip() or "another process"
            self._lock = None
            raise UserError(
                f"{self.path} is in use by {holder}",
                "two processes cannot write one run",
                "wait for it (dlmconvert status shows where it is), stop it, or start another run with --fresh",
                exit_code=EXIT_FAILED,
            ) from None
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(f"process {os.getpid()}\n")
        self._lock.flush()

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def holder(self) -> str | None:
        """Who holds the run now, or None."""
        import fcntl

        path = self.path / ".lock"
        if not path.is_file():
            return None
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except OSError:
                return file.read().strip() or "another process"


def _lock_within(file: Any, seconds: float) -> None:
    # `dlmconvert status` holds the lock for an instant when it looks who has it.
    import fcntl

    until = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def write_atomically(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}", "", "free some space or fix the permissions, then run the same command again", exit_code=EXIT_FAILED) from error


def runs_in(parent: Path) -> list[RunFolder]:
    """Runs in a folder, the latest used first."""
    found = [p for p in parent.glob("*") if (p / "run.json").is_file()]
    return [RunFolder(p) for p in sorted(found, key=lambda p: (p / "run.json").stat().st_mtime, reverse=True)]


def new_or_latest(recipe: Recipe, fresh: bool) -> RunFolder:
    """Where a recipe runs: `run.folder`, else runs/<name>; after `--fresh` runs/<name>-2, -3, ... of which the last is continued."""
    base = Path(recipe.run.folder).expanduser() if recipe.run.folder else Path(RUNS) / recipe.name
    numbered = [base]
    number = 2
    while (candidate := base.with_name(f"{base.name}-{number}")).exists():
        numbered.append(candidate)
        number += 1
    if fresh and numbered[-1].exists():
        return RunFolder(candidate)
    return RunFolder(numbered[-1])


def find_run(name: str | None) -> tuple[RunFolder, str]:
    """A run by folder or by name in ./runs; the latest when no name is given. Returns it with a sentence that says which."""
    here = runs_in(Path(RUNS))
    if name is None:
        if not here:
            raise UserError("there is no run in ./runs", "", "dlmconvert run tiny makes one; or name a run folder")
        return here[0], f"the latest run, {here[0].path}"
    for candidate in (Path(name).expanduser(), Path(RUNS) / name):
        if (candidate / "run.json").is_file():
            return RunFolder(candidate), str(candidate)
    choices = [run.name for run in here]
    raise UserError(f"{name!r} is not a run", nearest(name, choices) if choices else "there is no run in ./runs", "dlmconvert status lists the runs here")


@dataclass(frozen=True)
class ModelLocation:
    """path: a model folder. note: which one that is, for the user. run: the run it belongs to, if any."""

    path: Path
    note: str
    run: RunFolder | None = None


def find_model(name: str | None) -> ModelLocation:
    """A model folder, a run (its newest finished model), or the latest run when no name is given."""
    if name is not None:
        path = Path(name).expanduser()
        if (path / "config.json").is_file():
            parents = [p for p in path.resolve().parents if (p / "run.json").is_file()]
            return ModelLocation(path, str(path), RunFolder(parents[0]) if parents else None)
        if path.is_dir() and not (path / "run.json").is_file() and (path / "model" / "config.json").is_file():
            return find_model(str(path / "model"))
        if path.exists() and not (path / "run.json").is_file():
            raise UserError(f"{name} holds no model: it has no config.json", "", "name a run folder, a stage's model folder, or an export")
    run, which = find_run(name)
    for stage in reversed(MODEL_STAGES):
        folder = run.model_folder(stage)
        if run.stage_state(stage).get("status") == "done" and (folder / "config.json").is_file():
            return ModelLocation(folder, f"the {stage} model of {which}", run)
    raise UserError(f"{run.path} has no converted model yet", "", f"dlmconvert adapt continues it; dlmconvert status {run.name} says where it stands")
