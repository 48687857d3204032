"""Kernels of masking: counts, weights that make a bound (by enumeration), pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_models import known_answers

from dlmconvert.diffusion.corruption import at_least_one, complement, draw_masks, exact_count, late_in_block
from dlmconvert.diffusion.objective import cart_weights, cross_entropy, denoising_loss, token_weights
from dlmconvert.diffusion.randomness import MASK, counter_uniform


def draws(rows, length, seed=0):
    return counter_uniform(MASK, seed, torch.arange(rows)[:, None], torch.arange(length))


def one_group(eligible_BL):
    return torch.zeros_like(eligible_BL, dtype=torch.int64)


def some_eligible(rows, length):
    return (torch.arange(rows)[:, None] * 7 + torch.arange(length) * 3) % 5 != 0


@pytest.mark.parametrize("count", ["bernoulli", "at_least_one", "exact"])
def test_only_eligible_tokens_and_a_level_a_row(count):
    eligible_BL = some_eligible(500, 20)
    t_B = torch.linspace(0, 0.999, 500, dtype=torch.float64).clamp(min=1e-3)
    masked_BL, weight_t_BL = draw_masks(eligible_BL, t_B[:, None], draws(500, 20), count)
    weight_t_B = weight_t_BL[:, 0]
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
    masked_BL, t_B = draw_masks(eligible_BL, torch.tensor([[0.1], [0.5], [1.0]], dtype=torch.float64), draws(3, 6), count)
    assert not bool(masked_BL.any()) and bool((t_B > 0).all())


def test_exact_counts_are_uniform_and_so_are_the_subsets():
    rows, n = 6000, 5
    eligible_BL = torch.tensor([True, False, True, True, False, True, True]).expand(rows, -1)
    level_B = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    masked_BL, _ = exact_count(eligible_BL, level_B[:, None], draws(rows, 7), one_group(eligible_BL))
    assert torch.bincount(masked_BL.sum(1)).tolist() == [0] + [rows // n] * n  # levels on a grid: exactly uniform
    for size in (1, 2, 4):
        chosen = masked_BL[masked_BL.sum(1) == size].long() @ (2 ** torch.arange(7))
        seen = torch.bincount(chosen)[torch.bincount(chosen) > 0].double()
        assert len(seen) == math.comb(n, size)
        expected = rows / n / math.comb(n, size)
        assert float(((seen - expected).square() / expected).sum()) < len(seen) + 6 * (2 * len(seen)) ** 0.5


@pytest.mark.parametrize("count", ["bernoulli", "at_least_one", "exact"])
def test_groups_are_rows_of_their_own(count):
    """Blocks of a row are masked as if each were a row: the same subset, the same weights."""
    eligible_BL, u_BL = some_eligible(50, 24), draws(50, 24)
    levels_BG = draws(50, 4)
    groups_BL = (torch.arange(24) // 6).expand(50, 24)
    masked_BL, t_BL = draw_masks(eligible_BL, levels_BG, u_BL, count, groups_BL)
    alone = [draw_masks(eligible_BL[:, i : i + 6], levels_BG[:, i // 6, None], u_BL[:, i : i + 6], count) for i in range(0, 24, 6)]
    assert torch.equal(masked_BL, torch.cat([masked for masked, _ in alone], 1))
    assert torch.equal(t_BL, torch.cat([t for _, t in alone], 1))


def test_later_places_are_masked_more_often_at_low_noise():
    """Efficient-DLM: at t = 1 all alike; at low t the odds double every lambda n places."""
    rows, n = 40_000, 8
    eligible_BL = torch.ones(rows, n, dtype=torch.bool)
    u_BL = draws(rows, n)
    for t, half_life in ((1 / n, 0.25), (1 / n, 0.5)):
        masked_BL, t_BL = late_in_block(eligible_BL, torch.full((rows, 1), t).double(), u_BL, one_group(eligible_BL), half_life)
        assert bool((masked_BL.sum(1) == 1).all()) and bool((t_BL == 1 / n).all())
        expected = 2 ** (torch.arange(n) * (1 - t) / (half_life * n)).double()
        expected = expected / expected.sum()
        torch.testing.assert_close(masked_BL.double().mean(0), expected, atol=0.012, rtol=0)
    assert bool(late_in_block(eligible_BL, torch.ones(rows, 1).double(), u_BL, one_group(eligible_BL), 0.1)[0].all())


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
        masked_BL, weight_t_BL = kernel(torch.ones(steps, n, dtype=torch.bool), t[:, None], u_BL, torch.zeros(steps, n, dtype=torch.int64))
        probability_B = t**size * (1 - t) ** (n - size)
        count = int(masked_BL[0].sum())
        totals[count] += float((probability_B / weight_t_BL[:, 0]).mean()) * count if count else 0.0
    return totals


@pytest.mark.parametrize("n", [1, 3, 4])
def test_at_least_one_mask_keeps_the_bound(n):
    """sum over subsets of E[w] l must be 1 for each count l = 1..n (n tokens share the bound equally)."""
    torch.testing.assert_close(weight_of_each_count(n, at_least_one)[1:], torch.ones(n, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_a_forced_mask_with_1_over_t_would_not_be_the_bound():
    def kept(eligible_BL, t_BG, u_BL, groups_BL):
        return at_least_one(eligible_BL, t_BG, u_BL, groups_BL)[0], t_BG.gather(1, groups_BL)

    assert float(weight_of_each_count(4, kept)[1]) > 2


def test_the_two_views_of_a_pair_predict_every_token_once():
    eligible_BL = some_eligible(64, 20)
    t_B = torch.linspace(0.01, 0.99, 64, dtype=torch.float64)
    masked_BL, t_BL = draw_masks(eligible_BL, t_B[:, None], draws(64, 20), "bernoulli")
    other_BL, other_t_BL = complement(eligible_BL, masked_BL, t_BL)
    assert torch.equal(masked_BL ^ other_BL, eligible_BL) and not bool((masked_BL & other_BL).any())
    assert torch.equal(other_t_BL, 1 - t_BL)


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
