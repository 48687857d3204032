"""What a target format decides; everything else is common to all of them (package.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.errors import UserError


@dataclass(frozen=True)
class SourceFamily:
    """The transformers classes of the model that is exported, by the type of its config.

    model_type: `gpt2`, `llama`, ... The classes are the installed ones; nothing is copied from them.
    """

    model_type: str
    config_class: type
    base_class: type
    causal_class: type


@dataclass(frozen=True)
class Profile:
    """A target format.

    refusals: why this model cannot be written in this format, as sentences (empty: it can).
    change_config: config.json's values for this target, from the common ones.
    code_files: file name -> text of the code that is shipped.
    untie_head: write `lm_head.weight` as a tensor of its own, because the target's loaders do not tie.
    """

    name: str
    refusals: Callable[[DlmSpec, SourceFamily, dict[str, Any]], list[str]]
    change_config: Callable[[dict[str, Any], SourceFamily], dict[str, Any]]
    code_files: Callable[[SourceFamily], dict[str, str]]
    untie_head: bool = False


def source_family(config: Any, where: str) -> SourceFamily:
    """The installed classes for a config. Raises UserError when the model's code is not part of transformers."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.auto_factory import _get_model_class

    kind = type(config)
    if not kind.__module__.startswith("transformers.models.") or kind not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"{where}: the code of {config.model_type} is not part of transformers",
            "an export subclasses the installed classes of the source's family, and this one has none",
            "export a model of a family that transformers has",
        )
    return SourceFamily(
        model_type=config.model_type,
        config_class=kind,
        base_class=_get_model_class(config, AutoModel._model_mapping),
        causal_class=_get_model_class(config, AutoModelForCausalLM._model_mapping),
    )
