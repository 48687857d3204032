"""Where forward, backward and update happen. The loop knows this seam and nothing behind it.

An engine has: `denoiser`, `step` (steps done, left-out ones among them), `backward(loss)`, `update(learning_rate) -> gradient norm`,
`overflowed` and `loss_scale` (fp16), `autocast()`, `device`, `ranks` (who trains together, see ranks.py), `capture`, `state`, `newest`
and `restore` (checkpoints), `gradients()` (of the step under way), `plain(build)` (the trained model, whole).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.backbone.embedding import add_rows_in_place
from dlmconvert.backbone.head import compile_trunk
from dlmconvert.training.checkpoint import Checkpoint, CheckpointFolder, write_tensors
from dlmconvert.training.deepspeed_config import INITIAL_LOSS_SCALE, LOSS_SCALE_WINDOW, MIN_LOSS_SCALE
from dlmconvert.training.optimizer import clip, make_adamw, set_learning_rate
from dlmconvert.training.ranks import Solo


class SingleDeviceEngine:
    """One CPU, CUDA or Apple device. Weights and optimizer are float32; `bf16` and `fp16` run forward and backward under autocast,
    `fp16` with dynamic loss scaling (arXiv 1710.03740).

    compile: torch.compile the model but its head (`backbone.head.compile_trunk`).
    rates: see `make_adamw`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        device: torch.device,
        precision: str,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip_norm: float | None,
        gradient_checkpointing: bool = False,
        rates: dict[str, float] | None = None,
        compile: bool = False,
    ):
        self.ranks = Solo()
        self.device = device
        self.denoiser = denoiser.to(device).train()
        self.model = denoiser.model
        self.precision = precision
        self.clip_norm = clip_norm
        self.step = 0
        if gradient_checkpointing:
            enable_gradient_checkpointing(denoiser.model)
        self.optimizer = make_adamw(denoiser, betas=betas, eps=eps, weight_decay=weight_decay, rates=rates)
        self.parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        scales = {"init_scale": INITIAL_LOSS_SCALE, "growth_interval": LOSS_SCALE_WINDOW}
        self._scaler = torch.amp.GradScaler(device.type, **scales) if precision == "fp16" else None
        self.overflowed = False
        if compile:
            compile_trunk(denoiser.model)
        else:
            add_rows_in_place(denoiser.model)

    def autocast(self):
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16 if self.precision == "bf16" else torch.float16)

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by before the backward pass; None where nothing is (fp16 alone scales)."""
        return None if self._scaler is None else self._scaler.get_scale()

    def backward(self, loss: torch.Tensor) -> None:
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def update(self, learning_rate: float) -> float:
        """Clip, step, clear. Returns the global gradient norm before clipping; a non-finite one updates nothing.

        `overflowed` then says whether only the loss scale was too high, which is halved. `step` counts the step in every case: the
        schedule and the rows go by it, AdamW's own counter by updates.
        """
        scale = self.loss_scale
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        norm = float(clip(self.parameters.values(), self.clip_norm))
        is_finite = math.isfinite(norm)
        self.overflowed = scale is not None and scale > MIN_LOSS_SCALE and not is_finite
        if is_finite:
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
        if self._scaler is not None:
            self._scaler.update()
        self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Each trained parameter's gradient of the step under way, before clipping (None: it had none)."""
        for name, parameter in self.parameters.items():
            yield name, None if parameter.grad is None else parameter.grad / (self.loss_scale or 1.0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Trainable parameters and optimizer moments, by name."""
        result = {f"parameter/{name}": p.data for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                result[f"optimizer/{key}/{name}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
        return result

    def load_tensors(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """The inverse of `tensors`, bit for bit."""
        self.step = step
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for full_name, value in tensors.items():
            kind, _, name = full_name.partition("/")
            if kind == "parameter":
                self.parameters[name].data.copy_(value)
            else:
                key, _, name = name.partition("/")
                moments.setdefault(name, {})[key] = value
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        saved = self.optimizer.state_dict()
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        saved["state"] = {index: moments[names[id(p)]] for index, p in enumerate(order) if names[id(p)] in moments}
        self.optimizer.load_state_dict(saved)

    def capture(self, folder: Path, overlaps: bool) -> Callable[[], None]:
        """What writes this process's part of a checkpoint into a folder. overlaps: it may run in another thread while training goes
        on, because everything is copied to host memory now."""
        tensors = self.tensors()
        if overlaps:
            tensors = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        return lambda: write_tensors(folder, tensors)

    def state(self) -> dict[str, Any]:
        """JSON values that a checkpoint holds beside `capture`."""
        return {} if self._scaler is None else {"loss_scaler": self._scaler.state_dict()}

    def newest(self, checkpoints: CheckpointFolder) -> Checkpoint | None:
        return checkpoints.load_newest()

    def at(self, checkpoints: CheckpointFolder, step: int) -> Checkpoint:
        return checkpoints.load(step)

    def restore(self, checkpoints: CheckpointFolder, checkpoint: Checkpoint, scratch: Path | None = None) -> None:
        """Weights, optimizer, loss scale and step of a checkpoint, bit for bit."""
        self.load_tensors(checkpoint.tensors, checkpoint.step)
        if self._scaler is not None:
            self._scaler.load_state_dict(checkpoint.state["loss_scaler"])

    def plain(self, build: Callable[[], Denoiser]) -> Denoiser:
        """The trained model as an ordinary float32 one; here it is one already."""
        return self.denoiser

    def memory_bytes(self) -> int:
        """Peak device memory (CUDA), else the peak resident set of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident_bytes()


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass."""
    # Called gradient_checkpointing_enable before transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # else nothing would flow back through frozen embeddings (LoRA)


def seed_dropout(device: torch.device, seed: int) -> None:
    """torch's own generators of the CPU and of this device. On a CPU not through `torch.manual_seed`, which also leaves a note, with the
    whole call stack, for each kind of accelerator that is not there: a percent or two of a small model's step."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def peak_resident_bytes() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def batch_to(device: torch.device, *tensors: Any) -> tuple[Any, ...]:
    return tuple(t.to(device, non_blocking=True) if isinstance(t, torch.Tensor) else t for t in tensors)
