"""One stage of training inside a run folder: model in, rows in, checkpoints and a model folder out.

Pretraining, adaptation and fine-tuning differ in their rows and in the four choices, and in nothing else.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlmconvert.errors import Interrupted, UserError
from dlmconvert.recipe.method import Method, anneal_steps_of
from dlmconvert.recipe.optimization import Optimization
from dlmconvert.recipe.schema import Evaluation
from dlmconvert.runs.engines import engine_config
from dlmconvert.runs.folder import write_atomically
from dlmconvert.runs.stage import StageContext


@dataclass(frozen=True)
class TrainingJob:
    """stage: name and folder. source: the model folder that is trained. trained_as: what the result is called in `dlm.trained`.
    stores, weights: the mixture of prepared rows; validation: held-out rows or None. isolated: attention stops at documents."""

    stage: str
    settings: Optimization
    method: Method
    source: Path
    trained_as: str
    stores: Sequence[Any]
    weights: Sequence[float]
    validation: Any | None
    isolated: bool
    anneal: bool = True
    tokenizer: Any = None


def run_training(context: StageContext, job: TrainingJob) -> dict[str, Any]:
    """Train to the end (from the newest checkpoint), write <stage>/model, return facts for run.json."""
    from dlmconvert.backbone.adapters import save_adapter

    recipe, run, reporter = context.recipe, context.run, context.reporter
    folder = run.stage_folder(job.stage)
    folder.mkdir(parents=True, exist_ok=True)
    context.ranks.tell({"train": job.stage, "run": str(run.path.resolve())})  # the others come to train_together as well
    denoiser, spec = train_together(context, job)
    assert denoiser is not None

    if job.settings.lora is not None:
        reporter.say("  merging the adapters; they are kept apart in adapter/")
        save_adapter(denoiser.model, _fresh(folder / "adapter"), base=str(recipe.source.model or "scratch"))
    temporary = folder / ".writing-model"
    _write_model(temporary, job, denoiser, spec)
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
    return engine.plain(lambda: _trainable(context, job)[0]), spec


def _write_model(folder: Path, job: TrainingJob, denoiser: Any, spec: Any) -> None:
    """A plain model folder in the dtype of the source, adapters merged."""
    import torch

    from dlmconvert.backbone.adapters import merge_lora
    from dlmconvert.backbone.load import load_config, save_model_folder

    model = merge_lora(denoiser.model) if job.settings.lora is not None else denoiser.model
    dtype = getattr(load_config(job.source), "dtype", None) or torch.float32
    save_model_folder(_fresh(folder), model.cpu(), denoiser.tokenizer, spec, dtype=dtype)


def consolidate(context: StageContext, stage: str, step: int, folder: Path) -> None:
    """A kept checkpoint as a model folder of its own. Raises UserError when it is damaged."""
    from dlmconvert.backbone.load import load_tokenizer
    from dlmconvert.training.checkpoint import CheckpointFolder

    recipe, run = context.recipe, context.run
    settings, source = (recipe.sft, run.model_folder("adapt")) if stage == "sft" else (recipe.train, run.model_folder("prepare"))
    tokenizer = load_tokenizer(source)
    if stage == "sft":
        from dlmconvert.data.chat import ensure_chat_template

        ensure_chat_template(tokenizer)
    trained_as = "ar" if stage == "adapt" and recipe.method.attention.pattern == "causal" else stage
    job = TrainingJob(stage, settings, recipe.method, source, trained_as, [], [], None, False, anneal=stage == "adapt", tokenizer=tokenizer)
    checkpoints = CheckpointFolder(run.stage_folder(stage) / "checkpoints")
    damage = checkpoints.damage(step)
    if damage is not None:
        raise UserError(f"{checkpoints.path(step)} is damaged: {damage}", "", f"kept and whole: {[s for s in checkpoints.steps() if checkpoints.damage(s) is None]}")
    denoiser, spec = _trainable(context, job)
    restore_parameters(denoiser, checkpoints, step)
    row_length = (recipe.sft.row_length if stage == "sft" else None) or recipe.data.row_length
    open_ratio = _open_ratio_at(job, step, row_length)
    _write_model(folder, job, denoiser, replace(spec, annealing=spec.annealing | {"open_ratio": open_ratio}))


def _open_ratio_at(job: TrainingJob, step: int, row_length: int) -> float:
    """Share of the future pairs that was open in the last of `step` steps."""
    from dlmconvert.diffusion.schedules import attention_at, open_share

    if job.method.attention.pattern == "causal":
        return 0.0
    anneal = job.method.attention.anneal if job.anneal else "none"
    context = attention_at(step - 1, anneal=anneal, anneal_steps=_anneal_steps(job), length=row_length, seed=job.settings.seed)
    return open_share(context, row_length)


def _trainable(context: StageContext, job: TrainingJob, loading: Any = None, attaching: Any = None):
    """The denoiser with float32 weights, adapters attached, and the spec that the result will carry.

    loading, attaching: contexts around the two, for engines that deal the model out while it is loaded.
    """
    import torch

    from dlmconvert.backbone.adapters import attach_lora
    from dlmconvert.backbone.denoiser import Denoiser
    from dlmconvert.backbone.load import load_config, load_model, load_tokenizer
    from dlmconvert.backbone.rewrite import rewrite_config
    from dlmconvert.backbone.spec import DlmSpec
    from dlmconvert.training.optimizer import freeze

    method = job.method
    config = load_config(job.source, context.recipe.source.trust_remote_code)
    section = getattr(config, "dlm", None)
    spec = DlmSpec(**section) if section else DlmSpec(vocab_size=config.get_text_config().vocab_size)
    for name in ("dlm", "is_causal"):
        if hasattr(config, name):
            delattr(config, name)
    rewrite_config(config)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    row_length = job.stores[0].row_length if job.stores else 0
    if longest is not None and row_length > longest:
        raise UserError(
            f"data.row_length={row_length} is longer than the model's {longest} positions", "", f"lower it: data.row_length={longest}"
        )
    with loading or nullcontext():
        model = load_model(job.source, config, torch.float32, context.recipe.source.trust_remote_code)
    spec = replace(
        spec,
        attention=method.attention.pattern,
        alignment=method.alignment,
        corruption=method.corruption.kind,
        objective=method.objective.weight,
        method=method.name,
        trained=job.trained_as,
        annealing={
            "schedule": method.attention.anneal if job.anneal else "none",
            "steps": _anneal_steps(job),
            "open_ratio": 0.0 if method.attention.pattern == "causal" else 1.0,
        },
    )
    tokenizer = job.tokenizer or load_tokenizer(job.source)
    if job.settings.lora is not None:
        lora = job.settings.lora
        with attaching(model) if attaching else nullcontext():
            model = attach_lora(
                model,
                rank=lora.rank,
                alpha=lora.alpha,
                dropout=lora.dropout,
                target_modules=lora.target_modules,
                mask_token_id=None if spec.mask_is_word or spec.mask_token_id < 0 else spec.mask_token_id,
                seed=job.settings.seed,
            )
    freeze(model, job.settings.rates.model_dump())
    return Denoiser(model, spec, tokenizer), spec


def restore_parameters(denoiser: Any, checkpoints: Any, step: int) -> None:
    """The trained parameters of a checkpoint, whichever engine wrote it."""
    import torch

    stage = checkpoints.state(step).get("zero_stage")
    if stage is None:
        saved = {name.removeprefix("parameter/"): t for name, t in checkpoints.load(step).tensors.items() if name.startswith("parameter/")}
    else:
        from dlmconvert.training.deepspeed import checkpoint_tensors

        saved = checkpoint_tensors(checkpoints.path(step), stage)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name])


def _anneal_steps(job: TrainingJob) -> int:
    return anneal_steps_of(job.method.attention, job.settings.steps) if job.anneal else 1


def make_engine(context: StageContext, job: TrainingJob) -> tuple[Any, Any]:
    """The engine that the recipe names, with the model to train in it, and the model's spec."""
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
    }
    if engine.name == "single":
        denoiser, spec = _trainable(context, job)
        return SingleDeviceEngine(denoiser, clip_norm=settings.clip_norm, compile=engine.compile, **values), spec
    from dlmconvert.training.deepspeed import DeepSpeedEngine, built_in_parts, whole_embeddings

    config = engine_config(engine, settings, context.ranks.count, job.stage)
    if config["zero_optimization"]["stage"] != engine.zero_stage:
        context.reporter.say("  engine.zero_stage=0 with engine.precision=bf16 runs as stage 1: DeepSpeed's stage 0 would take another optimizer")
    denoiser, spec = _trainable(context, job, built_in_parts(config, context.ranks), whole_embeddings)
    return DeepSpeedEngine(denoiser, ranks=context.ranks, config=config, **values), spec


