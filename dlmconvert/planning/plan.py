"""`dlmconvert plan`: what a recipe will cost on one device, before anything is downloaded or trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dlmconvert.planning.architecture import Architecture, describe, find_config
from dlmconvert.planning.machine import device_memory, free_disk_bytes
from dlmconvert.planning.memory import Memory, memory_of
from dlmconvert.planning.time import STEP_EFFICIENCY, flops_per_token, measured_flops_per_second
from dlmconvert.recipe.load import flat
from dlmconvert.recipe.optimization import Optimization
from dlmconvert.recipe.schema import Recipe, text_sources

BYTES_PER_TOKEN_OF_TEXT = 4  # of plain English or code, for the estimate of the tokens in a local file


@dataclass(frozen=True)
class StagePlan:
    """One stage of training. Tokens and FLOPs are of the whole stage; seconds are an estimate, None when no speed is known."""

    name: str
    steps: int
    rows_per_step: int
    micro_batch: int
    row_length: int
    num_trainable: int
    memory: Memory
    peak_without_checkpointing: int
    peak_with_checkpointing: int
    flops: float
    seconds: float | None

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.row_length

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class Plan:
    """The answer. `rows` is for people, `to_dict` for scripts, `fits` for the exit code. resolved: the whole recipe, every key."""

    recipe: str
    resolved: dict[str, Any]
    architecture: Architecture
    config_from: str
    device: str
    device_bytes: int | None
    speed: str
    stages: list[StagePlan]
    disk: dict[str, int]
    disk_free: int
    unique_tokens: int | None
    unique_tokens_from: str
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        return max((stage.memory.peak_bytes for stage in self.stages), default=4 * self.architecture.num_parameters)

    def fits(self, memory_bytes: int | None = None) -> bool | None:
        """Whether every stage fits into the memory of one device (default: the one planned for); None when its size is unknown."""
        memory_bytes = self.device_bytes if memory_bytes is None else memory_bytes
        return None if memory_bytes is None else self.peak_bytes <= memory_bytes

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """(section, name, value) of everything that is printed."""
        return list(_rows(self))

    def to_dict(self) -> dict[str, Any]:
        result = asdict(self)
        for stage, values in zip(self.stages, result["stages"], strict=True):
            values |= {"tokens_per_step": stage.tokens_per_step, "tokens": stage.tokens}
        return result | {"peak_bytes": self.peak_bytes, "fits": self.fits()}


def plan_recipe(recipe: Recipe, *, memory_bytes: int | None = None, flops_per_second: float | None = None, hub_timeout: float = 3.0) -> Plan:
    """Plan every training stage of a recipe on one device; no weights are read and none are made.

    memory_bytes: of the device; default: of this machine's. flops_per_second: sustained speed of a step on it; default: a matrix
    product is timed here (half a second). hub_timeout: seconds to wait for the Hub when the config is not in the cache.
    Raises UserError when the source's config is nowhere to be found, or its family is unknown.
    """
    config, config_from = find_config(recipe.source, hub_timeout)
    rows_now = config.get_text_config().vocab_size
    adds_row = recipe.source.mask_token == rows_now
    remote = recipe.source.trust_remote_code
    shape = describe(config, extra_rows=int(adds_row), trust_remote_code=remote)
    kind, here, device = device_memory(recipe.engine.device)
    if memory_bytes is not None:
        device = f"one with {size(memory_bytes)} (as given)"
    else:
        memory_bytes = here
    if flops_per_second is not None:
        speed = f"{flops_per_second / 1e12:.4g} TFLOP/s (as given)"
    elif here is not None:
        measured = measured_flops_per_second(kind, recipe.engine.precision)
        flops_per_second = STEP_EFFICIENCY * measured
        speed = f"{STEP_EFFICIENCY:.0%} of a matrix product timed here just now ({measured / 1e12:.3g} TFLOP/s on {device_memory(recipe.engine.device)[2]})"
    else:
        speed = "unknown: give --tflops"

    notes = []
    if recipe.source.mask_token is None:
        notes.append("the mask token is chosen by `prepare`; where it needs a new embedding row, that row is not counted here")
    stages = []
    built_here = config_from.startswith("source.scratch")
    for name, section in (("pretrain", recipe.pretrain if built_here else None), ("adapt", recipe.train), ("sft", recipe.sft)):
        if section is None or (name != "pretrain" and name not in recipe.stages):
            continue
        stages.append(_plan_stage(name, section, recipe, shape, config, kind, int(adds_row), flops_per_second, notes))
    unique, unique_from = _unique_tokens(recipe)
    disk = _disk(recipe, shape, stages, unique)
    folder = recipe.run.folder or f"runs/{recipe.name}"
    result = Plan(
        recipe=recipe.name, resolved=recipe.model_dump(mode="json"), architecture=shape, config_from=config_from, device=device, device_bytes=memory_bytes, speed=speed, stages=stages,
        disk=disk, disk_free=free_disk_bytes(folder), unique_tokens=unique, unique_tokens_from=unique_from, notes=list(dict.fromkeys(notes)),
    )  # fmt: skip
    if sum(disk.values()) > result.disk_free:
        result.notes.append(f"the disk of {folder} has {size(result.disk_free)} free, which is less than the run may take")
    if result.fits() is False:
        result.advice.extend(_advice(result, recipe, config, kind, int(adds_row)))
    return result


def _plan_stage(
    name: str, section: Optimization, recipe: Recipe, shape: Architecture, config: Any, kind: str, extra_rows: int,
    flops_per_second: float | None, notes: list[str],
) -> StagePlan:  # fmt: skip
    causal = name == "pretrain" or recipe.method.attention.pattern == "causal"
    row_length = (recipe.sft.row_length or recipe.data.row_length) if name == "sft" else recipe.data.row_length
    if shape.max_positions and row_length > shape.max_positions:
        key = "sft.row_length" if name == "sft" and recipe.sft.row_length else "data.row_length"
        notes.append(
            f"{name} will be refused: rows of {row_length} tokens are longer than the model's {shape.max_positions} positions. "
            f"Planned with {key}={shape.max_positions}: set that"
        )
        row_length = shape.max_positions
    trained = _trained_shape(section, recipe, shape, config, extra_rows)
    arguments = _memory_arguments(name, section, recipe, row_length, kind)
    plain = memory_of(trained, **arguments, gradient_checkpointing=False)
    checkpointed = memory_of(trained, **arguments, gradient_checkpointing=True)
    per_token = flops_per_token(trained, row_length, causal=causal, gradient_checkpointing=section.gradient_checkpointing)
    flops = per_token * section.steps * section.rows_per_step * row_length
    return StagePlan(
        name=name,
        steps=section.steps,
        rows_per_step=section.rows_per_step,
        micro_batch=section.micro_batch,
        row_length=row_length,
        num_trainable=trained.num_trainable,
        memory=checkpointed if section.gradient_checkpointing else plain,
        peak_without_checkpointing=plain.peak_bytes,
        peak_with_checkpointing=checkpointed.peak_bytes,
        flops=flops,
        seconds=flops / flops_per_second if flops_per_second else None,
    )


def _trained_shape(section: Optimization, recipe: Recipe, shape: Architecture, config: Any, extra_rows: int) -> Architecture:
    if section.lora is None:
        return shape
    # The mask token's row is trained beside the adapters. Which id it has makes no difference to the count; none for a word.
    is_word = isinstance(recipe.source.mask_token, int) and not extra_rows
    return describe(
        config, lora=section.lora, extra_rows=extra_rows, mask_token_id=None if is_word else 0, trust_remote_code=recipe.source.trust_remote_code
    )


def _memory_arguments(name: str, section: Optimization, recipe: Recipe, row_length: int, kind: str) -> dict[str, Any]:
    isolated = recipe.data.documents == "isolated" if name != "sft" else recipe.sft.pad_to != "row"
    anneals = name == "adapt" and recipe.method.attention.anneal != "none"
    return {
        "micro_batch": section.micro_batch,
        "row_length": row_length,
        "accumulates": section.rows_per_step > section.micro_batch,
        "precision": recipe.engine.precision,
        "has_mask": isolated or anneals,
        "masked_rows": section.micro_batch if isolated else 1,
        "device": kind,
    }


def _unique_tokens(recipe: Recipe) -> tuple[int | None, str]:
    """Tokens of `data.train`, as far as it can be known without reading it."""
    from dlmconvert.data.sources import total_bytes
    from dlmconvert.errors import UserError

    sources = text_sources(recipe.data.train)
    if not sources:
        return None, "data.train is empty"
    bound = recipe.data.max_tokens * len(sources) if recipe.data.max_tokens else None
    try:
        found = total_bytes(sources)
    except UserError as error:
        return bound, f"{error.what}; data.max_tokens bounds it" if bound else error.what
    if found is None:
        return bound, "at most: data.max_tokens for each source" if bound else "unknown until `prepare` has read the text"
    estimate = found // BYTES_PER_TOKEN_OF_TEXT
    if bound is not None and bound < estimate:
        return bound, "at most: data.max_tokens for each source"
    return estimate, f"an estimate: {size(found)} of text, {BYTES_PER_TOKEN_OF_TEXT} bytes a token"


def _disk(recipe: Recipe, shape: Architecture, stages: list[StagePlan], unique_tokens: int | None) -> dict[str, int]:
    """Bytes in the run folder and its cache. Checkpoints: those kept and the one being written, weights and two moments each."""
    token_bytes = 2 if shape.vocab_size <= 1 << 16 else 4
    folders = 1 + sum(stage.name != "pretrain" for stage in stages) + ("export" in recipe.stages)
    sections = {"pretrain": recipe.pretrain, "adapt": recipe.train, "sft": recipe.sft}
    return {
        "tokens": (unique_tokens or 0) * token_bytes,
        "checkpoints": sum((sections[stage.name].keep_checkpoints + 1) * 3 * 4 * stage.num_trainable for stage in stages),
        "models": folders * 4 * shape.num_parameters,
    }


def _advice(plan: Plan, recipe: Recipe, config: Any, kind: str, extra_rows: int) -> Iterator[str]:
    """For each stage that does not fit: the largest micro-batch that does, or why none can."""
    sections = {"pretrain": recipe.pretrain, "adapt": recipe.train, "sft": recipe.sft}
    for stage in plan.stages:
        if stage.memory.peak_bytes <= plan.device_bytes:
            continue
        key = "train" if stage.name == "adapt" else stage.name
        section = sections[stage.name]
        shape = _trained_shape(section, recipe, plan.architecture, config, extra_rows)
        found = None
        for checkpointing in (section.gradient_checkpointing, True):
            micro_batch = section.micro_batch
            while micro_batch >= 1 and found is None:
                smaller = section.model_copy(update={"micro_batch": micro_batch})
                arguments = _memory_arguments(stage.name, smaller, recipe, stage.row_length, kind)
                if memory_of(shape, **arguments, gradient_checkpointing=checkpointing).peak_bytes <= plan.device_bytes:
                    found = (micro_batch, checkpointing)
                micro_batch //= 2
            if found:
                break
        if found:
            words = f"{key}.micro_batch={found[0]}" if found[0] != section.micro_batch else ""
            words += f" {key}.gradient_checkpointing=true" if found[1] != section.gradient_checkpointing else ""
            yield f"{stage.name} fits with {words.strip()}"
            if found[0] != section.micro_batch and recipe.method.objective.normaliser == "masked_micro_batch":
                yield "objective.normaliser=masked_micro_batch makes the loss depend on micro_batch; eligible does not"
        else:
            memory = stage.memory
            states = memory.weights + memory.gradients + memory.moments
            yield f"{stage.name}: no micro-batch fits; weights, gradients and optimizer alone are {size(states)}"
            if section.lora is None:
                yield f"{key}.lora={{rank: 16}} trains adapters: only their gradients and moments are kept (weights {size(memory.weights)})"


def size(num_bytes: float) -> str:
    """Bytes for people, in powers of 1000 (1 GB is 10^9 bytes, as on the label of a disk)."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}" if num_bytes < 1000 * factor else f"{num_bytes / factor:,.0f} {unit}"
    return f"{num_bytes:.0f} bytes"


