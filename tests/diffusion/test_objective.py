"""The loss against the released implementations, through the functions that training calls; corruption and noise levels."""

from __future__ import annotations

import pytest
import torch
from tiny_models import known_answers

from dlmconvert.diffusion.alignment import predictable, predicting_positions
from dlmconvert.diffusion.corruption import draw_masks
from dlmconvert.diffusion.objective import cross_entropy, denoising_loss, token_weights
from dlmconvert.diffusion.randomness import MASK, counter_uniform
from dlmconvert.diffusion.schedules import noise_levels

TOLERANCE = {"rel": 2e-6, "abs": 1e-6}


def loss_of(inputs, alignment, normaliser, weight="elbo"):
    logits_BLV, x_0_BL = torch.tensor(inputs["logits"], dtype=torch.float64), torch.tensor(inputs["x_0"])
    t_B = torch.tensor(inputs["t"], dtype=torch.float64)
    masked_BL = torch.tensor(inputs["mask"], dtype=torch.bool) & predictable(torch.zeros_like(x_0_BL), alignment)
    ce_N = cross_entropy(logits_BLV[predicting_positions(masked_BL, alignment)], x_0_BL[masked_BL])
    return float(denoising_loss(ce_N, token_weights(t_B[:, None].expand(masked_BL.shape), masked_BL, weight), normaliser)), int(masked_BL.sum())


@pytest.mark.parametrize(("alignment", "name"), [("shift", "shifted"), ("in_place", "unshifted")])
def test_the_loss_and_its_normalisers(alignment, name):
    for case in known_answers("02_masked_diffusion_loss.json")["cases"]:
        inputs, expected = case["inputs"], case["expected"][name]
        total, num_masked = loss_of(inputs, alignment, 1.0)
        assert num_masked == expected["n_masked"], case["name"]
        assert total == pytest.approx(expected["weighted_sum"], **TOLERANCE)
        assert loss_of(inputs, alignment, 1.0, "unweighted")[0] == pytest.approx(expected["unweighted_sum"], **TOLERANCE)
        # The two normalisers that a recipe can ask for.
        x_0_BL = torch.tensor(inputs["x_0"])
        eligible_BL = predictable(torch.zeros_like(x_0_BL), alignment)
        if inputs["prompt_mask"] is not None:
            eligible_BL &= ~torch.tensor(inputs["prompt_mask"], dtype=torch.bool)
        num_eligible = int(eligible_BL.sum())
        assert num_eligible == expected["n_predictable"]
        assert loss_of(inputs, alignment, num_eligible)[0] == pytest.approx(expected["elbo_sum_over_predictable"], **TOLERANCE)
        assert loss_of(inputs, alignment, num_masked)[0] == pytest.approx(expected["mean_over_masked_weighted"], **TOLERANCE)
        if "published_float32_DiffuLLaMA" in expected:
            assert loss_of(inputs, alignment, num_masked)[0] == pytest.approx(expected["published_float32_DiffuLLaMA"], rel=1e-5)


@pytest.mark.parametrize(("alignment", "name"), [("shift", "shifted"), ("in_place", "unshifted")])
def test_cross_entropy_of_every_token(alignment, name):
    for case in known_answers("02_masked_diffusion_loss.json")["cases"]:
        logits_BLV, x_0_BL = torch.tensor(case["inputs"]["logits"]), torch.tensor(case["inputs"]["x_0"])
        targets_BL = predictable(torch.zeros_like(x_0_BL), alignment)
        ce_N = cross_entropy(logits_BLV[predicting_positions(targets_BL, alignment)], x_0_BL[targets_BL]).tolist()
        expected = [v for row in case["expected"][name]["per_token_ce"] for v in row if v is not None]
        assert ce_N == pytest.approx(expected, **TOLERANCE)


def test_a_loss_over_nothing_is_zero_and_has_a_gradient():
    logits_NV = torch.zeros(0, 5, requires_grad=True)
    loss = denoising_loss(cross_entropy(logits_NV, torch.zeros(0, dtype=torch.int64)), torch.zeros(0), 7.0)
    loss.backward()
    assert loss.item() == 0.0 and logits_NV.grad.shape == (0, 5)


