"""README.md of an export: what it is, how to run it, how it was made, what was measured and what was not.

Numbers come from the caller and are shown as they are; a number that is absent leaves no row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from dlmconvert import __version__
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.diffusion.block_attention import BLOCK_PATTERNS
from dlmconvert.exporting.profiles.profile import SourceFamily

LOCAL_PATH = re.compile(r"^(/[^/\s<>{}|]+/|~/|[A-Za-z]:\\)")


@dataclass(frozen=True)
class Measured:
    """One number. what: for example `NELBO after adaptation`; unit: `nats a token`; on: the text and how much of it."""

    what: str
    value: float
    unit: str
    standard_error: float | None = None
    on: str = ""


@dataclass(frozen=True)
class CardFacts:
    """What a card says beyond what the folder itself knows.

    name: of the model. source: what was converted, in words or as a Hub id; base_model: its Hub id, when it has one.
    license: the source's, when known. recipe: resolved, as plain values. training: facts such as steps or tokens seen, by their names.
    measured: numbers in the order in which they are shown; values of None are left out.
    example: text before and after a gap, for the code sample.
    """

    name: str
    source: str
    base_model: str | None = None
    license: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    measured: Sequence[Measured] = ()
    example: tuple[str, str] = ("Once upon a time", "and they were happy.")


def model_card(
    facts: CardFacts, spec: DlmSpec, family: SourceFamily, generation: dict[str, Any], checks: dict[str, Any] | None, notes: list[str]
) -> str:
    """The text of README.md."""
    parts = [
        _front_matter(facts),
        f"# {facts.name}",
        f"A masked diffusion language model, converted from the autoregressive model {_source(facts)} with dlmconvert {__version__} "
        f"(method `{spec.method}`). It fills masked tokens, {_view(spec)}, in any order and several at a time.",
        _warnings(spec),
        "## Use",
        _usage(facts, spec, generation),
        "## What it is",
        _axes(spec, family),
        _numbers(facts),
        _training(facts),
        _checks(checks, notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def without_local_paths(value: Any) -> Any:
    """The value with folders of this machine shortened to their last part; everything else is untouched."""
    if isinstance(value, str) and LOCAL_PATH.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    if isinstance(value, Mapping):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(item) for item in value]
    return value


def _front_matter(facts: CardFacts) -> str:
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["diffusion", "masked-diffusion", "dlmconvert", "custom_code"]}
    if facts.base_model:
        values["base_model"] = facts.base_model
    if facts.license:
        values["license"] = facts.license
    return "---\n" + yaml.safe_dump(values, sort_keys=True).strip() + "\n---"


def _source(facts: CardFacts) -> str:
    if facts.base_model:
        return f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    return str(without_local_paths(facts.source))


def _warnings(spec: DlmSpec) -> str:
    lines = [
        f"- **{'Two models in one' if spec.gated_adapter else 'Not an autoregressive model'}.** {_attention_warning(spec)} Load it with `trust_remote_code=True` (transformers 5.22 or newer).",
        "- Its likelihood is a **bound**: a NELBO is an upper bound of the negative log-likelihood, estimated by sampling masks. "
        "It is not directly comparable with an autoregressive NLL, which is exact.",
    ]
    if spec.trained == "ar":
        lines.append("- **The weights were not trained after the conversion**: they are those of the autoregressive source.")
    if spec.mask_is_word:
        lines.append(f"- The mask token (id {spec.mask_token_id}) is an ordinary word piece, and is never generated.")
    return "\n".join(lines)


_PREDICT = "`model.predict(tokens)` gives the prediction of each masked token, aligned."


def _view(spec: DlmSpec) -> str:
    return "block after block" if spec.attention in BLOCK_PATTERNS else "seeing both sides of them"


def _attention_warning(spec: DlmSpec) -> str:
    if spec.gated_adapter is not None:
        return "Adapters act on masks only: `generate()` is the autoregressive source, bit for bit, and `diffusion_generate()` the diffusion model."
    if spec.attention in BLOCK_PATTERNS:
        return f"It fills blocks of {spec.block_length} tokens from left to right, each seeing the text before it and itself; `generate()` refuses."
    return "Its attention sees both sides, so next-token decoding gives nonsense; `generate()` refuses."


_SHOWN = (
    "max_new_tokens", "steps", "alg", "budget", "threshold", "factor", "entropy_bound", "block_length", "cache", "draft_length", "revision",
    "revision_strength", "initial_length", "temperature", "top_p", "top_k",
)  # fmt: skip


def _usage(facts: CardFacts, spec: DlmSpec, generation: dict[str, Any]) -> str:
    before, after = facts.example
    is_block = spec.attention in BLOCK_PATTERNS
    defaults = ", ".join(f"{name}={generation[name]!r}" for name in _SHOWN if name in generation)
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

# continue a prompt
prompt = tokenizer({before!r}, return_tensors="pt")
tokens = model.diffusion_generate(**prompt, seed=0)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))

# {"fill a gap of 16 tokens at the end (nothing right of a block is ever seen)" if is_block else "fill a gap of 16 tokens, seeing both sides"}
print(model.infill({f"{before}[[MASK:16]]" + ("" if is_block else f" {after}")!r}, tokenizer=tokenizer, seed=0))
```

Defaults (generation_config.json): {defaults or "those of the sampler"}. `alg` is the order in which positions are filled: `origin` (random), `maskgit_plus`
(confidence), `topk_margin`, `entropy`. Fewer `steps` fill more tokens at once: faster, and worse. {"" if is_block else _PREDICT}"""


