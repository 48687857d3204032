"""Checkpoints in and out: resolve a name, load strictly, build from a config, save a Hugging Face folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.backbone.gated_files import PREFIX as GATED
from dlmconvert.backbone.gated_files import attach_saved
from dlmconvert.backbone.hub import hub_reachable
from dlmconvert.backbone.rewrite import rewrite_config
from dlmconvert.backbone.spec import DlmSpec, spec_from_config
from dlmconvert.errors import UserError, nearest

_NEEDED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
# Buffers that old checkpoints stored and that models now compute. Dropped on purpose.
COMPUTED_BUFFERS = ("attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")


class NotFound(UserError):
    """The checkpoint is neither a folder, nor cached, nor reachable."""


def resolve_checkpoint(name: str, revision: str | None = None) -> Path:
    """A folder with the checkpoint's files: `name` itself, or a snapshot of the Hub repository (from the local cache first).

    Raises NotFound.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not a checkpoint: it has no config.json", "", "name the folder that holds config.json and *.safetensors")
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise NotFound(f"no such folder: {name}", nearest(folder.name, siblings) if siblings else "", "check the path, or give a Hub id such as gpt2")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_NEEDED, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError):
        pass
    unreachable = NotFound(
        f"{name!r} is neither a folder here nor in the local cache, and the Hub cannot be reached",
        "",
        "download it where there is a network (hf download NAME), then give the folder: source.model=FOLDER",
    )
    if not hub_reachable():
        raise unreachable
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_NEEDED))
    except RepositoryNotFoundError as error:
        raise NotFound(f"the Hub has no model {name!r} (or it is private)", "", "check the spelling; for a gated model run: hf auth login") from error
    except RevisionNotFoundError as error:
        raise NotFound(f"{name} has no revision {revision!r}", "", "leave source.revision out for the default branch") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError, ConnectionError) as error:
        unreachable.why = str(error).splitlines()[0][:200]
        raise unreachable from error


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint folder. Raises UserError for an unknown architecture."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{folder}: transformers does not know this architecture",
            str(error).splitlines()[0][:300],
            "upgrade transformers, or (if you trust the checkpoint's own code) set source.trust_remote_code=true",
        ) from error


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or Hub id. One that names no family (`tokenizer_class: TokenizersBackend`) is taken as its
    tokenizer.json says: AutoTokenizer would rebuild it after the model beside it (under qwen2, with Qwen's splitting rules)."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        settings = Path(folder) / "tokenizer_config.json"
        values = json.loads(settings.read_text()) if settings.is_file() and (Path(folder) / "tokenizer.json").is_file() else {}
        if values.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast") and "auto_map" not in values:
            return PreTrainedTokenizerFast.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} has no tokenizer that can be loaded",
            str(error).splitlines()[0][:300],
            "name one: source.tokenizer=FOLDER_OR_HUB_ID",
        ) from error


def load_model(folder: Path, config: Any, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False, besides: tuple[str, ...] = ()) -> Any:
    """The checkpoint's model, strictly: every tensor of the file is used, or a computed buffer, and none is missing.

    config: already rewritten. besides: how tensors are called that others read. Raises UserError that lists the tensors otherwise.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is told by the stage
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed and refused below, by name
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: the weights cannot be loaded", str(error).strip().splitlines()[0][:300], "is the folder complete? (model.safetensors, or the index and all shards)") from error
    unexpected = [k for k in info["unexpected_keys"] if not k.endswith(COMPUTED_BUFFERS) and not k.startswith(besides)]
    mismatched = [f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    refuse_other_tensors(folder, model, info["missing_keys"], unexpected, mismatched)
    return model


def refuse_other_tensors(folder: Path, model: Any, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]) -> None:
    """Raise UserError that lists the tensors when there are any."""
    problems = {"missing from the file": sorted(missing), "not used by the model": sorted(unexpected), "of another shape": sorted(mismatched)}
    problems = {kind: names for kind, names in problems.items() if names}
    if problems:
        listed = "; ".join(f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" for kind, names in problems.items())
        raise UserError(f"{folder}: the tensors are not those of {type(model).__name__}", listed, "the conversion is strict: mend the checkpoint, or name the right config")


def scratch_config(fields: dict[str, Any]) -> Any:
    """A transformers config from a recipe's `source.scratch`. Raises UserError for an unknown family or field."""
    from transformers import CONFIG_MAPPING

    fields = dict(fields)
    kind = fields.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"source.scratch.model_type={kind!r} is no family of transformers", nearest(kind, list(CONFIG_MAPPING)), "")
    config = CONFIG_MAPPING[kind]()
    # Published configs carry head_dim where the class has no default for it.
    unknown = [name for name in fields if not hasattr(config, name) and name != "head_dim"]
    if unknown:
        names = sorted(set(vars(config)) | set(config.attribute_map))
        raise UserError(f"source.scratch.{unknown[0]} is no field of a {kind} config", nearest(unknown[0], names), "")
    return CONFIG_MAPPING[kind](**fields)


