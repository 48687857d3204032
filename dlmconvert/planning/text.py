"""A plan in words: rows of (section, name, value), the table of settings, and what to type next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dlmconvert.planning.gpus import USABLE_SHARE
from dlmconvert.recipe.load import flat
from dlmconvert.recipe.schema import Recipe

if TYPE_CHECKING:
    from dlmconvert.planning.machine import Machine
    from dlmconvert.planning.plan import Plan, StagePlan

COLUMNS = 4  # micro-batches side by side in the table of settings
CHECKED = (
    "a formula of the shapes: within 5 percent of traced allocations of small models on the CPU in one process, within 15 percent under ZeRO 0 to 3 "
    "at 1 and 2 processes (docs/planning.md); not compared with a GPU yet"
)


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


def advice(plan: Plan, recipe: Recipe) -> Iterator[str]:
    """What to type next where the recipe's own settings do not fit."""
    if plan.fits() is not False:
        return
    if all(stage.recommended is not None for stage in plan.stages):
        yield f"it fits with {' '.join(plan.words)}"
        host = plan.machine.processes_a_node * max(stage.recommended.memory.host_bytes for stage in plan.stages if stage.recommended is not None)
        if host and plan.machine.host_bytes is None:
            yield f"that needs {size(host)} of host memory a node"
        if recipe.method.objective.normaliser == "masked_micro_batch":
            yield "objective.normaliser=masked_micro_batch makes the loss depend on micro_batch, which was left as it is; with eligible it may be changed"
        return
    for stage in plan.stages:
        if stage.fits or any(option.fits for option in stage.options):
            continue
        smallest = min((option.memory for option in stage.options), key=lambda memory: memory.peak_bytes)
        yield f"{stage.name}: no setting fits; the smallest takes {size(smallest.peak_bytes)}, weights, gradients and optimizer alone are {size(_states(stage))} as the recipe has it"
        key = "train" if stage.name == "adapt" else stage.name
        if getattr(recipe, key).lora is None:
            yield f"{key}.lora={{rank: 16}} trains adapters: only their gradients and moments are kept (weights {size(stage.memory.weights)})"
        if plan.machine.kind == "cuda":
            yield "more --processes divide weights, gradients and optimizer among them (ZeRO-3)"
        else:
            yield "--processes N --gpu NAME plans for several GPUs, which divide them (ZeRO)"


def _states(stage: StagePlan) -> int:
    memory = stage.memory
    return memory.weights + memory.gradients + memory.optimizer


def settings_rows(stage: StagePlan, machine: Machine) -> tuple[list[str], list[list[str]], str]:
    """(heads, rows, unit): a row an engine, offloading and checkpointing, the peaks of one process under micro-batches of so many rows; a
    star where it fits, the recommended in brackets."""
    known = sorted({option.micro_batch for option in stage.options})
    largest = max((option.micro_batch for option in stage.options if option.fits), default=known[0])
    # Up to the first one beyond what fits anywhere; the recipe's own and the recommended one in any case.
    chosen = {stage.micro_batch} | ({stage.recommended.micro_batch} if stage.recommended is not None else set())
    others = [micro_batch for micro_batch in known if micro_batch <= 2 * largest and micro_batch not in chosen]
    shown = sorted(chosen | set(others[len(chosen) - COLUMNS :]))
    unit, factor = ("GB", 1e9) if stage.memory.peak_bytes >= 1e9 else ("MB", 1e6)

    def number(num_bytes: float) -> str:
        value = num_bytes / factor
        return "-" if not num_bytes else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    heads = ["engine", "offload", "ckpt", "weights", "grads", "AdamW", "host", *map(str, shown)]
    rows: dict[tuple[object, bool], list[str]] = {}
    for option in stage.options:
        if machine.processes == 1 and option.engine.name != "single" and option.engine.offload == "none" and option != stage.recommended and option.engine != stage.setting:
            continue  # one process has nobody to deal anything to
        memory, setting = option.memory, option.engine
        row = rows.setdefault(
            (setting, option.gradient_checkpointing),
            [
                "single" if setting.name == "single" else f"ZeRO-{setting.stage}", {"none": "-", "optimizer": "AdamW"}.get(setting.offload, setting.offload), "yes" if option.gradient_checkpointing else "no",
                number(memory.weights), number(memory.gradients), number(memory.optimizer), number(memory.host_bytes),
            ],
        )  # fmt: skip
        if option.micro_batch in shown:
            cell = number(memory.peak_bytes) + ("*" if option.fits else "")
            row.append(f"[{cell}]" if option == stage.recommended else cell)
    return heads, list(rows.values()), unit


