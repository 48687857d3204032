"""The stages of a conversion. Each is a function of the run folder; heavy modules are imported when a stage runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlmconvert.errors import UserError
from dlmconvert.methods import METHODS
from dlmconvert.recipe.method import Method
from dlmconvert.recipe.schema import Recipe, text_sources
from dlmconvert.runs.folder import RunFolder
from dlmconvert.runs.preparing import build_scratch, prepare
from dlmconvert.runs.samplers import exported_sampler, saved_sampler
from dlmconvert.runs.stage import Stage, StageContext

if TYPE_CHECKING:
    from dlmconvert.runs.models import TrainingJob

AR = Method(name="ar", **METHODS["ar"].choices)


# pretrain: a scratch model learns to predict the next token, before anything is converted


def pretrain(context: StageContext) -> dict[str, Any]:
    from dlmconvert.runs.training import run_training

    scratch = context.run.stage_folder("pretrain") / "scratch"
    if not (scratch / "config.json").is_file():
        build_scratch(context, scratch)
    return run_training(context, pretrain_job(context))


def pretrain_job(context: StageContext) -> TrainingJob:
    from dlmconvert.backbone.load import load_tokenizer
    from dlmconvert.runs.models import TrainingJob
    from dlmconvert.runs.rows import text_rows

    scratch = context.run.stage_folder("pretrain") / "scratch"
    assert context.recipe.pretrain is not None
    stores, weights, held = text_rows(context, load_tokenizer(scratch), forbidden_id=None)
    return TrainingJob(
        "pretrain", context.recipe.pretrain, AR, scratch, "ar", stores, weights, held, context.recipe.data.documents == "isolated", anneal=False
    )


# adapt, sft: the conversion itself

CAUSAL = {"attention": "causal"}


def bound_of(method: Method) -> dict[str, Any]:
    """The pattern under which models of a method are scored, before and after: fully bidirectional, or block after block."""
    if method.attention.pattern in ("causal", "bidirectional"):
        return {"attention": method.attention.pattern}
    return {"attention": method.attention.pattern, "block_length": method.attention.block_length}


def adapt_job(context: StageContext) -> TrainingJob:
    from dlmconvert.backbone.load import load_tokenizer
    from dlmconvert.runs.models import TrainingJob
    from dlmconvert.runs.rows import text_rows

    run, recipe = context.run, context.recipe
    source = run.model_folder("prepare")
    tokenizer = load_tokenizer(source)
    stores, weights, held = text_rows(context, tokenizer, _forbidden_id(run))
    trained_as = "ar" if recipe.method.attention.pattern == "causal" else "adapt"
    return TrainingJob(
        "adapt", recipe.train, recipe.method, source, trained_as, stores, weights, held, recipe.data.documents == "isolated"
    )


def adapt(context: StageContext) -> dict[str, Any]:
    from dlmconvert.runs.training import run_training

    run, recipe, job = context.run, context.recipe, adapt_job(context)
    source, trained_as, held = job.source, job.trained_as, job.validation
    facts = run_training(context, job)
    if held is None:
        context.reporter.warn("  data.validation=0: nothing is held out, so nothing is measured")
        return facts
    asked = [("AR NLL of the source", source, CAUSAL), ("NELBO before adaptation", source, bound_of(recipe.method))]
    if trained_as == "ar":
        asked = asked[:1] + [("AR NLL after training", run.model_folder("adapt"), CAUSAL)]
    else:
        asked.append(("NELBO after adaptation", run.model_folder("adapt"), bound_of(recipe.method)))
    return facts | {"measured": measure(context, asked, held)}


def sft_job(context: StageContext) -> TrainingJob:
    from dlmconvert.backbone.load import load_tokenizer
    from dlmconvert.runs.models import TrainingJob
    from dlmconvert.runs.rows import chat_rows

    run, recipe = context.run, context.recipe
    source = run.model_folder("adapt")
    tokenizer = load_tokenizer(source)
    train_rows, held = chat_rows(context, tokenizer, _forbidden_id(run))
    return TrainingJob("sft", recipe.sft, recipe.method, source, "sft", [train_rows], [1.0], held, isolated=False, anneal=False, tokenizer=tokenizer)


def sft(context: StageContext) -> dict[str, Any]:
    from dlmconvert.runs.training import run_training

    run, recipe, job = context.run, context.recipe, sft_job(context)
    source, held = job.source, job.validation
    facts = run_training(context, job) | {name: value for name, value in job.stores[0].meta.items() if name.startswith("num_")}
    if held is None:
        return facts
    pattern = bound_of(recipe.method)
    kind = "AR NLL" if pattern == CAUSAL else "NELBO"
    asked = [
        (f"{kind} of held-out answers before sft", source, pattern),
        (f"{kind} of held-out answers after sft", run.model_folder("sft"), pattern),
    ]
    # Most scored tokens are end tokens, which have no bytes: bits a byte would mean nothing.
    return facts | {"measured": [row | {"bits_per_byte": None} for row in measure(context, asked, held)]}


def _forbidden_id(run: RunFolder) -> int | None:
    """The mask token's id, which text must not contain; None when it is an ordinary word."""
    spec = json.loads((run.model_folder("prepare") / "config.json").read_text())["dlm"]
    return None if spec["mask_is_word"] else spec["mask_token_id"]


