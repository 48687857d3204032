"""What the host knows, on the device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch


def on_device(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """torch.tensor(values, dtype=dtype) on `device`.

    A copy from ordinary memory makes the host wait until a CUDA device has done all that was queued before; from pinned memory it is queued
    as well, and torch keeps that memory until it has been read.
    """
    host = torch.tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def double(x: torch.Tensor) -> torch.Tensor:
    """x in the most precise floats of its device: float64, on mps float32."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def waits_for_counts(device: torch.device) -> bool:
    """Does the host wait when it asks this device how many elements are chosen? Then what is chosen is padded to what the host knows;
    else (on a CPU) nothing is computed that nobody asked for."""
    return device.type != "cpu"