def _loop(context: StageContext, job: TrainingJob, engine: Any) -> None:
    from dlmconvert.data.loader import BatchStream, Mixture
    from dlmconvert.evaluation.nelbo import measure_likelihood
    from dlmconvert.training.checkpoint import CheckpointFolder
    from dlmconvert.training.loop import train
    from dlmconvert.training.losses import LoopSettings
    from dlmconvert.training.metrics import Metrics

    settings, method, reporter, ranks = job.settings, job.method, context.reporter, context.ranks
    folder = context.run.stage_folder(job.stage)
    stream = BatchStream(
        Mixture(list(job.stores), list(job.weights), settings.seed),
        rows_per_step=settings.rows_per_step,
        seed=settings.seed,
        corruption_kind=method.corruption.kind,
        eps=method.corruption.eps,
        noise_levels=method.corruption.noise_levels,
        mask_token_id=engine.denoiser.spec.mask_token_id,
        alignment=method.alignment,
        isolated=job.isolated,
        band=method.corruption.band,
        count=method.corruption.count,
        views=method.corruption.views,
    )
    loop_settings = LoopSettings(
        steps=settings.steps,
        rows_per_step=settings.rows_per_step,
        micro_batch=settings.micro_batch,
        learning_rate=settings.learning_rate,
        final_learning_rate=settings.final_learning_rate,
        warmup_steps=settings.warmup_steps,
        schedule=settings.schedule,
        decay_fraction=settings.decay_fraction,
        seed=settings.seed,
        causal=method.attention.pattern == "causal",
        anneal_steps=_anneal_steps(job),
        weight=method.objective.weight,
        normaliser=method.objective.normaliser,
        save_steps=settings.save_steps,
        save_minutes=settings.save_minutes,
        validate_steps=settings.validate_steps,
        anneal=method.attention.anneal if job.anneal else "none",
        row_length=stream.mixture.row_length,
        cart_p=method.objective.cart_p,
    )
    checkpoints = CheckpointFolder(folder / "checkpoints", settings.keep_checkpoints, reporter.warn)
    begun, identity = 0, ""
    if ranks.rank == 0:
        begun = max(checkpoints.steps(), default=0)
        identity = _identity(context, job, begun)
    begun, identity = ranks.share((begun, identity))
    if begun:
        reporter.say(f"  continuing from the checkpoint of step {begun}")

    def validate() -> dict[str, float]:
        if job.validation is None:
            return {}
        found = _measure(context.recipe.eval, measure_likelihood, engine.denoiser, job.validation)
        return {f"{found.kind}": found.nats_per_token, f"{found.kind}_standard_error": found.standard_error}

    with reporter.progress(job.stage, settings.steps, begun) as bar:
        shown = begun

        def listen(line: dict[str, Any]) -> None:
            nonlocal shown
            if "loss" in line:
                text = f"loss {line['loss']:.3f}  masked CE {line['cross_entropy']:.3f}  {line['tokens_per_second']:,.0f} tokens/s"
                bar.advance(line["step"] - shown, text)
                shown = line["step"]

        metrics = Metrics(folder / "metrics.jsonl", settings.log_steps, listen, writes=ranks.rank == 0)
        context.stop.deferred = True
        try:
            train(engine, stream, loop_settings, checkpoints, metrics, validate, context.stop, identity)
        finally:
            context.stop.deferred = False
    if context.stop.requested:  # it came during the last step, which is saved
        raise Interrupted(context.stop.requested)


