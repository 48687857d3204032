"""Tensors from folder to folder, a shard at a time: a model of any size passes through in the memory of one shard."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlmconvert.backbone.gated_files import FILE as GATED
from dlmconvert.errors import UserError

SHARD_BYTES = 5 * 10**9
# Names that must not reach users: unmerged adapters, optimizer state, a frozen teacher.
_FOREIGN = ("lora_", "base_model.model.", "modules_to_save", "optimizer", "exp_avg", "teacher.", "reference_model.")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and what it is, without its values."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


def tensor_table(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder, by name, from the headers alone; those of adapters that act on masks only among them. Raises UserError for a folder without safetensors, for
    shards that are missing, and for tensors that do not belong into a model."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    table: dict[str, TensorInfo] = {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}", "the weights are missing, or in an older format than safetensors", "export a finished stage's model folder")
        table |= _header(folder, name)
    if (folder / GATED).is_file():
        table |= _header(folder, str(GATED))
    foreign = sorted(name for name in table if any(word in name for word in _FOREIGN))
    if foreign:
        raise UserError(f"{folder}: {foreign[0]} is no tensor of a finished model", f"{len(foreign)} such tensors: adapters that were not merged, or training state", "merge the adapters before exporting")
    return table


def copy_tensors(
    folder: Path,
    target: Path,
    table: dict[str, TensorInfo],
    clones: dict[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> list[str]:
    """Write the tensors into `target`, names and bytes unchanged, in shards of at most `shard_bytes`; returns the file names.

    clones: new name -> name of the tensor that is written a second time under it.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    source_of = {name: name for name in table} | (clones or {})
    shards: list[list[str]] = [[]]
    filled = 0
    for name, source in source_of.items():
        size = table[source].num_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file_name, tensors in zip(names, shards, strict=True):
        if progress is not None:
            progress(f"writing {file_name}")
        with ExitStack() as stack:
            files = {f: stack.enter_context(safe_open(folder / f, "pt")) for f in sorted({table[source_of[t]].file for t in tensors})}
            values = {name: files[table[source_of[name]].file].get_tensor(source_of[name]) for name in tensors}
            values |= {name: values[name].clone() for name in tensors if name != source_of[name]}  # aliases cannot be saved
            save_file(values, target / file_name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(table[source].num_bytes for source in source_of.values())},
            "weight_map": {t: file_name for file_name, tensors in zip(names, shards, strict=True) for t in tensors},
        }
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        names = [*names, "model.safetensors.index.json"]
    return names


def find_tensor(table: dict[str, Any], name: str) -> str | None:
    """The name under which a model's parameter lies in the files: itself, or with the base model's prefix on one side only."""
    if name in table:
        return name
    for candidate in table:
        if candidate.endswith("." + name) or name.endswith("." + candidate):
            return candidate
    return None


def _header(folder: Path, name: str) -> dict[str, TensorInfo]:
    with (folder / name).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {
        tensor: TensorInfo(name, tuple(info["shape"]), info["dtype"], info["data_offsets"][1] - info["data_offsets"][0])
        for tensor, info in header.items()
    }