def nats_text(measured: dict[str, Any]) -> str:
    """1.495 +- 0.037; without the error when one row gives none."""
    error = measured["standard_error"]
    return f"{measured['nats_per_token']:.3f}" + (f" +- {error:.3f}" if error is not None else "")


def measure(context: StageContext, asked: list[tuple[str, Path, dict[str, Any]]], rows: Any) -> list[dict[str, Any]]:
    """Likelihoods of several models on the same held-out rows: [{"what", "kind", "nats_per_token", ...}]. asked: (what, folder, pattern)."""
    from dlmconvert.backbone.load import load_denoiser
    from dlmconvert.evaluation.nelbo import measure_likelihood

    evaluation, results = context.recipe.eval, []
    num_rows = min(evaluation.rows, rows.num_rows)
    total = sum(num_rows * (1 if pattern == CAUSAL else evaluation.draws) for _, _, pattern in asked)
    with context.reporter.progress("measuring", total) as bar:
        for what, folder, pattern in asked:
            denoiser = load_denoiser(folder, context.recipe.engine.device, **pattern)
            found = measure_likelihood(
                denoiser, rows, num_rows=evaluation.rows, draws=evaluation.draws, batch=evaluation.batch, seed=evaluation.seed,
                advance=lambda done, what=what: bar.advance(done, what),
            )  # fmt: skip
            results.append({"what": what, **found.to_dict()})
    for result in results:
        context.reporter.say(f"  {result['what']}: {nats_text(result)} nats a token")
    return results


# export


def export(context: StageContext) -> dict[str, Any]:
    target = context.run.path / "export" / context.recipe.export.profile
    before = context.run.stage_state("export").get("facts", {}).get("stage")
    if target.exists():
        # The export of an earlier stage is kept beside; anything else is what an unfinished export left.
        if before is not None:
            os.rename(target, _free(target.with_name(f"{target.name}-{before}")))
        else:
            shutil.rmtree(target)
    context.run.update_stage("export", facts={})
    stage = exported_stage(context.run, context.recipe)
    return export_model(context, context.run.model_folder(stage), target, stage)


def _free(path: Path) -> Path:
    number = 2
    free = path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def exports_newest(run: RunFolder, recipe: Recipe) -> bool:
    """Whether the finished export is of the stage that would be exported now."""
    return run.stage_state("export").get("facts", {}).get("stage") == exported_stage(run, recipe)


def exported_stage(run: RunFolder, recipe: Recipe) -> str:
    """The stage whose model is exported: the named one, else the last that is finished."""
    wanted = [recipe.export.stage] if recipe.export.stage else ["sft", "adapt"]
    for stage in wanted:
        if run.stage_state(stage).get("status") == "done":
            return stage
    raise UserError(f"{run.path} has no finished {' or '.join(wanted)} stage to export", "", f"dlmconvert status {run.name} says where it stands")


