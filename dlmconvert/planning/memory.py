"""Memory of one training step in one process, from shapes alone.

Legend: T = rows x length tokens of a micro-batch (twice that where a row carries its clean copy, `streams`), d = hidden width, q / k =
query / key-value width, f = feed-forward width, V = vocabulary, P = parameters, P' = trained parameters, n = layers, c = bytes of the
compute type (4, or 2 under bfloat16 and float16), r = bytes of the residual stream (4 in the single engine, whose half precision is
autocast; c in DeepSpeed, whose weights are in the compute type).

What stays from the forward for the backward, bytes a token and layer (each term is a tensor that autograd saves):

    norms       r d each; an RMSNorm adds its float32 copy where r = 2 (4 d), and what it scales when its weight is trained (r d)
    projections c d for what reads a norm; under autocast each of the q, k, v (gate, up) layers casts its own copy
    attention   c (q + 2 k + q): queries, keys, values, result (keys and values are repeated to q under a mask); 4 heads;
                + c (q + k) where rotary positions follow one fused q, k, v layer (its result lives on in v)
    q, k norms  8 (q + k), 6 (q + k) where r = 2
    mlp         gated: 4 c f (gate, its activation, up, product); plain: 2 c f (ReLU 1, a written-out activation 5)
    experts     2 r d for each expert that a token goes through (its gathered input and weighted output)
    adapters    c r for each linear layer (here r is their rank)

    activations = n x T x that, or with gradient checkpointing n x r T d + one layer of it
    logits      = c bytes an element of one chunk, at most 128 MiB of them (diffusion/fused_head.py); + 4 for float32
                probabilities, + 4 more where c = 2, on a CPU of at most 2^19 elements at a time; 12 T V where the family's own forward computes the logits
    head        = 4 V d: the output matrix's gradient, which the loss computes in its forward, + 2 r T d for the hidden states and their
                gradient, + c V d for the matrix's copy under autocast
    casts       = 2 bytes a matrix element of the layers under autocast (of one layer under checkpointing)

Weights, gradients and optimizer are in planning/zero.py. Not all of it is alive at once; `Memory.peak_bytes` is the largest of the
moments of a step (see `memory_of`). Not counted: the framework itself, fragmentation, and the input pipeline (`gpus.USABLE_SHARE`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dlmconvert.planning.architecture import Architecture
from dlmconvert.planning.zero import FLOAT, Zero, single_states, zero_states

UNFUSED_ACTIVATIONS = ("quick_gelu",)  # written out by its family; for tanh GELUs see backbone/activations.py


@dataclass(frozen=True)
class Memory:
    """Bytes of one process on its device, and on the host where something is offloaded. `at` names the moment of the peak; the parts are
    the largest that each gets and need not add up to it. optimizer: AdamW moments, and float32 master weights under ZeRO. activations: of
    a forward without checkpointing. head: what the output matrix and the loss need besides the logits. update: gradients and their copies while the optimizer works."""

    weights: int
    casts: int
    gradients: int
    optimizer: int
    update: int
    activations: int
    activations_checkpointed: int
    logits: int
    head: int
    buffers: int
    peak_bytes: int
    host_bytes: int
    at: str
    gradient_checkpointing: bool


def activation_bytes_per_token(shape: Architecture, compute_bytes: int, device: str = "cpu", is_masked: bool = False, stream_bytes: int = FLOAT) -> int:
    """One layer's saved activations, bytes a token: the formula at the top of this module. stream_bytes: r."""
    c, r, d, q, k, f = compute_bytes, stream_bytes, shape.hidden, shape.query, shape.key_value, shape.feed_forward
    autocast = c < r
    norm = r * d
    if shape.is_rms_norm:
        norm = (FLOAT + (r if shape.norms_trained else 0)) * d
    # Autocast does not remember casts of activations: each linear layer that reads a norm saves its own.
    readers = shape.attention_readers + shape.feed_forward_readers if autocast else 2
    total = shape.wide_norms * norm + readers * c * d
    total += c * (2 * q + 2 * (q if is_masked else k)) + FLOAT * shape.num_heads
    if shape.has_rotary and shape.attention_readers == 1:
        total += c * (q + k)
    total += 2 * r * d * shape.experts_per_token
    if shape.has_qk_norm:
        total += (FLOAT + r) * (q + k)
    if shape.is_gated:
        total += 4 * c * f
    elif shape.activation not in UNFUSED_ACTIVATIONS:
        total += (1 if shape.activation == "relu" else 2) * c * f
    else:
        # x, tanh, x/2, 1 + tanh, product; CUDA's autocast runs the power, and all after it, in float32.
        total += (16 if autocast and device == "cuda" else 5 * c) * f
    return total + c * shape.lora_rank * shape.num_linears


