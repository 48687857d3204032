"""How fast a run is: tokens a second, model FLOP/s utilisation (MFU, arXiv 2204.02311), time left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from dlmconvert.training.optimizer import parameter_kinds

# Dense TFLOP/s in bf16 and fp16, from the manufacturers' data sheets: (words that the device's name holds, number). The first match
# counts, so that longer names stand first. fp32 on these GPUs is timed: it depends on how torch is set up (TF32).
GPU_TFLOPS = (
    ("GB200", 2500.0), ("B200", 2250.0), ("B100", 1800.0), ("GH200", 989.0), ("H200", 989.0), ("H800", 989.0), ("H100 PCIe", 756.0), ("H100 NVL", 835.0),
    ("H100", 989.0), ("A100", 312.0), ("A800", 312.0), ("L40S", 362.0), ("L40", 181.0), ("A10G", 70.0), ("A40", 150.0), ("A10", 125.0), ("L4", 121.0), ("A30", 165.0),
    ("A6000", 155.0), ("RTX 6000 Ada", 364.0), ("RTX 4090", 165.0), ("RTX 3090", 71.0), ("MI300X", 1307.0), ("MI250", 362.0), ("V100", 125.0), ("T4", 65.0),
)  # fmt: skip


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of forward and backward, as the model needs them: recomputed activations do not count.

    per_token: of every token of a row. per_target: of a prediction on top, which goes through the output matrix.
    """

    per_token: float
    per_target: float

    def of(self, tokens: float, targets: float) -> float:
        return tokens * self.per_token + targets * self.per_target


def model_flops(model: Any, row_length: int, *, causal: bool = False, streams: int = 1) -> ModelFlops:
    """Count those of a causal LM (wrapped by peft or not, dealt out by ZeRO-3 or not).

    6 a matrix element and token (2 forward, 4 backward; arXiv 2001.08361), 4 where the matrix is frozen (LoRA: it gets no gradient of
    its own); + 12 L q a layer for attention to all L positions of a row, q wide, half of it under the AR objective; + 6 V d for the
    output matrix, where a token is predicted. Norms, biases and the embedding look-up are left out. Of experts, those that a token
    goes through. causal: of the L x L pairs half, as under the AR objective. streams: 2 where the clean row goes through the layers beside
    the noised one; both together have about L^2 of the 4 L^2 pairs.
    """
    config = model.config.get_text_config()
    kinds = parameter_kinds(model)
    named = dict(model.named_parameters())
    numel = {name: getattr(p, "ds_numel", p.numel()) for name, p in named.items()}
    is_matrix = {name: len(getattr(p, "ds_shape", p.shape)) >= 2 for name, p in named.items()}
    share = _active_share(config)
    per_token = 0.0
    for name, kind in kinds.items():
        if kind in ("attention", "mlp") and is_matrix[name]:
            per_token += (6 if named[name].requires_grad else 4) * numel[name] * (share if ".experts." in name else 1.0)
    heads = config.num_attention_heads
    query = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 12 * config.num_hidden_layers * row_length * query * (0.5 if causal else 1.0)
    language_model = model if hasattr(model, "get_output_embeddings") else model.model
    head = language_model.get_output_embeddings()
    # Around a tied matrix of which peft trains one row, `weight` would be put together here: ZeRO-3 has dealt out its parts.
    weight = getattr(getattr(head, "original_module", head), "weight", None)
    is_trained = head is not None and any(p.requires_grad for p in head.parameters())
    per_target = 0.0 if weight is None else (6 if is_trained else 4) * float(getattr(weight, "ds_numel", weight.numel()))
    return ModelFlops(streams * per_token + attention, per_target)


def _active_share(config: Any) -> float:
    num_experts = next((n for name in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(config, name, None))), 1)
    return (getattr(config, "num_experts_per_tok", None) or 1) / num_experts if num_experts > 1 else 1.0


def peak_flops(device: torch.device, precision: str, processes: int = 1) -> tuple[float, str]:
    """(FLOP/s that `processes` such devices can reach, where the number is from). Where no table knows it a matrix product is timed: on
    a CPU with the threads of this process, of which every other has as many."""
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        for words, tflops in GPU_TFLOPS:
            if words in name:
                return processes * tflops * 1e12, f"{name}: {tflops:g} TFLOP/s"
    measured = matrix_product_flops(device, precision)
    return processes * measured, f"a timed matrix product: {measured / 1e12:.3g} TFLOP/s"


def matrix_product_flops(device: torch.device, precision: str, budget_s: float = 0.15) -> float:
    """FLOP/s of a large matrix product on this device, in the precision of the training: the best of several sizes. Touches no global
    random state."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    synchronise: Any = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    best, started = 0.0, time.perf_counter()
    with torch.no_grad():
        # Small ones first: some CPUs take seconds for a large product in float16.
        for size in (128, 256, 512, 1024) if device.type == "cpu" else (1024, 4096, 8192):
            a = torch.linspace(-1, 1, size * size, device=device).reshape(size, size).to(dtype)
            for _ in range(3):
                begin = time.perf_counter()
                a @ a
                synchronise()
                now = time.perf_counter()
                best = max(best, 2 * size**3 / (now - begin))
                if now - started > budget_s:
                    return best
    return best


class Speed:
    """What the clock says, over the steps since the last line. Nothing of it is in a checkpoint: no number of the run depends on it.

    flops: of this model; None leaves MFU out. peak: FLOP/s of all devices together (`peak_flops`).
    """

    def __init__(self, flops: ModelFlops | None = None, peak: float | None = None):
        self._flops, self._peak = flops, peak
        self._restart()

    def _restart(self) -> None:
        self._steps, self._seconds, self._tokens, self._passed, self._targets = 0, 0.0, 0.0, 0.0, 0.0
        self._since = time.monotonic()

    def add(self, seconds: float, tokens: int, targets: float, passes: int = 1) -> None:
        """One step. targets: predictions that were made in it, of all ranks. passes: how often its rows went through the model (twice with edits)."""
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        self._tokens, self._passed, self._targets = self._tokens + tokens, self._passed + passes * tokens, self._targets + targets

    def line(self, steps_left: int) -> dict[str, float]:
        """Means over the interval, which begins anew. Time left counts what lies between the steps as well (validation, checkpoints)."""
        steps, seconds = max(1, self._steps), max(self._seconds, 1e-9)
        values = {
            "tokens_per_second": self._tokens / seconds,
            "seconds_per_step": seconds / steps,
            "seconds_left": steps_left * (time.monotonic() - self._since) / steps,
        }
        if self._flops is not None and self._peak:
            values["mfu"] = self._flops.of(self._passed, self._targets) / seconds / self._peak
        self._restart()
        return values
