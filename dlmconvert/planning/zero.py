"""What lies where under DeepSpeed ZeRO (arXiv 1910.02054), bytes of one process: from its source and from traced steps.

Legend: P parameters, P' trained ones, n processes, c bytes of the weights' type (4, or 2 under bf16 and fp16).

                   stage 0         stage 1              stage 2            stage 3
    weights        4 P             c P                  c P                c P / n + c min(P, `stage3_max_live_parameters`)
    masters (1)    -               4 P' / n             4 P' / n           4 P' / n
    AdamW moments  8 P'            8 P' / n             8 P' / n           8 P' / n
    gradients (2)  4 P'            c P' + c P' / n      c P' / n           c P' / n
    buckets (3)    4 min(P', 5e8)  c b                  2 c b              2 c b + c b / n
    update (4)     -               c P' / n             c P' / n           c min(P' / n, `sub_group_size`)
    start (5)      -               c P + c P'           the same           -

(1) In float32; none where the weights are their own masters: fp32 under stage 3, and under 1 and 2 in one process (training/zero_alone.py).
(2) Stage 2 holds its part from the first gradient on, stage 3 always; in one process stages 1 and 2 hold c P' in all, each gradient from
when it is made. (3) b = min(`reduce_bucket_size`, P'): where gradients are collected, what is sent of it, what comes back; none in one process.
(4) While the optimizer works, beside the gradients of the rank's own part: a float32 copy of them, 4 in place of c; none where c = 4, and of
a few million at a time under 1 and 2 in one process. (5) Before anything else is there: the weights, and the same in one piece.

Offloading moves master, moments and float32 gradients (16 P' / n) and a copy of the weights' part (c P' / n) to the host, and with the
parameters (stage 3) c P / n more; on the GPU stages 1 and 2 keep a buffer of the largest parameter in place of their part of the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dlmconvert.planning.architecture import Architecture

FLOAT = 4
PIECE = 2**22  # elements of the gradients that are copied at a time in one process: training/zero_alone.py
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
    while a pass runs. partition: of the gradients, from the first one on. bucket: during the backward pass. sent: at its end, beside the
    bucket. update: gradients and copies of them while the optimizer works. start: while the engine is made, alone. host: in the machine's
    memory. gradients_stay: until the update where the backward pass leaves them; else a tied matrix gets two for a moment.
    """

    weights: float
    gradients: float
    accumulated: float
    optimizer: float
    gathered: float = 0
    partition: float = 0
    bucket: float = 0
    sent: float = 0
    update: float = 0
    start: float = 0
    host: float = 0
    gradients_stay: bool = False


def single_states(shape: Architecture, accumulates: bool) -> States:
    """The single-device engine: float32 weights, gradients and two moments, whatever the precision of the arithmetic."""
    gradients = FLOAT * shape.num_trainable
    return States(FLOAT * shape.num_parameters, gradients, gradients if accumulates else 0, 2 * gradients, update=gradients, gradients_stay=True)


def zero_states(shape: Architecture, zero: Zero, weight_bytes: int, accumulates: bool) -> States:
    """One rank of the DeepSpeed engine: the table above. weight_bytes: c."""
    c, n, every, trained = weight_bytes, zero.num_ranks, shape.num_parameters, shape.num_trainable
    part = trained / n
    if zero.stage == 0:
        gradients = FLOAT * trained
        flat = FLOAT * min(trained, ALLREDUCE) if n > 1 else 0
        return States(FLOAT * every, gradients, gradients if accumulates else 0, 8 * trained, update=gradients + flat, gradients_stay=True)
    offloaded = zero.offload in ("optimizer", "all")
    stay = n == 1 and zero.stage < 3 and not offloaded
    bucket = c * min(zero.elements("reduce_bucket_size"), trained)
    are_masters = c == FLOAT and not offloaded and (zero.stage == 3 or n == 1)
    optimizer = 0.0 if offloaded else (8 if are_masters else 12) * part
    host = (12 + FLOAT + c) * part + (c * part if accumulates else 0) if offloaded else 0.0
    copies = FLOAT if c < FLOAT else 0
    if zero.stage == 3:
        sent = bucket + bucket / n
        weights, gradients = c * every / n, 0.0 if offloaded else c * part
        if zero.offload in ("parameters", "all"):
            host, weights = host + weights, 0.0
        gathered = c * min(every, zero.elements("stage3_max_live_parameters") + zero.elements("stage3_prefetch_bucket_size"))
        update = 0.0 if offloaded else gradients + copies * min(part, zero.elements("sub_group_size"))
        states = States(weights, gradients, gradients, optimizer, gathered=gathered + (bucket if n > 1 else 0), update=update, host=host)
    else:
        sent = bucket if zero.stage == 2 else 0.0
        partition = 0.0 if offloaded or stay else c * part
        gradients = partition + (c * trained if zero.stage == 1 or stay else 0)
        if offloaded and zero.stage == 2:
            gradients = c * shape.largest_parameter
        accumulated = (c * trained if zero.stage == 1 else partition or gradients) if accumulates else 0.0
        buckets = bucket * (2 if dict(zero.keys).get("overlap_comm") is True else 1) if n > 1 or offloaded else 0.0
        states = States(
            c * every, gradients, accumulated, optimizer, partition=partition, bucket=buckets,
            update=0.0 if offloaded else c * part + copies * (min(part, PIECE) if stay else part), start=c * (every + trained), host=host, gradients_stay=stay,
        )  # fmt: skip
    if n == 1:
        return states
    # A bucket that is smaller than the model is sent many times, so that it meets the activations of the last layers.
    return replace(states, sent=sent) if bucket >= c * trained else replace(states, bucket=states.bucket + sent)
