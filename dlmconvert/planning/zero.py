"""What lies where under DeepSpeed ZeRO (arXiv 1910.02054), bytes of one process: from its source and from traced steps.

Legend: P parameters, P' trained ones, n processes, c bytes of the weights' type (4, or 2 under bf16 and fp16).

                   stage 0         stage 1              stage 2            stage 3
    weights        4 P             c P                  c P                c P / n + c min(P, `stage3_max_live_parameters`)
    float32 copy   -               4 P' / n             4 P' / n           4 P' / n
    AdamW moments  8 P'            8 P' / n             8 P' / n           8 P' / n
    gradients      4 P'            c P' + c P' / n      c P' / n (1)       c P' / n
    bucket         4 min(P', 5e8)  c b                  c b                c b              (stage 0: of several processes)
    update (2)     -               (c + 4) P' / n       (c + 4) P' / n     (c + 4) min(P' / n, `sub_group_size`)
    start (3)      -               max(4 P, c P + c P') the same           -

b is `reduce_bucket_size`: allocated whole, however small the model. (1) Twice while several micro-batches are summed. (2) While the
optimizer works, beside the gradients of the rank's own part: these, flattened, and a float32 copy (none where c = 4). (3) Before anything
else is there: the float32 model comes onto the device whole; in type c it is flattened.

Offloading moves master, moments and float32 gradients (16 P' / n) and a copy of the weights' part (c P' / n) to the host, and with the
parameters (stage 3) c P / n more; on the GPU stages 1 and 2 keep a buffer of the largest parameter in place of their part of the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlmconvert.planning.architecture import Architecture

FLOAT = 4
# DeepSpeed's defaults, in elements; `engine.deepspeed.zero_optimization` overrides them.
DEFAULTS = {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9, "stage3_prefetch_bucket_size": 5e7, "sub_group_size": 1e9}
ALLREDUCE = 5e8  # elements that stage 0 flattens at once; no key sets it


@dataclass(frozen=True)
class Zero:
    """stage: 0 to 3. num_ranks: processes. offload: `none`, `optimizer`, `parameters` (stage 3), or `all` (both). keys: the recipe's
    `engine.deepspeed.zero_optimization`."""

    stage: int
    num_ranks: int
    offload: str = "none"
    keys: Mapping[str, Any] | tuple[()] = ()

    def elements(self, key: str) -> float:
        value = dict(self.keys).get(key, DEFAULTS[key])
        return float(DEFAULTS[key] if value == "auto" else value)


@dataclass(frozen=True)
class States:
    """Bytes of one process that do not depend on the batch.

    gradients: at the end of the backward pass. accumulated: those of earlier micro-batches, while a forward runs. gathered: whole weights
    while a pass runs. bucket: during the backward pass. update: gradients and copies of them while the optimizer works. start: while the
    engine is made, alone. host: in the machine's memory.
    """

    weights: float
    gradients: float
    accumulated: float
    optimizer: float
    gathered: float = 0
    bucket: float = 0
    update: float = 0
    start: float = 0
    host: float = 0


def single_states(shape: Architecture, accumulates: bool) -> States:
    """The single-device engine: float32 weights, gradients and two moments, whatever the precision of the arithmetic."""
    gradients = FLOAT * shape.num_trainable
    return States(FLOAT * shape.num_parameters, gradients, gradients if accumulates else 0, 2 * gradients, update=gradients)


def zero_states(shape: Architecture, zero: Zero, weight_bytes: int, accumulates: bool) -> States:
    """One rank of the DeepSpeed engine: the table above. weight_bytes: c."""
    c, n, every, trained = weight_bytes, zero.num_ranks, shape.num_parameters, shape.num_trainable
    part = trained / n
    bucket = zero.elements("reduce_bucket_size")
    if zero.stage == 0:
        gradients = FLOAT * trained
        flat = FLOAT * min(trained, ALLREDUCE) if n > 1 else 0
        return States(FLOAT * every, gradients, gradients if accumulates else 0, 8 * trained, update=gradients + flat)
    offloaded = zero.offload in ("optimizer", "all")
    optimizer = 12 * part
    host = (12 + FLOAT + c) * part + (c * part if accumulates else 0) if offloaded else 0.0
    copies = c + FLOAT if c < FLOAT else FLOAT
    update = 0.0 if offloaded else (c + copies) * part
    if zero.stage == 3:
        weights, gradients = c * every / n, c * part
        if zero.offload in ("parameters", "all"):
            host, weights = host + weights, 0.0
        gathered = c * min(every, zero.elements("stage3_max_live_parameters") + zero.elements("stage3_prefetch_bucket_size"))
        if not offloaded:
            update = gradients + copies * min(part, zero.elements("sub_group_size"))
        return States(
            weights, 0.0 if offloaded else gradients, 0.0 if offloaded else gradients, 0.0 if offloaded else optimizer,
            gathered=gathered, bucket=c * bucket, update=update, host=host,
        )  # fmt: skip
    if zero.stage == 1 and not offloaded:
        gradients, accumulated = c * (trained + part), c * trained
    elif offloaded:
        gradients = accumulated = c * (trained if zero.stage == 1 else shape.largest_parameter)
    else:
        gradients, accumulated = c * part * (2 if accumulates else 1), c * part
    buckets = 2 if dict(zero.keys).get("overlap_comm") is True else 1
    start = max(FLOAT * every, c * (every + trained))
    return States(
        c * every, gradients, accumulated if accumulates else 0, 0.0 if offloaded else optimizer, bucket=buckets * c * bucket, update=update, start=start, host=host,
    )  # fmt: skip
