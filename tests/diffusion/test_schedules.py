"""The window and the other paths from causal to bidirectional attention; noise levels spread over the batch."""

from __future__ import annotations

import pytest
import torch

from dlmconvert.diffusion.attention import AttentionContext, allowed, allowed_matrix, realise
from dlmconvert.diffusion.attention import _block_mask as block_mask
from dlmconvert.diffusion.schedules import annealing_ratio, attention_at, look_ahead_width, noise_levels, open_share


def window(width, **rest):
    return AttentionContext(open_ratio=1.0, look_ahead=width, **rest)


@pytest.mark.parametrize("width", [0, 1, 3, 8, 11, 40])
def test_the_window_is_causal_and_so_many_ahead(width):
    matrix_LL = allowed_matrix(12, window(width))[0, 0]
    expected_LL = torch.ones(12, 12).tril(width).bool()
    assert torch.equal(matrix_LL, expected_LL)
    future = expected_LL.triu(1).sum() / 66
    assert open_share(window(width), 12) == pytest.approx(float(future))


def test_a_window_and_documents_and_draws_only_close_pairs():
    segments_BL = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    matrix_B1LL = allowed_matrix(12, window(3, segments_BL=segments_BL))
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    assert torch.equal(matrix_B1LL[:, 0], allowed_matrix(12, window(3))[0] & same_BLL)
    drawn = AttentionContext(open_ratio=0.5, seed=3, step=1)
    both = AttentionContext(open_ratio=0.5, seed=3, step=1, look_ahead=3)
    assert torch.equal(allowed_matrix(12, both), allowed_matrix(12, drawn) & allowed_matrix(12, window(3)))


def test_realisations_of_the_window():
    """No mask at both ends only; a dense one between; the BlockMask is made of the same predicate."""
    context = window(3, segments_BL=torch.tensor([[0] * 9 + [1] * 7]))
    matrix = allowed_matrix(16, context)
    assert torch.equal(realise(context, 16, "sdpa", torch.float32, "cpu").mask, matrix)
    assert torch.equal(realise(context, 16, "eager", torch.float32, "cpu").mask == 0, matrix)
    for flexible in (context, window(3), AttentionContext(0.3, seed=2, step=5, look_ahead=4)):
        mask = block_mask(flexible, 16, "cpu")
        index_16 = torch.arange(16)
        seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), index_16[:, None], index_16[None, :])
        assert torch.equal(seen, allowed_matrix(16, flexible)[0, 0])
    assert realise(AttentionContext(0.0, look_ahead=3), 16, "sdpa", torch.float32, "cpu").is_causal
    assert bool(allowed(torch.tensor(0), torch.tensor(2), torch.tensor(5), window(3)))
    assert not bool(allowed(torch.tensor(0), torch.tensor(2), torch.tensor(6), window(3)))


@pytest.mark.parametrize(("steps", "length"), [(1, 16), (4, 16), (7, 16), (50, 16), (200, 128), (5, 2), (3, 1)])
def test_the_window_grows_to_the_whole_row(steps, length):
    widths = [look_ahead_width(step, steps, length) for step in range(steps + 3)]
    assert widths == sorted(widths) and widths[steps - 1 :] == [length - 1] * 4
    assert widths[0] >= 1 or length == 1
    assert all(width - (length - 1) * (step + 1) / steps < 1 for step, width in enumerate(widths[:steps]))


@pytest.mark.parametrize("anneal", ["none", "random", "window"])
def test_every_path_ends_bidirectional_without_a_mask(anneal):
    contexts = [attention_at(step, anneal=anneal, anneal_steps=5, length=16, seed=4) for step in range(8)]
    shares = [open_share(context, 16) for context in contexts]
    assert shares == sorted(shares) and shares[4:] == [1.0] * 4
    assert all(realise(context, 16, "sdpa", torch.float32, "cpu").mask is None for context in contexts[4:])
    if anneal == "none":
        assert shares[0] == 1.0
    else:
        assert 0 < shares[0] < 1
    if anneal == "random":
        assert shares[:5] == [annealing_ratio(step, 5) for step in range(5)]


@pytest.mark.parametrize("kind", ["uniform", "stratified", "offset", "antithetic"])
@pytest.mark.parametrize(("low", "high"), [(1e-3, 1.0), (0.3, 0.8), (1.0, 1.0)])
def test_every_row_is_uniform_on_its_range(kind, low, high):
    """Whatever the rows of a batch have to do with each other, each estimates the same."""
    t = torch.stack([noise_levels(5, step, 7, low, kind, high) for step in range(3000)])
    assert low <= float(t.min()) and float(t.max()) <= high
    sigma = (high - low) / 12**0.5 / 3000**0.5
    # A stratified row keeps to its stratum: the batch as a whole is uniform.
    means = t.mean(0) if kind != "stratified" else t.mean().reshape(1)
    assert bool(((means - (low + high) / 2).abs() <= 5 * sigma + 1e-12).all())


def test_the_levels_of_a_batch_are_spread():
    for step in range(20):
        even = noise_levels(1, step, 8, 0.0, "offset").sort().values
        torch.testing.assert_close(even.diff(), torch.full((7,), 1 / 8, dtype=torch.float64))
        assert even.dtype == torch.float64
        pairs = noise_levels(1, step, 8, 1e-3, "antithetic").view(4, 2)
        torch.testing.assert_close(pairs.sum(1), torch.full((4,), 1 + 1e-3, dtype=torch.float64))
    assert torch.equal(noise_levels(1, 3, 7, 1e-3, "antithetic")[6], noise_levels(1, 3, 7, 1e-3, "uniform")[6])
