"""Asking the model: only the rows that have something to ask, with classifier-free guidance when it is on, and the users' hooks.

    logits = un + (s + 1) (cond - un),  un with the given tokens masked       (arXiv 2410.18514; LLaDA, 2502.09992)

Shapes: B rows, L positions of the canvas, N positions asked for (row-major), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .canvas import ROW, Canvas, Predictor

Hook = Callable[[int | None, torch.Tensor, torch.Tensor | None], torch.Tensor]


def ask(
    predictor: Predictor, canvas: Canvas, tokens_BL: torch.Tensor, asked_BL: torch.Tensor, cfg_scale: float
) -> tuple[torch.Tensor, int]:
    """(logits_NV, forwards: 2 with guidance). Rows without a question stay out of the forward."""
    segments_BL, positions_BL, given_BL = canvas.segments_BL, canvas.positions_BL, ~canvas.masked_BL
    live_B = asked_BL.any(dim=1)
    if not bool(live_B.all()):
        rows = live_B.nonzero()[:, 0]
        tokens_BL, asked_BL, positions_BL, given_BL = (x[rows] for x in (tokens_BL, asked_BL, positions_BL, given_BL))
        segments_BL = None if segments_BL is None else segments_BL[rows]
    if cfg_scale == 0:
        with torch.no_grad():
            return predictor.predict(tokens_BL, asked_BL, positions_BL, segments_BL), 1
    if segments_BL is not None:
        given_BL = given_BL & (segments_BL == ROW)
    unprompted_BL = tokens_BL.masked_fill(given_BL, predictor.mask_token_id)
    tokens_BL = torch.cat([tokens_BL, unprompted_BL])
    asked_BL, positions_BL = torch.cat([asked_BL, asked_BL]), torch.cat([positions_BL, positions_BL])
    segments_BL = None if segments_BL is None else torch.cat([segments_BL, segments_BL])
    with torch.no_grad():
        cond_NV, un_NV = predictor.predict(tokens_BL, asked_BL, positions_BL, segments_BL).to(torch.float32).chunk(2)
    return un_NV + (cfg_scale + 1) * (cond_NV - un_NV), 2


def after_tokens_hook(hook, step, tokens_BL, masked_BL, logits_BLV, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens_BL, masked_BL) as the tokens hook leaves them: where it changed nothing, the state stays."""
    changed_BL = hook(step, tokens_BL.clone(), logits_BLV)
    return changed_BL, torch.where(changed_BL == tokens_BL, masked_BL, changed_BL == mask_token_id)


def spread(logits_NV: torch.Tensor, asked_BL: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
    """logits_BLV for hooks: elsewhere than asked, all probability on the token that stands there."""
    logits_BLV = logits_NV.new_full((*asked_BL.shape, logits_NV.shape[1]), torch.finfo(logits_NV.dtype).min)
    known_BL = tokens_BL.clamp(max=logits_NV.shape[1] - 1)
    logits_BLV.scatter_(-1, known_BL[..., None], 0.0)
    logits_BLV[asked_BL] = logits_NV
    return logits_BLV
