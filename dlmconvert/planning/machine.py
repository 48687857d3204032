"""What this machine has: devices, memory, cores. Every answer is None where the system does not tell."""

from __future__ import annotations

import os
from pathlib import Path

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
