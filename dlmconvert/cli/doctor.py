"""`dlmconvert doctor`: is this machine ready?"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

OK, NOTE, WRONG = "ok", "note", "wrong"
# Packages that a command imports, beyond those that only some settings need (deepspeed, datasets).
REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "peft", "datasets", "pydantic", "numpy")
LOW_DISK_BYTES = 5e9


def doctor(json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Versions, devices, memory, disk and network: what there is, and what is missing. Exit code 1 when something required is."""
    from dlmconvert.cli.console import out
    from dlmconvert.errors import EXIT_FAILED

    found = checks()
    if json:
        import json as json_module

        out(json_module.dumps({"ready": not any(check["state"] == WRONG for check in found), "checks": found}, indent=1))
    else:
        from rich.markup import escape
        from rich.table import Table

        colours = {OK: "green", NOTE: "yellow", WRONG: "red"}
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for check in found:
            text = check["value"] + (f"\n{check['hint']}" if check["hint"] else "")
            table.add_row(f"[{colours[check['state']]}]{check['state']}[/]", check["name"], escape(text))
        out(table)
    if any(check["state"] == WRONG for check in found):
        raise typer.Exit(EXIT_FAILED)


def checks() -> list[dict[str, Any]]:
    """Every check: {name, state: ok | note | wrong, value, hint}. Only `wrong` stops a conversion."""
    return [_python(), *_packages(), *_devices(), _cores(), _memory(), _disk(), _hub(), _openmp(), _locale()]


def _check(name: str, state: str, value: str, hint: str = "") -> dict[str, Any]:
    return {"name": name, "state": state, "value": value, "hint": hint}


def _python() -> dict[str, Any]:
    version = ".".join(map(str, sys.version_info[:3]))
    fine = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return _check("Python", OK if fine else WRONG, f"{version} ({sys.executable})", "" if fine else "3.11 to 3.13 are supported")


def requirements() -> dict[str, str]:
    """{package: version range} as this package's metadata says; {} when it runs from a source tree that was never installed."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    try:
        lines = requires("dlmconvert") or []
    except PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {r.name.replace("-", "_"): str(r.specifier) for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


def _packages() -> list[dict[str, Any]]:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.specifiers import SpecifierSet

    wanted = requirements()
    found = []
    for name in (*REQUIRED, "deepspeed"):
        bounds = wanted.get(name, "")
        try:
            here = version(name)
        except PackageNotFoundError:
            if name == "deepspeed":
                found.append(_check(name, NOTE, "not installed", "not needed on one device; clusters need it (Linux: pip install deepspeed)"))
            else:
                found.append(_check(name, WRONG, "not installed", f"pip install '{name}{bounds}'"))
            continue
        fine = SpecifierSet(bounds).contains(here, prereleases=True)
        state = OK if fine else NOTE if name == "deepspeed" else WRONG
        found.append(_check(name, state, here + (f" (required: {bounds})" if bounds else ""), "" if fine else f"pip install '{name}{bounds}'"))
    if not wanted:
        found.append(_check("dlmconvert", NOTE, "runs from a source tree", "versions were not compared: pip install . records what is required"))
    return found


def _devices() -> list[dict[str, Any]]:
    from dlmconvert.planning.plan import size

    try:
        import torch
    except Exception as error:  # a broken installation raises whatever its libraries raise
        return [_check("devices", WRONG, f"torch cannot be imported: {error}", "install torch again: https://pytorch.org")]
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        precision = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found.append(_check(f"GPU {index}", OK, f"{facts.name}, {size(facts.total_memory)}, {precision}"))
    if torch.backends.mps.is_available():
        found.append(_check("GPU", OK, "Apple GPU (engine.device=mps), memory shared with the machine"))
    if not found:
        hint = "this torch is built for CPUs" if torch.version.cuda is None and torch.version.hip is None else "torch was built for GPUs, but sees none: driver?"
        found.append(_check("GPU", NOTE, "none: everything runs on the CPU", hint))
    return found


def _cores() -> dict[str, Any]:
    from dlmconvert.planning.machine import cpu_cores

    return _check("cores", OK, str(cpu_cores()))


def _memory() -> dict[str, Any]:
    from dlmconvert.planning.machine import ram_bytes
    from dlmconvert.planning.plan import size

    total = ram_bytes()
    if total is None:
        return _check("memory", NOTE, "unknown")
    return _check("memory", OK, f"{size(total)}", "dlmconvert plan RECIPE says what a conversion needs")


def _disk() -> dict[str, Any]:
    from dlmconvert.planning.machine import free_disk_bytes
    from dlmconvert.planning.plan import size

    free = free_disk_bytes("runs")
    if not os.access(next(p for p in ("runs", ".") if os.path.isdir(p)), os.W_OK):
        return _check("disk", WRONG, "./runs cannot be written", "go to another folder, or set run.folder")
    low = free < LOW_DISK_BYTES
    return _check("disk", NOTE if low else OK, f"{size(free)} free for ./runs", "a run of GPT-2 small takes about 10 GB" if low else "")


def _hub() -> dict[str, Any]:
    from dlmconvert.backbone.hub import hub_reachable

    num_cached, folder = cached_models()
    cached = f"{num_cached} models in the cache ({folder})"
    if hub_reachable(timeout=3.0):
        return _check("Hub", OK, f"reachable; {cached}")
    return _check("Hub", NOTE, f"not reachable; {cached}", "local folders and cached models work; tiny needs neither. HF_HUB_OFFLINE=1 saves waiting for it")


def cached_models() -> tuple[int, str]:
    from pathlib import Path

    try:
        from huggingface_hub import constants
    except ImportError:
        return 0, "?"
    folder = Path(constants.HF_HUB_CACHE)
    return len(list(folder.glob("models--*"))), str(folder)


def _openmp() -> dict[str, Any]:
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.lower() == "passive":
        return _check("OMP_WAIT_POLICY", OK, policy)
    hint = "on a busy machine, waiting threads that spin make a step up to ten times slower: export OMP_WAIT_POLICY=passive"
    return _check("OMP_WAIT_POLICY", NOTE, policy or "not set", hint)


def _locale() -> dict[str, Any]:
    import locale

    encoding = locale.getpreferredencoding(False)
    fine = encoding.lower().replace("-", "") == "utf8"
    hint = "" if fine else "text files are read as UTF-8 all the same; the terminal may not show every character: export LC_ALL=C.UTF-8"
    return _check("locale", OK if fine else NOTE, encoding, hint)
