"""What a training stage trains, and how it becomes a model folder: the job, the model with float32 weights, what is written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from dlmconvert.errors import UserError
from dlmconvert.recipe.method import (
    Method,
    anneal_steps_of,
    block_stages_of,
    edits_from,
    embedding_noise_steps_of,
    piece_stages_of,
    rise_steps_of,
)
from dlmconvert.recipe.optimization import Optimization
from dlmconvert.runs.engines import SECTIONS
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


def trainable(context: StageContext, job: TrainingJob, loading: Any = None, attaching: Any = None):
    """The denoiser with float32 weights, adapters attached, and the spec that the result will carry.

    loading, attaching: contexts around the two, for engines that deal the model out while it is loaded.
    """
    import torch

    from dlmconvert.backbone.adapters import attach_lora
    from dlmconvert.backbone.denoiser import Denoiser
    from dlmconvert.backbone.extras import balance_coefficient
    from dlmconvert.backbone.gated_files import attach_new, load_gated
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
        block_length=method.attention.block_length,
        corruption=method.corruption.kind + ("+edits" if method.corruption.edit_share > 0 else ""),
        objective=method.objective.weight,
        method=method.name,
        trained=job.trained_as,
        annealing={
            "schedule": method.attention.anneal if job.anneal else "none",
            "steps": anneal_steps_of_job(job),
            "open_ratio": 0.0 if method.attention.pattern == "causal" else 1.0,
            **({"block_stages": [list(stage) for stage in block_stages_of_job(job, row_length)]} if method.attention.block_length else {}),
        },
    )
    tokenizer = job.tokenizer or load_tokenizer(job.source)
    lora, adapters = job.settings.lora, None
    if spec.gated_adapter is not None and not (lora is not None and lora.gated and spec.gated_adapter == _gated(lora)):
        raise UserError(
            f"{job.source} has adapters that act on masks only", "its weights are the source's, and training them would lose that",
            f"train the same adapters on: {SECTIONS[job.stage]}.lora={{gated: true, " + ", ".join(f"{k}: {v}" for k, v in spec.gated_adapter.items()) + "}",
        )  # fmt: skip
    if lora is not None and lora.gated:
        if spec.mask_is_word:
            raise UserError(
                f"{SECTIONS[job.stage]}.lora.gated=true with source.mask_token={spec.mask_token_id}, an ordinary word",
                "text contains it, and would open the gate", "leave source.mask_token out to have an unused one chosen",
            )  # fmt: skip
        model.requires_grad_(False)
        adapters = attach_new(model, _gated(lora), spec.mask_token_id, job.settings.seed)
        if spec.gated_adapter is not None:
            load_gated(adapters, job.source)
        spec = replace(spec, gated_adapter=adapters.describe())
    elif lora is not None:
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
    if method.corruption.kind == "gidd" and spec.mask_is_word:
        raise UserError(
            f"method.corruption.kind=gidd with source.mask_token={spec.mask_token_id}, an ordinary word",
            "its prediction leaves the mask token out, and text contains this one", "leave source.mask_token out to have an unused one chosen",
        )  # fmt: skip
    if method.objective.router_weight and not balance_coefficient(model):
        raise UserError(
            f"method.objective.router_weight={method.objective.router_weight:g}: {config.model_type} has no routers whose balance loss is known", "",
            "leave it out",
        )  # fmt: skip
    return Denoiser(model, spec, tokenizer, teacher_of(context, method), adapters), spec


def _gated(lora: Any) -> dict[str, Any]:
    return {"rank": lora.rank, "alpha": lora.alpha, "target_modules": lora.target_modules}


def teacher_of(context: StageContext, method: Method) -> Any:
    """The frozen source where the objective compares with it, read when it is first needed."""
    import torch

    from dlmconvert.backbone.teacher import Teacher, load_source

    if not (method.objective.alignment_weight or method.objective.teacher_kl):
        return None
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[context.recipe.engine.precision]
    return Teacher(partial(load_source, context.run.model_folder("prepare"), dtype, context.recipe.source.trust_remote_code))


def write_model(folder: Path, job: TrainingJob, denoiser: Any, spec: Any) -> None:
    """A plain model folder in the dtype of the source, adapters merged; those that act on masks only beside the source's own weights."""
    import torch

    from dlmconvert.backbone.adapters import merge_lora
    from dlmconvert.backbone.gated_files import save_gated
    from dlmconvert.backbone.load import load_config, save_model_folder

    merges = job.settings.lora is not None and not job.settings.lora.gated
    model = merge_lora(denoiser.model) if merges else denoiser.model
    dtype = getattr(load_config(job.source), "dtype", None) or torch.float32
    save_model_folder(fresh_folder(folder), model.cpu(), denoiser.tokenizer, spec, dtype=dtype)
    if denoiser.adapters is not None:
        save_gated(denoiser.adapters, folder)


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
    denoiser, spec = trainable(context, job)
    restore_parameters(denoiser, checkpoints, step)
    row_length = (recipe.sft.row_length if stage == "sft" else None) or recipe.data.row_length
    open_ratio = _open_ratio_at(job, step, row_length)
    write_model(folder, job, denoiser, replace(spec, annealing=spec.annealing | {"open_ratio": open_ratio}))


