"""Where forward, backward and update happen. The loop knows this seam and nothing behind it.

An engine has: `denoiser`, `step` (updates done), `backward(loss)`, `update(learning_rate) -> gradient norm`, `autocast()`, `device`,
`ranks` (who trains together, see ranks.py), `save`, `newest` and `restore` (checkpoints), `plain(build)` (the trained model, whole).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.training.checkpoint import Checkpoint, CheckpointFolder
from dlmconvert.training.optimizer import make_adamw, set_learning_rate
from dlmconvert.training.ranks import Solo


class SingleDeviceEngine:
    """One CPU, CUDA or Apple device. Weights and optimizer are float32; `bf16` runs forward and backward under autocast.

    compile: torch.compile the model's forward (the mask and the number of targets vary, so shapes are dynamic).
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
        self.precision = precision
        self.clip_norm = clip_norm
        self.step = 0
        if gradient_checkpointing:
            enable_gradient_checkpointing(denoiser.model)
        self.optimizer = make_adamw(denoiser, betas=betas, eps=eps, weight_decay=weight_decay, rates=rates)
        self.parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        if compile:
            denoiser.model.compile(dynamic=True)

    def autocast(self):
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self, learning_rate: float) -> float:
        """Clip, step, clear. Returns the global gradient norm before clipping; a non-finite one updates nothing."""
        parameters = list(self.parameters.values())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm if self.clip_norm is not None else float("inf")))
        if norm == norm and norm != float("inf"):
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
            self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm

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

    def save(self, checkpoints: CheckpointFolder, step: int, state: dict[str, Any]) -> None:
        checkpoints.save(Checkpoint(step, self.tensors(), state))

    def newest(self, checkpoints: CheckpointFolder) -> Checkpoint | None:
        return checkpoints.load_newest()

    def restore(self, checkpoints: CheckpointFolder, checkpoint: Checkpoint) -> None:
        self.load_tensors(checkpoint.tensors, checkpoint.step)

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


def peak_resident_bytes() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def batch_to(device: torch.device, *tensors: Any) -> tuple[Any, ...]:
    return tuple(t.to(device, non_blocking=True) if isinstance(t, torch.Tensor) else t for t in tensors)
