"""Counter-based draws: uniform, independent, and a function of the key alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from dlmconvert.diffusion import randomness
from dlmconvert.diffusion.randomness import counter_gumbel, counter_hash, counter_uniform, permutation

N = 200_000


def chi_square(u, bins=64):
    counts = torch.histc(u.double(), bins=bins, min=0, max=1)
    expected = u.numel() / bins
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("keys", [(0,), (3, 1), (4, 0, 0), (7, 2**63, -1)])
def test_draws_are_uniform(keys):
    u = counter_uniform(*keys, torch.arange(N))
    assert u.dtype == torch.float64 and 0 <= float(u.min()) and float(u.max()) < 1
    # 63 degrees of freedom: mean 63, standard deviation 11.2
    assert chi_square(u) < 63 + 5 * 11.3
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / N) ** 0.5


def test_every_bit_is_fair():
    bits = counter_hash(1, 2, torch.arange(20_000))
    ones = torch.stack([(bits >> b) & 1 for b in range(64)]).double().mean(1)
    assert float((ones - 0.5).abs().max()) < 5 * 0.5 / 20_000**0.5


def test_streams_are_independent():
    """Neighbouring keys in any place, and every pair of purposes: no correlation, no common draw."""
    n = 50_000
    index = torch.arange(n)
    streams = [counter_uniform(purpose, 0, 0, index) for purpose in range(1, 9)]
    streams += [counter_uniform(1, 1, 0, index), counter_uniform(1, 0, 1, index), counter_uniform(1, 0, index, 0), counter_uniform(1, 0, 0, index + 1)]
    for a, b in itertools.combinations(streams, 2):
        a, b = a[1:], b[1:]  # two of them share the key (1, 0, 0, 0)
        correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
        assert abs(correlation) < 5 / n**0.5
        assert not bool((a == b).any())


def test_serial_correlation_is_absent():
    u = counter_uniform(5, 9, torch.arange(N))
    for lag in (1, 2, 3, 7, 64, 512, 4096):
        assert abs(float(torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1])) < 5 / (N - lag) ** 0.5


def test_a_pair_matrix_has_no_stripes():
    u = counter_uniform(3, 0, 0, torch.arange(400)[:, None], torch.arange(400)[None, :])
    sigma = (1 / 12 / 400) ** 0.5
    for means in (u.mean(0), u.mean(1)):
        assert float((means - 0.5).abs().max()) < 5 * sigma
    assert abs(float(torch.corrcoef(torch.stack([u.flatten(), u.T.flatten()]))[0, 1])) < 5 / 400


def test_values_do_not_depend_on_shape_or_broadcast():
    rows, columns = torch.arange(7), torch.arange(11)
    whole = counter_uniform(2, 5, rows[:, None], columns[None, :])
    assert torch.equal(whole[3:5, 2:9], counter_uniform(2, 5, rows[3:5, None], columns[None, 2:9]))
    assert torch.equal(whole.T, counter_uniform(2, 5, rows[None, :], columns[:, None]))
    for r, c in ((0, 0), (6, 10), (2, 7)):
        assert float(whole[r, c]) == float(counter_uniform(2, 5, r, c)) == float(counter_uniform(2, torch.tensor(5), torch.tensor(r), c))
    assert torch.equal(whole, counter_uniform(2, 5, rows[:, None].expand(7, 11).int(), columns.expand(7, 11)))


def test_the_mixer_is_splitmix64_in_plain_integers():
    """Checkpoints and published runs depend on these bits."""
    ones = (1 << 64) - 1
    for keys in ((0,), (1, 2), (3, 2**40, 77), (8, -1)):
        state = 0
        for key in keys:
            state = ((state ^ (key & ones)) + 0x9E3779B97F4A7C15) & ones
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & ones
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & ones
            state ^= state >> 31
        assert int(counter_hash(*keys)) & ones == state


def test_purposes_are_distinct():
    names = ("NOISE_LEVEL", "MASK", "ATTENTION_PAIR", "ROW_ORDER", "SAMPLE_TOKEN", "SAMPLE_ORDER", "LIKELIHOOD", "SOURCE_CHOICE")
    assert len({getattr(randomness, name) for name in names}) == len(names)


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_is_a_permutation(n):
    order = permutation(n, 3, 1)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(n))
    if n > 2:
        assert order.tolist() != permutation(n, 3, 2).tolist()


def test_permutation_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    permutation(100, 1)
    counter_gumbel(1, torch.arange(3))
    assert torch.equal(before, torch.get_rng_state())


def test_permutations_are_uniform():
    counts = torch.zeros(24)
    table = {p: i for i, p in enumerate(itertools.permutations(range(4)))}
    for seed in range(4800):
        counts[table[tuple(permutation(4, seed).tolist())]] += 1
    assert float(((counts - 200) ** 2 / 200).sum()) < 23 + 5 * 46**0.5


def test_gumbel_has_its_distribution():
    g = counter_gumbel(1, torch.arange(N))
    assert bool(torch.isfinite(g).all())
    assert chi_square(torch.exp(-torch.exp(-g))) < 63 + 5 * 11.3
    # Gumbel-max: the argmax of log p + g is a draw from p.
    p = torch.tensor([0.5, 0.3, 0.2])
    draws = (p.log() + counter_gumbel(2, torch.arange(50_000)[:, None], torch.arange(3))).argmax(1)
    share = torch.bincount(draws).double() / 50_000
    assert bool(((share - p).abs() < 5 * (p * (1 - p) / 50_000) ** 0.5).all())
