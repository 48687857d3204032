"""A stage's model folder becomes the folder that users download.

Everything is written beside the final name, checked by a fresh process, and renamed: a folder under its final name is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlmconvert import __version__
from dlmconvert.backbone.gated_files import FILE as GATED_FILE
from dlmconvert.backbone.gated_files import PREFIX as GATED
from dlmconvert.backbone.load import load_config, load_tokenizer
from dlmconvert.backbone.rewrite import rewrite_config
from dlmconvert.backbone.spec import DlmSpec, spec_from_config
from dlmconvert.errors import EXIT_FAILED, UserError
from dlmconvert.exporting.card import CardFacts, model_card, without_local_paths
from dlmconvert.exporting.profiles import PROFILES, Profile, find_profile
from dlmconvert.exporting.profiles.profile import SourceFamily, source_family
from dlmconvert.exporting.verify import Tolerance, verify_export
from dlmconvert.exporting.weights import SHARD_BYTES, TensorInfo, copy_tensors, find_tensor, tensor_table
from dlmconvert.sampling.budget import READING, check_budget
from dlmconvert.sampling.options import SAVED_OPTIONS
from dlmconvert.sampling.order import ORDERS
from dlmconvert.sampling.text import end_ids

UNFINISHED = ".dlmconvert-unfinished"
# Dream's name of an order where it has one: readers of Dream's format know these.
ALGORITHMS = {name: name for name in ORDERS} | {"random": "origin", "confidence": "maskgit_plus", "margin": "topk_margin"}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_SAMPLER_KEYS = tuple(name for name in SAVED_OPTIONS if name not in ("alg", "eos_token_id", "pad_token_id"))


@dataclass(frozen=True)
class ExportReport:
    """files: names in the folder. checks: what verify_export found, or None when it was not run. notes: what was changed on the way."""

    target: Path
    profile: str
    files: list[str]
    num_bytes: int
    checks: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)


def export_folder(
    model_folder: Path,
    target: Path,
    profile: str,
    *,
    card: CardFacts,
    generation: dict[str, Any],
    progress: Callable[[str], None] | None = None,
    verify: bool = True,
    tolerance: Tolerance | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Write `model_folder` as `profile` into `target`, verify it in a fresh process, and rename it into place.

    card: what the model card says. generation: sampler defaults (max_new_tokens and names of sampling/options.py's SAVED_OPTIONS, and
    `order`, as in a recipe's `export`, or `alg`). progress: called with a sentence before each part of the work.
    Raises UserError: the target is not empty; the model cannot be written in this format; the export differs from the model.
    """
    model_folder, target = Path(model_folder), Path(target)
    say = progress or (lambda sentence: None)
    chosen = find_profile(profile)
    say("checking the model")
    config = load_config(model_folder)
    spec = spec_from_config(config, str(model_folder))
    family = source_family(config, str(model_folder))
    values = json.loads((model_folder / "config.json").read_text())
    refuse(chosen, spec, family, values, model_folder)
    table = tensor_table(model_folder)
    if spec.gated_adapter is not None and not any(name.startswith(GATED) for name in table):
        raise UserError(f"{model_folder} has no {GATED_FILE}", "its dlm section speaks of adapters that act on masks only", "export a finished stage's model folder")
    tokenizer = load_tokenizer(model_folder)
    check_tokens(spec, tokenizer, table, embedding_names(config), values, model_folder)
    rewritten, notes = rewritten_values(config)
    generation_values = generation_config(generation, spec, tokenizer, config)

    folder = _workplace(target)
    notes += write_tokenizer(model_folder, folder, tokenizer)
    untie = chosen.untie_head and config.tie_word_embeddings
    common = config_values(values | rewritten, config, spec, tokenizer) | ({"tie_word_embeddings": False} if untie else {})
    _write_json(folder / "config.json", chosen.change_config(common, family))
    _write_json(folder / "generation_config.json", generation_values)
    for name, text in chosen.code_files(family).items():
        (folder / name).write_text(text, encoding="utf-8")
    clones = _head_clone(family, table) if untie else {}
    copy_tensors(model_folder, folder, table, clones, shard_bytes, progress)
    checks = verify_export(folder, model_folder, tolerance=tolerance or Tolerance(), progress=progress) if verify else None
    say("writing the model card")
    _write_json(folder / "dlmconvert.json", passport(card, chosen, family, spec, checks, notes))
    (folder / "README.md").write_text(model_card(card, spec, family, generation_values, checks, notes), encoding="utf-8")
    (folder / UNFINISHED).unlink()
    if target.exists():
        target.rmdir()
    folder.rename(target)
    files = sorted(p.name for p in target.iterdir())
    return ExportReport(target, chosen.name, files, sum(p.stat().st_size for p in target.iterdir()), checks, notes)


# --- may this model be written in this format?


def refuse(profile: Profile, spec: DlmSpec, family: SourceFamily, values: dict[str, Any], model_folder: Path) -> None:
    reasons = profile.refusals(spec, family, values)
    if reasons:
        others = [p.name for p in PROFILES.values() if not p.refusals(spec, family, values)]
        raise UserError(
            f"{model_folder} cannot be exported as {profile.name!r}",
            "; ".join(reasons),
            f"formats that fit: {', '.join(others)} (export.profile=NAME)" if others else "no export format fits this model",
        )


