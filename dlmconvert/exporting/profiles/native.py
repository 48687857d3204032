"""`native`: own code over the source family's installed classes. Loads in transformers, for any family; keeps everything."""

from __future__ import annotations

from importlib.resources import files
from string import Template
from typing import Any

from dlmconvert import __version__
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.diffusion.alignment import ALIGNMENTS
from dlmconvert.diffusion.block_attention import BLOCK_PATTERNS
from dlmconvert.exporting.copying import ALLOWED, check_standalone, standalone_files
from dlmconvert.exporting.profiles.profile import Profile, SourceFamily


def refusals(spec: DlmSpec, family: SourceFamily, config: dict[str, Any]) -> list[str]:
    reasons = []
    if spec.attention == "causal":
        reasons.append("it has causal attention: it is an autoregressive model, and its own folder loads as one already")
    elif spec.attention not in ("bidirectional", *BLOCK_PATTERNS):
        known = ", ".join(("bidirectional", *BLOCK_PATTERNS))
        reasons.append(f"its attention is {spec.attention!r}, and the sampler that is shipped knows {known}")
    if spec.alignment not in ALIGNMENTS:
        reasons.append(f"its alignment is {spec.alignment!r}, and the code that is shipped knows {', '.join(ALIGNMENTS)}")
    if (spec.block_length is None) == (spec.attention in BLOCK_PATTERNS):
        reasons.append(f"its attention is {spec.attention!r} and its block length {spec.block_length}: block models have one, and others none")
    return reasons


def change_config(values: dict[str, Any], family: SourceFamily) -> dict[str, Any]:
    """The model type is a new one: under the source's own, AutoModel would load a causal model without a word."""
    model_type = _model_type(family)
    causal = f"Dlm{family.causal_class.__name__}"
    auto_map = {
        "AutoConfig": f"configuration_{_module(family)}.Dlm{family.config_class.__name__}",
        "AutoModel": f"modeling_{_module(family)}.Dlm{family.base_class.__name__}",
        "AutoModelForCausalLM": f"modeling_{_module(family)}.{causal}",
    }
    if values["dlm"].get("gated_adapter"):
        del auto_map["AutoModel"]  # adapters that act on masks only belong to the whole model; without them it would be the source
    return values | {"model_type": model_type, "architectures": [causal], "auto_map": auto_map}


def code_files(family: SourceFamily) -> dict[str, str]:
    """configuration_*.py, modeling_*.py, and the sampler beside them, flat."""
    module = _module(family)
    identifiers = _converted_identifiers(family)
    register = "".join(
        f'\nregister_checkpoint_conversion_mapping("{new}", get_checkpoint_conversion_mapping("{old}"), overwrite=True)' for new, old in identifiers
    )
    fields = {
        "version": __version__,
        "source_type": family.model_type,
        "model_type": _model_type(family),
        "module": module,
        "config_class": family.config_class.__name__,
        "config_module": family.config_class.__module__,
        "base_class": family.base_class.__name__,
        "base_module": family.base_class.__module__,
        "causal_class": family.causal_class.__name__,
        "causal_module": family.causal_class.__module__,
        "conversion_import": _CONVERSION_IMPORT if identifiers else "",
        "conversion_register": f"\n# The published files hold other tensors than the model has in memory (fused experts): convert as for the source.{register}\n"
        if identifiers
        else "",
    }
    templates = files("dlmconvert.exporting") / "templates"
    own = {
        f"{name}_{module}.py": Template((templates / f"{name}.py.txt").read_text(encoding="utf-8")).substitute(fields)
        for name in ("configuration", "modeling")
    }
    copied = standalone_files()
    for name, text in own.items():
        check_standalone(name, text, set(own) | set(copied), ALLOWED)
    return own | copied


_CONVERSION_IMPORT = "from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping\n"


def _converted_identifiers(family: SourceFamily) -> list[tuple[str, str]]:
    """(name in the export, name in transformers) of each conversion of tensors that transformers has for this family.

    They are looked up by model type and by class name, and the export has neither of the source's.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    names = [(_model_type(family), family.model_type)]
    names += [(f"Dlm{kind.__name__}", kind.__name__) for kind in (family.base_class, family.causal_class)]
    return [(new, old) for new, old in names if get_checkpoint_conversion_mapping(old) is not None]


def _model_type(family: SourceFamily) -> str:
    return f"dlm_{family.model_type}"


def _module(family: SourceFamily) -> str:
    return _model_type(family).replace("-", "_")


NATIVE = Profile(name="native", refusals=refusals, change_config=change_config, code_files=code_files)
