"""One training step again, alone: from the newest checkpoint before it, without a trace in the run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlmconvert.errors import UserError
from dlmconvert.recipe.schema import Recipe
from dlmconvert.runs.folder import RunFolder
from dlmconvert.runs.stage import Reporter, StageContext, StopFlag

if TYPE_CHECKING:
    from dlmconvert.training.inspection import Inspected

PLACE_KEYS = ("engine.device", "engine.offload_optimizer", "engine.offload_parameters", "engine.nvme", "engine.threads")
TRAINING_STAGES = ("pretrain", "adapt", "sft")


@dataclass(frozen=True)
class Replay:
    """step: from 1. begun: the step of the checkpoint that it was reached from, 0 for the start. found: what the step looks like."""

    stage: str
    step: int
    begun: int
    found: Inspected

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def replay_step(run: RunFolder, recipe: Recipe, step: int, stage: str | None, reporter: Reporter, ranks: Any = None) -> Replay:
    """Run the steps from the newest whole checkpoint before `step`, then `step` itself without an update.

    ranks: as many as the run had when it was last started, all of which call this. None: one process takes the micro-batches of them all,
    and the numbers are equal but for the order of additions. Nothing is written into the run. Raises UserError when the stage has not
    begun, has no such step, or had another number of processes, or when its text or model has changed.
    """
    if recipe.engine.nvme is None:
        return _replay(run, recipe, step, stage, reporter, ranks)
    disk = Path(recipe.engine.nvme).expanduser()
    disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="replay-", dir=disk) as own:  # the run's own files there may be in use
        return _replay(run, recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"nvme": own})}), step, stage, reporter, ranks)


def _replay(run: RunFolder, recipe: Recipe, step: int, stage: str | None, reporter: Reporter, ranks: Any) -> Replay:
    from dlmconvert.runs.models import band_search, batch_stream, loop_settings_of
    from dlmconvert.runs.stages import JOBS
    from dlmconvert.runs.training import changed_inputs, make_engine
    from dlmconvert.training.checkpoint import CheckpointFolder
    from dlmconvert.training.inspection import inspect_step
    from dlmconvert.training.loop import accumulate, balance_of
    from dlmconvert.training.nonfinite import problem_of
    from dlmconvert.training.ranks import Solo

    stage = chosen_stage(run, stage)
    had = run.stage_state(stage).get("process", {}).get("ranks", 1)
    if ranks is not None and ranks.count != had:
        raise UserError(f"{ranks.count} processes, but {stage} was last trained in {had}", "the step is cut into the micro-batches of those", f"take --processes {had}, or 1" if had > 1 else "leave --processes out")
    ranks = ranks or Solo(had)
    context = StageContext(run, recipe, reporter, StopFlag(), ranks=ranks)
    job = JOBS[stage](context)
    if not 1 <= step <= job.settings.steps:
        raise UserError(f"{stage} has no step {step}", f"its steps are 1 to {job.settings.steps}", "")
    if changed := changed_inputs(run, job):
        raise UserError(f"{' and '.join(changed)} changed since {stage} was trained", "its steps cannot be run again", "put the old content back")
    checkpoints = CheckpointFolder(run.stage_folder(stage) / "checkpoints", warn=reporter.warn)
    begun = ranks.share(checkpoints.newest_whole(before=step) or 0 if ranks.rank == 0 else None)
    engine, _ = make_engine(context, job)
    balance = checkpoints.state(begun).get("balance") if begun else None
    if begun:
        with _common_folder(ranks) as scratch:
            engine.restore(checkpoints, engine.at(checkpoints, begun), scratch)
    stream = batch_stream(job, engine.denoiser.spec)
    settings = loop_settings_of(job, stream.mixture.row_length)
    search = band_search(context, job, engine.denoiser.spec)
    if search is not None and begun and (band := checkpoints.state(begun).get("band")):
        stream.band = tuple(band)
    reporter.say(f"  from {f'the checkpoint of step {begun}' if begun else 'the start'}: steps to go before it: {step - 1 - begun}")
    with reporter.progress("steps before it", step - 1 - begun) as bar:
        for before in range(begun, step - 1):
            part = accumulate(engine, stream, settings, before, balance)
            sums = ranks.sum(part.sums | {"broken": float(len(part.broken))})
            norm = engine.update(settings.learning_rate_at(before))
            if problem_of(int(sums["broken"]), norm, engine.overflowed) is None:
                balance = balance_of(sums, sums["ce_sum"] / max(1.0, sums["masked"]), balance)
            if search is not None and (before + 1) % search.every == 0:
                engine.denoiser.eval()
                found = search.look(engine, settings, before + 1)
                engine.denoiser.train()
                stream.band = found["band_low"], found["band_high"]
            bar.advance(1)
    return Replay(stage, step, begun, inspect_step(engine, stream, settings, step - 1, balance))


@contextmanager
def _common_folder(ranks: Any) -> Iterator[Path]:
    """A temporary folder of rank 0 that all ranks of its machine see. Collective."""
    if ranks.rank:
        yield Path(ranks.share(None))
        return
    with tempfile.TemporaryDirectory(prefix="dlmconvert-replay-") as folder:
        yield Path(ranks.share(folder))


def check_place_words(words: list[str]) -> None:
    """Raise UserError for a key that is not about where a step is run: another value would make it another step."""
    other = [word for word in words if word.partition("=")[0] not in PLACE_KEYS]
    if other:
        raise UserError(f"{other[0]}: not on replay, which runs the step as it was", f"what may be set: {', '.join(PLACE_KEYS)}", "")


def chosen_stage(run: RunFolder, name: str | None) -> str:
    """The named training stage, else the one that was trained last. Raises UserError when there is none."""
    begun = [stage for stage in TRAINING_STAGES if run.stage_state(stage).get("inputs") is not None]
    if name is not None and name not in begun:
        raise UserError(f"{run.path} has not trained a stage {name!r}", f"trained: {', '.join(begun) or 'none'}", "")
    if not begun:
        raise UserError(f"{run.path} has not trained anything yet", "", f"dlmconvert status {run.name} says where it stands")
    return name or begun[-1]