def check_tokens(
    spec: DlmSpec, tokenizer: Any, table: dict[str, TensorInfo], matrices: list[str], values: dict[str, Any], where: Path
) -> None:
    """The tokenizer, the mask token and the matrices on disk agree. Raises UserError that names the first that does not."""
    mask_id = spec.mask_token_id
    rows = {}
    for name in matrices:
        found = find_tensor(table, name)
        if found is None:
            raise UserError(f"{where}: the weights have no {name}", "config.json says that it is not tied to another tensor", "export a finished stage's model folder")
        rows[found] = table[found].shape[0]
    fewest = min(rows.values())
    largest_id = max(tokenizer.get_vocab().values())
    text = tokenizer.convert_ids_to_tokens(mask_id) if 0 <= mask_id < len(tokenizer) else None
    back = None if text is None else tokenizer.convert_tokens_to_ids(text)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    same = [name for name, token_id in special.items() if token_id == mask_id]
    named = [values["mask_token_id"]] if values.get("mask_token_id") is not None else []
    ordinary = tokenizer("The quick brown fox, 1234 (def f(x): return x)\n\tcaf\u00e9 \u4e2d\u6587 _[MASK]_ mask").get("input_ids")
    problems = [
        (not 0 <= mask_id < fewest, f"the mask id {mask_id} has no row", f"rows on disk: {rows}"),
        (largest_id >= fewest, f"the tokenizer knows id {largest_id}, and the embedding has {fewest} rows", f"rows on disk: {rows}"),
        (not 0 < spec.vocab_size <= fewest, f"dlm.vocab_size={spec.vocab_size} is not within the {fewest} rows of the embedding", ""),
        (back != mask_id, f"the mask token does not survive the tokenizer: id {mask_id} is {text!r}, and that is id {back}", ""),
        (
            not spec.mask_is_word and tokenizer.mask_token_id != mask_id,
            f"the tokenizer's mask token {tokenizer.mask_token!r} has id {tokenizer.mask_token_id}, and the model was trained with {mask_id}",
            "",
        ),
        (bool(same), f"the mask id {mask_id} is also the {same[0] if same else ''}", "a gap could not be told from an end"),
        (any(m != mask_id for m in named), f"config.json says mask_token_id={named}, and its dlm section {mask_id}", "the two must agree"),
        (not spec.mask_is_word and mask_id in ordinary, f"ordinary text encodes to the mask id {mask_id}", "then dlm.mask_is_word must be true"),
    ]
    for wrong, what, why in problems:
        if wrong:
            raise UserError(f"{where}: {what}", why, "was the folder edited by hand? run the stage `prepare` again on the source")


def embedding_names(config: Any) -> list[str]:
    """Names of the matrices that have a row a token and a tensor of their own: the input embedding, and the head unless tied."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and not config.tie_word_embeddings:
        wanted.append(head.weight)
    return [name for name, parameter in model.named_parameters() if any(parameter is w for w in wanted)]


# --- the files


def rewritten_values(config: Any) -> tuple[dict[str, Any], list[str]]:
    """The values of the config that denoising changes (windows, dropout, caches), and what they were. A stage's model has them
    changed already; a folder from elsewhere may not."""
    before = config.to_dict()
    notes = rewrite_config(config)
    return {name: value for name, value in config.to_dict().items() if before.get(name) != value}, notes


def config_values(values: dict[str, Any], config: Any, spec: DlmSpec, tokenizer: Any) -> dict[str, Any]:
    """config.json, common to all formats: the source's own values, and both spellings of what readers disagree about.

    values: config.json as it lies in the model folder; config: the same as transformers understands it.
    """
    result = {name: value for name, value in values.items() if name != "_name_or_path" and not (name == "rope_scaling" and value is None)}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        result[name] = values.get(name) if values.get(name) is not None else getattr(tokenizer, name)
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    result |= {
        "dlm": spec.to_dict(),
        "dtype": dtype,
        "torch_dtype": dtype,
        "is_causal": False,
        "mask_token_id": spec.mask_token_id,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "use_cache": False,
        "vocab_size": config.vocab_size,
    }
    return result | rope_values(config)


def rope_values(config: Any) -> dict[str, Any]:
    """`rope_parameters` for transformers 5, `rope_theta` and `rope_scaling` for readers that would fall back to a base of 10,000.

    `rope_scaling` is left out when there is none: as null it says nothing, and transformers 5 warns when it reads it.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return {}
    main, local = parameters, None
    if "full_attention" in parameters:  # a base for each kind of layer (Gemma-3)
        main, local = parameters["full_attention"], parameters.get("sliding_attention")
    scaled = main.get("rope_type", "default") != "default"
    result = {"rope_parameters": parameters, "rope_theta": main["rope_theta"]}
    if scaled:
        result["rope_scaling"] = {name: value for name, value in main.items() if name != "rope_theta"}
    if local is not None:
        result["rope_local_base_freq"] = local["rope_theta"]
    return result


