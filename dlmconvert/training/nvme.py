"""Checkpoints of an optimizer or of weights that lie on NVMe (`engine.offload_optimizer=nvme`, `engine.offload_parameters=nvme`).

DeepSpeed 0.19 copies the optimizer's swap files into a checkpoint and back, and nothing else: what is too small for NVMe, AdamW's step
counters and the weights stay those of a fresh model, so that a resumed run silently trains on something else. Here the files of a
checkpoint are whole, as without offloading, and are read back part by part: bit for bit, and through the universal form on another
number of processes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_STATES = "optimizer_state_dict", "fp32_flat_groups"  # DeepSpeed's keys: moments, masters


def make_checkpoints_whole(engine: Any) -> None:
    """engine: DeepSpeed's, under ZeRO-3; nothing happens unless something lies on NVMe. Replaces methods of it and of its optimizer only."""
    optimizer = engine.optimizer
    if not optimizer.swap_optimizer and not optimizer.params_in_nvme_and_cpu:
        return
    whole, parts = type(optimizer)._rigid_state_dict, len(optimizer.fp16_groups)
    # The moments are numbered group after group, which is the order of the parts only where there is one group.
    order = sorted(range(parts), key=lambda part: optimizer.sub_group_to_group_id[part])

    def state_dict() -> dict[str, Any]:
        found = whole(optimizer)
        moments, masters = dict(found[_STATES[0]]["state"]), []
        for part in range(parts):
            with _swapped_in(optimizer, part) as is_swapped:
                master = optimizer.fp32_partitioned_groups_flat[part]
                place = Path(optimizer.optimizer_swapper.swap_folder) if is_swapped else None
                masters.append(_copy(master.detach(), place))
                moments[order.index(part)] = {key: _copy(value, place) for key, value in optimizer.optimizer.state[master].items()}
        return found | {_STATES[0]: found[_STATES[0]] | {"state": moments}, _STATES[1]: masters}

    def load(found: dict[str, Any], load_optimizer_states: bool = True) -> None:
        optimizer.loss_scaler, optimizer.dynamic_loss_scale, optimizer.overflow = found["loss_scaler"], found["dynamic_loss_scale"], found["overflow"]
        for group, values in zip(optimizer.optimizer.param_groups, found[_STATES[0]]["param_groups"], strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})
        moments, masters = found[_STATES[0]]["state"], found[_STATES[1]]
        _take_up(optimizer, (({"fp32": masters[part]} | moments[order.index(part)]) for part in range(parts)))

    def load_universal(folder: str) -> None:
        folder = os.path.join(folder, "zero")
        common = torch.load(os.path.join(folder, "optimizer_state.pt"), weights_only=False)
        optimizer._load_global_state_stage3(common)
        step = common[_STATES[0]]["state"][0]["step"]

        def flat(part: int, key: str) -> torch.Tensor:
            names = optimizer.param_names
            return torch.cat([optimizer.load_hp_checkpoint_state(os.path.join(folder, names[p]), key, param=p).reshape(-1) for p in optimizer.fp16_groups[part]])

        _take_up(optimizer, ({"step": step.clone()} | {key: flat(part, key) for key in ("fp32", "exp_avg", "exp_avg_sq")} for part in range(parts)))

    engine.zero_nvme_offload_optimizer = lambda: False  # so that DeepSpeed reads and writes what it does elsewhere
    optimizer._rigid_state_dict = state_dict
    optimizer._rigid_load_state_dict = load
    optimizer.load_hp_checkpoint_state_from_checkpoint_dir_stage3 = load_universal


@contextmanager
def _swapped_in(optimizer: Any, part: int) -> Iterator[bool]:
    """Inside, masters and moments of a part are in memory; what is done to them reaches the disk. Gives whether it lies there."""
    is_swapped = optimizer._swappable_optimizer_subgroup(part)
    if is_swapped:
        optimizer._optimizer_states_and_gradient_swap_in(part)
    yield is_swapped
    if is_swapped:
        optimizer._optimizer_states_and_gradient_swap_out(part)


def _take_up(optimizer: Any, saved: Iterator[dict[str, Any]]) -> None:
    """Masters, moments and weights of every part. saved: of a part, `fp32` and what AdamW keeps."""
    if optimizer.swap_optimizer:
        optimizer.optimizer_swapper.purge_state()
    optimizer._partition_all_parameters()
    for part, values in enumerate(saved):
        with _swapped_in(optimizer, part):
            master = optimizer.fp32_partitioned_groups_flat[part]
            master.data.copy_(values.pop("fp32").reshape(-1)[: master.numel()])
            optimizer.optimizer.state[master] = {
                key: value.to(master.device).clone() if isinstance(value, torch.Tensor) and value.numel() > 1 else value for key, value in values.items()
            }
            optimizer._reassign_or_swap_out_partitioned_parameters(part)
    optimizer._post_step(set())


def _copy(value: Any, place: Path | None) -> Any:
    """A tensor as it is; of one that will be swapped out again, a copy in a file without a name in `place`: memory is what is short here."""
    if place is None or not isinstance(value, torch.Tensor) or value.numel() <= 1:
        return value
    with tempfile.NamedTemporaryFile(dir=place, suffix=".copy") as file:
        copied = torch.from_file(file.name, shared=True, size=value.numel(), dtype=value.dtype)
    return copied.copy_(value.reshape(-1))
