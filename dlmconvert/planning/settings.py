"""Every setting of one stage on one machine: what it takes, whether it fits, and the one that is recommended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dlmconvert.planning.architecture import Architecture
from dlmconvert.planning.machine import Machine
from dlmconvert.planning.memory import Memory, memory_of
from dlmconvert.planning.time import Work, row_work
from dlmconvert.planning.zero import Zero
from dlmconvert.recipe.optimization import Engine
from dlmconvert.training.deepspeed_config import effective_stage

# What orders the settings that fit: how much longer a step takes, roughly. Sizes of the effects, not measurements of this machine.
OFFLOAD_COST = {"none": 1.0, "optimizer": 1.3, "parameters": 1.4, "all": 1.6}  # transfers to the host, and AdamW on its cores
STAGE_COST = {0: 1.0, 1: 1.0, 2: 1.01, 3: 1.1}  # ZeRO-3 moves 1.5 times the bytes (arXiv 1910.02054)
KEEPING = 0.95
SMALL_BATCH_TOKENS = 512  # a forward of so many tokens runs at half of the speed of a large one


@dataclass(frozen=True)
class EngineSetting:
    """name: `single` or `deepspeed`. offload: as in `Zero`; to where is the recipe's choice (`cpu` when it has none)."""

    name: str = "single"
    stage: int = 0
    offload: str = "none"

    def zero(self, processes: int, keys: Mapping[str, Any]) -> Zero | None:
        return None if self.name == "single" else Zero(self.stage, processes, self.offload, keys)

    @property
    def label(self) -> str:
        if self.name == "single":
            return "single"
        return f"ZeRO-{self.stage}" + {"none": "", "optimizer": ", optimizer offloaded", "parameters": ", weights offloaded", "all": ", all offloaded"}[self.offload]

    def words(self, engine: Engine, processes: int) -> list[str]:
        """The recipe's keys that have to be typed for it; several processes mean DeepSpeed without being told."""
        words = []
        if self.name != engine.name and not (self.name == "deepspeed" and processes > 1):
            words.append(f"engine.name={self.name}")
        if self.name == "single":
            return words
        if self.stage != effective_stage(engine.zero_stage, engine.precision):
            words.append(f"engine.zero_stage={self.stage}")
        for key, moved in (("offload_optimizer", ("optimizer", "all")), ("offload_parameters", ("parameters", "all"))):
            now = getattr(engine, key)
            if (self.offload in moved) != (now != "none"):
                words.append(f"engine.{key}={'cpu' if self.offload in moved else 'none'}")
        return words


@dataclass(frozen=True)
class Option:
    """One way to train a stage. fits: None where a size is unknown. cost: time of a step relative to the best thinkable."""

    engine: EngineSetting
    micro_batch: int
    gradient_checkpointing: bool
    memory: Memory
    fits: bool | None
    cost: float


def setting_of(engine: Engine, processes: int) -> EngineSetting:
    """What the recipe asks for, typed as it is."""
    if engine.name == "single" and processes == 1:
        return EngineSetting()
    moved = (engine.offload_optimizer != "none", engine.offload_parameters != "none")
    offload = {(False, False): "none", (True, False): "optimizer", (False, True): "parameters", (True, True): "all"}[moved]
    return EngineSetting("deepspeed", effective_stage(engine.zero_stage, engine.precision), offload)


def engine_settings(engine: Engine, processes: int, kind: str) -> list[EngineSetting]:
    """All of them; on one process the single engine first. Offloading from a CPU would move nothing."""
    found = [] if processes > 1 else [EngineSetting()]
    stages = sorted({effective_stage(stage, engine.precision) for stage in range(4)})
    found += [EngineSetting("deepspeed", stage) for stage in stages]
    found += [EngineSetting("deepspeed", stage, "optimizer") for stage in stages if stage > 0]
    found.append(EngineSetting("deepspeed", 3, "all"))
    if kind == "mps":
        return [setting for setting in found if setting.name == "single"]
    return found if kind == "cuda" else [setting for setting in found if setting.offload == "none"]


