"""How a stage is optimised, and where and in which precision it runs. The docstring below a field is what users read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dlmconvert.recipe.section import SAFE, Beta, Positive, Section


class Lora(Section):
    """Low-rank adapters (peft) instead of full-parameter training."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale of the adapters; the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"
    """Module names, or `all-linear`: every linear layer but the output head."""
    gated: bool = False
    """Adapters act on masks only: on text without masks the model stays the source, bit for bit (arXiv 2604.11035). They stay beside the weights, also in an export, and cannot be merged."""


class Rates(Section):
    """Learning rate of each kind of parameter, as a multiple of `learning_rate`: 0 freezes it. Norms keep 1."""

    attention: Annotated[float, Field(ge=0)] = 1.0
    mlp: Annotated[float, Field(ge=0)] = 1.0
    """All other parts of a layer, experts and routers among them."""
    embeddings: Annotated[float, Field(ge=0)] = 1.0
    """With the mask token's row; frozen, that row stays as `source.mask_init` made it."""
    head: Annotated[float, Field(ge=0)] = 1.0
    """The output matrix. Where it is tied to the embeddings, give both one value."""


class Optimization(Section):
    """One stage of training."""

    steps: Positive = 1000
    """Optimizer steps."""
    rows_per_step: Positive = 16
    """Rows in the global batch."""
    micro_batch: Positive = Field(default=8)
    """Rows in one forward and backward; the rest of the global batch is accumulated."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After warm-up: cosine to `final_learning_rate`, constant, or constant and then linear decay over the last `decay_fraction` (warm-up, stable, decay)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the last step of `cosine` and `wsd`."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the steps that `wsd` decays over."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled (AdamW), on matrices only: biases, norms and embeddings are left alone."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm."""
    rates: Rates = Rates()
    lora: Lora | None = None
    """Train adapters; empty: all parameters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = 0
    """Order of the rows, noise, attention pairs."""
    save_steps: Positive = Field(default=500, json_schema_extra=SAFE)
    """Optimizer steps between checkpoints."""
    save_minutes: Annotated[float, Field(gt=0)] | None = Field(default=30.0, json_schema_extra=SAFE)
    """Minutes between checkpoints, whichever comes first."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(default=2, json_schema_extra=SAFE)
    """Newest checkpoints that are kept."""
    overlap_saving: bool | None = Field(default=None, json_schema_extra=SAFE)
    """Copy what a checkpoint holds to host memory and write it while training goes on: as much more host memory as the weights and the optimizer (this process's part) take. Empty: on GPUs, unless the optimizer is offloaded."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = Field(default=3, json_schema_extra=SAFE)
    """Steps in a row whose loss or gradient is not finite that are left out (no update) before the run stops."""
    log_steps: Positive = Field(default=10, json_schema_extra=SAFE)
    """Optimizer steps between lines of metrics.jsonl."""
    validate_steps: Positive | None = Field(default=None, json_schema_extra=SAFE)
    """Optimizer steps between validation NELBOs (fixed noise). Empty: at the end only."""


class Engine(Section):
    """Where and in which precision the training runs."""

    name: Literal["single", "deepspeed"] = "single"
    """`single`: one device, no DeepSpeed. `deepspeed`: ZeRO, on one process or many (`--processes` switches to it)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """`bf16`: forward and backward in bfloat16, optimizer and master weights in float32 (single: autocast; deepspeed: bfloat16 copies of the weights). `fp16`: the same in float16 with dynamic loss scaling, for GPUs without bfloat16."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed deals to the processes: 0 nothing, 1 the optimizer, 2 gradients as well, 3 weights as well. bf16 and fp16 with stage 0 run as stage 1."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where DeepSpeed keeps the optimizer when not on the GPU: `cpu` from stage 1 on, `nvme` under stage 3."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO-3 keeps weights that are not in use."""
    nvme: str | None = None
    """Folder on a fast local disk for `nvme`."""
    deepspeed: dict[str, Any] = {}
    """More keys for the DeepSpeed JSON, which is derived from the recipe; a key that contradicts the recipe is an error."""
    compile: bool = False
    """torch.compile the model's forward, but for the head; not under ZeRO-3, which works around each module in Python."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(default=None, json_schema_extra=SAFE)
    """Highest TFLOP/s of one device in `precision`, for the model FLOP/s utilisation in metrics.jsonl. Empty: of known GPUs their dense number, else a matrix product is timed."""
    threads: Positive | None = Field(default=None, json_schema_extra=SAFE)
    """CPU threads. Empty: torch's own choice."""


def engine_contradictions(engine: Engine):
    """Of the engine: sentences that begin with the key."""
    if engine.offload_optimizer != "none" and engine.zero_stage == 0:
        yield f"engine.offload_optimizer={engine.offload_optimizer} needs engine.zero_stage=1 or more (nvme: 3)"
    if engine.offload_optimizer == "nvme" and engine.zero_stage in (1, 2):
        yield f"engine.offload_optimizer=nvme needs engine.zero_stage=3, not {engine.zero_stage}: set zero_stage=3, or offload to cpu"
    if engine.offload_parameters != "none" and engine.zero_stage != 3:
        yield f"engine.offload_parameters={engine.offload_parameters} needs engine.zero_stage=3, not {engine.zero_stage}"
    if "nvme" in (engine.offload_optimizer, engine.offload_parameters) and engine.nvme is None:
        yield "offloading to nvme needs a folder on a fast local disk: set engine.nvme"
    if engine.name == "deepspeed" and engine.zero_stage == 3 and engine.compile:
        yield "engine.compile=true: ZeRO-3 gathers weights around each module, in Python, which cannot be compiled; leave it out, or set engine.zero_stage=2"
    if engine.name == "deepspeed" and engine.device == "mps":
        yield "engine.name=deepspeed runs on cuda or cpu, not on engine.device=mps"
