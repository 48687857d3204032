"""Between the loop and the model: where positions stand in the flattened canvas, and the users' hooks.

Shapes: B rows, L positions of the canvas, N positions asked for (row-major), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .cache import Asked

Hook = Callable[[int | None, torch.Tensor, torch.Tensor | None], torch.Tensor]


def places(chosen_BL: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """flat_N: where the `num_chosen` True stand, row-major. Unlike nonzero() it does not wait for the device to count them."""
    return torch.sort((~chosen_BL.flatten()).to(torch.int8), stable=True).indices[:num_chosen]


def after_tokens_hook(hook, step, tokens_BL, masked_BL, logits_BLV, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens_BL, masked_BL) as the tokens hook leaves them: where it changed nothing, the state stays."""
    changed_BL = hook(step, tokens_BL.clone(), logits_BLV)
    return changed_BL, torch.where(changed_BL == tokens_BL, masked_BL, changed_BL == mask_token_id)


def after_logits_hook(hook: Hook, step: int, logits_NV: torch.Tensor, asked: Asked, tokens_BL: torch.Tensor) -> torch.Tensor:
    """logits_NV as the logits hook leaves them."""
    return hook(step, tokens_BL.clone(), spread(logits_NV, asked, tokens_BL)).flatten(0, 1)[asked.flat_N]


def spread(logits_NV: torch.Tensor, asked: Asked, tokens_BL: torch.Tensor) -> torch.Tensor:
    """logits_BLV for hooks: elsewhere than asked, all probability on the token that stands there."""
    logits_BLV = logits_NV.new_full((*tokens_BL.shape, logits_NV.shape[1]), torch.finfo(logits_NV.dtype).min)
    known_BL = tokens_BL.clamp(max=logits_NV.shape[1] - 1)
    logits_BLV.scatter_(-1, known_BL[..., None], 0.0)
    logits_BLV.flatten(0, 1)[asked.flat_N] = logits_NV
    return logits_BLV
