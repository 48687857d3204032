"""Arithmetic of a training stage, and how long it may take: an estimate, never a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from dlmconvert.planning.architecture import Architecture

# Share of a large matrix product's speed that a whole training step reaches on the CPU: attention, norms, the loss and the optimizer are
# slower. Measured side by side on one busy core: 0.3 to 0.75 (GPT-2 small and a Llama of 3M; fp32 about 0.6, bf16 about 0.4).
STEP_EFFICIENCY = 0.5
# Of a GPU's dense peak, counting recomputed activations as work: an assumption. Published: Megatron-LM 0.44 to 0.52 (arXiv 2104.04473), PaLM 540B
# 0.46 (arXiv 2204.02311); LLaDA 8B comes to 0.24 (2.3T tokens in 0.13M H800 hours, arXiv 2502.09992, by 6 N D). Networks between
# nodes, short rows and small models lie below.
GPU_EFFICIENCY = 0.4
PUBLISHED_EFFICIENCY = (0.24, 0.52)
MASKED_SHARE = 0.5  # E[t] of uniform noise levels


@dataclass(frozen=True)
class Work:
    """Floating-point operations. model: what the model needs (the numerator of MFU). recomputed: on top, under checkpointing, and for the
    forward of a frozen source."""

    model: float
    recomputed: float

    @property
    def total(self) -> float:
        return self.model + self.recomputed


def row_work(
    shape: Architecture, row_length: int, *, causal: bool = False, streams: int = 1, target_share: float = MASKED_SHARE, edits: float = 0.0, has_teacher: bool = False,
    gradient_checkpointing: bool = False,
) -> Work:  # fmt: skip
    """Of one row of L = row_length tokens, forward and backward.

    model = s L w + p L^2 + m L h, where w, p, h are `flops_per_token`, `flops_per_position`, `flops_per_target` of training/throughput.py
    (6 a matrix element, arXiv 2001.08361; 4 where it is frozen; 12 q a layer and pair; 6 V d), s = streams, m = target_share, of the
    tokens the share that goes through the output matrix: E[t], or 1 under the AR objective, which needs half of the pairs. A row of two streams has about L^2 allowed pairs
    (a block-sparse kernel computes those only; a dense one four times as many). recomputed = 2 s L N + p L^2 / 3: one more forward of the
    N matrix elements of the layers. edits: the share of the steps with a second forward in which every token is a target. has_teacher: a
    frozen source reads the clean row causally, forward only.
    """
    pairs = shape.flops_per_position * row_length**2 * (0.5 if causal else 1.0)
    model = streams * row_length * shape.flops_per_token + pairs + (1.0 if causal else target_share) * row_length * shape.flops_per_target
    model += edits * (streams * row_length * shape.flops_per_token + pairs + row_length * shape.flops_per_target)
    teacher = 2.0 * row_length * shape.active_matrix_parameters + shape.flops_per_position * row_length**2 / 6 if has_teacher else 0.0
    again = 2.0 * streams * row_length * shape.active_matrix_parameters + pairs / 3
    return Work(model, teacher + ((1 + edits) * again if gradient_checkpointing else 0.0))


@dataclass(frozen=True)
class Speed:
    """FLOP/s of one device in a training step. sustained: of all arithmetic. mfu: of the model's alone, where the user said so."""

    sustained: float | None = None
    useful: float | None = None
    said: str = "unknown: give --gpu, or --tflops"

    def seconds(self, work: Work, processes: int) -> float | None:
        if self.useful is not None:
            return work.model / (self.useful * processes)
        return None if self.sustained is None else work.total / (self.sustained * processes)


def assumed_speed(peak: float | None, where: str, efficiency: float, mfu: float | None, tflops: float | None) -> Speed:
    """peak: FLOP/s of one device, None when unknown; where: what that number is. mfu, tflops: as the user gave them."""
    if tflops is not None:
        return Speed(sustained=tflops * 1e12, said=f"{tflops:.4g} TFLOP/s a device (as given)")
    if peak is None:
        return Speed()
    if mfu is not None:
        return Speed(useful=mfu * peak, said=f"MFU {mfu:g} (as given) of {where}")
    known = "; published training reached {:g} to {:g}".format(*PUBLISHED_EFFICIENCY) if efficiency == GPU_EFFICIENCY else ""
    return Speed(sustained=efficiency * peak, said=f"{efficiency:.0%} of {where}, assumed: MFU {efficiency:g}, a quarter less with gradient checkpointing{known}")