def test_cross_entropy_is_float32_for_bfloat16_logits():
    logits_NV = torch.randn(4, 9, dtype=torch.bfloat16)
    ce_N = cross_entropy(logits_NV, torch.arange(4))
    assert ce_N.dtype == torch.float32 and torch.equal(ce_N, cross_entropy(logits_NV.float(), torch.arange(4)))


def test_alignment_keeps_the_order_of_the_targets():
    """Row-major: the n-th hidden state that is read predicts the n-th target, under both alignments."""
    generator = torch.Generator().manual_seed(0)
    place_BL = torch.arange(3 * 10).view(3, 10)
    for _ in range(50):
        targets_BL = torch.rand(3, 10, generator=generator) < 0.5
        targets_BL[:, 0] = False
        assert torch.equal(place_BL[predicting_positions(targets_BL, "in_place")], place_BL[targets_BL])
        assert torch.equal(place_BL[predicting_positions(targets_BL, "shift")], place_BL[targets_BL] - 1)


def test_what_is_predictable():
    segments_BL = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3]])
    assert predictable(segments_BL, "in_place").all()
    assert predictable(segments_BL, "shift").tolist() == [[False, True, True, False, True, False, False, True]]
    joined_BL = torch.zeros(2, 5, dtype=torch.int64)
    assert predictable(joined_BL, "shift").tolist() == [[False, True, True, True, True]] * 2


def test_masking_touches_eligible_tokens_only_and_as_often_as_t_says():
    eligible_BL = torch.arange(50).expand(2000, 50) % 3 != 0
    t_B = torch.linspace(0.05, 1, 2000, dtype=torch.float64)
    u_BL = counter_uniform(MASK, 0, torch.arange(2000)[:, None], torch.arange(50))
    masked_BL, _ = draw_masks(eligible_BL, t_B[:, None], u_BL, "bernoulli")
    assert not bool((masked_BL & ~eligible_BL).any())
    assert torch.equal(masked_BL[t_B == 1], eligible_BL[t_B == 1])
    n_B = eligible_BL.sum(1)
    excess = float((masked_BL.sum(1) - n_B * t_B).sum())
    assert abs(excess) < 5 * float((n_B * t_B * (1 - t_B)).sum()) ** 0.5


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
def test_noise_levels(kind):
    eps = 1e-3
    t = torch.stack([noise_levels(3, step, 64, eps, kind) for step in range(500)])
    assert eps <= float(t.min()) and float(t.max()) <= 1
    sigma = (1 / 12 / t.numel()) ** 0.5
    assert abs(float(t.mean()) - (1 + eps) / 2) < 5 * sigma
    assert torch.equal(t[7], noise_levels(3, 7, 64, eps, kind))
    if kind == "stratified":
        strata = ((t - eps) / (1 - eps) * 64).floor()
        assert torch.equal(strata, torch.arange(64.0, dtype=torch.float64).expand(500, 64))


def test_the_weighted_loss_estimates_the_elbo():
    """With CE = 1 everywhere, E[(1/t) masked] is the number of eligible tokens (up to the cut at eps)."""
    t_B = noise_levels(0, 0, 20_000, 1e-3, "uniform")
    eligible_BL = torch.ones(20_000, 16, dtype=torch.bool)
    u_BL = counter_uniform(MASK, 1, torch.arange(20_000)[:, None], torch.arange(16))
    masked_BL, _ = draw_masks(eligible_BL, t_B[:, None], u_BL, "bernoulli")
    weights_N = token_weights(t_B[:, None].expand(masked_BL.shape), masked_BL, "elbo")
    estimate = float(denoising_loss(torch.ones_like(weights_N), weights_N, 16.0)) / 20_000
    # Standard deviation of the sum over 16 tokens: (16 * 5.91)^0.5 (methods.md, section 2).
    assert abs(estimate - 1) < 5 * (16 * 5.91) ** 0.5 / 16 / 20_000**0.5
