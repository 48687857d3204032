"""Which engine a recipe asks for, checked before anything is loaded. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dlmconvert.errors import UserError
from dlmconvert.recipe.optimization import Engine, Optimization
from dlmconvert.recipe.schema import Recipe
from dlmconvert.runs.folder import RunFolder
from dlmconvert.runs.stage import Reporter
from dlmconvert.training.deepspeed_config import derived_config, effective_stage, merged_config
from dlmconvert.training.ranks import shares
from dlmconvert.training.trackers import check_trackers

SECTIONS = {"pretrain": "pretrain", "adapt": "train", "sft": "sft"}  # stage: section of the recipe


def engine_config(engine: Engine, settings: Optimization, num_ranks: int, stage: str, stands_for: int = 1) -> dict[str, Any]:
    """The DeepSpeed JSON of a stage. stands_for: see `Solo`. Raises UserError for keys of the user's own that contradict the recipe."""
    share = shares(settings.rows_per_step, num_ranks * stands_for, SECTIONS[stage])
    micro_batch = min(settings.micro_batch, share)
    derived = derived_config(
        zero_stage=effective_stage(engine.zero_stage, engine.precision),
        precision=engine.precision,
        clip_norm=settings.clip_norm,
        micro_batch=micro_batch,
        num_micro_batches=-(-share // micro_batch) * stands_for,
        num_ranks=num_ranks,
        offload_optimizer=engine.offload_optimizer,
        offload_parameters=engine.offload_parameters,
        nvme=engine.nvme,
    )
    return merged_config(derived, engine.deepspeed)


def check_engine(recipe: Recipe, stages: Iterable[str], num_ranks: int, reporter: Reporter) -> None:
    """Raise UserError when these stages cannot be trained as asked; warn of settings that are ignored."""
    engine = recipe.engine
    check_trackers(recipe.run.trackers)
    stages = [stage for stage in stages if stage in SECTIONS]
    if engine.name == "single":
        fields = ("zero_stage", "offload_optimizer", "offload_parameters", "nvme", "deepspeed")
        ignored = [f"engine.{name}={getattr(engine, name)}" for name in fields if getattr(engine, name) != Engine.model_fields[name].default]
        if ignored and stages:
            reporter.warn(f"{', '.join(ignored)}: ignored under engine.name=single (set engine.name=deepspeed)")
        if num_ranks > 1 and stages:
            raise UserError(f"{num_ranks} processes, but engine.name=single", "only DeepSpeed trains on several", "set engine.name=deepspeed")
        return
    for stage in stages:
        engine_config(engine, getattr(recipe, SECTIONS[stage]), num_ranks, stage)


def engine_words(run: RunFolder, recipe: Recipe, overrides: list[str], num_ranks: int, processes: int | None) -> list[str]:
    """The overrides of a command with `engine.name=deepspeed` added where several processes need it, or where `--processes 1`
    continues a run that several have begun."""
    if recipe.engine.name != "single" or any(word.startswith("engine.name=") for word in overrides):
        return overrides
    begun = processes == 1 and (run.path / "recipe.yaml").is_file() and run.recipe().engine.name == "deepspeed"
    return [*overrides, "engine.name=deepspeed"] if num_ranks > 1 or begun else overrides
