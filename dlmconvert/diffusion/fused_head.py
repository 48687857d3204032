"""The output matrix and the weighted cross-entropy in one: no more than a few rows of logits exist at a time.

    loss = sum_i w_i CE_i,   CE_i = logsumexp(z_i) - z_i[x_0^i],   z_i = W h_i + b

The gradient of a sum whose weights are known does not wait for the backward pass: dloss/dz_i = w_i (softmax(z_i) - e_{x_0^i}). So each
chunk of logits turns into its share of dloss/dh and dloss/dW at once and is dropped. The peak does not grow with the number of targets.

Shapes: N targets, D width of the hidden states, V rows of the output matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

CHUNK_BYTES = 128 * 2**20
"""Logits of one chunk, in the dtype of the products, whatever the vocabulary. Their gradient takes the same place."""
BLOCK_ELEMENTS = 2**19
"""Logits whose softmax is taken at once on a CPU: what the passes over them read again is then in the cache."""
_ROWS_ADDED = 4096  # of the matrix's gradient at once: the sum of two dtypes makes a copy, which so stays in the cache


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    x_0_N: torch.Tensor,
    weights_N: torch.Tensor,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum_i w_i CE_i, CE_N), float32, in nats. The sum is differentiable in the hidden states and the matrix; CE_N is for the log.

    weights_N: divided by the normaliser already; they get no gradient. Under autocast the products are taken in its dtype, as a
    linear layer's would be; softmax, CE and the gradient of the matrix are float32 in any case.
    """
    dtype = hidden_ND.dtype
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
    rows = max(1, chunk_bytes // (weight_VD.shape[0] * dtype.itemsize))
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, x_0_N, weights_N.float(), rows, dtype)


Score = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""(logits_CV float32, which of the N targets) -> (their share of the loss, values_KC for the log)."""


def linear_scored(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, score: Score, chunk_bytes: int = CHUNK_BYTES
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, values_KN) of any loss that is a sum over targets, whose gradient is taken chunk by chunk in the same way.

    score: differentiable in the logits; called once a chunk, with gradients on. A chunk holds a few copies of its logits, and is smaller
    for it.
    """
    dtype = hidden_ND.dtype
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
    rows = max(1, chunk_bytes // (8 * 4 * weight_VD.shape[0]))
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
        (num_targets, _), device = hidden_ND.shape, hidden_ND.device
        with torch.autocast(device.type, enabled=False):
            matrix_VD = weight_VD.detach().to(dtype)
            ce_N = torch.empty(num_targets, dtype=torch.float32, device=device)
            d_hidden_ND = torch.empty(hidden_ND.shape, dtype=dtype, device=device) if needs_hidden else None
            d_weight_VD = torch.empty(weight_VD.shape, dtype=torch.float32, device=device) if needs_weight else None
            d_bias_V = torch.zeros(bias_V.shape, dtype=torch.float32, device=device) if needs_bias else None
            if needs_weight and not num_targets:
                d_weight_VD.zero_()
            # Relative weights keep the products of half precision in range; the scale comes back in float32.
            scale = weights_N.abs().amax() if num_targets else weights_N.new_ones(())
            scale = torch.where(scale > 0, scale, 1.0)
            # One buffer for all chunks: fresh memory costs more than what is computed in it.
            size = -(-num_targets // max(1, -(-num_targets // rows)))
            buffer_CV = torch.empty((size, weight_VD.shape[0]), dtype=dtype, device=device)
            for first in range(0, num_targets, max(1, size)):
                chunk = slice(first, min(first + size, num_targets))
                h_CD, z_CV = hidden_ND.detach()[chunk].to(dtype), buffer_CV[: chunk.stop - first]
                torch.mm(h_CD, matrix_VD.t(), out=z_CV)
                if bias_V is not None:
                    z_CV += bias_V.detach().to(dtype)
                ce_N[chunk] = _scored(z_CV, x_0_N[chunk], weights_N[chunk] / scale, d_bias_V, needs_hidden or needs_weight or needs_bias)
                d_z_CV = z_CV
                if needs_hidden:
                    torch.mm(d_z_CV, matrix_VD, out=d_hidden_ND[chunk])
                if needs_weight and dtype == torch.float32:
                    torch.addmm(d_weight_VD, d_z_CV.t(), h_CD, beta=int(first > 0), out=d_weight_VD)  # beta = 0 reads nothing
                elif needs_weight:
                    for row in range(0, d_weight_VD.shape[0], _ROWS_ADDED):  # the sum in another dtype makes a copy: a small one
                        block = slice(row, row + _ROWS_ADDED)
                        part = d_z_CV[:, block].t() @ h_CD
                        d_weight_VD[block] = part if first == 0 else d_weight_VD[block] + part
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


def _scored(z_CV: torch.Tensor, x_0_C: torch.Tensor, weights_C: torch.Tensor, d_bias_V: torch.Tensor | None, needs_gradient: bool) -> torch.Tensor:
    """CE_C in float32. Where a gradient is needed, z becomes dloss/dz in its own place (and dtype), and d_bias grows by it.

    On a CPU a few rows at a time: all passes but the first then find them in the cache.
    """
    rows = max(1, BLOCK_ELEMENTS // z_CV.shape[1]) if z_CV.device.type == "cpu" else z_CV.shape[0]
    ce_C = torch.empty(z_CV.shape[0], dtype=torch.float32, device=z_CV.device)
    for first in range(0, z_CV.shape[0], rows):
        block = slice(first, first + rows)
        target_R1 = x_0_C[block, None]
        log_p_RV = torch.log_softmax(z_CV[block], dim=-1, dtype=torch.float32)
        ce_C[block] = -log_p_RV.gather(1, target_R1)[:, 0]
        if not needs_gradient:
            continue
        d_z_RV = log_p_RV.exp_()
        d_z_RV.scatter_add_(1, target_R1, d_z_RV.new_full((1, 1), -1.0).expand_as(target_R1))
        d_z_RV *= weights_C[block, None]
        if d_bias_V is not None:
            d_bias_V += d_z_RV.sum(0)
        z_CV[block] = d_z_RV
    return ce_C
