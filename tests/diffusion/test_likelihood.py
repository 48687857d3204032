"""The NELBO estimator against exact enumeration on toy models (shared/vectors/11)."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from tiny_models import known_answers

from dlmconvert.diffusion.likelihood import ar_nll, exact_counts, mean_and_standard_error, nelbo_draw, random_subset
from dlmconvert.diffusion.objective import cross_entropy

VECTOR = "11_likelihood_estimator.json"


class Pairwise:
    """logits[i][v] = base[i][v] + sum over j != i of W[i][j][ctx_j][v]."""

    def __init__(self, inputs):
        self.base_LV = torch.tensor(inputs["base"], dtype=torch.float64)
        self.pair = torch.tensor(inputs["W"], dtype=torch.float64)
        self.mask_token_id, self.num_prompt = inputs["mask_id"], inputs["prompt_length"]

    def predict(self, tokens_BL, wanted_BL, positions_BL, segments_BL):
        length = tokens_BL.shape[1]
        logits_BLV = self.base_LV.expand(len(tokens_BL), length, -1).clone()
        for i, j in itertools.permutations(range(length), 2):
            logits_BLV[:, i] += self.pair[i, j][tokens_BL[:, j]]
        return logits_BLV[wanted_BL]


class Joint:
    """p(x_i | what is visible), from one table of the joint distribution."""

    def __init__(self, inputs):
        self.length, self.V = inputs["length"], inputs["V"]
        self.mask_token_id, self.num_prompt = self.V, 0
        self.p = torch.tensor(inputs["weights"], dtype=torch.float64).view([self.V] * self.length)
        self.p = self.p / self.p.sum()

    def predict(self, tokens_BL, wanted_BL, positions_BL, segments_BL):
        rows = []
        for b, i in wanted_BL.nonzero().tolist():
            index = tuple(slice(None) if v == self.V or j == i else v for j, v in enumerate(tokens_BL[b].tolist()))
            left = [j for j, v in enumerate(tokens_BL[b].tolist()) if v == self.V or j == i]
            table = self.p[index]
            rows.append(table.sum([axis for axis, j in enumerate(left) if j != i]).log() if len(left) > 1 else table.log())
        return torch.stack(rows)


def models():
    answers = known_answers(VECTOR)
    for case in answers["pairwise_model_cases"]:
        for expected in case["expected"]:
            yield Pairwise(case["inputs"]), expected
    for expected in answers["joint_model_case"]["expected"]:
        yield Joint(answers["joint_model_case"]["inputs"]), expected


def subset_sums(model, x):
    """{masked subset: sum of CE}, over all non-empty subsets of the targets."""
    x_0_BL = torch.tensor([x])
    targets = range(model.num_prompt, len(x))
    sums = {}
    for size in range(1, len(targets) + 1):
        for subset in itertools.combinations(targets, size):
            masked_BL = torch.zeros_like(x_0_BL, dtype=torch.bool)
            masked_BL[0, list(subset)] = True
            logits_NV = model.predict(x_0_BL.masked_fill(masked_BL, model.mask_token_id), masked_BL, None, None)
            sums[subset] = float(cross_entropy(logits_NV, x_0_BL[masked_BL]).double().sum())
    return sums


def test_both_forms_of_the_bound_are_the_enumerated_one():
    """Exact count: l ~ U{1..n}, weight n/l. Bernoulli: t ~ U(eps, 1), weight 1/t. One number."""
    for model, expected in models():
        sums = subset_sums(model, expected["x"])
        n = len(expected["x"]) - model.num_prompt
        exact = sum(value * (n / len(s)) / (n * math.comb(n, len(s))) for s, value in sums.items())
        assert exact == pytest.approx(expected["nelbo"], rel=1e-6, abs=1e-8)
        # int (1/t) t^l (1-t)^(n-l) dt, the weight that Bernoulli masking gives a subset of l tokens.
        for eps, name in ((0.0, "nelbo"), (1e-3, "nelbo_bernoulli_eps_1e-3")):
            if name in expected:
                bernoulli = sum(value * integral(len(s), n, eps) for s, value in sums.items())
                assert bernoulli == pytest.approx(expected[name], rel=1e-6, abs=1e-8)
        if "minus_log_p" in expected:
            assert exact == pytest.approx(expected["minus_log_p"], rel=1e-6)


def integral(count, n, eps):
    """int over t in (eps, 1) of (1/t) t^count (1-t)^(n-count), with the power expanded."""
    total = 0.0
    for k in range(n - count + 1):
        total += math.comb(n - count, k) * (-1) ** k * (1 - eps ** (count + k)) / (count + k)
    return total / (1 - eps)


def test_the_estimator_is_unbiased():
    rows = 4000
    for seed, (model, expected) in enumerate(models()):
        if isinstance(model, Joint):
            continue
        x_0_BL = torch.tensor([expected["x"]]).expand(rows, -1)
        targets_BL = torch.arange(x_0_BL.shape[1]).expand_as(x_0_BL) >= model.num_prompt
        for num_draws in (1, 3):
            nats_B = torch.zeros(rows, dtype=torch.float64)
            for draw in range(num_draws):
                nats_B += nelbo_draw(
                    model.predict, x_0_BL, targets_BL, torch.arange(rows), model.mask_token_id,
                    draw=draw, num_draws=num_draws, seed=seed, positions_BL=targets_BL.long(),
                ) / num_draws  # fmt: skip
            bound = 5 * expected["single_sample_std_exact_count"] / rows**0.5
            assert abs(float(nats_B.mean()) - expected["nelbo"]) < bound
            if num_draws > 1:
                assert float(nats_B.std()) < expected["single_sample_std_exact_count"]


@pytest.mark.parametrize(("n", "num_draws"), [(4, 1), (4, 8), (5, 2), (20, 16), (7, 7), (3, 128)])
def test_counts_are_uniform(n, num_draws):
    """Also where LLaDA's rounding is not (4 tokens, 8 draws; 20 tokens, 16 draws)."""
    keys_B = torch.arange(20_000)
    counts = torch.cat([exact_counts(torch.full((len(keys_B), 1), n), keys_B, draw, num_draws, 0)[:, 0] for draw in range(num_draws)])
    share = torch.bincount(counts, minlength=n + 1)[1:].double() / counts.numel()
    assert int(counts.min()) >= 1 and int(counts.max()) <= n
    assert float((share - 1 / n).abs().max()) < 5 * (1 / n / counts.numel()) ** 0.5