def plan_rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    shape, machine = plan.architecture, plan.machine
    defaults = flat(Recipe.model_construct().model_dump(mode="json"))
    for key, value in flat(plan.resolved).items():
        unused = key == "source.scratch" or (key.startswith("sft.") and "sft" not in plan.resolved["stages"])
        if value != defaults.get(key) and not unused:
            yield "recipe", key, f"{value:g}" if isinstance(value, float) else json.dumps(value)
    yield "model", "shapes from", plan.config_from
    yield "model", "parameters", f"{count(shape.num_parameters)} ({shape.family}, {shape.num_layers} layers, {shape.vocab_size:,} rows{', tied' if shape.is_tied else ''})"
    yield "data", "unique tokens", f"{count(plan.unique_tokens)} ({plan.unique_tokens_from})" if plan.unique_tokens else f"unknown ({plan.unique_tokens_from})"
    if plan.budget is not None:
        bound = "at least " if plan.unique_tokens_from.startswith("at most") else ""
        yield "data", "epochs", f"{bound}{plan.budget.epochs:.2g}"
        for kind, sentence in plan.budget.sentences:
            yield "data", kind, sentence
    for stage in plan.stages:
        yield from _stage_rows(stage, shape.num_parameters)
    yield from _time_rows(plan)
    for name, value in plan.disk.items():
        yield "disk", name, size(value) if value else "unknown"
    here = "" if machine.is_given else f", of {size(plan.disk_free)} free in the current folder's file system"
    yield "disk", "total", f"{size(sum(plan.disk.values()))}{here}"
    memory = size(machine.memory_bytes) if machine.memory_bytes is not None else "of unknown size"
    yield "memory", "device", machine.name if machine.is_given else f"{machine.name}, {memory}{' a process' if machine.processes > 1 else ''}"
    if machine.processes > 1:
        where = f"on {machine.nodes} nodes" if machine.nodes > 1 else "on one node"
        yield "memory", "processes", f"{machine.processes} {where}"
    if machine.usable_bytes is not None and machine.usable_bytes != machine.memory_bytes:
        yield "memory", "usable", f"{size(machine.usable_bytes)}: {1 - USABLE_SHARE:.0%} is kept for CUDA, NCCL and fragmentation"
    if plan.host_bytes:
        yield "memory", "host", f"{size(plan.host_bytes)} a node for what is offloaded (with nvme: on that disk)"
    if plan.saving_bytes:
        yield "memory", "while saving", f"{size(plan.saving_bytes)} of host memory a node: a checkpoint is written beside the training (overlap_saving)"
    if plan.stages and machine.processes > 1:
        yield "memory", "at the end", f"{size(4 * shape.num_parameters)} of host memory where rank 0 is: the float32 model is put together there"
    verdict = {True: "yes", False: "NO", None: "unknown: give --gpu or --memory"}[plan.fits()]
    yield "memory", "fits", f"{verdict} (needs {size(plan.peak_bytes)})"
    if any(stage.recommended is not None for stage in plan.stages):
        words = " ".join(plan.words) or "as the recipe has it"
        seconds = [stage.recommended_seconds for stage in plan.stages if stage.recommended_seconds is not None]
        yield "memory", "recommended", words + (f" ({span(sum(seconds))})" if seconds and plan.words else "")
    yield "memory", "how exact", CHECKED


def _stage_rows(stage: StagePlan, num_parameters: int) -> Iterator[tuple[str, str, str]]:
    memory, name = stage.memory, stage.name
    trained = f"{count(stage.num_trainable)}"
    if stage.num_trainable < num_parameters:
        trained += f" ({stage.num_trainable / num_parameters:.2%} of the model)"
    yield name, "trainable", trained
    yield name, "steps", f"{stage.steps:,} x {stage.rows_per_step:,} rows x {stage.row_length:,} tokens"
    yield name, "tokens", f"{count(stage.tokens_per_step)} a step, {count(stage.tokens)} in all"
    yield name, "planned as", f"{stage.setting.label}, micro-batch {stage.micro_batch}, {'with' if memory.gradient_checkpointing else 'without'} gradient checkpointing, a process:"
    yield name, "weights", size(memory.weights) + (f", and half-precision casts {size(memory.casts)}" if memory.casts else "")
    yield name, "gradients", size(memory.gradients)
    yield name, "optimizer", size(memory.optimizer) + (" (AdamW moments and float32 weights)" if stage.setting.name == "deepspeed" and stage.setting.stage else " (AdamW moments)")
    yield name, "activations", f"{size(memory.activations)}; with gradient checkpointing {size(memory.activations_checkpointed)}"
    yield name, "logits, loss", f"{size(memory.logits)}, and {size(memory.head)} for the output matrix (all positions masked)"
    yield name, "buffers", size(memory.buffers)
    if memory.host_bytes:
        yield name, "host", size(memory.host_bytes)
    yield name, "peak memory", f"{size(memory.peak_bytes)} ({memory.at})"
    other = stage.peak_without_checkpointing if memory.gradient_checkpointing else stage.peak_with_checkpointing
    yield name, "", f"{size(other)} {'without' if memory.gradient_checkpointing else 'with'} gradient checkpointing"
    again = f", and {stage.recomputed_flops:.2e} recomputed" if stage.recomputed_flops else ""
    yield name, "arithmetic", f"{stage.flops:.2e} FLOPs{again}"
    yield name, "time (estimate)", span(stage.seconds) if stage.seconds is not None else "unknown: give --gpu, or --tflops"


def _time_rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    if plan.seconds is None or plan.gpu_hours is None:
        return
    processes = plan.machine.processes
    yield "time", "speed", plan.speed.said
    where = "one device" if processes == 1 else f"{processes} devices (no time lost between them)"
    yield "time", "training", f"{span(plan.seconds)} on {where}: an estimate, not a measurement"
    unit = "GPU hours" if plan.machine.kind == "cuda" else "device hours"
    yield "time", unit, f"{plan.gpu_hours:,.0f}" if plan.gpu_hours >= 10 else f"{plan.gpu_hours:.2g}"
    if plan.cost is not None:
        yield "time", "cost", f"{plan.cost:,.0f} at {plan.price:g} a {unit[:-1]}" if plan.cost >= 10 else f"{plan.cost:.2g} at {plan.price:g} a {unit[:-1]}"
