"""The output matrix and the weighted cross-entropy in one: no more than a few rows of logits exist at a time.

    loss = sum_i w_i CE_i,   CE_i = logsumexp(z_i) - z_i[x_0^i],   z_i = W h_i + b

The gradient of a sum whose weights are known does not wait for the backward pass: dloss/dz_i = w_i (softmax(z_i) - e_{x_0^i}). So each
chunk of logits turns into its share of dloss/dh and dloss/dW at once and is dropped. The peak does not grow with the number of targets.

Shapes: N targets, D width of the hidden states, V rows of the output matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

CHUNK_ELEMENTS = 16 * 2**20
"""Logits of one chunk; 64 MiB in float32, whatever the vocabulary."""
_ROWS_ADDED = 4096  # of the matrix's gradient at once: the sum of two dtypes makes a copy, which so stays in the cache


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    x_0_N: torch.Tensor,
    weights_N: torch.Tensor,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum_i w_i CE_i, CE_N), float32, in nats. The sum is differentiable in the hidden states and the matrix; CE_N is for the log.

    weights_N: divided by the normaliser already; they get no gradient. Under autocast the products are taken in its dtype, as a
    linear layer's would be; softmax, CE and the gradient of the matrix are float32 in any case.
    """
    dtype = hidden_ND.dtype
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
    rows = max(1, chunk_elements // weight_VD.shape[0])
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, x_0_N, weights_N.float(), rows, dtype)


