"""The DeepSpeed engine: the same seam as `SingleDeviceEngine`, with optimizer, gradients and weights dealt to many processes (ZeRO,
arXiv 1910.02054). DeepSpeed is imported here and in deepspeed_check.py, and only when an engine is made.

The loss of a micro-batch is its share of one sum, divided once by the global count of eligible tokens. DeepSpeed divides by the
accumulation steps and averages over the ranks; both are undone by one factor.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.backbone.embedding import add_rows_in_place
from dlmconvert.backbone.head import compile_trunk
from dlmconvert.errors import EXIT_FAILED, UserError
from dlmconvert.training.checkpoint import Checkpoint, CheckpointFolder
from dlmconvert.training.deepspeed_config import MIN_LOSS_SCALE, NO_CLIPPING, with_bucket_for
from dlmconvert.training.engine import enable_gradient_checkpointing, peak_resident_bytes
from dlmconvert.training.nvme import make_checkpoints_whole
from dlmconvert.training.optimizer import clip, make_adamw, set_learning_rate
from dlmconvert.training.saving import host_copy
from dlmconvert.training.zero_gradients import spare_copies

TAG = "deepspeed"  # the folder of DeepSpeed's own files inside a checkpoint
_linear = torch.nn.functional.linear


def load_deepspeed(ranks: Any) -> Any:
    """Import DeepSpeed so that it neither looks for MPI, nor compiles anything, nor talks. Raises UserError when it is not there."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    import torch.distributed as dist

    if not dist.is_initialized():  # one process: no port, no launcher
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger
    except ImportError as error:
        raise UserError("engine.name=deepspeed needs DeepSpeed, which is not installed", str(error), "pip install deepspeed, or set engine.name=single", exit_code=EXIT_FAILED) from error
    logger.setLevel("ERROR")
    # What DeepSpeed asks of torch's older interface, thousands of times.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated")
    if not torch.cuda.is_available():
        # Else a shared-memory kernel is compiled at the first start; gloo does the same without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        # Else the configuration is checked against one process before an engine is there.
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


@contextmanager
def built_in_parts(config: dict[str, Any], ranks: Any) -> Iterator[None]:
    """Under ZeRO-3 a model that is loaded inside is dealt to the ranks tensor by tensor (`zero.Init`): none ever holds all of it."""
    load_deepspeed(ranks)
    if config["zero_optimization"]["stage"] < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(config)  # transformers keeps a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