def logit_bytes(shape: Architecture, targets: int, compute_bytes: int, device: str = "cpu") -> int:
    """Logits and what is computed of them, at the most, when `targets` tokens are predicted."""
    from dlmconvert.diffusion.fused_head import BLOCK_ELEMENTS, CHUNK_BYTES

    if not shape.has_plain_head:
        return 12 * targets * shape.vocab_size
    rows = max(1, CHUNK_BYTES // (shape.vocab_size * compute_bytes))
    chunk = math.ceil(targets / math.ceil(targets / rows)) * shape.vocab_size
    # The softmax is taken in float32, on a GPU of the whole chunk at once and on a CPU of a few rows.
    block = min(chunk, max(BLOCK_ELEMENTS, shape.vocab_size)) if device == "cpu" else chunk
    return chunk * compute_bytes + block * FLOAT * (1 if compute_bytes == FLOAT else 2)


def memory_of(
    shape: Architecture,
    *,
    micro_batch: int,
    row_length: int,
    accumulates: bool,
    precision: str,
    gradient_checkpointing: bool,
    has_mask: bool = False,
    masked_rows: int = 1,
    streams: int = 1,
    targets_per_token: int = 1,
    passes: int = 1,
    teacher: str = "none",
    device: str = "cpu",
    zero: Zero | None = None,
) -> Memory:
    """Memory of a training step.

    micro_batch: rows in one forward. row_length: tokens in a row. accumulates: whether gradients of earlier micro-batches are there
    while a forward runs. has_mask: attention under a dense mask (annealing, isolated documents). masked_rows: 1 when all rows share
    it. streams: 2 where a row runs as [noised | clean] (block patterns). targets_per_token: 2 where the clean copy is scored as well.
    passes: 2 where one backward pass goes through two forwards (training on edits). teacher: a frozen source beside the model, for its
    `predictions` or its hidden `states`. device: `cpu`, `cuda` or `mps`. zero: None is the single engine.
    """
    c = FLOAT if precision == "fp32" else 2
    r = FLOAT if zero is None else c
    length = streams * row_length
    tokens, targets = micro_batch * length, targets_per_token * micro_batch * row_length
    states = single_states(shape, accumulates) if zero is None else zero_states(shape, zero, c, accumulates)

    mask_bytes = masked_rows * length**2 * c if has_mask else 0  # SDPA saves a boolean mask as numbers, in each layer
    if shape.attention_implementation == "eager":
        mask_bytes += 2 * micro_batch * shape.num_heads * length**2 * c  # the probabilities, and their copy
    layer = tokens * activation_bytes_per_token(shape, c, device, has_mask, r) + mask_bytes
    plain = shape.num_layers * layer
    inputs = shape.num_layers * tokens * shape.hidden * r
    saved = passes * (inputs if gradient_checkpointing else plain)
    buffers = (masked_rows * length**2 if has_mask else 0) + tokens * (3 * 8 + 1) + 3 * FLOAT * tokens * shape.hidden

    is_autocast = c < r
    matrix = shape.vocab_size * shape.hidden
    logits = logit_bytes(shape, targets, c, device)
    head_gradient = FLOAT * matrix if shape.head_trained else 0
    head = passes * (head_gradient + 2 * r * targets * shape.hidden) + (c * matrix if is_autocast else 0)
    in_layers = shape.matrix_parameters - (matrix if shape.has_plain_head else 0)
    casts = 2 * in_layers if is_autocast else 0
    casts_late = 2 * in_layers // shape.num_layers if is_autocast and gradient_checkpointing else casts
    if shape.lora_rank:  # autocast remembers casts of trained weights only, until the forward ends
        casts = casts_late
    # Gradients inside one layer while it is walked back.
    working = tokens * max(3 * c * shape.feed_forward, 6 * r * shape.hidden)
    # Where ZeRO collects gradients a tied matrix gets two (else rows: backbone/embedding.py); any gets one more while earlier ones are kept.
    extra = ((1 if shape.is_tied and not states.gradients_stay else 0) + (1 if states.accumulated else 0)) * head_gradient

    frozen = 0 if teacher == "none" else c * shape.num_base_parameters
    if teacher == "states":
        buffers += shape.num_layers * c * micro_batch * row_length * shape.hidden
    always = states.weights + frozen + states.optimizer + buffers
    passing = always + states.gathered
    kept = states.accumulated
    largest = max(
        (passing + kept + saved + casts + head + logits, "loss"),
        (
            passing + states.bucket + max(kept, states.partition + passes * head_gradient) + saved + casts_late + (layer if gradient_checkpointing else 0) + working,
            "backward of the last layer",
        ),
        (passing + states.bucket + states.sent + states.gradients + extra, "end of the backward"),
        (always + states.update, "update"),
        (states.start, "start"),
    )
    return Memory(
        weights=round(states.weights + states.gathered + frozen),
        casts=casts,
        gradients=round(states.gradients),
        optimizer=round(states.optimizer),
        update=round(states.update),
        activations=passes * plain,
        activations_checkpointed=passes * inputs + layer,
        logits=logits,
        head=head,
        buffers=round(buffers + states.bucket + states.sent),
        peak_bytes=round(largest[0]),
        host_bytes=round(states.host),
        at=largest[1],
        gradient_checkpointing=gradient_checkpointing,
    )
