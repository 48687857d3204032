"""Adapters that act on masks only, beside the source's weights in a model folder: gated/adapter.safetensors.

The tensors carry the names that they have in an export, where they are a part of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlmconvert.backbone.gated import GatedAdapters
from dlmconvert.errors import UserError

FILE = Path("gated") / "adapter.safetensors"
PREFIX = "gated."


def attach_new(model: Any, described: dict[str, Any], mask_token_id: int, seed: int) -> GatedAdapters:
    """Fresh adapters on a model. described: rank, alpha, target_modules. Raises UserError when no layer has such a name."""
    try:
        return GatedAdapters(model, **described, mask_token_id=mask_token_id, seed=seed)
    except ValueError as error:
        raise UserError(f"no adapter fits: target_modules={described['target_modules']!r}", str(error), "use target_modules: all-linear") from error


def attach_saved(model: Any, described: dict[str, Any], mask_token_id: int, folder: Path) -> GatedAdapters:
    """The adapters of a model folder, attached."""
    adapters = GatedAdapters(model, **described, mask_token_id=mask_token_id, seed=None)
    load_gated(adapters, folder)
    return adapters


def save_gated(adapters: GatedAdapters, folder: Path) -> None:
    from safetensors.torch import save_file

    (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: p.detach().float().cpu().contiguous() for name, p in adapters.named_parameters()}
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def load_gated(adapters: GatedAdapters, folder: Path) -> None:
    """Of a stage's model folder or of an export. Raises UserError when they are missing or of another shape."""
    from safetensors import safe_open

    files = [folder / FILE] if (folder / FILE).is_file() else sorted(folder.glob("model*.safetensors"))
    tensors = {}
    try:
        for path in files:
            with safe_open(path, "pt") as file:
                tensors |= {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys() if name.startswith(PREFIX)}  # noqa: SIM118
        adapters.load_state_dict(tensors)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the adapters in {folder} cannot be read", str(error).strip().splitlines()[0][:200], "the folder is incomplete: train or copy it again") from error
