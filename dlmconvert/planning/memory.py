"""Memory of one training step on one device, from shapes alone.

Legend: T = rows x length tokens of a micro-batch, d = hidden width, q / k = query / key-value width, f = feed-forward width,
V = vocabulary, P = parameters, P' = trained parameters, n = layers, c = bytes of the compute type (4, or 2 under bfloat16 autocast).

What stays from the forward for the backward, bytes a token and layer (each term is a tensor that autograd saves):

    norms       4 d each (the residual stream is float32), + 4 d for a trained RMSNorm (its normalised input)
    projections c d for what reads a norm; under autocast each of the q, k, v (gate, up) layers casts its own copy
    attention   c (q + 2 k + q): queries, keys, values, result (keys and values are repeated to q under a mask); 4 heads;
                + c (q + k) where rotary positions follow one fused q, k, v layer (its result lives on in v)
    q, k norms  8 (q + k)
    mlp         gated: 4 c f (gate, its activation, up, product); plain: 2 c f (ReLU 1, a written-out GELU 5)
    experts     8 d for each expert that a token goes through (its gathered input and weighted output)
    adapters    c r for each linear layer

    activations = n x T x that, or with gradient checkpointing n x 4 T d + one layer of it
    logits      = 12 T V: log-probabilities and two gradients in float32, all positions masked (the worst case)
    weights     = 4 P, gradients = 4 P', AdamW moments = 8 P'
    casts       = 2 bytes a matrix element under bfloat16 autocast (of one layer and the head under checkpointing)

Not all of it is alive at once; `Memory.peak_bytes` is the largest of the moments of a step (see `memory_of`).
Not counted: the framework itself (a CUDA context is 0.5 GB), fragmentation, and the input pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlmconvert.planning.architecture import Architecture

FLOAT = 4
UNFUSED_ACTIVATIONS = ("gelu_new", "gelu_fast", "gelu_accurate", "quick_gelu")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `at` names the moment of the peak; the parts are the largest that each gets and need not add up to it."""

    weights: int
    casts: int
    gradients: int
    moments: int
    activations: int
    activations_checkpointed: int
    logits: int
    buffers: int
    peak_bytes: int
    at: str
    gradient_checkpointing: bool


def activation_bytes_per_token(shape: Architecture, compute_bytes: int, device: str = "cpu", is_masked: bool = False) -> int:
    """One layer's saved activations, bytes a token: the formula at the top of this module."""
    c, d, q, k, f = compute_bytes, shape.hidden, shape.query, shape.key_value, shape.feed_forward
    norm = FLOAT * d * (2 if shape.is_rms_norm and shape.embedding_trained else 1)
    # Autocast does not remember casts of activations: each linear layer that reads a norm saves its own.
    readers = 2 if c == FLOAT else shape.attention_readers + shape.feed_forward_readers
    total = shape.wide_norms * norm + readers * c * d
    total += c * (2 * q + 2 * (q if is_masked else k)) + FLOAT * shape.num_heads
    if shape.has_rotary and shape.attention_readers == 1:
        total += c * (q + k)
    total += 2 * FLOAT * d * shape.experts_per_token
    if shape.has_qk_norm:
        total += 2 * FLOAT * (q + k)
    if shape.is_gated:
        total += 4 * c * f
    elif shape.activation not in UNFUSED_ACTIVATIONS:
        total += (1 if shape.activation == "relu" else 2) * c * f
    else:
        # x, tanh, x/2, 1 + tanh, product; CUDA's autocast runs the power, and all after it, in float32.
        total += (5 * c if c == FLOAT or device == "cpu" else 16) * f
    return total + c * shape.lora_rank * shape.num_linears


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
    device: str = "cpu",
) -> Memory:
    """Memory of a training step.

    micro_batch: rows in one forward. row_length: tokens in a row. accumulates: whether gradients of earlier micro-batches are there
    while a forward runs. has_mask: attention under a dense mask (annealing, isolated documents). masked_rows: 1 when all rows share
    it. device: `cpu`, `cuda` or `mps`.
    """
    c = FLOAT if precision == "fp32" else 2
    tokens = micro_batch * row_length
    weights, gradients, moments = FLOAT * shape.num_parameters, FLOAT * shape.num_trainable, 2 * FLOAT * shape.num_trainable

    mask_bytes = masked_rows * row_length**2 * c if has_mask else 0  # SDPA saves a boolean mask as numbers, in each layer
    if shape.attention_implementation == "eager":
        mask_bytes += 2 * micro_batch * shape.num_heads * row_length**2 * c  # the probabilities, and their copy
    layer = tokens * activation_bytes_per_token(shape, c, device, has_mask) + mask_bytes
    plain = shape.num_layers * layer
    inputs = shape.num_layers * tokens * shape.hidden * FLOAT
    logits = 12 * tokens * shape.vocab_size
    head = shape.vocab_size * shape.hidden
    buffers = (masked_rows * row_length**2 if has_mask else 0) + tokens * (3 * 8 + 1) + 3 * FLOAT * tokens * shape.hidden

    casts = 2 * shape.matrix_parameters if c == 2 else 0
    casts_late = 2 * ((shape.matrix_parameters - head) // shape.num_layers + head) if c == 2 and gradient_checkpointing else casts
    if not shape.embedding_trained:  # autocast remembers casts of trained weights only, until the forward ends
        casts = casts_late
    head_gradient = FLOAT * head if shape.embedding_trained else 0
    working = tokens * max(3 * c * shape.feed_forward, 6 * FLOAT * shape.hidden)  # gradients inside one layer while it is walked back

    saved = inputs if gradient_checkpointing else plain
    states = weights + moments + buffers
    kept = gradients if accumulates else 0
    largest = max(
        (states + kept + saved + casts + tokens * shape.vocab_size * (8 if c == FLOAT else 10), "end of the forward"),
        (states + kept + saved + casts_late + logits, "gradient of the logits"),
        (states + kept + saved + casts_late + tokens * shape.vocab_size * (4 if c == FLOAT else 6) + head_gradient, "gradient of the head"),
        (
            states + max(kept, head_gradient) + saved + casts_late + (layer if gradient_checkpointing else 0) + working,
            "backward of the last layer",
        ),
        # A tied matrix gets two gradients and their sum; any gets one more while those of earlier micro-batches are kept.
        (states + gradients + (2 * shape.is_tied + accumulates) * head_gradient, "end of the backward"),
    )
    return Memory(
        weights=weights,
        casts=casts,
        gradients=gradients,
        moments=moments,
        activations=plain,
        activations_checkpointed=inputs + layer,
        logits=logits,
        buffers=buffers,
        peak_bytes=largest[0],
        at=largest[1],
        gradient_checkpointing=gradient_checkpointing,
    )
