"""Other forms of the same objective, for checks and for reading papers: nothing here is used in training.

D3PM's bound with finitely many levels becomes the continuous one; SEDD's scores are the predictions times a number.

Shapes: K levels, n targets, N masked tokens, V ordinary tokens (no mask token).
"""

from __future__ import annotations

import torch


def linear_alphas(num_levels: int) -> torch.Tensor:
    """alpha_0 .. alpha_T of the linear schedule, float64 (T + 1): the probability that a token is still clean, 1 - k/T."""
    return 1 - torch.arange(num_levels + 1, dtype=torch.float64) / num_levels


def finite_weights(alphas: torch.Tensor) -> torch.Tensor:
    """w_k = (alpha_{k-1} - alpha_k) / (1 - alpha_k), k = 1..T: the weight of a masked token's CE at level k (D3PM, arXiv 2107.03006).

    It is the probability that a token which is masked at level k becomes clean in the reverse step to level k - 1; every KL term
    of the absorbing process is this times a cross-entropy. Linear schedule: 1/k. k = 1 is the reconstruction term (weight 1).
    alphas: alpha_0 = 1 down to alpha_T = 0, so that the prior term vanishes.
    """
    return (alphas[:-1] - alphas[1:]) / (1 - alphas[1:])


def finite_bound(count_sums: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """NELBO_T = sum_k w_k E[ sum over masked i of CE_i at level k ], in nats.

    count_sums: (n + 1,), entry l is the mean over all subsets of l masked targets of the sum of their CE (entry 0 is 0). At level
    k each target is masked with probability 1 - alpha_k, so l is binomial. T = 1 predicts everything from nothing. For a
    consistent model the bound falls with T; its limit, whatever the schedule, is `continuous_bound`.
    """
    num_targets = len(count_sums) - 1
    count = torch.arange(num_targets + 1, dtype=torch.float64)
    log_choose = torch.lgamma(count[-1] + 1) - torch.lgamma(count + 1) - torch.lgamma(num_targets - count + 1)
    masked_K1 = (1 - alphas[1:])[:, None]
    log_binomial_KL = log_choose + torch.xlogy(count, masked_K1) + torch.xlogy(num_targets - count, 1 - masked_K1)
    return (finite_weights(alphas)[:, None] * log_binomial_KL.exp() * count_sums).sum()


def continuous_bound(count_sums: torch.Tensor) -> torch.Tensor:
    """NELBO = sum over l = 1..n of count_sums[l] / l: the limit T -> infinity, equal to E over t of (1/t) sum CE and to the exact-count
    form E over l of (n/l) sum CE (arXiv 2406.07524, arXiv 2502.09992)."""
    return (count_sums[1:] / torch.arange(1, len(count_sums))).sum()


def scores_from_predictions(log_p_NV: torch.Tensor, alpha_t: torch.Tensor | float) -> torch.Tensor:
    """SEDD's concrete scores at masked positions: s(M, t)_j = q_t(j) / q_t(M) = alpha_t / (1 - alpha_t) p(j) (arXiv 2310.16834; 2406.03736).

    alpha_t: a number, or broadcasting against (N, V). The scores of a position sum to alpha_t / (1 - alpha_t), whatever p is:
    a free score head has to learn that.
    """
    return alpha_t / (1 - alpha_t) * log_p_NV.exp()


def predictions_from_scores(scores_NV: torch.Tensor) -> torch.Tensor:
    """log p_NV of the scores at masked positions. Normalising takes the place of knowing alpha_t, and is right for a free head too."""
    return scores_NV.log() - scores_NV.sum(-1, keepdim=True).log()


def denoising_score_entropy(scores_NV: torch.Tensor, x_0_N: torch.Tensor, alpha_t: torch.Tensor | float) -> torch.Tensor:
    """DSE_N = sum_j [ s_j - r_j log s_j + r_j (log r_j - 1) ] at masked positions, r_j = alpha_t / (1 - alpha_t) for j = x_0 and 0 elsewhere.

    SEDD, arXiv 2310.16834, Eq. 5 for the absorbing process. It is 0 for the true scores. For scores made from predictions it is
    alpha_t / (1 - alpha_t) CE, and times the rate -alpha'_t / alpha_t it is our loss: -alpha'_t / (1 - alpha_t) CE = CE / t.
    alpha_t: a number, or one a token (N).
    """
    ratio = torch.as_tensor(alpha_t / (1 - alpha_t), dtype=scores_NV.dtype, device=scores_NV.device)
    s_x_0_N = scores_NV.gather(-1, x_0_N[:, None])[:, 0]
    return scores_NV.sum(-1) - ratio * s_x_0_N.log() + ratio * (ratio.log() - 1)
