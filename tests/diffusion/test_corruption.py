"""Kernels of masking: counts, weights that make a bound (by enumeration), pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_models import known_answers

from dlmconvert.diffusion.corruption import at_least_one, complement, draw_masks, exact_count
from dlmconvert.diffusion.objective import cart_weights, cross_entropy, denoising_loss, token_weights
from dlmconvert.diffusion.randomness import MASK, counter_uniform


def draws(rows, length, seed=0):
    return counter_uniform(MASK, seed, torch.arange(rows)[:, None], torch.arange(length))


def some_eligible(rows, length):
    return (torch.arange(rows)[:, None] * 7 + torch.arange(length) * 3) % 5 != 0


@pytest.mark.parametrize("count", ["bernoulli", "at_least_one", "exact"])
def test_only_eligible_tokens_and_a_level_a_row(count):
    eligible_BL = some_eligible(500, 20)
    t_B = torch.linspace(0, 0.999, 500, dtype=torch.float64).clamp(min=1e-3)
    masked_BL, weight_t_B = draw_masks(eligible_BL, t_B, draws(500, 20), count)
    assert not bool((masked_BL & ~eligible_BL).any()) and weight_t_B.dtype == torch.float64
    n_B, l_B = eligible_BL.sum(1), masked_BL.sum(1)
    if count == "bernoulli":
        assert torch.equal(weight_t_B, t_B) and bool((l_B == 0).any())
    else:
        assert bool((l_B >= 1).all())
    if count == "exact":
        assert torch.equal(l_B, (n_B * t_B).floor().long() + 1)
        torch.testing.assert_close(1 / weight_t_B, n_B / l_B.double())


@pytest.mark.parametrize("count", ["bernoulli", "at_least_one", "exact"])
def test_rows_without_eligible_tokens_have_no_masks_and_finite_weights(count):
    eligible_BL = torch.zeros(3, 6, dtype=torch.bool)
    masked_BL, t_B = draw_masks(eligible_BL, torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), draws(3, 6), count)
    assert not bool(masked_BL.any()) and bool((t_B > 0).all())


def test_exact_counts_are_uniform_and_so_are_the_subsets():
    rows, n = 6000, 5
    eligible_BL = torch.tensor([True, False, True, True, False, True, True]).expand(rows, -1)
    level_B = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    masked_BL, _ = exact_count(eligible_BL, level_B, draws(rows, 7))
    assert torch.bincount(masked_BL.sum(1)).tolist() == [0] + [rows // n] * n  # levels on a grid: exactly uniform
    for size in (1, 2, 4):
        chosen = masked_BL[masked_BL.sum(1) == size].long() @ (2 ** torch.arange(7))
        seen = torch.bincount(chosen)[torch.bincount(chosen) > 0].double()
        assert len(seen) == math.comb(n, size)
        expected = rows / n / math.comb(n, size)
        assert float(((seen - expected).square() / expected).sum()) < len(seen) + 6 * (2 * len(seen)) ** 0.5


def weight_of_each_count(n, kernel, steps=20_000):
    """E[ weight of a masked token; l masked ] over t, from the kernel's own weights: 1 / (l C(n, l)) a subset makes the bound."""
    t = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    totals = torch.zeros(n + 1, dtype=torch.float64)
    for pattern in itertools.product((0.0, 0.5), repeat=n):
        # Draws that mask exactly this subset whatever t is: 0 is below every level; the others are above every level.
        subset = torch.tensor(pattern) > 0
        size = int(subset.sum())
        u_BL = torch.where(subset, 0.0, 2.0).double().expand(steps, n)
        if size == 0:
            u_BL = 2.0 + torch.arange(n).double().expand(steps, n) / n  # nothing is drawn; the smallest is the first
        masked_BL, weight_t_B = kernel(torch.ones(steps, n, dtype=torch.bool), t, u_BL)
        probability_B = t**size * (1 - t) ** (n - size)
        count = int(masked_BL[0].sum())
        totals[count] += float((probability_B / weight_t_B).mean()) * count if count else 0.0
    return totals


@pytest.mark.parametrize("n", [1, 3, 4])
def test_at_least_one_mask_keeps_the_bound(n):
    """sum over subsets of E[w] l must be 1 for each count l = 1..n (n tokens share the bound equally)."""
    torch.testing.assert_close(weight_of_each_count(n, at_least_one)[1:], torch.ones(n, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_a_forced_mask_with_1_over_t_would_not_be_the_bound():
    def kept(eligible_BL, t_B, u_BL):
        return at_least_one(eligible_BL, t_B, u_BL)[0], t_B

    assert float(weight_of_each_count(4, kept)[1]) > 2


def test_the_two_views_of_a_pair_predict_every_token_once():
    eligible_BL = some_eligible(64, 20)
    t_B = torch.linspace(0.01, 0.99, 64, dtype=torch.float64)
    masked_BL, _ = draw_masks(eligible_BL, t_B, draws(64, 20), "bernoulli")
    other_BL, other_t_B = complement(eligible_BL, masked_BL, t_B)
    assert torch.equal(masked_BL ^ other_BL, eligible_BL) and not bool((masked_BL & other_BL).any())
    assert torch.equal(other_t_B, 1 - t_B)


def test_cart_against_the_released_implementations():
    answers = known_answers("04_cart_weights.json")
    for case in answers["cases"]:
        masked_BL = torch.tensor(case["inputs"]["mask"], dtype=torch.bool)
        weights_BL = cart_weights(masked_BL, case["inputs"]["p"])
        torch.testing.assert_close(weights_BL, torch.tensor(case["expected"]["weights"], dtype=torch.float64), rtol=1e-9, atol=1e-12)
        assert bool((weights_BL[~masked_BL] == 0).all())
    for case in answers["loss_cases"]:
        inputs, expected = case["inputs"], case["expected"]
        logits_BLV = torch.tensor(inputs["logits"], dtype=torch.float64)
        masked_BL, x_0_BL = torch.tensor(inputs["mask"], dtype=torch.bool), torch.tensor(inputs["x_0"])
        ce_N = cross_entropy(logits_BLV[torch.roll(masked_BL, -1, 1)], x_0_BL[masked_BL])
        weights_N = token_weights(torch.ones(len(x_0_BL)), masked_BL, "cart", None, inputs["p"])
        assert float(denoising_loss(ce_N, weights_N, 1.0)) == pytest.approx(expected["weighted_sum"], rel=2e-6)
        assert float(denoising_loss(ce_N, weights_N, expected["n_masked"])) == pytest.approx(expected["loss_mean_over_masked"], rel=2e-6)


def test_cart_at_p_1_is_the_limit():
    masked_BL = torch.tensor([[0, 1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert cart_weights(masked_BL, 1.0).tolist() == [[0, 1.0, 0, 0.5, 0.5, 0, 0.5], [0.0] * 7]
    torch.testing.assert_close(cart_weights(masked_BL, 1.0), cart_weights(masked_BL, 1 - 1e-9), rtol=1e-6, atol=1e-6)


def test_cart_sees_its_own_document_only():
    """Tokens of another document, and padding (a document of its own), are no clean context: as if the document stood alone."""
    masked_BL = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    segments_BL = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1]])
    weights_BL = cart_weights(masked_BL, 0.3, segments_BL)
    for row, first, last in ((0, 0, 3), (0, 3, 6), (0, 6, 8), (1, 0, 4), (1, 4, 8)):
        torch.testing.assert_close(weights_BL[row, first:last], cart_weights(masked_BL[row : row + 1, first:last], 0.3)[0])
