"""What a converted model is: the `dlm` section of its config.json.

The sampler, the evaluator and the exporter read it from there; nobody repeats it by hand.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dlmconvert.errors import UserError


@dataclass(frozen=True)
class DlmSpec:
    """The choices that a model was trained with.

    mask_token_id: the id that stands for [MASK] in the model's input.
    vocab_size: tokens of ordinary text; ids from here on (padding rows, an added mask token) are never produced.
    mask_is_word: the mask id is an ordinary word piece, so masks must be tracked as booleans.
    trained: `ar`, `adapt` or `sft`: the last stage that changed the weights.
    annealing: the share of non-causal pairs that was open at the end of training, and the schedule that led there.
    gated_adapter: adapters beside the weights that act on masks only (backbone/gated.py); None where there are none.
    """

    attention: str = "bidirectional"
    alignment: str = "shift"
    block_length: int | None = None
    corruption: str = "masking"
    objective: str = "elbo"
    mask_token_id: int = -1
    vocab_size: int = 0
    mask_is_word: bool = False
    method: str = "diffullama"
    trained: str = "ar"
    annealing: dict[str, Any] = field(default_factory=dict)
    gated_adapter: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def banned_ids(self) -> list[int]:
        """Ids inside the vocabulary that a sampler must never produce. Ids from `vocab_size` on are banned as well."""
        return [] if self.mask_token_id >= self.vocab_size else [self.mask_token_id]


def spec_from_config(config: Any, where: str) -> DlmSpec:
    """The spec of a loaded transformers config (its attribute `dlm`).

    Raises UserError when the folder is an ordinary AR checkpoint, or was written by a newer version with other fields.
    """
    section = getattr(config, "dlm", None)
    if not isinstance(section, dict):
        raise UserError(
            f"{where} is not a converted model: its config.json has no `dlm` section",
            "it looks like an ordinary autoregressive checkpoint",
            f"convert it first: dlmconvert adapt {where} data.train=TEXT",
        )
    known = set(DlmSpec.__dataclass_fields__)
    unknown = sorted(set(section) - known)
    if unknown:
        raise UserError(
            f"{where}: the `dlm` section of config.json has unknown keys {unknown}", "it was written by a newer dlmconvert", "upgrade dlmconvert"
        )
    return DlmSpec(**section)
