"""How much of the AR source is left in a converted model: its weights, and what it computes when it is read from left to right.

Shapes: B rows, L positions, N predicted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.backbone.rewrite import call_model
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.data.loader import positions
from dlmconvert.diffusion.alignment import predictable, predicting_positions
from dlmconvert.diffusion.attention import AttentionContext
from dlmconvert.diffusion.objective import cross_entropy
from dlmconvert.errors import UserError
from dlmconvert.evaluation.nelbo import RowSource
from dlmconvert.evaluation.own_tokens import OwnTokens

KINDS = ("attention", "MLP", "norm", "embedding", "head", "other")
# The first that is found in a tensor's name decides: a norm inside an attention block is a norm.
_KIND_WORDS = (
    ("head", r"lm_head|embed_out"),
    ("norm", r"norm|(^|\.)ln_"),
    ("attention", r"attn|attention"),
    ("MLP", r"mlp|\.fc[12]\.|feed_forward|moe|expert"),
    ("embedding", r"embed|wte|wpe"),
)
_BY_POSITION = re.compile(r"wpe|position")  # embeddings whose rows are not words
_NEXT = "name the AR model that it was converted from: --source MODEL"
_CHUNK = 512  # predictions whose probabilities are compared at once, in float32


@dataclass(frozen=True)
class Drift:
    """relative: ||W - W0||_F / ||W0||_F over the tensors of one kind in one layer (layer None: those outside of the layers, or all);
    None where W0 is zero and W is not. parameters: how many numbers were compared."""

    layer: int | None
    kind: str
    relative: float | None
    parameters: int


@dataclass(frozen=True)
class WeightDrift:
    """parts: by layer and kind. by_kind: over all layers. total: over everything. not_compared: tensors that one side lacks."""

    parts: list[Drift]
    by_kind: list[Drift]
    total: Drift
    not_compared: list[str]


@dataclass(frozen=True)
class Agreement:
    """Both models on their causal path, on the same tokens.

    nats_before, nats_after: AR NLL a token of the source and of the converted model; perplexity_*: their exponentials.
    cosine: mean cosine of the hidden states: of the embeddings, then behind each layer. greedy: share of positions with the same
    argmax. acceptance: mean of sum_v min(p, q).
    """

    rows: int
    tokens: int
    nats_before: float
    nats_after: float
    perplexity_before: float
    perplexity_after: float
    cosine: list[float]
    greedy: float
    acceptance: float


@dataclass(frozen=True)
class Retention:
    """own: None for a model that does not denoise."""

    weights: WeightDrift
    agreement: Agreement
    own: OwnTokens | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sentence": sentence(self)}


def weight_drift(folder: Path, source: Path, spec: DlmSpec, advance: Callable[[int], None] = lambda tensors: None) -> WeightDrift:
    """||W - W0||_F / ||W0||_F by layer and kind, read tensor by tensor: no model is built.

    The squares are summed over the tensors of a group before the quotient is taken. Of embedding and head only the rows of text
    tokens that both have are compared: the mask token's row and rows that nothing is ever written with are not the source's.
    Published files may leave out the prefix of the base model (`h.0.` for `transformer.h.0.`).

    spec: of the converted model. advance: called with the tensors done, for progress. Raises UserError when the tensors are not of
    one architecture.
    """
    from safetensors import safe_open

    opened = cache(lambda path: safe_open(path, "pt"))
    files, files_0 = tensor_files(folder), tensor_files(source)
    pairs = {name: found for name in files if (found := _counterpart(name, files_0)) is not None}
    strangers = [name for name in files if name not in pairs and layer_and_kind(name)[0] is not None]
    if strangers or {layer_and_kind(name)[0] for name in files} != {layer_and_kind(name)[0] for name in files_0}:
        why = f"it has no {strangers[0]}" if strangers else "it has another number of layers"
        raise UserError(f"{source} is not of the architecture of {folder}", why, _NEXT)
    squares: dict[tuple[int | None, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    for name, name_0 in pairs.items():
        w, w_0 = opened(files[name]).get_tensor(name), opened(files_0[name_0]).get_tensor(name_0)
        layer, kind = layer_and_kind(name)
        if kind in ("embedding", "head") and not _BY_POSITION.search(name):
            rows = _text_ids(spec, min(len(w), len(w_0)), torch.device("cpu"))
            w, w_0 = w[rows], w_0[rows]
        if w.shape != w_0.shape:
            raise UserError(f"{source} is not of the architecture of {folder}", f"{name} is {list(w_0.shape)} there and {list(w.shape)} here", _NEXT)
        if w.is_floating_point():
            w_0 = w_0.float()
            found = (float((w.float() - w_0).square().sum()), float(w_0.square().sum()), w.numel())
            squares[layer, kind] = [a + b for a, b in zip(squares[layer, kind], found, strict=True)]
        advance(1)
    order = sorted(squares, key=lambda key: (key[0] is None, key[0] or 0, KINDS.index(key[1])))
    parts = [_drift(layer, kind, [squares[layer, kind]]) for layer, kind in order]
    by_kind = [_drift(None, kind, [v for k, v in squares.items() if k[1] == kind]) for kind in KINDS if any(k[1] == kind for k in squares)]
    # A head that only one side has is a copy of its tied embedding.
    lacking = sorted(name for name in (set(files) - set(pairs)) | (set(files_0) - set(pairs.values())) if layer_and_kind(name)[1] != "head")
    return WeightDrift(parts, by_kind, _drift(None, "all", list(squares.values())), lacking)


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """`model.layers.3.self_attn.q_proj.weight` -> (3, "attention")."""
    layer = re.search(r"(?:^|\.)(\d+)\.", name)
    kind = next((kind for kind, words in _KIND_WORDS if re.search(words, name)), "other")
    return int(layer[1]) if layer else None, kind


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it. Raises UserError when the folder has none."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} has no model.safetensors", "the weights are missing, or in an older format", "name a folder with *.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict.fromkeys(file.keys(), folder / "model.safetensors")


@torch.no_grad()
def causal_agreement(
    converted: Denoiser, source: Denoiser, rows: RowSource, *, num_rows: int, batch: int, advance: Callable[[int], None] = lambda rows: None
) -> Agreement:
    """Both models read the same rows from left to right (both loaded with attention="causal"), and are compared at each prediction.

    perplexity = exp(mean of -log p(x_i | x_<i)), over the whole softmax, as `eval` measures the NLL.
    cosine_l   = mean of <h_l, h0_l> / (||h_l|| ||h0_l||) over the predicting positions, h_0 the embeddings.
    greedy     = share of positions with argmax_v p = argmax_v q.
    acceptance = mean of sum_v min(p(v), q(v)) = 1 - TV(p, q): what speculative decoding accepts when one model drafts for the other
                 (arXiv 2211.17192). p and q over the text tokens that both have, without the mask token.

    Both models are in memory at once: what has to be kept of one for the other (N x V probabilities) would be larger.
    """
    assert converted.spec.attention == source.spec.attention == "causal"
    num_rows = min(num_rows, rows.num_rows)
    sums: dict[str, float] = defaultdict(float)
    cosine = 0.0
    for first in range(0, num_rows, batch):
        found = rows.rows(np.arange(first, min(first + batch, num_rows)))
        targets_BL = found.eligible_BL & predictable(found.segments_BL, "shift")
        isolated = bool((found.segments_BL != found.segments_BL[:, :1]).any())
        inputs = [t.to(converted.device) for t in (found.tokens_BL, targets_BL, positions(found.segments_BL, isolated=True), found.segments_BL)]
        logits_NV, hidden = _read(converted, *inputs, isolated)
        logits_0_NV, hidden_0 = _read(source, *inputs, isolated)
        assert len(hidden) == len(hidden_0)
        cosine += torch.stack([F.cosine_similarity(h, h_0, dim=-1).sum().cpu() for h, h_0 in zip(hidden, hidden_0, strict=True)]).double()
        del hidden, hidden_0
        ids_V = _text_ids(converted.spec, min(logits_NV.shape[1], logits_0_NV.shape[1]), logits_NV.device)
        x_0_N = inputs[0][inputs[1]]
        for part in range(0, len(x_0_N), _CHUNK):
            z_NV, z_0_NV, x_N = (t[part : part + _CHUNK] for t in (logits_NV, logits_0_NV, x_0_N))
            sums["after"] += float(cross_entropy(z_NV, x_N).sum())
            sums["before"] += float(cross_entropy(z_0_NV, x_N).sum())
            z_NV, z_0_NV = (z[:, ids_V].float() for z in (z_NV, z_0_NV))
            sums["greedy"] += int((z_NV.argmax(-1) == z_0_NV.argmax(-1)).sum())
            sums["acceptance"] += float(torch.minimum(z_NV.softmax(-1), z_0_NV.softmax(-1)).sum())
            sums["tokens"] += len(x_N)
        advance(len(found.tokens_BL))
    tokens = int(sums["tokens"])
    before, after = sums["before"] / tokens, sums["after"] / tokens
    return Agreement(
        num_rows, tokens, before, after, _exp(before), _exp(after), [min(1.0, value / tokens) for value in cosine.tolist()],
        sums["greedy"] / tokens, min(1.0, sums["acceptance"] / tokens),
    )  # fmt: skip


def sentence(retention: Retention) -> str:
    """The report in words, with its numbers."""
    weights, agreement, own = retention.weights, retention.agreement, retention.own
    of_itself = "" if own is None else f", and its own AR path {own.acceptance:.1%} of the tokens that it fills in"
    most = max(weights.by_kind, key=lambda part: part.relative or 0.0)
    lowest = min(range(len(agreement.cosine)), key=agreement.cosine.__getitem__)
    return (
        f"Read from left to right, the converted model picks the source's token at {agreement.greedy:.1%} of positions and the source "
        f"would accept {agreement.acceptance:.1%} of what it samples so{of_itself}; AR perplexity goes from {agreement.perplexity_before:.4g} to "
        f"{agreement.perplexity_after:.4g}, hidden states keep a cosine of {agreement.cosine[lowest]:.3f} where they turned most "
        f"({'in the embeddings' if lowest == 0 else f'behind layer {lowest - 1}'}), and the weights moved by "
        f"{weights.total.relative or 0.0:.2%} of their norm (most: {most.kind}, {most.relative or 0.0:.2%})."
    )


def _read(denoiser: Denoiser, x_0_BL: Any, targets_BL: Any, positions_BL: Any, segments_BL: Any, isolated: bool) -> tuple[Any, list[Any]]:
    """logits_NV of the targets, and the hidden states behind each of them, float32 (N, D) each, the embeddings first."""
    keep_BL = predicting_positions(targets_BL, "shift")
    context = AttentionContext(open_ratio=0.0, segments_BL=segments_BL if isolated else None)
    found = call_model(denoiser.model, x_0_BL, positions_BL, context, logits_to_keep=keep_BL, output_hidden_states=True)
    return found.logits, [h_BLD[keep_BL].float() for h_BLD in found.hidden_states]


def _text_ids(spec: DlmSpec, rows: int, device: torch.device) -> torch.Tensor:
    """Ids of ordinary text among the first `rows`: no padding rows, and no mask token unless it is a word."""
    ids = torch.arange(min(rows, spec.vocab_size), device=device)
    return ids if spec.mask_is_word else ids[ids != spec.mask_token_id]


def _counterpart(name: str, names: Any) -> str | None:
    shorter = name.split(".", 1)[-1]
    for candidate in (name, shorter, *(f"{base}.{name}" for base in ("model", "transformer", "gpt_neox"))):
        if candidate in names:
            return candidate
    return None


def _drift(layer: int | None, kind: str, squares: list[list[float]]) -> Drift:
    moved, norm, parameters = (sum(column) for column in zip(*squares, strict=True))
    relative = math.sqrt(moved / norm) if norm else 0.0 if moved == 0 else None
    return Drift(layer, kind, relative, int(parameters))


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