def export_model(context: StageContext, model_folder: Path, target: Path, stage: str, step: int | None = None) -> dict[str, Any]:
    """Write, verify in a fresh process, rename into place. Facts: where, which checks.

    step: of the checkpoint that is exported in place of the finished stage; what was measured of the finished model is then left out.
    """
    from dlmconvert.exporting.card import CardFacts, Measured
    from dlmconvert.exporting.package import export_folder

    run, recipe = context.run, context.recipe
    measured = []
    stages = ("pretrain", "adapt", "sft") if stage == "sft" else ("pretrain", "adapt")
    for name in stages:
        for row in run.stage_state(name).get("facts", {}).get("measured", []):
            if step is not None and name == stage and " after " in row["what"]:
                continue
            text = f"{row['rows']} held-out rows, {row['tokens']:,} tokens"
            measured.append(Measured(row["what"], row["nats_per_token"], "nats a token", row["standard_error"], text))
    training = {}
    for name in stages:
        facts = run.stage_state(name).get("facts", {})
        if step is not None and name == stage:
            training[f"{name} steps"] = f"{step} (a checkpoint before the end)"
        elif facts:
            training |= {f"{name} steps": facts["steps"], f"{name} tokens seen": facts["tokens_seen"]}
    origin = run.stage_state("prepare").get("facts", {}).get("origin", "unknown")
    local = recipe.source.model is None or Path(recipe.source.model).expanduser().exists() or "random" in origin
    facts = CardFacts(
        name=f"{recipe.name}-dlm",
        source=origin,
        base_model=None if local else recipe.source.model,
        recipe=recipe.model_dump(mode="json"),
        training=training,
        measured=measured,
        example=("def area(width, height):\n", "\n    return result\n") if _is_code(recipe) else ("Once upon a time", "and they were happy."),
    )
    saved = saved_sampler(model_folder)
    if saved:
        context.reporter.say(f"  sampler: {model_folder.name}/generation_config.json's, and what the recipe's export section changes")
    report = export_folder(
        model_folder,
        target,
        recipe.export.profile,
        card=facts,
        generation=exported_sampler(recipe, saved),
        progress=lambda text: context.reporter.say(f"  {text}"),
    )
    context.reporter.say(f"  {target}: {len(report.files)} files, {report.num_bytes / 1e6:.1f} MB, verified in a fresh process")
    return {"folder": str(target), "files": report.files, "checks": report.checks, "stage": stage}


# report: what a person looks at in the end


def show(context: StageContext) -> dict[str, Any]:
    """One gap filled in by the source and by the converted model, and report.html."""
    from dlmconvert.backbone.load import load_denoiser
    from dlmconvert.evaluation.generation import continue_prefix, fill_gap, held_out_function
    from dlmconvert.runs.report import write_report

    run, recipe = context.run, context.recipe
    facts: dict[str, Any] = {}
    text = recipe.eval.infill
    if text is not None and recipe.method.attention.block_length is not None:
        context.reporter.say("  eval.infill is left out: a block model sees nothing to the right of the block that it fills")
        text = None
    if text is not None:
        source = load_denoiser(run.model_folder("prepare"), recipe.engine.device, attention="causal")
        converted = load_denoiser(run.model_folder(exported_stage(run, recipe)), recipe.engine.device)
        if text == "builtin:python":
            fraction = recipe.data.validation if isinstance(recipe.data.validation, float) else 0.0
            text = held_out_function(source.tokenizer, fraction, recipe.data.row_length)
        if text is not None:
            context.reporter.say("  filling one gap with the AR parent (sees the prefix) and the converted model (sees both sides)")
            facts["infill"] = {"text": text, "source": continue_prefix(source, text), "converted": fill_gap(converted, text, recipe.eval.seed)}
    run.update_stage("report", facts=facts)
    write_report(run)
    return facts


def _is_code(recipe: Recipe) -> bool:
    return any("python" in source.path or "code" in source.path for source in text_sources(recipe.data.train))


JOBS = {"pretrain": pretrain_job, "adapt": adapt_job, "sft": sft_job}  # what every rank trains; the rest of a stage is rank 0's

_TEXT = ("data.train", "data.validation", "data.row_length", "data.max_tokens", "data.documents")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("pretrain", "train an AR model from scratch", ("source.scratch", "source.scratch_tokenizer", "source.tokenizer", "source.seed", "pretrain", *_TEXT, "engine"), lambda recipe: (), pretrain, ("pretrain/model",)),
        Stage("prepare", "prepare the source model", ("source", "method.alignment"), lambda recipe: ("pretrain",) if recipe.pretrain is not None else (), prepare, ("source",)),
        Stage("adapt", "adapt: autoregressive -> diffusion", ("source", "method", *_TEXT, "train", "engine"), lambda recipe: ("prepare",), adapt, ("adapt/model",)),
        Stage("sft", "fine-tune on conversations", ("method", "data.row_length", "sft", "engine"), lambda recipe: ("adapt",), sft, ("sft/model",)),
        Stage("export", "export", ("export",), lambda recipe: ("sft",) if "sft" in recipe.stages and recipe.export.stage != "adapt" else ("adapt",), export, ("export",), exports_newest),
        Stage("report", "report", (), lambda recipe: tuple(recipe.stages), show, ("report.html",)),
    )
}  # fmt: skip
