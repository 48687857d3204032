"""A Hugging Face AR model as a denoiser: it predicts chosen tokens from everything that the attention pattern shows.

Alignment lives here: callers ask for the prediction of token i and never see from which hidden state it was read.

Shapes: B rows, L positions, N chosen tokens in row-major order, V rows of the output matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dlmconvert.backbone.rewrite import call_model
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.diffusion.alignment import predicting_positions
from dlmconvert.diffusion.attention import AttentionContext


class Denoiser(nn.Module):
    """model: any AutoModelForCausalLM of transformers 5.22 or newer, unmodified (or wrapped by peft).

    Satisfies the sampler's `Predictor`: `predict`, `mask_token_id`, `vocab_size`, `alignment`.
    """

    def __init__(self, model: nn.Module, spec: DlmSpec, tokenizer: Any = None):
        super().__init__()
        self.model = model
        self.spec = spec
        self.tokenizer = tokenizer

    def forward(
        self, tokens_BL: torch.Tensor, targets_BL: torch.Tensor, positions_BL: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """logits_NV: the prediction of token i for each True in targets_BL, row-major.

        The output matrix is applied to the chosen hidden states only (transformers' boolean `logits_to_keep`): at a
        vocabulary of 128k the full logits would be most of the memory. Under `shift` targets_BL must be False at position 0.
        """
        keep_BL = predicting_positions(targets_BL, self.spec.alignment)
        logits_NV = call_model(self.model, tokens_BL, positions_BL, context, logits_to_keep=keep_BL).logits
        if torch.is_grad_enabled():
            _let_tied_gradients_add_in_place(logits_NV)
        return logits_NV

    @torch.no_grad()
    def predict(
        self,
        tokens_BL: torch.Tensor,
        wanted_BL: torch.Tensor,
        positions_BL: torch.Tensor | None = None,
        segments_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """logits_NV under the pattern that the model was trained for; what samplers and estimators call."""
        if positions_BL is None:
            positions_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
        context = AttentionContext(open_ratio=0.0 if self.spec.attention == "causal" else 1.0, segments_BL=segments_BL)
        return self(tokens_BL, wanted_BL, positions_BL, context)

    @property
    def mask_token_id(self) -> int:
        return self.spec.mask_token_id

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    @property
    def alignment(self) -> str:
        return self.spec.alignment

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def _let_tied_gradients_add_in_place(logits_NV: torch.Tensor) -> None:
    """Save one copy of a tied embedding's gradient (V x D) at the end of the backward pass, where memory peaks.

    The output matrix's gradient arrives as a transposed view, and autograd adds in place only to tensors that own their memory: it
    would make a third matrix for the sum with the input embedding's gradient. Detached, the view owns it. The values are the same.
    """
    node = logits_NV.grad_fn
    for _ in range(4):  # reshapes and logit scaling may stand between the logits and the product
        if node is None:
            return
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        for parent in parents:
            if parent.name() == "TBackward0":
                parent.register_hook(lambda inputs, _: tuple(None if g is None else g.detach() for g in inputs))
                return
        node = parents[0] if parents else None
