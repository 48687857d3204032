"""A source checkpoint becomes a model folder tensor by tensor: no more than one tensor is in memory, whatever the size of the model.

The result is the folder that `load_model`, `install_mask_token` and `save_model_folder` write, bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dlmconvert.backbone.load import COMPUTED_BUFFERS, refuse_other_tensors, save_description
from dlmconvert.backbone.mask_token import MaskChoice, tell_tokenizer, with_mask_row
from dlmconvert.backbone.spec import DlmSpec

SHARD_BYTES = 5_000_000_000
# The format's names of the dtypes, in the order in which safetensors lays tensors down: largest alignment first.
_DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_ORDER = list(_DTYPES)
_OLD_NAMES = (".gamma", ".beta", ".weight_g", ".weight_v")  # of layers that transformers renames when it loads them


Opened = Callable[[Path], Any]
"""The opened safetensors file of a path."""


class CannotStream(Exception):
    """The checkpoint has to be loaded whole; the text says why."""


@dataclass(frozen=True)
class SourceTensors:
    """model: the architecture on torch's meta device, without values. dtype: what floating-point tensors are stored in.
    places: name of each tensor of the model (tied ones once) -> the file that holds it and its name there. opened: the files, read lazily."""

    model: Any
    dtype: torch.dtype
    places: dict[str, tuple[Path, str]]
    opened: Opened

    def tensor(self, name: str) -> torch.Tensor:
        file, stored = self.places[name]
        tensor = self.opened(file).get_tensor(stored)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def write(self, folder: Path, tokenizer: Any, spec: DlmSpec, choice: MaskChoice, init: str, seed: int) -> None:
        """The model folder with the mask token in its place. `folder` must not exist yet or be empty. Changes model and tokenizer as
        `install_mask_token` would."""
        folder.mkdir(parents=True, exist_ok=True)
        existing = len(tokenizer)
        matrices = {id(self.model.get_input_embeddings().weight), id(self.model.get_output_embeddings().weight)}
        changed = {name for name in self.places if id(self.model.get_parameter_or_buffer(name)) in matrices}
        if choice.adds_row:
            self.model.resize_token_embeddings(choice.id + 1, mean_resizing=False)
        tell_tokenizer(tokenizer, choice)

        def tensor(name: str) -> torch.Tensor:
            found = self.tensor(name)
            return with_mask_row(found, choice, init, seed, min(existing, len(found))) if name in changed else found

        state = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in _untied(self.model).items()}
        _write_shards(folder, state, tensor)
        save_description(folder, self.model, tokenizer, spec, self.dtype)


def open_source(folder: Path, config: Any, trust_remote_code: bool = False) -> SourceTensors:
    """The checkpoint's tensors, strictly: every tensor of the files is used, or a computed buffer, and none is missing.

    config: already rewritten. Raises CannotStream where transformers itself has to read the files, UserError that lists the tensors
    which are not those of the model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping

    files, opened = _files(folder), cache(_open)
    if (folder / "adapter_config.json").is_file():
        raise CannotStream("adapters lie beside its weights")
    if getattr(config, "quantization_config", None) is not None:
        raise CannotStream("its weights are quantized")
    if config.get_text_config() is not config:
        raise CannotStream("it is a part of a larger model")
    if trust_remote_code and getattr(config, "auto_map", None):
        raise CannotStream("its code is its own")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if get_model_conversion_mapping(model, add_legacy=False):
        raise CannotStream(f"transformers holds the tensors of {config.model_type} under other names or fused")
    if model.get_output_embeddings() is None or getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise CannotStream("its output layer is not a plain matrix")
    stored = {name: file for file in files for name in opened(file).keys()}  # noqa: SIM118 (not a dict)
    if any(name.endswith(_OLD_NAMES) for name in stored):
        raise CannotStream("its tensors have old names")
    kept = _untied(model)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found, unexpected = {}, []
    for name in stored:
        own = next((candidate for candidate in _candidates(name, model.base_model_prefix) if candidate in shapes), None)
        if own is not None:
            found[own] = (stored[name], name)
        elif not name.endswith(COMPUTED_BUFFERS) and not _ignored(name, model._keys_to_ignore_on_load_unexpected):
            unexpected.append(name)
    stored_shapes = {own: list(opened(file).get_slice(name).get_shape()) for own, (file, name) in found.items()}
    mismatched = [f"{own} {shape} instead of {shapes[own]}" for own, shape in stored_shapes.items() if shape != shapes[own]]
    places = {name: _one_of(name, kept, found, model, opened) for name in kept}
    missing = [name for name, place in places.items() if place is None]
    if any(_ignored(name, model._keys_to_ignore_on_load_missing) for name in missing):
        raise CannotStream("transformers computes some of its tensors")
    refuse_other_tensors(folder, model, missing, unexpected, mismatched)
    return SourceTensors(model, _dtype(config, files, opened), places, opened)


def _files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise CannotStream("it has no safetensors files")
    files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not all(file.is_file() for file in files):
        raise CannotStream("some of its files are not there")
    return files


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise CannotStream(f"{file.name} cannot be read") from error


def _candidates(name: str, prefix: str) -> Iterable[str]:
    """Published files may leave the base model's name out (`h.0.` for `transformer.h.0.`)."""
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


def _ignored(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _one_of(name: str, kept: dict[str, Any], found: dict[str, tuple[Path, str]], model: Any, opened: Opened) -> tuple[Path, str] | None:
    """Where a tensor is stored, itself or one that is tied to it. Both may be, with one value."""
    parameter = model.get_parameter_or_buffer(name)
    tied = [other for other in found if other not in kept and model.get_parameter_or_buffer(other) is parameter]
    places = [found[one] for one in (name, *tied) if one in found]
    if len(places) > 1:
        first, *others = (opened(file).get_tensor(stored) for file, stored in places)
        if not all(torch.equal(first, other) for other in others):
            raise CannotStream(f"{name} and {tied[0]} should be tied and differ")
    return places[0] if places else None


def _untied(model: Any) -> dict[str, torch.Tensor]:
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    return remove_tied_weights_from_state_dict(dict(model.state_dict()), model)


def _dtype(config: Any, files: list[Path], opened: Opened) -> torch.dtype:
    """As transformers' `dtype="auto"`: the config's, else that of the first floating-point tensor."""
    if config.dtype is not None:
        return config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype)
    first = opened(files[0])
    return next((t.dtype for name in first.keys() if (t := first.get_tensor(name)).is_floating_point()), torch.float32)  # noqa: SIM118


def _write_shards(folder: Path, state: dict[str, torch.Tensor], tensor: Any) -> None:
    """state: name -> shape and dtype (on meta), in the order in which shards are filled. tensor(name): its values."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(state, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        _write_safetensors(folder / file, {name: state[name] for name in names}, tensor)
    if split.is_sharded:
        index = {"metadata": {**split.metadata, "format": "pt"}, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_safetensors(path: Path, state: dict[str, torch.Tensor], tensor: Any) -> None:
    """The file that safetensors.torch.save_file writes, without having all tensors at once: 8 bytes of length, a JSON header, the data."""
    names = sorted(state, key=lambda name: (_ORDER.index(state[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + state[name].nbytes
        header[name] = {"dtype": _DTYPES[state[name].dtype], "shape": list(state[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            values = tensor(name)
            assert values.shape == state[name].shape and values.dtype == state[name].dtype, (name, values.shape, state[name].shape)
            file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del values
