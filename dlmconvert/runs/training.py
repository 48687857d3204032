"""One stage of training inside a run folder: model in, rows in, checkpoints and a model folder out.

Pretraining, adaptation and fine-tuning differ in their rows and in the four choices, and in nothing else.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shlex
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlmconvert.errors import Interrupted, UserError
from dlmconvert.recipe.schema import Evaluation
from dlmconvert.runs.engines import SECTIONS, engine_config
from dlmconvert.runs.folder import RunFolder, write_atomically
from dlmconvert.runs.models import (
    TrainingJob,
    anneal_steps_of_job,
    band_search,
    batch_stream,
    fresh_folder,
    loop_settings_of,
    trainable,
    write_model,
)
from dlmconvert.runs.stage import StageContext
from dlmconvert.runs.status import stage_process


def run_training(context: StageContext, job: TrainingJob) -> dict[str, Any]:
    """Train to the end (from the newest checkpoint), write <stage>/model, return facts for run.json."""
    from dlmconvert.backbone.adapters import save_adapter

    recipe, run, reporter = context.recipe, context.run, context.reporter
    folder = run.stage_folder(job.stage)
    folder.mkdir(parents=True, exist_ok=True)
    context.ranks.tell({"train": job.stage, "run": str(run.path.resolve())})  # the others come to train_together as well
    denoiser, spec = train_together(context, job)
    assert denoiser is not None

    if job.settings.lora is not None and not job.settings.lora.gated:
        reporter.say("  merging the adapters; they are kept apart in adapter/")
        save_adapter(denoiser.model, fresh_folder(folder / "adapter"), base=str(recipe.source.model or "scratch"))
    temporary = folder / ".writing-model"
    write_model(temporary, job, denoiser, spec)
    shutil.rmtree(folder / "model", ignore_errors=True)
    os.rename(temporary, folder / "model")
    del denoiser
    gc.collect()
    row_length = job.stores[0].row_length
    views = 2 if job.method.corruption.views == "complementary" else 1
    return {
        "steps": job.settings.steps,
        "tokens_seen": job.settings.steps * job.settings.rows_per_step * row_length,
        "unique_tokens": sum(store.num_rows for store in job.stores) * row_length,
        "epochs": job.settings.steps * job.settings.rows_per_step / views / sum(store.num_rows for store in job.stores),
    }


def train_together(context: StageContext, job: TrainingJob) -> tuple[Any | None, Any]:
    """The part of a training stage that every rank takes part in. Returns the trained denoiser (None on other ranks than 0), its spec."""
    import torch

    if context.recipe.engine.threads:
        torch.set_num_threads(context.recipe.engine.threads)
    engine, spec = make_engine(context, job)
    context.reporter.say(_describe(engine, job, spec))
    _loop(context, job, engine)
    denoiser = engine.plain(lambda: trainable(context, job)[0])
    if context.recipe.engine.nvme is not None:  # every rank is past its last step
        shutil.rmtree(swap_folder(context.run, context.recipe.engine.nvme), ignore_errors=True)
    return denoiser, spec


def swap_folder(run: RunFolder, nvme: str) -> Path:
    """This run's part of `engine.nvme`: two runs would write over each other's files, which DeepSpeed names by the rank alone."""
    return Path(nvme).expanduser() / f"{run.name}-{hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:8]}"


def make_engine(context: StageContext, job: TrainingJob) -> tuple[Any, Any]:
    """The engine that the recipe names, with the model to train in it, and the model's spec."""
    from dlmconvert.backbone.head import check_compiler
    from dlmconvert.backbone.load import pick_device
    from dlmconvert.training.engine import SingleDeviceEngine

    settings, engine = job.settings, context.recipe.engine
    values: dict[str, Any] = {
        "device": pick_device(engine.device),
        "precision": engine.precision,
        "betas": settings.betas,
        "eps": settings.adam_eps,
        "weight_decay": settings.weight_decay,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "rates": settings.rates.model_dump(),
        "compile": engine.compile,
    }
    if engine.compile:
        check_compiler("engine.compile=true")
    if settings.lora is not None and settings.lora.gated and job.method.objective.ar_weight:
        # Refused for the stage that the method speaks of; a later one simply has none.
        context.reporter.warn(f"  {SECTIONS[job.stage]}.lora.gated=true: adapters leave the next-token path as it is, so this stage has no AR loss")
    if engine.precision == "fp16" and values["device"].type == "cpu":
        context.reporter.warn("  engine.precision=fp16 is for GPUs: most CPUs are many times slower in it than in fp32 or bf16")
    if engine.name == "single":
        denoiser, spec = trainable(context, job)
        return SingleDeviceEngine(denoiser, clip_norm=settings.clip_norm, **values), spec
    from dlmconvert.training.deepspeed import DeepSpeedEngine, built_in_parts, whole_embeddings
    from dlmconvert.training.deepspeed_check import check_config

    if engine.nvme is not None:
        engine = engine.model_copy(update={"nvme": str(swap_folder(context.run, engine.nvme))})
    config = engine_config(engine, settings, context.ranks.count, job.stage, context.ranks.stands_for)
    for key in check_config(config, context.ranks):
        context.reporter.warn(f"  engine.deepspeed.{key}: DeepSpeed knows no such key and ignores it")
    if config["zero_optimization"]["stage"] != engine.zero_stage:
        context.reporter.say(f"  engine.zero_stage=0 with engine.precision={engine.precision} runs as stage 1: DeepSpeed's stage 0 would take another optimizer")
    denoiser, spec = trainable(context, job, built_in_parts(config, context.ranks), whole_embeddings)
    return DeepSpeedEngine(denoiser, ranks=context.ranks, config=config, **values), spec