def _axes(spec: DlmSpec, family: SourceFamily) -> str:
    alignment = {"shift": "hidden state i-1 predicts token i (`shift`)", "in_place": "hidden state i predicts token i (`in_place`)"}
    rows = [
        ("source family", f"`{family.model_type}` (weights under the source's own tensor names)"),
        ("attention", f"`{spec.attention}`" + (f", blocks of {spec.block_length}" if spec.block_length else "")),
        ("alignment", alignment.get(spec.alignment, spec.alignment)),
        ("corruption", f"`{spec.corruption}`, mask token {spec.mask_token_id}"),
        ("objective", f"`{spec.objective}`"),
        ("last stage trained", f"`{spec.trained}`"),
        *([("adapters", "on masks only, tensors `gated.*`: " + ", ".join(f"{k}={v}" for k, v in spec.gated_adapter.items()))] if spec.gated_adapter else []),
        *([("annealing", ", ".join(f"{k}={v}" for k, v in spec.annealing.items()))] if spec.annealing else []),
    ]
    return _table(("", ""), rows)


def _numbers(facts: CardFacts) -> str:
    shown = [m for m in facts.measured if m.value is not None]
    if not shown:
        return "## Measured\n\nNothing was measured for this card."
    rows = [
        (m.what, f"{m.value:.4g}" + (f" +- {m.standard_error:.2g}" if m.standard_error is not None else ""), m.unit, without_local_paths(m.on)) for m in shown
    ]
    return "## Measured\n\n" + _table(("what", "value (+- standard error)", "unit", "on"), rows)


def _training(facts: CardFacts) -> str:
    parts = ["## How it was made"]
    known = {k: v for k, v in facts.training.items() if v is not None}
    if known:
        parts.append(_table(("", ""), [(k, f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else str(without_local_paths(v))) for k, v in known.items()]))
    if facts.recipe:
        text = yaml.safe_dump(without_local_paths(facts.recipe), sort_keys=False, allow_unicode=True, width=120).strip()
        parts.append(f"The exact recipe (`dlmconvert run recipe.yaml`; local folders are shortened to their names):\n\n```yaml\n{text}\n```")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _checks(checks: dict[str, Any] | None, notes: list[str]) -> str:
    lines = ["## Checked"]
    if checks is None:
        lines.append("This export was **not** compared with the trained model.")
    else:
        moved, total = checks["earlier_predictions_moved_by_a_later_token"]
        exact = "exactly equal" if checks["logits_exact"] else f"equal within {checks['largest_logit_difference']:.2g}"
        lines.append(
            "\n".join(
                [
                    f"- Loaded with {checks['loaded_with']}.",
                    f"- Logits {exact} to the trained model's at {checks['positions_compared']} predictions ({'; '.join(checks['states'])}); "
                    f"allowed: {checks['allowed_logit_difference']}.",
                    *(["- Without masks its autoregressive logits (`as_source`) are those of the source's weights, bit for bit."] if "autoregressive_logits" in checks else []),
                    f"- A change of the last token moved {moved} of {total} earlier predictions.",
                    f"- {checks['sampler_parity']}; the mask token is never produced.",
                    "- The tokenizer encodes as in training, and the mask token survives it. " + "; ".join(checks["files"]) + ".",
                ]
            )
        )
    lines.append("Not checked: any runtime but transformers (SGLang, LMDeploy, llama.cpp, vLLM), other attention kernels, GPUs, quantisation, and the truth of what it writes.")
    if notes:
        lines.append("Notes: " + "; ".join(notes) + ".")
    return "\n\n".join(lines)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])