def count(number: float) -> str:
    """A large number for people: 124M, 65.0B."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.4g}{unit}"
    return f"{number:.0f}"


def span(seconds: float) -> str:
    """A duration for people, coarse, because it is an estimate."""
    for unit, factor in (("years", 365 * 86400.0), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * factor:
            value = seconds / factor
            return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{max(1, round(seconds))} seconds"


def _rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    shape = plan.architecture
    defaults = flat(Recipe.model_construct().model_dump(mode="json"))
    for key, value in flat(plan.resolved).items():
        unused = key == "source.scratch" or (key.startswith("sft.") and "sft" not in plan.resolved["stages"])
        if value != defaults.get(key) and not unused:
            yield "recipe", key, f"{value:g}" if isinstance(value, float) else json.dumps(value)
    yield "model", "shapes from", plan.config_from
    yield "model", "parameters", f"{count(shape.num_parameters)} ({shape.family}, {shape.num_layers} layers, {shape.vocab_size:,} rows{', tied' if shape.is_tied else ''})"
    yield "data", "unique tokens", f"{count(plan.unique_tokens)} ({plan.unique_tokens_from})" if plan.unique_tokens else f"unknown ({plan.unique_tokens_from})"
    for stage in plan.stages:
        memory, name = stage.memory, stage.name
        trained = f"{count(stage.num_trainable)}"
        if stage.num_trainable < shape.num_parameters:
            trained += f" ({stage.num_trainable / shape.num_parameters:.2%}, adapters)"
        yield name, "trainable", trained
        yield name, "steps", f"{stage.steps:,} x {stage.rows_per_step:,} rows x {stage.row_length:,} tokens"
        yield name, "tokens", f"{count(stage.tokens_per_step)} a step, {count(stage.tokens)} in all"
        if name != "sft" and plan.unique_tokens:
            yield name, "epochs", f"{stage.tokens / plan.unique_tokens:.2g}"
        yield name, "weights", size(memory.weights) + (f", and bfloat16 casts {size(memory.casts)}" if memory.casts else "")
        yield name, "gradients", size(memory.gradients)
        yield name, "AdamW moments", size(memory.moments)
        chosen = "with" if memory.gradient_checkpointing else "without"
        yield name, "activations", (
            f"{size(memory.activations)} for a micro-batch of {stage.micro_batch}; with gradient checkpointing {size(memory.activations_checkpointed)} (planned {chosen})"
        )
        yield name, "logits", f"{size(memory.logits)} at most (all positions masked)"
        yield name, "buffers", size(memory.buffers)
        yield name, "peak memory", f"{size(memory.peak_bytes)} (at the {memory.at})"
        other = stage.peak_without_checkpointing if memory.gradient_checkpointing else stage.peak_with_checkpointing
        yield name, "", f"{size(other)} {'without' if memory.gradient_checkpointing else 'with'} gradient checkpointing"
        yield name, "arithmetic", f"{stage.flops:.2e} FLOPs"
        yield name, "time (estimate)", span(stage.seconds) if stage.seconds is not None else "unknown: give --tflops"
    if any(stage.seconds is not None for stage in plan.stages):
        yield "time", "speed", plan.speed
        yield "time", "training", f"{span(sum(stage.seconds or 0.0 for stage in plan.stages))} on one device: an estimate, not a measurement"
    for name, value in plan.disk.items():
        yield "disk", name, size(value) if value else "unknown"
    yield "disk", "total", f"{size(sum(plan.disk.values()))}, of {size(plan.disk_free)} free in {Path.cwd()}"
    memory_of_device = size(plan.device_bytes) if plan.device_bytes is not None else "of unknown size"
    yield "memory", "device", plan.device if "as given" in plan.device else f"{plan.device}, {memory_of_device}"
    verdict = {True: "yes", False: "NO", None: "unknown: give --memory"}[plan.fits()]
    yield "memory", "fits", f"{verdict} (needs {size(plan.peak_bytes)})"
