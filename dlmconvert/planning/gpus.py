"""GPUs by name, with the numbers on their makers' data sheets. Plain data; peak bf16 arithmetic is in training/throughput.py, so that the
utilisation that a plan assumes and the one that a run logs are shares of one number."""

from __future__ import annotations

from dataclasses import dataclass

from dlmconvert.errors import UserError, nearest

# Kept free of what a plan counts: CUDA context, NCCL and cuBLAS workspaces, fragmentation.
USABLE_SHARE = 0.9


@dataclass(frozen=True)
class Gpu:
    """device: as torch.cuda.get_device_name has it. memory_gb: 10^9 bytes, as on the label (drivers show a little more). bandwidth: of the
    memory, TB/s. fp32_tflops: without tensor cores, which is what torch computes float32 with unless told otherwise."""

    name: str
    device: str
    memory_gb: float
    bandwidth: float
    fp32_tflops: float

    def tflops(self, precision: str) -> float:
        """Dense peak TFLOP/s: tensor cores under bf16 and fp16, with float32 sums."""
        if precision == "fp32":
            return self.fp32_tflops
        from dlmconvert.training.throughput import GPU_TFLOPS

        return next(tflops for words, tflops in GPU_TFLOPS if words in self.device)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", "NVIDIA B200", 180, 8.0, 75.0),
        Gpu("h200-141gb", "NVIDIA H200", 141, 4.8, 67.0),
        Gpu("gh200-96gb", "NVIDIA GH200 480GB", 96, 4.0, 67.0),
        Gpu("h100-80gb", "NVIDIA H100 80GB HBM3", 80, 3.35, 67.0),
        Gpu("h100-pcie-80gb", "NVIDIA H100 PCIe", 80, 2.0, 51.0),
        Gpu("h100-nvl-94gb", "NVIDIA H100 NVL", 94, 3.9, 60.0),
        Gpu("a100-80gb", "NVIDIA A100-SXM4-80GB", 80, 2.039, 19.5),
        Gpu("a100-40gb", "NVIDIA A100-SXM4-40GB", 40, 1.555, 19.5),
        Gpu("l40s", "NVIDIA L40S", 48, 0.864, 91.6),
        Gpu("l4", "NVIDIA L4", 24, 0.3, 30.3),
        Gpu("a40", "NVIDIA A40", 48, 0.696, 37.4),
        Gpu("a6000", "NVIDIA RTX A6000", 48, 0.768, 38.7),
        Gpu("rtx6000-ada", "NVIDIA RTX 6000 Ada Generation", 48, 0.96, 91.1),
        Gpu("rtx4090", "NVIDIA GeForce RTX 4090", 24, 1.008, 82.6),
        Gpu("rtx3090", "NVIDIA GeForce RTX 3090", 24, 0.936, 35.6),
        Gpu("v100-32gb", "Tesla V100-SXM2-32GB", 32, 0.9, 15.7),
        Gpu("mi300x", "AMD Instinct MI300X", 192, 5.3, 163.4),
    )
}


def find_gpu(name: str) -> Gpu:
    """By name, in any case; a name that only one GPU begins with will do (`h200`). Raises UserError with the nearest names."""
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    if wanted in GPUS:
        return GPUS[wanted]
    begun = [gpu for gpu in GPUS.values() if gpu.name.startswith(wanted)]
    if len(begun) == 1 and wanted:
        return begun[0]
    which = "several are: " + ", ".join(gpu.name for gpu in begun) if wanted and begun else nearest(wanted, GPUS)
    raise UserError(f"--gpu {name!r} is not a GPU that is known", which, "any other: --memory GB and --tflops N (sustained)")
