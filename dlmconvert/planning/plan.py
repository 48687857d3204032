"""`dlmconvert plan`: what a recipe will cost on a machine, before anything is downloaded or trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dlmconvert.errors import UserError
from dlmconvert.planning.architecture import Architecture, describe, find_config
from dlmconvert.planning.budget import Budget, data_budget
from dlmconvert.planning.disk import checkpoint_bytes, disk_of, unique_tokens_of
from dlmconvert.planning.machine import Machine, free_disk_bytes, planned_machine
from dlmconvert.planning.memory import Memory
from dlmconvert.planning.settings import EngineSetting, Option, StageShape, recommended, setting_of
from dlmconvert.planning.text import advice, plan_rows, size
from dlmconvert.planning.time import GPU_EFFICIENCY, MASKED_SHARE, STEP_EFFICIENCY, Speed, Work, assumed_speed
from dlmconvert.recipe.contradictions import TWO_STREAMS
from dlmconvert.recipe.method import Method, edits_from
from dlmconvert.recipe.optimization import Optimization
from dlmconvert.recipe.schema import Recipe
from dlmconvert.training.ranks import shares

SECTIONS = {"pretrain": "pretrain", "adapt": "train", "sft": "sft"}  # stage: section of the recipe

__all__ = ["Machine", "Plan", "StagePlan", "plan_recipe", "size"]


@dataclass(frozen=True)
class StagePlan:
    """One stage of training. Tokens and FLOPs are of the whole stage; seconds are an estimate, None when no speed is known.

    memory: of one process with the recipe's own settings. options: every setting. recommended: one of them, None when none fits. words:
    the keys to type for it. flops: of the model; recomputed_flops: on top, of the recipe's gradient checkpointing.
    """

    name: str
    steps: int
    rows_per_step: int
    micro_batch: int
    row_length: int
    num_trainable: int
    setting: EngineSetting
    memory: Memory
    fits: bool | None
    peak_without_checkpointing: int
    peak_with_checkpointing: int
    flops: float
    recomputed_flops: float
    seconds: float | None
    options: list[Option]
    recommended: Option | None
    words: list[str]
    recommended_seconds: float | None

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.row_length

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class Plan:
    """The answer. `rows` is for people, `to_dict` for scripts, `fits` for the exit code. resolved: the whole recipe, every key.
    price: of a GPU hour, None when not given. budget: of the text, None when the amount of it is unknown."""

    recipe: str
    resolved: dict[str, Any]
    architecture: Architecture
    config_from: str
    machine: Machine
    speed: Speed
    price: float | None
    stages: list[StagePlan]
    disk: dict[str, int]
    disk_free: int
    unique_tokens: int | None
    unique_tokens_from: str
    budget: Budget | None
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        return max((stage.memory.peak_bytes for stage in self.stages), default=4 * self.architecture.num_parameters)

    @property
    def host_bytes(self) -> int:
        """Host memory of a node: what is offloaded there."""
        return self.machine.processes_a_node * max((stage.memory.host_bytes for stage in self.stages), default=0)

    @property
    def saving_bytes(self) -> int:
        """Host memory of a node that a checkpoint takes which is written while the training goes on (`overlap_saving`)."""
        found = [0]
        for stage in self.stages:
            section, engine = self.resolved[SECTIONS[stage.name]], self.resolved["engine"]
            overlaps = section["overlap_saving"]
            if overlaps is None:
                overlaps = self.machine.kind == "cuda" and stage.setting.offload == "none"
            if overlaps:
                found.append(checkpoint_bytes(stage.num_trainable, stage.setting, engine["precision"]) // self.machine.nodes)
        return max(found)

    def fits(self) -> bool | None:
        """Whether every stage, with the settings as typed, fits into the memory of a device; None when its size is unknown."""
        found = [stage.fits for stage in self.stages]
        return None if None in found else all(found)

    @property
    def words(self) -> list[str]:
        """What to type for the recommended settings; empty when the recipe has them already, or when nothing fits."""
        return list(dict.fromkeys(word for stage in self.stages for word in stage.words))

    @property
    def seconds(self) -> float | None:
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known else None

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds / 3600 * self.machine.processes

    @property
    def cost(self) -> float | None:
        return None if self.gpu_hours is None or self.price is None else self.gpu_hours * self.price

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """(section, name, value) of everything that is printed."""
        return list(plan_rows(self))

    def to_dict(self) -> dict[str, Any]:
        result = asdict(self)
        for stage, values in zip(self.stages, result["stages"], strict=True):
            values |= {"tokens_per_step": stage.tokens_per_step, "tokens": stage.tokens}
        together = {"peak_bytes": self.peak_bytes, "host_bytes": self.host_bytes, "saving_bytes": self.saving_bytes, "fits": self.fits(), "words": self.words}
        return result | together | {"seconds": self.seconds, "gpu_hours": self.gpu_hours, "cost": self.cost}


def plan_recipe(
    recipe: Recipe,
    *,
    gpu: str | None = None,
    processes: int | None = None,
    nodes: int | None = None,
    memory_bytes: int | None = None,
    flops_per_second: float | None = None,
    mfu: float | None = None,
    price: float | None = None,
    unique_tokens: int | None = None,
    targets: list[str] | None = None,
    hub_timeout: float = 3.0,
) -> Plan:
    """Plan the training stages of a recipe on a machine; no weights are read and none are made.

    gpu: a name of planning/gpus.py; default: this machine's device. processes, nodes: the totals. memory_bytes: of one device.
    flops_per_second: sustained, of one device in a step; mfu: share of its peak; default: an assumed share of the peak (without a GPU: of
    a matrix product that is timed here). price: of one device and hour. unique_tokens: of `data.train`; default: an estimate.
    targets: stages that are planned, default the recipe's. hub_timeout: seconds to wait for the Hub when the config is not in the cache.
    Raises UserError when the source's config is nowhere to be found, its family is unknown, or the processes cannot be dealt with.
    """
    config, config_from = find_config(recipe.source, hub_timeout)
    extra_rows = int(recipe.source.mask_token == config.get_text_config().vocab_size)
    shape = describe(config, extra_rows=extra_rows, trust_remote_code=recipe.source.trust_remote_code)
    machine = planned_machine(
        recipe.engine.device, recipe.engine.precision, gpu=gpu, processes=processes, nodes=nodes, memory_bytes=memory_bytes, timed=flops_per_second is None
    )
    speed = assumed_speed(
        machine.peak, machine.peak_from, STEP_EFFICIENCY if gpu is None else GPU_EFFICIENCY, mfu, None if flops_per_second is None else flops_per_second / 1e12
    )
    notes: list[str] = []
    if recipe.source.mask_token is None:
        notes.append("the mask token is chosen by `prepare`; where it needs a new embedding row, that row is not counted here")
    built_here = config_from.startswith("source.scratch")
    sections = (("pretrain", recipe.pretrain if built_here else None), ("adapt", recipe.train), ("sft", recipe.sft))
    wanted = targets or recipe.stages
    planned = [
        (name, section, _stage_shape(name, section, recipe, config, extra_rows, machine, notes))
        for name, section in sections
        if section is not None and (name in wanted or (name == "pretrain" and "adapt" in wanted))
    ]
    stages = _plan_stages(planned, recipe, machine, speed)
    unique, unique_from = (unique_tokens, "as given") if unique_tokens is not None else unique_tokens_of(recipe)
    disk = disk_of(recipe, shape, [(stage.name, stage.num_trainable, stage.setting) for stage in stages], unique)
    folder = recipe.run.folder or f"runs/{recipe.name}"
    text_tokens = sum(stage.tokens for stage in stages if stage.name != "sft")
    budget = None
    if unique and text_tokens:
        active = shape.num_parameters if not shape.experts_per_token else shape.active_matrix_parameters
        budget = data_budget(active, unique, text_tokens, recipe.method.attention.pattern != "causal", unique_from.startswith("at most"))
    result = Plan(
        recipe=recipe.name, resolved=recipe.model_dump(mode="json"), architecture=shape, config_from=config_from, machine=machine, speed=speed, price=price, stages=stages,
        disk=disk, disk_free=free_disk_bytes(folder), unique_tokens=unique, unique_tokens_from=unique_from, budget=budget, notes=list(dict.fromkeys(notes)),
    )  # fmt: skip
    if budget is not None and unique_from.startswith("at most"):
        result.notes.append("the unique tokens are a bound: with less text there are more epochs, and --unique-tokens N says how much there is")
    if sum(disk.values()) > result.disk_free and not machine.is_given:
        result.notes.append(f"the disk of {folder} has {size(result.disk_free)} free, which is less than the run may take")
    result.advice.extend(advice(result, recipe))
    return result


def _plan_stages(planned: list[tuple[str, Optimization, StageShape]], recipe: Recipe, machine: Machine, speed: Speed) -> list[StagePlan]:
    keys = zero_keys(recipe)
    is_fixed = recipe.method.objective.normaliser == "masked_micro_batch"
    options = {name: list(trained.options(recipe.engine, section.micro_batch, machine, keys, is_fixed)) for name, section, trained in planned}
    mine = setting_of(recipe.engine, machine.processes)
    best = recommended(options, mine) or {}
    stages = []
    for name, section, trained in planned:
        typed = trained.option(mine, section.micro_batch, section.gradient_checkpointing, machine, keys)
        other = trained.option(mine, section.micro_batch, not section.gradient_checkpointing, machine, keys)
        plain, checkpointed = (other, typed) if section.gradient_checkpointing else (typed, other)
        chosen = best.get(name)
        works = {again: _work(trained, section, again) for again in (False, True)}
        work = works[section.gradient_checkpointing]
        stages.append(
            StagePlan(
                name=name, steps=section.steps, rows_per_step=section.rows_per_step, micro_batch=typed.micro_batch, row_length=trained.row_length,
                num_trainable=trained.shape.num_trainable, setting=mine, memory=typed.memory, fits=typed.fits,
                peak_without_checkpointing=plain.memory.peak_bytes, peak_with_checkpointing=checkpointed.memory.peak_bytes, flops=work.model,
                recomputed_flops=work.recomputed, seconds=speed.seconds(work, machine.processes), options=options[name], recommended=chosen,
                words=[] if chosen is None else _words(chosen, SECTIONS[name], section, typed, recipe, machine),
                recommended_seconds=None if chosen is None else speed.seconds(works[chosen.gradient_checkpointing], machine.processes),
            )  # fmt: skip
        )
    return stages


def zero_keys(recipe: Recipe) -> Mapping[str, Any]:
    """`engine.deepspeed.zero_optimization`: bucket sizes and the like."""
    return recipe.engine.deepspeed.get("zero_optimization") or {}


def _words(chosen: Option, key: str, section: Optimization, typed: Option, recipe: Recipe, machine: Machine) -> list[str]:
    words = chosen.engine.words(recipe.engine, machine.processes)
    if chosen.micro_batch != typed.micro_batch:
        words.append(f"{key}.micro_batch={chosen.micro_batch}")
    if chosen.gradient_checkpointing != section.gradient_checkpointing:
        words.append(f"{key}.gradient_checkpointing={str(chosen.gradient_checkpointing).lower()}")
    return words


def _work(trained: StageShape, section: Optimization, checkpointing: bool) -> Work:
    row = trained.work(checkpointing)
    rows = section.steps * section.rows_per_step
    return Work(rows * row.model, rows * row.recomputed)


def _stage_shape(name: str, section: Optimization, recipe: Recipe, config: Any, extra_rows: int, machine: Machine, notes: list[str]) -> StageShape:
    # The mask token's row is trained beside the adapters. Which id it has makes no difference to the count; none for a word.
    is_word = isinstance(recipe.source.mask_token, int) and not extra_rows
    mask_token_id = None if is_word or section.lora is None else 0
    try:
        shape = describe(
            config, lora=section.lora, rates=section.rates.model_dump(), extra_rows=extra_rows, mask_token_id=mask_token_id, trust_remote_code=recipe.source.trust_remote_code
        )
    except UserError as error:
        raise UserError(f"{SECTIONS[name]}: {error.what}", error.why, error.next_step) from error
    row_length = (recipe.sft.row_length or recipe.data.row_length) if name == "sft" else recipe.data.row_length
    if shape.max_positions and row_length > shape.max_positions:
        key = "sft.row_length" if name == "sft" and recipe.sft.row_length else "data.row_length"
        notes.append(
            f"{name} will be refused: rows of {row_length} tokens are longer than the model's {shape.max_positions} positions. "
            f"Planned with {key}={shape.max_positions}: set that"
        )
        row_length = shape.max_positions
    attention = recipe.method.attention
    causal = name == "pretrain" or attention.pattern == "causal"
    streams = 2 if attention.pattern in TWO_STREAMS and not causal else 1  # [noised | clean]
    isolated = recipe.data.documents == "isolated" if name != "sft" else recipe.sft.pad_to != "row"
    anneals = name == "adapt" and attention.anneal != "none"
    return StageShape(
        shape=shape, share=shares(section.rows_per_step, machine.processes, SECTIONS[name]), row_length=row_length, streams=streams, precision=recipe.engine.precision,
        causal=causal, has_mask=isolated or anneals or (attention.block_length is not None and not causal), isolated=isolated,
        target_share=1.0 if causal else target_share(recipe.method), edits=0.0 if causal else edit_share_of_steps(recipe.method, section.steps),
        teacher="none" if name == "pretrain" else teacher_of(recipe.method),
    )  # fmt: skip


def target_share(method: Method) -> float:
    """Of the tokens of a row, those that are predicted in a step, on average; the next tokens of the clean copy on top."""
    band = method.corruption.band
    masked = 1.0 if method.corruption.kind in ("all_masked", "gidd") else sum(band) / 2 if band is not None else MASKED_SHARE
    return masked + (1.0 if method.objective.ar_weight else 0.0)


def edit_share_of_steps(method: Method, steps: int) -> float:
    """Of the steps of a stage, those that train on edits as well."""
    return (steps - edits_from(method.corruption, steps)) / steps if method.corruption.edit_share else 0.0


def teacher_of(method: Method) -> str:
    """What of the frozen source is looked at: `states` of its layers, `predictions`, or `none` of it."""
    if method.objective.alignment_weight:
        return "states"
    return "predictions" if method.objective.teacher_kl else "none"
