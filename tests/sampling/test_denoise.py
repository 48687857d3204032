"""The loop: what must hold for every order, budget and temperature."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_predictors import HashPredictor, TablePredictor, chi_square_limit

from dlmconvert.sampling.canvas import build_canvas
from dlmconvert.sampling.denoise import denoise, generate
from dlmconvert.sampling.order import ORDERS, event_times

ROWS = [[3, 4] + [None] * 9, [5, None, None, 6, 7, None, 8], [2] + [None] * 4, [1, 1, 1, None, 1]]
SETTINGS = [dict(temperature=0.0), dict(temperature=1.0), dict(temperature=0.8, top_p=0.9, top_k=10)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("num_steps", [1, 4, 40])
def test_invariants_of_every_step(order, settings, num_steps):
    settings = settings | ({"budget": "even"} if order == "first_hitting" else {})
    canvas = build_canvas(ROWS, 0)
    predictor = HashPredictor(favourite=23)
    before_BL, masked_BL, nfe = canvas.tokens_BL.masked_fill(canvas.masked_BL, 23), canvas.masked_BL, 0
    for step in denoise(predictor, canvas, num_steps=num_steps, order=order, **settings):
        assert torch.equal(step.masked_BL, masked_BL & ~step.committed_BL)
        assert not bool((step.committed_BL & ~masked_BL).any())
        assert torch.equal(step.tokens_BL[~step.committed_BL], before_BL[~step.committed_BL])
        assert bool((step.tokens_BL[step.committed_BL] < predictor.vocab_size).all())
        assert bool((step.confidence_BL[step.committed_BL] > 0).all()) and float(step.confidence_BL[~step.committed_BL].sum()) == 0
        assert step.nfe - nfe == int(bool(step.committed_BL.any()))
        before_BL, masked_BL, nfe = step.tokens_BL, step.masked_BL, step.nfe
    assert not bool(masked_BL.any())
    assert nfe == len(predictor.asked) <= min(num_steps, int(canvas.masked_BL.sum()))


def test_a_mask_token_that_is_a_word_is_kept_where_given_and_never_produced():
    predictor = HashPredictor(mask_token_id=5, favourite=5)
    canvas = build_canvas([[5, None, 5, None, None]], 0)
    filled = generate(predictor, canvas, num_steps=2, order="confidence").tokens_BL[0].tolist()
    assert filled[0] == filled[2] == 5 and filled.count(5) == 2


@pytest.mark.parametrize("order", ORDERS)
def test_seed_decides(order):
    def run(seed):
        return generate(HashPredictor(), build_canvas(ROWS, 0), order=order, temperature=1.0, seed=seed).tokens_BL

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_rows_of_one_batch_draw_differently():
    canvas = build_canvas([[1] + [None] * 12] * 2, 0)
    tokens_BL = generate(HashPredictor(), canvas, num_steps=12, temperature=1.0).tokens_BL
    assert tokens_BL[0].tolist() != tokens_BL[1].tolist()


def test_more_steps_than_positions_cost_no_forwards():
    canvas = build_canvas([[1, None, None, None]], 0)
    for order in ("confidence", "random"):
        assert generate(HashPredictor(), canvas, num_steps=500, order=order).nfe <= 3


def test_random_order_asks_for_the_chosen_positions_only():
    predictor = HashPredictor()
    generate(predictor, build_canvas([[1] + [None] * 20], 0), num_steps=6, order="random")
    assert sum(predictor.asked) == 20
    predictor = HashPredictor()
    generate(predictor, build_canvas([[1] + [None] * 20], 0), num_steps=5, order="entropy")
    assert predictor.asked == [20, 16, 12, 8, 4]


def test_nothing_masked_is_nothing_to_do():
    canvas = build_canvas([[1, 2]], 0)
    assert list(denoise(HashPredictor(), canvas, num_steps=3)) == []
    assert generate(HashPredictor(), canvas, num_steps=3).tokens_BL.tolist() == [[1, 2]]


def test_confidence_order_is_the_slow_obvious_one():
    predictor = HashPredictor()
    row = [1] + [None] * 6
    state = [1] + [predictor.mask_token_id] * 6
    masked = set(range(1, 7))
    for count in (2, 2, 2):
        wanted = torch.tensor([[place in masked for place in range(7)]])
        logits = predictor.predict(torch.tensor([state]), wanted, torch.arange(7)[None], None)[:, :23]
        p = torch.softmax(logits, -1)
        ranked = sorted(zip(p.max(-1).values.tolist(), sorted(masked), p.argmax(-1).tolist(), strict=True), reverse=True)
        for _, place, token in ranked[:count]:
            state[place] = token
            masked.discard(place)
    assert generate(predictor, build_canvas([row], 0), num_steps=3, order="confidence").tokens_BL[0].tolist() == state


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_steps=0), "steps"),
        (dict(num_steps=1, order="sideways"), "order"),
        (dict(num_steps=1, budget="all"), "budget"),
        (dict(num_steps=1, temperature=-1), "temperature"),
        (dict(num_steps=1, temperature=1e-300), "below 1e-6"),
        (dict(num_steps=1, order_temperature=-1), "temperature"),
    ],
)
def test_settings_without_meaning_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        denoise(HashPredictor(), build_canvas([[1, None]], 0), **settings)


# Distributions.

NUM_ROWS, LENGTH, V = 8000, 3, 2


def _joint() -> torch.Tensor:
    weights = torch.tensor([5.0, 1.0, 1.0, 3.0, 2.0, 0.5, 0.5, 6.0], dtype=torch.float64).reshape(V, V, V)
    return weights / weights.sum()


def _sampled_counts(**settings) -> torch.Tensor:
    predictor = TablePredictor(_joint())
    canvas = build_canvas([[0] + [None] * LENGTH] * NUM_ROWS, 0)
    tokens_BL = generate(predictor, canvas, **settings).tokens_BL
    codes_B = tokens_BL[:, 1] * V * V + tokens_BL[:, 2] * V + tokens_BL[:, 3]
    return torch.bincount(codes_B, minlength=V**LENGTH).double()


def _chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p.reshape(-1) * NUM_ROWS
    return float(((counts - expected) ** 2 / expected).sum())


def _exact_ancestral(num_steps: int) -> torch.Tensor:
    """The distribution of Algorithm 2's output: each state's mass flows to its successors; tokens of one step are independent."""
    predictor = TablePredictor(_joint())
    mass = {(predictor.mask_token_id,) * LENGTH: 1.0}
    for step in range(num_steps):
        reveal, after = 1 / (num_steps - step), {}
        for state, weight in mass.items():
            options = []
            for place, token in enumerate(state):
                if token != predictor.mask_token_id:
                    options.append([(token, 1.0)])
                else:
                    p = predictor.conditional(state, place).tolist()
                    options.append([(token, 1 - reveal)] + [(v, reveal * q) for v, q in enumerate(p)])
            for choice in itertools.product(*options):
                share = weight
                for _, q in choice:
                    share *= q
                if share > 0:
                    successor = tuple(token for token, _ in choice)
                    after[successor] = after.get(successor, 0.0) + share
        mass = after
    result = torch.zeros(V, V, V, dtype=torch.float64)
    for state, weight in mass.items():
        result[state] += weight
    return result


ONE_BY_ONE = [dict(budget="even"), dict(budget="llada", block_length=2)]
ONE_BY_ONE += [dict(threshold=1.01), dict(factor=0.0, block_length=1), dict(entropy_bound=0.0, block_length=2)]


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "confidence"])
@pytest.mark.parametrize("settings", ONE_BY_ONE, ids=str)
def test_one_token_a_step_samples_the_joint_whatever_the_order(order, settings):
    # Not so for confidence: it looks at the drawn candidate, so it prefers probable tokens, by design.
    counts = _sampled_counts(order=order, temperature=1.0, seed=5, **settings)
    assert _chi_square(counts, _joint()) < chi_square_limit(V**LENGTH - 1)


def test_the_test_of_the_joint_would_notice():
    counts = _sampled_counts(order="confidence", budget="even", temperature=1.0, seed=5)
    assert _chi_square(counts, _joint()) > 10 * chi_square_limit(V**LENGTH - 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_an_order_temperature_leaves_the_joint_as_it_is(temperature):
    counts = _sampled_counts(order="left_to_right", order_temperature=temperature, temperature=1.0, seed=6)
    assert _chi_square(counts, _joint()) < chi_square_limit(V**LENGTH - 1)


def test_event_times_have_the_law_of_first_hitting():
    # The recursion t <- t u^(1/n), n <- n - 1 of arXiv 2409.02908 beside the sorted times: means and quantiles of each event.
    n, rows = 4, 20000
    keys_BL = torch.arange(rows)[:, None].expand(rows, n)
    times_BL = event_times(3, keys_BL, torch.arange(n).expand(rows, n)).sort(dim=1, descending=True).values
    u_BL = torch.rand(rows, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t_B = torch.ones(rows, dtype=torch.float64)
    for event in range(n):
        t_B = t_B * u_BL[:, event] ** (1 / (n - event))
        for level in (0.1, 0.5, 0.9):
            below = float((times_BL[:, event] < t_B.quantile(level)).double().mean())
            assert abs(below - level) < 5 * (2 * level * (1 - level) / rows) ** 0.5


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("budget", ["ancestral", "bernoulli"])
def test_bernoulli_at_its_limit_is_the_ancestral_sampler(num_steps, budget):
    counts = _sampled_counts(num_steps=num_steps, budget=budget, eps=0.0, temperature=1.0, seed=8)
    assert _chi_square(counts, _exact_ancestral(num_steps)) < chi_square_limit(V**LENGTH - 1)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_ancestral_sampler_has_its_exact_distribution(num_steps):
    exact = _exact_ancestral(num_steps)
    assert abs(float(exact.sum()) - 1) < 1e-12
    counts = _sampled_counts(num_steps=num_steps, order="random", temperature=1.0, seed=7)
    limit = chi_square_limit(V**LENGTH - 1)
    assert _chi_square(counts, exact) < limit
    if num_steps == 1:  # the test has power: one step is the product of the marginals, far from the joint
        assert _chi_square(counts, _joint()) > 10 * limit


def test_reveal_step_is_uniform_over_the_steps():
    canvas = build_canvas([[0] + [None] * LENGTH] * NUM_ROWS, 0)
    counts = [int(step.committed_BL.sum()) for step in denoise(TablePredictor(_joint()), canvas, num_steps=6, order="random")]
    expected = NUM_ROWS * LENGTH / 6
    assert sum((count - expected) ** 2 / expected for count in counts) < chi_square_limit(5)


def test_order_temperature_draws_positions_without_replacement():
    # At a huge temperature every position is as likely to come first.
    canvas = build_canvas([[0] + [None] * LENGTH] * NUM_ROWS, 0)
    first = next(denoise(TablePredictor(_joint()), canvas, num_steps=LENGTH, order="margin", order_temperature=1e6))
    counts = first.committed_BL.sum(0)[1:].tolist()
    assert sum(counts) == NUM_ROWS
    assert sum((count - NUM_ROWS / LENGTH) ** 2 / (NUM_ROWS / LENGTH) for count in counts) < chi_square_limit(LENGTH - 1)
