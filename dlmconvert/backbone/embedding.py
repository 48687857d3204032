"""The embedding's share of a tied matrix's gradient, added row by row.

torch makes that share as large as the matrix, nearly all of it zeros, and adds it to the head's: a second matrix of the vocabulary's size,
and passes over both, for a few thousand rows. Here the rows are added where the gradient lies.

Shapes: B rows, L tokens, N = B L, D width, V rows of the embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def add_rows_in_place(model: Any) -> None:
    """For a model whose head is its embedding, where gradients lie in `.grad` until the update: the rows reach the matrix through no edge of
    the graph, so hooks that collect gradients (ZeRO) would miss them. Other models, and embeddings that do more than to look up rows,
    stay as they are."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if type(embedding) is nn.Embedding and not embedding.sparse and embedding.max_norm is None and head is not None and head.weight is embedding.weight:
        embedding.__class__ = _TiedEmbedding  # this one instance


class _TiedEmbedding(nn.Embedding):
    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and self.weight.requires_grad) or torch.compiler.is_compiling():
            return super().forward(tokens_BL)
        anchor = torch.zeros((), requires_grad=True)  # else autograd would not come back here: the weight is hidden from it
        return _Rows.apply(tokens_BL, anchor, self)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens_BL: torch.Tensor, anchor: torch.Tensor, embedding: nn.Embedding) -> torch.Tensor:
        ctx.save_for_backward(tokens_BL)
        ctx.embedding = embedding
        return F.embedding(tokens_BL, embedding.weight.detach())

    @staticmethod
    def backward(ctx, d_embedded_BLD: torch.Tensor) -> tuple[None, None, None]:
        (tokens_BL,), weight_VD, padding_idx = ctx.saved_tensors, ctx.embedding.weight, ctx.embedding.padding_idx
        if weight_VD.grad is None:  # the head's share is there before, but for the second of two forwards of one backward pass
            weight_VD.grad = torch.zeros_like(weight_VD)
        tokens_N, d_ND = tokens_BL.reshape(-1), d_embedded_BLD.reshape(-1, d_embedded_BLD.shape[-1]).to(weight_VD.dtype)
        if padding_idx is not None:
            d_ND = d_ND.masked_fill((tokens_N == padding_idx)[:, None], 0)
        if weight_VD.device.type == "cuda":
            weight_VD.grad.index_put_((tokens_N,), d_ND, accumulate=True)  # sorts first: the same sum every time, which index_add_ is not there
        else:
            weight_VD.grad.index_add_(0, tokens_N, d_ND)
        return None, None, None
