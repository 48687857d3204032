"""`dlmconvert export`: the stage in its usual place, or another place, or an earlier checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from dlmconvert.errors import EXIT_FAILED, UserError, nearest
from dlmconvert.recipe.schema import Recipe
from dlmconvert.runs.engines import SECTIONS
from dlmconvert.runs.folder import RunFolder
from dlmconvert.runs.runner import run_stages, signals_set
from dlmconvert.runs.stage import Reporter, StageContext, StopFlag
from dlmconvert.runs.stages import export_model, exported_stage


def export_run(run: RunFolder, recipe: Recipe, reporter: Reporter, to: str | None = None, checkpoint: str | None = None) -> Path:
    """Export and return the folder. Without `to` and `checkpoint` this is the stage `export`, finished once; with them a folder of its own.

    checkpoint: `step-001000` or 1000, of the stage that is exported. Raises UserError with the kept steps when it is not there,
    and when the target exists.
    """
    usual = run.path / "export" / recipe.export.profile
    if to is None and checkpoint is None:
        if run_stages(run, recipe, ["export"], reporter) is False:
            reporter.say("exported and verified before")
        return usual
    target = Path(to).expanduser() if to else usual.with_name(f"{usual.name}-{checkpoint}")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} exists already", "nothing is overwritten", "name another folder with --to, or remove this one")
    if checkpoint is None:  # a checkpoint is exported while the training goes on: nothing in the run is written
        run.hold()
    stop = StopFlag()
    context = StageContext(run, recipe, reporter, stop)
    try:
        with signals_set(stop):
            if checkpoint is None:
                stage = exported_stage(run, recipe)
                export_model(context, run.model_folder(stage), target, stage)
            else:
                _export_checkpoint(context, checkpoint, target)
    finally:
        run.release()
    return target


def _export_checkpoint(context: StageContext, checkpoint: str, target: Path) -> None:
    from dlmconvert.runs.models import consolidate
    from dlmconvert.training.checkpoint import COMPLETE

    run, recipe = context.run, context.recipe
    stage = recipe.export.stage or ("sft" if run.stage_state("sft") else "adapt")
    step = checkpoint.removeprefix("step-").lstrip("0") or "0"
    kept = sorted(p.name for p in (run.stage_folder(stage) / "checkpoints").glob("step-*") if (p / COMPLETE).is_file())
    wanted = f"step-{int(step):06d}" if step.isdigit() else checkpoint
    if wanted not in kept:
        raise UserError(f"{stage} keeps no checkpoint {checkpoint!r}", nearest(wanted, kept) if kept else "it has none yet", "train.keep_checkpoints says how many are kept")
    folder = target.resolve().with_name(f".{target.resolve().name}-model")
    try:
        try:
            consolidate(context, stage, int(step), folder)
        except Exception as error:
            if (run.stage_folder(stage) / "checkpoints" / wanted / COMPLETE).is_file():
                raise
            what = f"{wanted} was removed while it was read: the training goes on, and keeps its newest checkpoints only"
            raise UserError(what, "", f"export a newer one, or let it keep more: {SECTIONS[stage]}.keep_checkpoints", exit_code=EXIT_FAILED) from error
        export_model(context, folder, target, stage, int(step))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