@pytest.mark.parametrize("seed", range(30))
def test_strata_and_subsets(seed):
    n, draws = random.Random(seed).randint(1, 40), random.Random(-seed - 1).randint(1, 20)
    keys_B = torch.arange(6)
    targets_BL = torch.zeros(6, 50, dtype=torch.bool)
    targets_BL[:, torch.randperm(50, generator=torch.Generator().manual_seed(seed))[:n]] = True
    for draw in range(draws):
        counts_B = exact_counts(targets_BL.sum(1, keepdim=True), keys_B, draw, draws, seed)[:, 0]
        assert bool((counts_B >= n * draw // draws).all()) and bool((counts_B <= -(-n * (draw + 1) // draws) + 1).all())
        masked_BL, weight_BL = random_subset(targets_BL, torch.zeros(6, 50, dtype=torch.int64), keys_B, draw, draws, seed)
        assert torch.equal(masked_BL.sum(1), counts_B) and not bool((masked_BL & ~targets_BL).any())
        torch.testing.assert_close(weight_BL[:, 0], n / counts_B)


def test_noise_is_fixed_by_row_and_draw_not_by_batch():
    targets_BL = torch.ones(8, 12, dtype=torch.bool)
    keys_B = torch.arange(8)
    blocks_BL = (torch.arange(12) // 5).expand(8, 12)
    masked_BL, _ = random_subset(targets_BL, blocks_BL, keys_B, 1, 4, 9)
    assert torch.equal(masked_BL[5:7], random_subset(targets_BL[5:7], blocks_BL[5:7], keys_B[5:7], 1, 4, 9)[0])


def test_one_target_is_exact_and_no_target_is_zero():
    logits_V = torch.randn(7, generator=torch.Generator().manual_seed(0))

    def predict(tokens_BL, wanted_BL, positions_BL, segments_BL):
        assert bool((tokens_BL[wanted_BL] == 6).all())
        return logits_V.expand(int(wanted_BL.sum()), 7)

    targets_BL = torch.tensor([[False, True, False], [False, False, False]])
    nats_B = nelbo_draw(
        predict, torch.ones(2, 3, dtype=torch.int64), targets_BL, torch.arange(2), 6, draw=0, num_draws=1, seed=0, positions_BL=targets_BL.long()
    )  # fmt: skip
    # The mask token (6) stays in the softmax, as in training.
    assert nats_B.tolist() == pytest.approx([float(-logits_V.log_softmax(0)[1]), 0.0], rel=1e-6)


def test_ar_likelihood_is_the_chain_rule():
    for model, expected in models():
        if isinstance(model, Joint):
            continue
        x = expected["x"]

        def left_to_right(tokens_BL, wanted_BL, positions_BL, segments_BL, model=model, x=x):
            hidden_BL = torch.arange(tokens_BL.shape[1])[:, None] <= torch.arange(tokens_BL.shape[1])
            rows = [
                model.predict(tokens_BL.masked_fill(hidden_BL[i], model.mask_token_id), wanted_BL & (torch.arange(len(x)) == i), None, None)
                for i in range(len(x))
            ]
            return torch.cat(rows)

        targets_BL = torch.arange(len(x))[None] >= model.num_prompt
        assert float(ar_nll(left_to_right, torch.tensor([x]), targets_BL, None)[0]) == pytest.approx(expected["nll_left_to_right"], rel=1e-6)


def test_mean_and_standard_error():
    nats_B, tokens_B = torch.tensor([2.0, 4.0, 9.0]).double(), torch.tensor([1, 2, 3])
    mean, error = mean_and_standard_error(nats_B, tokens_B)
    assert mean == pytest.approx(2.5)
    assert error == pytest.approx((((0.5) ** 2 + 1 + 1.5**2) * 3 / 2) ** 0.5 / 6)
    assert math.isnan(mean_and_standard_error(nats_B[:1], tokens_B[:1])[1])
