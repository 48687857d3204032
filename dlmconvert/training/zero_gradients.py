"""What DeepSpeed's ZeRO optimizers do with gradients beside dealing them out, in fewer passes over memory and with the same numbers.

`spare_copies` replaces methods of one optimizer object (written for DeepSpeed 0.19), and touches none of DeepSpeed's classes:

- in one process stages 1 and 2 leave gradients where they are, and update from there (zero_alone.py);
- the norm is taken in float32 over short rows, not over a float64 copy of every gradient (`optimizer.gradient_norm`);
- in several processes stages 1 and 2 sum gradients where the update reads them, in DeepSpeed's own flat partition, which it otherwise uses
  only when gradients are summed in another type than the weights'; without it the partition is a list that is copied into one tensor at the
  update. Stage 3 has such a partition, and still copies; in one process straight from the backward pass;
- where masters and weights have one type and lie together (stage 3, and stages 1 and 2 in one process), the masters are the weights.

Under an offloaded optimizer DeepSpeed keeps its own way, but for the straight copy under stage 3. Every other version of DeepSpeed keeps it
altogether.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch

from dlmconvert.training.optimizer import gradient_norm
from dlmconvert.training.zero_alone import update_in_place

VERSION = "0.19."
_STAGE_3 = "_DeepSpeedZeroOptimizer_Stage3__"  # how Python spells that class's private names


def spare_copies(engine: Any, zero_stage: int, num_ranks: int) -> bool:
    """engine: DeepSpeed's, under ZeRO 1, 2 or 3, before the first step. True: gradients lie in `.grad` until the update."""
    optimizer = engine.optimizer
    if not version("deepspeed").startswith(VERSION):
        return False  # private methods: what another version does in them is not known
    is_offloaded = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    if zero_stage == 3:
        if num_ranks == 1:
            optimizer.reduce_bucket_size = 1  # nobody is waited for: each gradient is taken, and freed, when it comes
            setattr(optimizer, f"{_STAGE_3}avg_scatter_grads", lambda parameters, _: [p.grad.reshape(-1) for p in parameters])
        if not is_offloaded:
            _take_norm_in_rows(optimizer)
            _update_from_partition(optimizer)
        return False
    if is_offloaded:
        return False
    if num_ranks == 1 and update_in_place(engine):
        return True
    _take_norm_in_rows(optimizer)
    optimizer._use_compact_grad_partition_buffer = lambda group: True
    return False


def _take_norm_in_rows(optimizer: Any) -> None:
    def norm(gradients: Iterable[torch.Tensor], params: Any, norm_type: float = 2) -> torch.Tensor:
        flat = getattr(gradients, "flat_partition", None)
        square = gradient_norm(gradients if flat is None else [flat]).square()
        torch.distributed.all_reduce(square, group=optimizer.dp_process_group)
        return torch.where(square.isfinite(), square.sqrt(), -1.0)  # by -1 DeepSpeed means not finite

    optimizer.get_grad_norm_direct = norm


def _update_from_partition(optimizer: Any) -> None:
    groups = optimizer.fp32_partitioned_groups_flat
    for master, weights in zip(groups, optimizer.fp16_partitioned_groups_flat, strict=True):
        if weights is not None and weights.dtype == master.dtype:
            master.data = weights.data
    starts = [sum(master.numel() for master in groups[:number]) for number in range(len(groups))]

    def prepare(number: int) -> None:
        own = optimizer.grad_partitions_flat_buffer.narrow(0, starts[number], groups[number].numel())
        groups[number].grad = own.to(groups[number].dtype)
        optimizer.averaged_gradients[number] = None

    optimizer._prepare_fp32_grad_for_sub_group = prepare
