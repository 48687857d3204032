"""What this machine has: devices, memory, cores. Every answer is None where the system does not tell."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dlmconvert.errors import UserError

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def cpu_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ram_bytes() -> int | None:
    """Physical memory, or the container's limit when that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    for path in CGROUP_LIMITS:
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return total


def device_memory(wanted: str = "auto") -> tuple[str, int | None, str]:
    """(kind, bytes, a name for people) of the device that `engine.device` means here; bytes is None when the device is not here.

    On Apple machines the GPU shares the machine's memory.
    """
    import torch

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in ("cuda", "mps", "cpu") if has[k]) if wanted == "auto" else wanted
    if not has[kind]:
        return kind, None, f"{kind} (not on this machine)"
    if kind == "cuda":
        facts = torch.cuda.get_device_properties(0)
        return kind, facts.total_memory, facts.name
    if kind == "mps":
        limit = getattr(torch.mps, "recommended_max_memory", lambda: None)() or ram_bytes()
        return kind, limit, "Apple GPU"
    return kind, ram_bytes(), f"CPU, {cpu_cores()} cores"


def free_disk_bytes(folder: str | Path) -> int:
    """Free space where `folder` is, or will be made."""
    import shutil

    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@dataclass(frozen=True)
class Machine:
    """What a plan is made for. kind: `cpu`, `cuda`, `mps`. memory_bytes: of one process's device, None when unknown; usable_bytes: what of
    it a plan may fill. processes: of the whole run. host_bytes: memory of one node, None when unknown. peak: dense FLOP/s of one device.
    peak_from: what `peak` is. is_given: described by `--gpu` or `--memory`, not looked up here."""

    kind: str
    name: str
    memory_bytes: int | None
    usable_bytes: int | None
    processes: int
    nodes: int
    host_bytes: int | None
    peak: float | None
    peak_from: str
    is_given: bool

    @property
    def processes_a_node(self) -> int:
        return self.processes // self.nodes


def planned_machine(
    device: str, precision: str, *, gpu: str | None = None, processes: int | None = None, nodes: int | None = None, memory_bytes: int | None = None, timed: bool = True
) -> Machine:  # fmt: skip
    """The machine that the options describe, or this one.

    device: the recipe's `engine.device`. processes: the total; one a GPU. timed: time a matrix product here where no data sheet is asked
    for (0.15 s). Raises UserError for an unknown GPU and for processes that cannot be spread over the nodes.
    """
    from dlmconvert.planning.gpus import USABLE_SHARE, find_gpu

    nodes = nodes or 1
    if nodes > 1 and processes is None:
        raise UserError(f"--nodes {nodes} without --processes", "--processes is the total, one a GPU", f"as in --processes {8 * nodes} --nodes {nodes}")
    processes = processes or 1
    if processes % nodes:
        raise UserError(f"--processes {processes} cannot be spread over --nodes {nodes}", "every node runs the same number", f"as in --processes {-(-processes // nodes) * nodes}")
    if gpu is not None:
        found = find_gpu(gpu)
        memory = round(found.memory_gb * 1e9) if memory_bytes is None else memory_bytes
        peak = found.tflops(precision) * 1e12
        words = f"{found.name}'s {peak / 1e12:g} TFLOP/s ({precision}, dense, data sheet)"
        return Machine("cuda", f"{found.name}, {memory / 1e9:g} GB", memory, round(USABLE_SHARE * memory), processes, nodes, None, peak, words, True)
    kind, here, name = device_memory(device)
    usable = memory = here if memory_bytes is None else memory_bytes
    if memory_bytes is not None:
        name = f"one with {memory_bytes / 1e9:g} GB (as given)"
    elif here is not None and kind == "cuda":
        usable = round(USABLE_SHARE * here)
    elif here is not None:  # the processes of a machine share its memory
        memory = usable = here * nodes // processes
    peak, words = None, ""
    if timed and here is not None:
        import torch

        from dlmconvert.training.throughput import matrix_product_flops

        # Several processes on one CPU share its cores.
        peak = matrix_product_flops(torch.device(kind), precision) / (1 if kind == "cuda" else processes // nodes)
        words = f"a matrix product timed here just now ({peak / 1e12:.3g} TFLOP/s on {device_memory(device)[2]})"
    return Machine(kind, name, memory, usable, processes, nodes, ram_bytes() if memory_bytes is None else None, peak, words, memory_bytes is not None)