@contextmanager
def whole_embeddings(model: Any) -> Iterator[None]:
    """Inside, the rows of the embedding can be read although ZeRO-3 has dealt it out: peft copies the mask token's row."""
    weight = model.get_input_embeddings().weight
    if not hasattr(weight, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        yield


def leave_zero_3() -> None:
    """ZeRO-3 puts a linear layer of its own into torch, for good; what this process computes after the training is to use torch's."""
    torch.nn.functional.linear = _linear


def _announce_trained_rows(model: Any) -> None:
    # peft's layer for the mask token's row uses the weights of the layer that it wraps, of which ZeRO-3 would not know.
    import deepspeed

    for layer in model.modules():
        if hasattr(layer, "trainable_tokens_delta"):
            for parameter in (layer.base_layer.weight, *layer.trainable_tokens_delta.values()):
                deepspeed.zero.register_external_parameter(layer, parameter)


class _WrittenLater:
    """In place of DeepSpeed's writer of checkpoint files: copies of what it is given, which `write` puts into the files.

    DeepSpeed's own overlapped writers need a compiled extension and pinned memory; this seam is the one that they use.
    """

    def __init__(self, real: Any):
        self._real = real
        self._files: list[tuple[Any, str]] = []

    def save(self, state_dict: Any, path: str) -> None:
        self._files.append((host_copy(state_dict), path))

    def write(self) -> None:
        for state_dict, path in self._files:
            self._real.save(state_dict, path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class DeepSpeedEngine:
    """ranks: who trains together. config: the merged DeepSpeed JSON (`deepspeed_config`). Collective where it says so."""

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        ranks: Any,
        config: dict[str, Any],
        device: torch.device,
        precision: str,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        gradient_checkpointing: bool = False,
        rates: dict[str, float] | None = None,
        compile: bool = False,
    ):
        deepspeed = load_deepspeed(ranks)
        if precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise UserError(f"engine.precision=fp16: DeepSpeed does not take it on this {device.type}", "", "set engine.precision=bf16 (or engine.name=single)")
        self.ranks, self.precision, self.step = ranks, precision, 0
        self.device = torch.device("cuda", ranks.local_rank) if device.type == "cuda" else device
        self.zero_stage = config["zero_optimization"]["stage"]
        self.module = denoiser.train()
        self.model = denoiser.model
        if gradient_checkpointing:
            enable_gradient_checkpointing(denoiser.model)
        self.parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        self.has_frozen = any(not p.requires_grad for p in denoiser.parameters())
        if self.zero_stage < 3:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
            for parameter in denoiser.parameters():  # DeepSpeed would cast them too, on the device, after all of float32 has come there
                parameter.data = parameter.data.to(self.device, dtype)
            denoiser.to(self.device)
        optimizer = make_adamw(denoiser, betas=betas, eps=eps, weight_decay=weight_decay, rates=rates)
        config = with_bucket_for(config, sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters.values()))
        self._engine, *_ = deepspeed.initialize(model=denoiser, optimizer=optimizer, config=config, dist_init_required=False)
        if self.zero_stage == 3:
            _announce_trained_rows(denoiser)
        if self.zero_stage == 0 and ranks.count == 1:
            self._engine.enable_backward_allreduce = False  # it would copy all gradients to sum them with nobody's
        self._gradients_stay = self.zero_stage == 0 or spare_copies(self._engine, self.zero_stage, ranks.count)  # in `.grad`, until the update
        if self.zero_stage == 3:
            make_checkpoints_whole(self._engine)
        if precision == "fp16":
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # the loop decides when to stop
        self.overflowed = False
        self._accumulation = config["gradient_accumulation_steps"]
        self._clip_norm = None if config["gradient_clipping"] == NO_CLIPPING else config["gradient_clipping"]
        if compile:
            compile_trunk(denoiser.model)
        elif self._gradients_stay:
            add_rows_in_place(denoiser.model)
        self._engine.clip_fp32_gradients = lambda: None  # of stage 0: `update` has done it, by the same norm as all others
        self._backwards = 0
        self.denoiser = self._engine  # called like the Denoiser that it wraps

    def autocast(self):
        return nullcontext()  # bf16 or fp16 is the dtype of the weights; their masters are float32

    def backward(self, loss: torch.Tensor) -> None:
        if self._backwards:
            self._engine.step()  # closes the micro-batch before; only the last one, in `update`, moves weights
        self._engine.backward(loss * (self.ranks.count * self._accumulation))
        self._backwards += 1

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by before the backward pass; None where nothing is (fp16 alone scales)."""
        return float(self._engine.optimizer.loss_scaler.cur_scale) if self.precision == "fp16" else None

    def update(self, learning_rate: float) -> float:
        """Clip, step, clear; as in the single engine. Collective."""
        assert self._backwards == self._accumulation, (self._backwards, self._accumulation)
        self._backwards = 0
        self.step += 1
        scale = self.loss_scale
        set_learning_rate(self._engine.optimizer, learning_rate)
        if self.zero_stage == 0:  # DeepSpeed clips with torch here, and neither tells the norm nor looks at it
            norm = float(clip(self.parameters.values(), self._clip_norm))
            if not math.isfinite(norm):
                self._leave_out()
                return norm
        self._engine.step()
        if self.zero_stage > 0:
            norm = float(self._engine.get_global_grad_norm())
            if norm < 0 or not self._engine.was_step_applied():
                norm = float("inf")
        self.overflowed = scale is not None and scale > MIN_LOSS_SCALE and not math.isfinite(norm)
        return norm

    def _leave_out(self) -> None:
        # Stage 0 would update: everything else that a step does, without it.
        optimizer = self._engine.optimizer
        optimizer.step = lambda *args, **kwargs: None
        try:
            self._engine.step()
        finally:
            del optimizer.step

    def gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Each trained parameter's gradient of the step under way, whole and before clipping (None: it had none). Collective."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.parameters.items():
            whole = parameter.grad if self._gradients_stay else safe_get_full_grad(parameter)
            yield name, None if whole is None else whole.float() / (self.loss_scale or 1.0)

    def trained_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each trained parameter whole, float32, one at a time. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.parameters.items():
            whole = safe_get_full_fp32_param(parameter)
            yield name, (parameter.detach() if whole is None else whole).float()

    def plain(self, build: Callable[[], Denoiser]) -> Denoiser | None:
        """The trained model as an ordinary float32 one on the CPU of rank 0, None elsewhere. Collective.

        build: the untrained model, adapters attached. Its tensors are overwritten one by one: no host holds two copies.
        """
        leave_zero_3()
        result = build() if self.ranks.rank == 0 else None
        targets = dict(result.named_parameters()) if result is not None else {}
        with torch.no_grad():
            for name, whole in self.trained_tensors():
                if result is not None:
                    targets[name].copy_(whole)
        self.ranks.barrier()
        return result

    def capture(self, folder: Path, overlaps: bool) -> Callable[[], None]:
        """What writes this rank's part of a checkpoint into a folder. overlaps: it may run in another thread while training goes on,
        because everything is copied to host memory now. Collective; what it returns is not."""
        real = self._engine.checkpoint_engine
        self._engine.checkpoint_engine = later = _WrittenLater(real) if overlaps else real
        try:
            self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=self.has_frozen)
        finally:
            self._engine.checkpoint_engine = real
        return later.write if overlaps else lambda: None

    def state(self) -> dict[str, Any]:
        """JSON values that a checkpoint holds beside `capture`."""
        return {"processes": self.ranks.count, "zero_stage": self.zero_stage}

    def newest(self, checkpoints: CheckpointFolder) -> Checkpoint | None:
        """The newest whole checkpoint, as rank 0 finds it. Collective."""
        step = self.ranks.share(checkpoints.newest_whole() if self.ranks.rank == 0 else None)
        return None if step is None else self.at(checkpoints, step)

    def at(self, checkpoints: CheckpointFolder, step: int) -> Checkpoint:
        """A whole checkpoint; its tensors stay in its files."""
        return Checkpoint(step, {}, checkpoints.state(step))

    def restore(self, checkpoints: CheckpointFolder, checkpoint: Checkpoint, scratch: Path | None = None) -> None:
        """Weights, optimizer and step of a checkpoint: bit for bit for the same number of processes, through DeepSpeed's universal
        form for another, which is put into `scratch` (default: beside the checkpoints) and taken away again. Collective. Raises UserError
        for a checkpoint of another ZeRO stage."""
        stage, processes = checkpoint.state.get("zero_stage"), checkpoint.state.get("processes")
        folder = checkpoints.path(checkpoint.step)
        if stage != self.zero_stage:
            before = f"engine.zero_stage={stage}" if stage is not None else "engine.name=single"
            raise UserError(f"{folder} was written with {before}, this is engine.zero_stage={self.zero_stage}", "DeepSpeed cannot turn one into the other", f"go on with {before}, or start anew beside it with --fresh")
        if processes == self.ranks.count or self.zero_stage == 0:
            self._load(folder, TAG)
        else:
            universal = (scratch or checkpoints.folder) / ".universal"
            if self.ranks.rank == 0:
                to_universal(folder / TAG, universal / TAG)
            self.ranks.barrier()
            self._load_universal(universal)
            self.ranks.barrier()
            if self.ranks.rank == 0:
                shutil.rmtree(universal)
        self.step = checkpoint.step

    def _load_universal(self, folder: Path) -> None:
        base = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in base.param_groups]
        self._engine._config.load_universal_checkpoint = True
        try:
            self._load(folder, TAG)
        finally:
            self._engine._config.load_universal_checkpoint = False
        # ZeRO-3 gives every group the decay and rate of the first, and all of them one step counter, which each then advances.
        for group, values in zip(base.param_groups, groups, strict=True):
            group.update(values)
        for state in base.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    def _load(self, folder: Path, tag: str) -> None:
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not self.has_frozen)
        assert loaded is not None, folder

    def memory_bytes(self) -> int:
        """Peak memory of this rank's device (CUDA), else the peak resident set of the process."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_resident_bytes()


def to_universal(source: Path, target: Path) -> None:
    """DeepSpeed's files, whatever number of processes wrote them, in the form that any number can read."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    words = ["--inject_missing_state", "--input_folder", source, "--output_folder", target, "--num_extract_workers", 1, "--num_merge_workers", 1]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *map(str, words)], capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{source.parent} could not be made ready for another number of processes", last, "continue with the number of processes that wrote it", exit_code=EXIT_FAILED)


def checkpoint_tensors(folder: Path, zero_stage: int) -> dict[str, torch.Tensor]:
    """{name: whole float32 parameter} of a checkpoint folder, without starting an engine. Needs memory for all of them."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
    if zero_stage == 0:
        return torch.load(folder / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it talks, and draws bars
        return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