def build_model(config: Any, seed: int) -> Any:
    """Random float32 weights, a pure function of (config, seed)."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float()


def save_model_folder(folder: Path, model: Any, tokenizer: Any, spec: DlmSpec | None, dtype: torch.dtype | None = None) -> None:
    """A plain Hugging Face folder: config.json with its `dlm` section, safetensors (shards of 5 GB), tokenizer.

    dtype: of the saved floating-point tensors; None keeps the model's. Tied tensors are written once. `folder` must not exist yet
    or be empty; callers write beside the final name and rename.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
    # Families whose experts transformers fuses in memory go back to the names of their published files.
    state = revert_weight_conversion(model, state)
    dtype = dtype or model.dtype
    state = {name: _own_storage((t.to(dtype) if t.is_floating_point() else t).cpu()) for name, t in state.items()}
    save_torch_state_dict(state, folder, max_shard_size="5GB", metadata={"format": "pt"})
    save_description(folder, model, tokenizer, spec, dtype)


def save_description(folder: Path, model: Any, tokenizer: Any, spec: DlmSpec | None, dtype: torch.dtype) -> None:
    """Everything of a model folder but its weights. model: may be on the meta device. dtype: of the saved floating-point tensors."""
    # Not model.config.save_pretrained(): `dlm` and `is_causal` are this project's words, and stay out of the live config.
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    for name in ("is_causal", "_name_or_path"):  # the latter is a path on this machine
        config.pop(name, None)
    if spec is not None:
        config["dlm"] = spec.to_dict()
        config["is_causal"] = spec.attention == "causal"
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if config.get(name) is None and getattr(tokenizer, name) is not None:
                config[name] = getattr(tokenizer, name)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    if spec is None and model.can_generate():
        # The AR model's sampling defaults say nothing about a denoiser, so a folder with a spec does not inherit them.
        # Written as it is: save_pretrained() refuses values that published checkpoints carry (a temperature without do_sample, Llama-2).
        (folder / "generation_config.json").write_text(model.generation_config.to_json_string())


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    # An expert is a slice of its family's fused tensor; safetensors writes whole storages only.
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def load_denoiser(
    folder: str | Path,
    device: str = "auto",
    dtype: torch.dtype | str = "auto",
    attention: str | None = None,
    trust_remote_code: bool = False,
    block_length: int | None = None,
) -> Denoiser:
    """A converted model folder as a Denoiser in eval mode.

    attention, block_length: override the pattern of the spec (a model before its conversion is scored as it will be after). `causal` reads the model as
    the AR model that it was or is, aligned by shift; an ordinary AR checkpoint will do then. The folder may also be an export of
    ours: its weights carry the source's names, and its own code is not needed here.
    """
    folder = Path(folder)
    config = source_config(folder, trust_remote_code)
    if attention == "causal" and getattr(config, "dlm", None) is None:
        spec = DlmSpec(vocab_size=config.get_text_config().vocab_size)
    else:
        spec = spec_from_config(config, str(folder))
    for name in ("dlm", "is_causal"):
        if hasattr(config, name):
            delattr(config, name)
    rewrite_config(config)
    model = load_model(folder, config, dtype, trust_remote_code, () if spec.gated_adapter is None else (GATED,))
    adapters = None if spec.gated_adapter is None else attach_saved(model, spec.gated_adapter, spec.mask_token_id, folder).to(pick_device(device))
    model.to(pick_device(device)).eval()
    if attention is not None:
        spec = replace(spec, attention=attention, block_length=block_length, alignment="shift" if attention == "causal" else spec.alignment)
    return Denoiser(model, spec, load_tokenizer(folder), adapters=adapters).eval()


def source_config(folder: Path, trust_remote_code: bool) -> Any:
    """The folder's config; for an export with its own model type, that of the source's family."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json", "", "name a run folder, a stage's model folder, or an export")
    values = json.loads((folder / "config.json").read_text())
    if not str(values.get("model_type", "")).startswith("dlm_"):
        return load_config(folder, trust_remote_code)
    values["model_type"] = values["model_type"].removeprefix("dlm_")
    values.pop("auto_map", None)
    with tempfile.TemporaryDirectory(prefix="dlmconvert-") as view:
        (Path(view) / "config.json").write_text(json.dumps(values))
        return load_config(Path(view))


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA, else Apple's GPU, else the CPU. Raises UserError when a named device is not there, or is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device=cuda, but torch sees no CUDA device", "", "dlmconvert doctor says what this machine has; engine.device=cpu runs anywhere")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("engine.device=mps, but torch sees no Apple GPU", "", "engine.device=cpu runs anywhere")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name!r} is no device", "", "auto, cpu, cuda, cuda:1 (the second GPU) or mps") from error
