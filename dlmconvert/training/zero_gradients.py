"""What DeepSpeed's ZeRO optimizers do with gradients beside dealing them out, in fewer passes over memory and with the same numbers.

`spare_copies` replaces methods of one optimizer object (written for DeepSpeed 0.19), and touches none of DeepSpeed's classes:

- the norm is taken in float32 over short rows, not over a float64 copy of every gradient (`optimizer.gradient_norm`);
- stages 1 and 2 sum gradients where the update reads them, in DeepSpeed's own flat partition, which it otherwise uses only when gradients
  are summed in another type than the weights'; without it the partition is a list that is copied into one tensor at the update. Stage 3
  has such a partition, and still copies;
- in one process a gradient goes there straight from the backward pass: flattening, dividing by one, summing with nobody and copying back
  are left out;
- where masters and weights have one type and lie together (stage 3, and stages 1 and 2 in one process), the masters are the weights.

Under an offloaded optimizer DeepSpeed keeps its own way, but for the third under stage 3. Every other version of DeepSpeed keeps it altogether.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch

from dlmconvert.training.optimizer import gradient_norm

VERSION = "0.19."
_STAGE_3 = "_DeepSpeedZeroOptimizer_Stage3__"  # how Python spells that class's private names


def spare_copies(optimizer: Any, zero_stage: int, num_ranks: int) -> None:
    """optimizer: of an engine under ZeRO 1, 2 or 3, before the first step."""
    if not version("deepspeed").startswith(VERSION):
        return  # private methods: what another version does in them is not known
    is_offloaded = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    if zero_stage == 3:
        if num_ranks == 1:
            _take_at_once(optimizer)
            setattr(optimizer, f"{_STAGE_3}avg_scatter_grads", lambda parameters, _: [p.grad.reshape(-1) for p in parameters])
        if not is_offloaded:
            _take_norm_in_rows(optimizer)
            _update_from_partition(optimizer)
        return
    if is_offloaded:
        return
    _take_norm_in_rows(optimizer)
    optimizer._use_compact_grad_partition_buffer = lambda group: True
    if num_ranks == 1:
        _take_at_once(optimizer)
        _sum_with_nobody(optimizer)
        if optimizer.dtype == torch.float32:
            for master, (weights,) in zip(optimizer.single_partition_of_fp32_groups, optimizer.parallel_partitioned_bit16_groups, strict=True):
                master.data = weights.data
            optimizer._link_all_hp_params()  # its views of the masters were of the copies


def _take_at_once(optimizer: Any) -> None:
    optimizer.reduce_bucket_size = 1  # nobody is waited for: each gradient is taken, and freed, when it comes


def _take_norm_in_rows(optimizer: Any) -> None:
    def norm(gradients: Iterable[torch.Tensor], params: Any, norm_type: float = 2) -> torch.Tensor:
        flat = getattr(gradients, "flat_partition", None)
        square = gradient_norm(gradients if flat is None else [flat]).square()
        torch.distributed.all_reduce(square, group=optimizer.dp_process_group)
        return torch.where(square.isfinite(), square.sqrt(), -1.0)  # by -1 DeepSpeed means not finite

    optimizer.get_grad_norm_direct = norm


def _sum_with_nobody(optimizer: Any) -> None:
    def take(gradients: list[torch.Tensor], places: list[tuple[int, int, int]], communication_data_type: torch.dtype) -> None:
        for gradient, (group, _, number) in zip(gradients, places, strict=True):
            own = optimizer._get_compact_grad_partition_slice(group, 0, number, gradient.numel())
            filled = optimizer.averaged_gradients[group].__dict__.setdefault("filled", set())
            if number in filled:
                own.add_(gradient.reshape(-1))
            else:
                own.copy_(gradient.reshape(-1))  # nothing but zeros is there yet
            filled.add(number)
            optimizer.clear_grad_attribute(optimizer.param_dict[number])

    optimizer._allreduce_noncontiguous_bucket_preserving_fp32 = take


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