def _loop(context: StageContext, job: TrainingJob, engine: Any) -> None:
    from dlmconvert.evaluation.nelbo import measure_likelihood
    from dlmconvert.training.checkpoint import CheckpointFolder
    from dlmconvert.training.loop import train
    from dlmconvert.training.metrics import Metrics
    from dlmconvert.training.trackers import open_trackers

    settings, reporter, ranks = job.settings, context.reporter, context.ranks
    folder = context.run.stage_folder(job.stage)
    stream = batch_stream(job, engine.denoiser.spec)
    overlaps = settings.overlap_saving
    if overlaps is None:  # on a CPU host memory is what the training needs, and an offloaded optimizer lies there
        overlaps = engine.device.type == "cuda" and context.recipe.engine.offload_optimizer == "none"
    loop_settings = replace(loop_settings_of(job, stream.mixture.row_length), overlap_saving=overlaps)
    checkpoints = CheckpointFolder(folder / "checkpoints", settings.keep_checkpoints, reporter.warn)
    begun, identity = 0, ""
    if ranks.rank == 0:
        begun = checkpoints.newest_whole() or 0
        identity = _identity(context, job, begun)
    begun, identity = ranks.share((begun, identity))
    if begun:
        reporter.say(f"  continuing from the checkpoint of step {begun}")

    def validate() -> dict[str, float]:
        if job.validation is None:
            return {}
        found = _measure(context.recipe.eval, measure_likelihood, engine.denoiser, job.validation)
        return {f"{found.kind}": found.nats_per_token, f"{found.kind}_standard_error": found.standard_error}

    trackers = open_trackers(context.recipe.run.trackers, folder, begun, f"{context.run.name}/{job.stage}", context.recipe.model_dump(mode="json")) if ranks.rank == 0 else []
    with reporter.progress(job.stage, settings.steps, begun) as bar:
        shown = begun

        def listen(line: dict[str, Any]) -> None:
            nonlocal shown
            for tracker in trackers:
                tracker.write(line)
            if "overflow_steps" in line and "skipped" in line:
                return  # fp16 looks for its loss scale
            if "skipped" in line:
                reporter.warn(f"  step {line['step']} is left out: the {line['skipped']}")
            if "loss" in line:
                text = f"loss {line['loss']:.3f}  masked CE {line['cross_entropy']:.3f}  {line['tokens_per_second']:,.0f} tokens/s"
                bar.advance(line["step"] - shown, text)
                shown = line["step"]

        metrics = Metrics(folder / "metrics.jsonl", settings.log_steps, listen, writes=ranks.rank == 0)
        context.stop.deferred = True
        try:
            train(
                engine, stream, loop_settings, checkpoints, metrics, validate, context.stop, identity, _speed(context, job, engine),
                reproduce=f"dlmconvert replay {shlex.quote(str(context.run.path))} {{step}} --stage {job.stage}", section=SECTIONS[job.stage],
                search=band_search(context, job, engine.denoiser.spec),
            )  # fmt: skip
        finally:
            context.stop.deferred = False
            for tracker in trackers:
                tracker.close()
    if context.stop.requested:  # it came during the last step, which is saved
        raise Interrupted(context.stop.requested)