def _measure(evaluation: Evaluation, measure: Any, denoiser: Any, rows: Any):
    return measure(
        denoiser, rows, num_rows=evaluation.rows, draws=evaluation.draws, batch=evaluation.batch, seed=evaluation.seed
    )


def _identity(context: StageContext, job: TrainingJob, begun: int) -> str:
    """Hash of all that the numbers depend on: the recipe keys that the stage read, the model it starts from, its rows.

    Raises UserError when the model or the text is not the one that the checkpoints (newest: step `begun`) were trained on.
    """
    recorded = context.run.stage_state(job.stage)
    inputs = {"model": fingerprint(job.source), "rows": [store.meta.get("fingerprint") for store in job.stores]}
    names = {"model": f"the model in {job.source}", "rows": "the text" if job.stage != "sft" else "the file of conversations"}
    changed = [names[key] for key in inputs if recorded.get("inputs", inputs)[key] != inputs[key]]
    if begun and changed:
        raise UserError(
            f"{' and '.join(changed)} changed while {job.stage} was interrupted",
            f"its checkpoint of step {begun} was trained on another content; mixing the two would make numbers that are those of neither",
            "put the old content back and run the same command again, or start anew beside it with --fresh",
        )
    context.run.update_stage(job.stage, inputs=inputs)
    values = {"keys": recorded.get("keys"), **inputs}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint(model_folder: Path) -> str:
    """Hash of a model folder's weights; kept beside them, because hashing gigabytes takes a while."""
    from dlmconvert.training.checkpoint import file_hash

    files = sorted(model_folder.glob("*.safetensors"))
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
    anneal = f"annealed over {_anneal_steps(job)} steps" if spec.annealing["schedule"] != "none" else "open from the first step"
    attention = "causal" if spec.attention == "causal" else f"{spec.attention}, {anneal}"
    return f"  {total:,} parameters{share} on {engine.device}, {engine.precision}; attention {attention}; {job.settings.steps} steps of {job.settings.rows_per_step} x {job.stores[0].row_length} tokens"


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