def generation_config(generation: dict[str, Any], spec: DlmSpec, tokenizer: Any, config: Any) -> dict[str, Any]:
    """generation_config.json: the sampler's defaults and the special ids. Raises UserError for a key that no sampler has."""
    unknown = sorted(set(generation) - set(_SAMPLER_KEYS) - {"order", "alg"})
    if unknown:
        raise UserError(f"export.{unknown[0]} is no default of the sampler", "valid: order, " + ", ".join(_SAMPLER_KEYS))
    result = {name: generation[name] for name in _SAMPLER_KEYS if generation.get(name) is not None}
    order = generation.get("order") or generation.get("alg")
    if order is not None:
        result["alg"] = ALGORITHMS.get(order, order)
        if result["alg"] not in ALGORITHMS.values():
            raise UserError(f"export.order={order!r} is no order", "valid: " + ", ".join(ALGORITHMS))
    try:
        check_budget(result.get("budget"), {name: result.get(name) for name in READING})
    except ValueError as error:
        raise UserError(f"the sampler's defaults contradict each other: {error}") from error
    if any(result.get(name) is not None for name in READING):
        result["alg"] = result.get("alg") or ("entropy" if "entropy_bound" in result else ALGORITHMS["confidence"])
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own = getattr(config, name, None)
        result[name] = own if own is not None else getattr(tokenizer, name)
    ends = result["eos_token_id"]
    if ends is not None:  # with bos, where every text begins with one
        ends = list(dict.fromkeys([*(ends if isinstance(ends, list) else [ends]), *end_ids(tokenizer)]))
        result["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if not result.get("temperature"):
        # Greedy, which is the sampler's own default: transformers warns about these keys without sampling.
        result = {name: value for name, value in result.items() if name not in ("temperature", "top_p", "top_k")}
    return result | {"mask_token_id": spec.mask_token_id, "do_sample": "temperature" in result, "use_cache": False}


def write_tokenizer(source: Path, target: Path, tokenizer: Any) -> list[str]:
    """The tokenizer's files, byte for byte, and the maps of special tokens that older readers look for."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / "tokenizer_config.json").is_file():
        raise UserError(f"{source} has no tokenizer_config.json", "the export must carry its tokenizer", "name one: source.tokenizer=FOLDER_OR_HUB_ID")
    values = json.loads((target / "tokenizer_config.json").read_text())
    if "auto_map" in values:
        raise UserError(f"{source}: the tokenizer has code of its own", "an export carries no code that it did not write", "save it as a plain tokenizer.json first")
    clean = {name: value for name, value in values.items() if name not in ("name_or_path", "tokenizer_file", "local_files_only", "is_local")}
    # transformers chooses the class by the model type as well, and the export has another one: name the class that was loaded.
    clean["tokenizer_class"] = type(tokenizer).__name__
    if clean != values:
        _write_json(target / "tokenizer_config.json", clean)
    if not (target / "special_tokens_map.json").is_file():
        _write_json(target / "special_tokens_map.json", {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)})
    if tokenizer.chat_template is None:
        return ["the tokenizer has no chat template"]
    return []


def passport(
    card: CardFacts, profile: Profile, family: SourceFamily, spec: DlmSpec, checks: dict[str, Any] | None, notes: list[str]
) -> dict[str, Any]:
    """dlmconvert.json: what the model card says, for machines."""
    return {
        "dlmconvert": __version__,
        "profile": profile.name,
        "source": without_local_paths(card.source),
        "base_model": card.base_model,
        "source_family": family.model_type,
        "dlm": spec.to_dict(),
        "recipe": without_local_paths(card.recipe),
        "training": without_local_paths(card.training),
        "measured": [without_local_paths(vars(m)) for m in card.measured],
        "checks": checks,
        "notes": notes,
    }


def _head_clone(family: SourceFamily, table: dict[str, TensorInfo]) -> dict[str, str]:
    """Head -> embedding for a target that does not tie: transformers names the pair in the class."""
    clones = {}
    for head, embedding in family.causal_class._tied_weights_keys.items():
        found = find_tensor(table, embedding)
        if find_tensor(table, head) is None and found is not None:
            clones[head] = found
    return clones


def _workplace(target: Path) -> Path:
    """An empty folder beside the target, marked as ours. What an earlier export left there unfinished is removed."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not (target / UNFINISHED).exists():
        raise UserError(f"{target} exists and is not empty", "nothing is overwritten", "choose another folder (--to DIR), or move this one away", exit_code=2)
    folder = target.parent / f"{target.name}.unfinished"
    for leftover in (folder, target):
        if (leftover / UNFINISHED).exists():
            shutil.rmtree(leftover)
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{folder} is in the way", "the export is written there first, and this folder is not ours", "move it away") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be made", str(error), "choose another folder (--to DIR)", exit_code=EXIT_FAILED) from error
    (folder / UNFINISHED).write_text("dlmconvert is writing here, or was stopped; this folder may be deleted\n")
    return folder


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
