"""The finite-T bound becomes the ELBO; SEDD's scores are the predictions times a number."""

from __future__ import annotations

import math

import pytest
import torch
from test_likelihood import Joint, models, subset_sums

from dlmconvert.diffusion.equivalents import (
    continuous_bound,
    denoising_score_entropy,
    finite_bound,
    finite_weights,
    linear_alphas,
    predictions_from_scores,
    scores_from_predictions,
)


def count_sums(model, x):
    """Entry l: mean over the subsets of l masked targets of the sum of CE."""
    n = len(x) - model.num_prompt
    result = torch.zeros(n + 1, dtype=torch.float64)
    for subset, value in subset_sums(model, x).items():
        result[len(subset)] += value / math.comb(n, len(subset))
    return result


def test_the_finite_bound_converges_to_the_elbo():
    for model, expected in models():
        sums = count_sums(model, expected["x"])
        assert float(continuous_bound(sums)) == pytest.approx(expected["nelbo"], rel=1e-6)
        bounds = [float(finite_bound(sums, linear_alphas(t))) for t in (1, 2, 4, 16, 256, 4096)]
        assert bounds[0] == pytest.approx(float(sums[-1]), rel=1e-9)  # T = 1: everything from nothing
        for t, bound in zip((16, 256, 4096), bounds[3:], strict=True):  # the error goes as 1/T at least
            assert abs(bound - expected["nelbo"]) < expected["nelbo"] * (1 / t + 1e-5)
        # Whatever the schedule: cosine levels end at the same number.
        cosine = (torch.arange(4097, dtype=torch.float64) / 4096 * math.pi / 2).cos().square()
        assert float(finite_bound(sums, cosine)) == pytest.approx(expected["nelbo"], rel=5e-3)


def test_for_a_consistent_model_the_bound_falls_with_the_levels():
    """Averaged over the joint itself; the limit is the entropy."""
    model = next(model for model, _ in models() if isinstance(model, Joint))
    weights = model.p.flatten()
    points = [list(index) for index in torch.cartesian_prod(*[torch.arange(model.V)] * model.length).tolist()]
    sums = sum(p * count_sums(model, x) for p, x in zip(weights, points, strict=True))
    bounds = [float(finite_bound(sums, linear_alphas(t))) for t in (1, 2, 4, 16, 256)]
    assert bounds == sorted(bounds, reverse=True)
    entropy = float(-torch.xlogy(weights, weights).sum())
    assert float(continuous_bound(sums)) == pytest.approx(entropy, rel=1e-6) and bounds[-1] == pytest.approx(entropy, rel=5e-3)


def test_linear_levels_weigh_1_over_k():
    torch.testing.assert_close(finite_weights(linear_alphas(9)), 1 / torch.arange(1, 10, dtype=torch.float64))


def test_scores_and_predictions():
    generator = torch.Generator().manual_seed(2)
    log_p_NV = torch.randn(6, 11, generator=generator, dtype=torch.float64).log_softmax(-1)
    x_0_N = torch.randint(0, 11, (6,), generator=generator)
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)[:, None]
    alpha = 1 - t
    scores_NV = scores_from_predictions(log_p_NV, alpha)
    torch.testing.assert_close(scores_NV.sum(-1), (alpha / t)[:, 0])
    torch.testing.assert_close(predictions_from_scores(scores_NV), log_p_NV)
    ce_N = -log_p_NV.gather(-1, x_0_N[:, None])[:, 0]
    entropy_N = denoising_score_entropy(scores_NV, x_0_N, alpha[:, 0])
    torch.testing.assert_close(entropy_N, (alpha / t)[:, 0] * ce_N)
    torch.testing.assert_close(entropy_N / alpha[:, 0], ce_N / t[:, 0])  # times the rate 1 / alpha_t: the 1/t loss


def test_the_score_entropy_is_lowest_at_the_true_scores():
    x_0_N, alpha = torch.tensor([3]), 0.4
    true_NV = torch.full((1, 6), 1e-12, dtype=torch.float64)
    true_NV[0, 3] = alpha / (1 - alpha)
    assert float(denoising_score_entropy(true_NV, x_0_N, alpha)) == pytest.approx(0, abs=1e-9)
    for scale in (0.5, 1.5):
        assert float(denoising_score_entropy(true_NV * scale, x_0_N, alpha)) > 1e-3
