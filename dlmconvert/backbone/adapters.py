"""Low-rank adapters (peft): attach, save, load, merge. The mask token's row is trained beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dlmconvert.errors import UserError


def attach_lora(
    model: Any, *, rank: int, alpha: float, dropout: float, target_modules: str | list[str], mask_token_id: int | None, seed: int
) -> Any:
    """The model wrapped by peft, with every other parameter frozen.

    mask_token_id: the embedding row that is trained as well (a fresh row would otherwise stay as it was), or None when the mask
    is an ordinary word. Tied output rows follow their input row.
    """
    from peft import LoraConfig, get_peft_model

    trainable = None
    if mask_token_id is not None:
        trainable = {_embedding_name(model): [mask_token_id]}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        bias="none",
        task_type="CAUSAL_LM",
        trainable_token_indices=trainable,
        fan_in_fan_out=model.config.model_type == "gpt2",  # its linear layers keep their weights transposed
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"no adapter fits: target_modules={target_modules!r}", str(error).splitlines()[0], "use target_modules: all-linear") from error


def _embedding_name(model: Any) -> str:
    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        if module is embedding:
            return name
    raise AssertionError("the input embedding is not a module of its model")


def merge_lora(model: Any) -> Any:
    """The adapters added into the weights: a plain model again, ties kept."""
    return model.merge_and_unload()


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """A peft adapter folder beside the merged model. base: what the adapter sits on, for its config."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, default=_jsonable, sort_keys=True) + "\n")


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