def _open_ratio_at(job: TrainingJob, step: int, row_length: int) -> float:
    """Share of the future pairs that was open in the last of `step` steps."""
    from dlmconvert.diffusion.schedules import block_length_at, open_share, piece_share
    from dlmconvert.training.losses import context_of

    if job.method.attention.pattern == "causal":
        return 0.0
    pieces = piece_stages_of(job.method.attention, job.settings.steps, row_length, job.anneal)
    share = piece_share(block_length_at(step - 1, pieces), row_length) if pieces else 1.0
    return share * open_share(context_of(loop_settings_of(job, row_length), step - 1), row_length)


def band_search(context: StageContext, job: TrainingJob, spec: Any) -> Any:
    """What looks for the band of noise levels: `training.bands.BandSearch`; None where the recipe fixes it, or nothing is held out."""
    from dlmconvert.training.bands import BandSearch

    corruption, evaluation = job.method.corruption, context.recipe.eval
    if corruption.band_search_steps is None or job.validation is None:
        return None
    whole = job.method.model_copy(update={"corruption": corruption.model_copy(update={"band": None, "noise_levels": "stratified", "edit_share": 0.0, "rise_steps": None})})
    rows = min(evaluation.rows, job.validation.num_rows)
    held = replace(job, stores=[job.validation], weights=[1.0], method=whole, settings=job.settings.model_copy(update={"rows_per_step": rows}))
    return BandSearch(batch_stream(held, spec), evaluation.draws, corruption.band_search_steps, corruption.eps)


def batch_stream(job: TrainingJob, spec: Any) -> Any:
    """The noised batches of a stage: `data.loader.BatchStream`."""
    from dlmconvert.data.loader import BatchStream, Mixture
    from dlmconvert.diffusion.attention import TWO_STREAMS
    from dlmconvert.diffusion.schedules import block_length_at

    settings, method = job.settings, job.method
    stages = block_stages_of_job(job, job.stores[0].row_length)
    pieces = piece_stages_of(method.attention, settings.steps, job.stores[0].row_length, job.anneal)
    return BatchStream(
        Mixture(list(job.stores), list(job.weights), settings.seed),
        rows_per_step=settings.rows_per_step,
        seed=settings.seed,
        corruption_kind=method.corruption.kind,
        eps=method.corruption.eps,
        noise_levels=method.corruption.noise_levels,
        mask_token_id=spec.mask_token_id,
        alignment=method.alignment,
        isolated=job.isolated,
        band=method.corruption.band,
        count=method.corruption.count,
        views=method.corruption.views,
        levels_per=method.corruption.levels_per,
        half_life=method.corruption.half_life,
        block_length=partial(block_length_at, stages=stages) if stages else None,
        has_clean_copy=method.attention.pattern in TWO_STREAMS,
        uniform_share=method.corruption.uniform_share,
        vocab_size=spec.vocab_size,
        edit_share=method.corruption.edit_share,
        edit_from=edits_from(method.corruption, settings.steps),
        rise_steps=rise_steps_of(method.corruption, settings.steps) if job.anneal else 0,
        rise_from=method.corruption.rise_from,
        piece_length=partial(block_length_at, stages=pieces) if pieces else None,
    )


def loop_settings_of(job: TrainingJob, row_length: int) -> Any:
    """Plain values for the loop, `training.losses.LoopSettings`: its fields are keys of the recipe under the same name, but for these."""
    from dlmconvert.training.losses import LoopSettings

    settings, method = job.settings, job.method
    names = {field.name for field in fields(LoopSettings)}
    same = {name: getattr(part, name) for part in (settings, method.objective, method.corruption) for name in names & set(type(part).model_fields)}
    own = {
        "causal": method.attention.pattern == "causal",
        "anneal": method.attention.anneal if job.anneal else "none",
        "anneal_steps": anneal_steps_of_job(job),
        "row_length": row_length,
        "pattern": method.attention.pattern,
        "block_stages": block_stages_of_job(job, row_length),
        # Adapters that act on masks only leave the next-token path as it is: its loss would have no gradient.
        "ar_weight": 0.0 if method.attention.pattern == "causal" or (settings.lora is not None and settings.lora.gated) else method.objective.ar_weight,
        "corruption": method.corruption.kind,
        "embedding_noise_steps": embedding_noise_steps_of(method.corruption, settings.steps) if job.anneal else 0,
        "overlap_saving": bool(settings.overlap_saving),
    }
    return LoopSettings(**same | own)


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


def anneal_steps_of_job(job: TrainingJob) -> int:
    return anneal_steps_of(job.method.attention, job.settings.steps) if job.anneal else 1


def block_stages_of_job(job: TrainingJob, row_length: int) -> tuple[tuple[int, int], ...]:
    return block_stages_of(job.method.attention, job.settings.steps, row_length, job.anneal)


def fresh_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
