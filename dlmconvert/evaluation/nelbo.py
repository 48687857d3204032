"""Held-out likelihood: the NELBO of a denoiser and the NLL of an AR model, on the same rows and the same positions.

Shapes: B rows, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.data.loader import positions
from dlmconvert.diffusion.alignment import predictable
from dlmconvert.diffusion.block_attention import BLOCK_PATTERNS
from dlmconvert.diffusion.likelihood import ar_nll, block_nelbo_draw, mean_and_standard_error, nelbo_draw
from dlmconvert.diffusion.streams import block_starts


class RowSource(Protocol):
    """What is scored: prepared rows (data/packing.py)."""

    num_rows: int

    def rows(self, indices: np.ndarray) -> Any: ...


@dataclass(frozen=True)
class Likelihood:
    """kind: `nelbo` (an upper bound on -log p) or `nll` (exact).

    nats_per_token, standard_error: over `tokens` scored tokens of `rows` rows, rows as the independent units (None for one row).
    bits_per_byte: nats / ln 2 over the UTF-8 bytes of the scored tokens' text; None without a tokenizer.
    """

    kind: str
    nats_per_token: float
    standard_error: float | None
    bits_per_byte: float | None
    rows: int
    tokens: int
    draws: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_likelihood(
    denoiser: Denoiser,
    source: RowSource,
    *,
    num_rows: int,
    draws: int,
    batch: int,
    seed: int,
    advance: Callable[[int], None] = lambda forwards: None,
) -> Likelihood:
    """NELBO of a diffusion model (of a block model: block after block, given the clean ones before), or NLL when its spec says `causal`.

    The rows are the first `num_rows` (all when there are fewer), the noise is keyed by row and draw: fixed across models and
    checkpoints, independent of `batch`. Position 0 is never scored, under either kind, so that both speak of the same tokens.
    advance: called with the rows done, for progress.
    """
    causal = denoiser.spec.attention == "causal"
    num_rows = min(num_rows, source.num_rows)
    draws = 1 if causal else draws
    nats, tokens, num_bytes = [], [], 0
    was_training = denoiser.training
    denoiser.eval()
    with torch.no_grad():
        for first in range(0, num_rows, batch):
            indices = np.arange(first, min(first + batch, num_rows))
            rows = source.rows(indices)
            targets_BL = rows.eligible_BL & predictable(rows.segments_BL, "shift")
            segments_BL = rows.segments_BL if bool((rows.segments_BL != rows.segments_BL[:, :1]).any()) else None
            positions_BL = positions(rows.segments_BL, isolated=True)
            num_bytes += _text_bytes(denoiser.tokenizer, rows.tokens_BL, targets_BL)
            nats_B = row_nats(
                denoiser, rows.tokens_BL, targets_BL, torch.from_numpy(indices), draws=draws, seed=seed, positions_BL=positions_BL,
                segments_BL=segments_BL, advance=advance,
            )  # fmt: skip
            nats.append(nats_B)
            tokens.append(targets_BL.sum(1).cpu())
    denoiser.train(was_training)
    nats_B, tokens_B = torch.cat(nats), torch.cat(tokens)
    mean, error = mean_and_standard_error(nats_B, tokens_B)
    return Likelihood(
        kind="nll" if causal else "nelbo",
        nats_per_token=mean,
        standard_error=None if math.isnan(error) else error,
        bits_per_byte=float(nats_B.sum()) / math.log(2) / num_bytes if num_bytes else None,
        rows=num_rows,
        tokens=int(tokens_B.sum()),
        draws=draws,
    )


@torch.no_grad()
def row_nats(
    denoiser: Denoiser,
    x_0_BL: torch.Tensor,
    targets_BL: torch.Tensor,
    row_keys_B: torch.Tensor,
    *,
    draws: int,
    seed: int,
    positions_BL: torch.Tensor,
    segments_BL: torch.Tensor | None = None,
    advance: Callable[[int], None] = lambda forwards: None,
) -> torch.Tensor:
    """nats_B, float64 on the CPU: -log p of each row's targets (exact under `causal`), or a bound on it by `draws` draws, given the rest.

    row_keys_B: key the noise; the same key means the same masks. Nothing is masked but targets.
    """
    x_0_BL, targets_BL, positions_BL, segments_BL, keys_B = (
        t if t is None else t.to(denoiser.device) for t in (x_0_BL, targets_BL, positions_BL, segments_BL, row_keys_B)
    )
    if denoiser.spec.attention == "causal":
        nats_B = ar_nll(denoiser.predict, x_0_BL, targets_BL, positions_BL, segments_BL)
        advance(len(x_0_BL))
        return nats_B.cpu().double()
    nats_B = torch.zeros(len(x_0_BL), dtype=torch.float64)
    is_block_model = denoiser.spec.attention in BLOCK_PATTERNS
    if is_block_model:
        starts_BL = block_starts(positions_BL, denoiser.spec.block_length)
        blocks_BL = starts_BL.cumsum(1) - 1
        read_clean_BL = targets_BL & starts_BL if denoiser.alignment == "shift" else torch.zeros_like(targets_BL)
    for draw in range(draws):
        how = {"draw": draw, "num_draws": draws, "seed": seed, "positions_BL": positions_BL, "segments_BL": segments_BL}
        if is_block_model:
            found_B = block_nelbo_draw(
                denoiser.predict_blocks, x_0_BL, targets_BL, read_clean_BL, blocks_BL, keys_B, denoiser.mask_token_id, **how
            )  # fmt: skip
        else:
            found_B = nelbo_draw(denoiser.predict, x_0_BL, targets_BL, keys_B, denoiser.mask_token_id, **how)
        nats_B += found_B.cpu().double() / draws
        advance(len(x_0_BL))
    return nats_B


def _text_bytes(tokenizer: Any, tokens_BL: torch.Tensor, targets_BL: torch.Tensor) -> int:
    if tokenizer is None:
        return 0
    texts = tokenizer.batch_decode([row[keep].tolist() for row, keep in zip(tokens_BL, targets_BL, strict=True)], skip_special_tokens=True)
    return sum(len(text.encode("utf-8")) for text in texts)