Score = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""(logits_CV float32, which of the N targets) -> (their share of the loss, values_KC for the log)."""


def linear_scored(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, score: Score, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, values_KN) of any loss that is a sum over targets, whose gradient is taken chunk by chunk in the same way.

    score: differentiable in the logits; called once a chunk, with gradients on. A chunk holds a few copies of its logits, and is smaller
    for it.
    """
    dtype = hidden_ND.dtype
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
    rows = max(1, chunk_elements // (4 * weight_VD.shape[0]))
    return _LinearScored.apply(hidden_ND, weight_VD, bias_V, score, rows, dtype)


class _LinearScored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, score, rows, dtype):
        needs_hidden, needs_weight, needs_bias = (needed and x is not None for needed, x in zip(ctx.needs_input_grad, (hidden_ND, weight_VD, bias_V), strict=False))
        device, (num_targets, width) = hidden_ND.device, hidden_ND.shape
        with torch.autocast(device.type, enabled=False):
            matrix_VD = weight_VD.detach().to(dtype)
            d_hidden_ND = torch.zeros((num_targets, width), device=device) if needs_hidden else None
            d_weight_VD = torch.zeros(weight_VD.shape, device=device) if needs_weight else None
            d_bias_V = torch.zeros(bias_V.shape, device=device) if needs_bias else None
            loss, values = torch.zeros((), device=device), []
            for first in range(0, max(1, num_targets), rows):  # also without targets once: values_KN has its K
                chunk = slice(first, min(first + rows, num_targets))
                h_CD = hidden_ND.detach()[chunk].to(dtype)
                z_CV = h_CD @ matrix_VD.t()
                if bias_V is not None:
                    z_CV += bias_V.detach().to(dtype)
                with torch.enable_grad():
                    z_CV = z_CV.float().requires_grad_()
                    part, found_KC = score(z_CV, chunk)
                loss += part.detach()
                values.append(found_KC.detach())
                if not (needs_hidden or needs_weight or needs_bias) or chunk.start == chunk.stop:
                    continue
                (d_z_CV,) = torch.autograd.grad(part, z_CV)
                if needs_bias:
                    d_bias_V += d_z_CV.sum(0)
                # Half precision takes the products of numbers around 1; the scale comes back in float32.
                scale = d_z_CV.abs().amax().clamp(min=1e-30) if dtype != torch.float32 else 1.0
                d_z_CV = (d_z_CV / scale).to(dtype) if dtype != torch.float32 else d_z_CV
                if needs_hidden:
                    d_hidden_ND[chunk] = (d_z_CV @ matrix_VD).float() * scale
                if needs_weight and dtype == torch.float32:
                    d_weight_VD.addmm_(d_z_CV.t(), h_CD)
                elif needs_weight:
                    for row in range(0, d_weight_VD.shape[0], _ROWS_ADDED):
                        block = slice(row, row + _ROWS_ADDED)
                        d_weight_VD[block] += (d_z_CV[:, block].t() @ h_CD).float() * scale
                del z_CV, d_z_CV, part
        ctx.gradients = [d_hidden_ND, d_weight_VD, d_bias_V]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V)]
        values_KN = torch.cat(values, dim=1)
        ctx.mark_non_differentiable(values_KN)
        return loss, values_KN

    @staticmethod
    def backward(ctx, d_loss, _):
        found = []
        while ctx.gradients:
            gradient, dtype = ctx.gradients.pop(0), ctx.dtypes.pop(0)
            found.append(None if gradient is None else gradient.mul_(d_loss.float()).to(dtype))
            del gradient
        return (*found, None, None, None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, x_0_N, weights_N, rows, dtype):
        needs_hidden, needs_weight, needs_bias = (needed and x is not None for needed, x in zip(ctx.needs_input_grad, (hidden_ND, weight_VD, bias_V), strict=False))
        num_targets = hidden_ND.shape[0]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            matrix_VD = weight_VD.detach().to(dtype)
            ce_N = torch.empty(num_targets, dtype=torch.float32, device=hidden_ND.device)
            d_hidden_ND = torch.empty(hidden_ND.shape, dtype=dtype, device=hidden_ND.device) if needs_hidden else None
            d_weight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=hidden_ND.device) if needs_weight else None
            d_bias_V = torch.zeros(bias_V.shape, dtype=torch.float32, device=hidden_ND.device) if needs_bias else None
            # Relative weights keep the products of half precision in range; the scale comes back in float32.
            scale = weights_N.abs().amax() if num_targets else weights_N.new_ones(())
            scale = torch.where(scale > 0, scale, 1.0)
            num_chunks = -(-num_targets // rows)
            for part in torch.arange(num_targets, device="cpu").tensor_split(num_chunks) if num_targets else ():
                chunk = slice(int(part[0]), int(part[-1]) + 1)
                h_CD, target_C1 = hidden_ND.detach()[chunk].to(dtype), x_0_N[chunk, None]
                z_CV = h_CD @ matrix_VD.t()
                if bias_V is not None:
                    z_CV += bias_V.detach().to(dtype)
                log_p_CV = torch.log_softmax(z_CV, dim=-1, dtype=torch.float32)
                del z_CV
                ce_N[chunk] = -log_p_CV.gather(1, target_C1)[:, 0]
                if not (needs_hidden or needs_weight or needs_bias):
                    continue
                d_z_CV = log_p_CV.exp_()
                d_z_CV.scatter_add_(1, target_C1, d_z_CV.new_full((1, 1), -1.0).expand_as(target_C1))
                d_z_CV *= (weights_N[chunk] / scale)[:, None]
                if needs_bias:
                    d_bias_V += d_z_CV.sum(0)
                d_z_CV = d_z_CV.to(dtype)
                if needs_hidden:
                    torch.mm(d_z_CV, matrix_VD, out=d_hidden_ND[chunk])
                if needs_weight and dtype == torch.float32:
                    d_weight_VD.addmm_(d_z_CV.t(), h_CD)
                elif needs_weight:
                    for first in range(0, d_weight_VD.shape[0], _ROWS_ADDED):  # the sum in another dtype makes a copy: a small one
                        block = slice(first, first + _ROWS_ADDED)
                        d_weight_VD[block] += d_z_CV[:, block].t() @ h_CD
                del log_p_CV, d_z_CV
        ctx.gradients = [d_hidden_ND, d_weight_VD, d_bias_V]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V)]
        ctx.scale = scale
        ctx.mark_non_differentiable(ce_N)
        return (weights_N * ce_N).sum(), ce_N

    @staticmethod
    def backward(ctx, d_loss, _):
        factor = d_loss.float() * ctx.scale
        found = []
        while ctx.gradients:  # emptied, so that autograd owns each and adds a tied embedding's gradient into it in place
            gradient, dtype = ctx.gradients.pop(0), ctx.dtypes.pop(0)
            found.append(None if gradient is None else (gradient.mul_(factor) if gradient.dtype == torch.float32 else gradient.float() * factor).to(dtype))
            del gradient
        return (*found, None, None, None, None)