def _speed(context: StageContext, job: TrainingJob, engine: Any) -> Any:
    """What turns seconds into MFU; rank 0 alone writes it down."""
    from dlmconvert.training.losses import context_of
    from dlmconvert.training.throughput import Speed, model_flops, peak_flops

    ranks, settings = context.ranks, context.recipe.engine
    if ranks.rank > 0:
        return Speed()
    row_length = job.stores[0].row_length
    streams = 2 if context_of(loop_settings_of(job, row_length), job.settings.steps - 1).has_two_streams else 1
    flops = model_flops(engine.model, row_length, causal=job.method.attention.pattern in ("causal", "block_causal_noisy"), streams=streams)
    if settings.peak_tflops is not None:
        peak, source = ranks.count * settings.peak_tflops * 1e12, f"engine.peak_tflops={settings.peak_tflops:g}"
    else:
        peak, source = peak_flops(engine.device, settings.precision, ranks.count)
    context.run.update_stage(job.stage, peak=source)
    return Speed(flops, peak)


def _measure(evaluation: Evaluation, measure: Any, denoiser: Any, rows: Any):
    return measure(
        denoiser, rows, num_rows=evaluation.rows, draws=evaluation.draws, batch=evaluation.batch, seed=evaluation.seed
    )


def _identity(context: StageContext, job: TrainingJob, begun: int) -> str:
    """Hash of all that the numbers depend on: the recipe keys that the stage read, the model it starts from, its rows.

    Raises UserError when the model or the text is not the one that the checkpoints (newest: step `begun`) were trained on.
    """
    recorded, inputs = context.run.stage_state(job.stage), inputs_of(job)
    if begun and (changed := changed_inputs(context.run, job)):
        raise UserError(
            f"{' and '.join(changed)} changed while {job.stage} was interrupted",
            f"its checkpoint of step {begun} was trained on another content; mixing the two would make numbers that are those of neither",
            "put the old content back and run the same command again, or start anew beside it with --fresh",
        )
    context.run.update_stage(job.stage, inputs=inputs, process=stage_process(context.ranks.count))
    values = {"keys": recorded.get("keys"), **inputs}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def inputs_of(job: TrainingJob) -> dict[str, Any]:
    """What a stage is trained on, by content."""
    return {"model": fingerprint(job.source), "rows": [store.meta.get("fingerprint") for store in job.stores]}


def changed_inputs(run: RunFolder, job: TrainingJob) -> list[str]:
    """Which of them are not those that the stage has begun with."""
    names = {"model": f"the model in {job.source}", "rows": "the text" if job.stage != "sft" else "the file of conversations"}
    inputs = inputs_of(job)
    recorded = run.stage_state(job.stage).get("inputs", inputs)
    return [names[key] for key in inputs if recorded[key] != inputs[key]]


def fingerprint(model_folder: Path) -> str:
    """Hash of a model folder's weights; kept beside them, because hashing gigabytes takes a while."""
    from dlmconvert.training.checkpoint import file_hash

    files = sorted(model_folder.rglob("*.safetensors"))  # adapters beside the weights too
    stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    note = model_folder / ".fingerprint.json"
    if note.is_file():
        with suppress(ValueError):  # cut short by a kill
            known = json.loads(note.read_text())
            if known["stamp"] == stamp:
                return known["hash"]
    value = hashlib.sha256("".join(file_hash(f) for f in files).encode()).hexdigest()[:32]
    write_atomically(note, json.dumps({"stamp": stamp, "hash": value}))
    return value


def _describe(engine: Any, job: TrainingJob, spec: Any) -> str:
    # ZeRO-3 leaves an empty tensor where a parameter was.
    total, trained = (sum(getattr(p, "ds_numel", p.numel()) for p in found) for found in (engine.denoiser.parameters(), engine.parameters.values()))
    share = "" if trained == total else f" ({trained:,} trained)"
    anneal = f"annealed over {anneal_steps_of_job(job)} steps" if spec.annealing["schedule"] != "none" else "open from the first step"
    attention = "causal" if spec.attention == "causal" else f"{spec.attention}, {anneal}"
    return f"  {total:,} parameters{share} on {engine.device}, {engine.precision}; attention {attention}; {job.settings.steps} steps of {job.settings.rows_per_step} x {job.stores[0].row_length} tokens"