def micro_batches(share: int, asked: int, is_fixed: bool) -> list[int]:
    """Powers of two up to the rows of one process, and what the recipe asks for. is_fixed: only that."""
    asked = min(asked, share)
    if is_fixed:
        return [asked]
    return sorted({asked, *(2**power for power in range(share.bit_length()) if 2**power <= share)})


@dataclass(frozen=True)
class StageShape:
    """What of a stage decides its memory and its arithmetic, besides the setting. share: rows of one process in one step. target_share: of
    the tokens of a row, those that are predicted in a step (above 1 where the clean copy is scored as well). edits: the share of the
    steps that train on edits, in a second forward. teacher: as in `memory_of`."""

    shape: Architecture
    share: int
    row_length: int
    streams: int
    precision: str
    causal: bool
    has_mask: bool
    isolated: bool
    target_share: float
    edits: float = 0.0
    teacher: str = "none"

    def work(self, checkpointing: bool) -> Work:
        """Of one row."""
        return row_work(
            self.shape, self.row_length, causal=self.causal, streams=self.streams, target_share=self.target_share, edits=self.edits,
            has_teacher=self.teacher != "none", gradient_checkpointing=checkpointing,
        )  # fmt: skip

    def option(self, setting: EngineSetting, micro_batch: int, checkpointing: bool, machine: Machine, keys: Mapping[str, Any]) -> Option:
        micro_batch = min(micro_batch, self.share)
        memory = memory_of(
            self.shape, micro_batch=micro_batch, row_length=self.row_length, accumulates=self.share > micro_batch, precision=self.precision,
            gradient_checkpointing=checkpointing, has_mask=self.has_mask, masked_rows=micro_batch if self.isolated else 1, streams=self.streams,
            targets_per_token=2 if self.target_share > 1 else 1, passes=2 if self.edits else 1, teacher=self.teacher, device=machine.kind, zero=setting.zero(machine.processes, keys),
        )  # fmt: skip
        work = self.work(checkpointing)
        cost = work.total / work.model * STAGE_COST[setting.stage] * OFFLOAD_COST[setting.offload]
        cost *= 1 + SMALL_BATCH_TOKENS / (micro_batch * self.row_length * self.streams)
        return Option(setting, micro_batch, checkpointing, memory, fits(memory, machine), cost)

    def options(self, engine: Engine, asked: int, machine: Machine, keys: Mapping[str, Any], is_fixed: bool) -> Iterator[Option]:
        for setting in engine_settings(engine, machine.processes, machine.kind):
            for checkpointing in (False, True):
                for micro_batch in micro_batches(self.share, asked, is_fixed):
                    yield self.option(setting, micro_batch, checkpointing, machine, keys)


def fits(memory: Memory, machine: Machine) -> bool | None:
    """On the device, and what is offloaded into the memory of the node. On a CPU both are the same memory."""
    if machine.usable_bytes is None:
        return None
    if machine.kind != "cuda":
        return memory.peak_bytes + memory.host_bytes <= machine.usable_bytes
    on_host = machine.host_bytes is None or machine.processes_a_node * memory.host_bytes <= machine.host_bytes
    return memory.peak_bytes <= machine.usable_bytes and on_host


def recommended(stages: Mapping[str, list[Option]], asked: EngineSetting) -> dict[str, Option] | None:
    """Of each stage the cheapest option that fits, all under one engine setting; None when no setting carries every stage. asked: the
    recipe's engine setting, which is left for another only where that one is clearly cheaper."""
    best: dict[str, Option] | None = None
    cost = float("inf")
    for setting in dict.fromkeys(option.engine for options in stages.values() for option in options):
        found = {
            name: min((o for o in options if o.engine == setting and o.fits), key=lambda o: (o.cost, -o.micro_batch), default=None) for name, options in stages.items()
        }
        if any(option is None for option in found.values()):
            continue
        whole = {name: option for name, option in found.items() if option is not None}
        together = sum(option.cost for option in whole.values()) * (KEEPING if setting == asked else 1.0)
        if together < cost:
            best, cost = whole, together
    return best
