"""Every corruption through the stream that training reads: splits, pairs, and the count of masked tokens."""

from __future__ import annotations

import pytest
import torch
from test_loader import assert_same, stream, tensors

CHOICES = {
    "exact": {"count": "exact"},
    "exact, uniform": {"count": "exact", "noise_levels": "uniform"},
    "at least one": {"count": "at_least_one", "noise_levels": "antithetic"},
    "band": {"band": (0.3, 0.8), "noise_levels": "offset"},
    "rising": {"rise_steps": 10, "rise_from": 0.2},
    "pieces": {"piece_length": lambda step: 4},
    "pieces, in place, exact": {"piece_length": lambda step: 4, "alignment": "in_place", "count": "exact"},
    "rising, exact": {"rise_steps": 6, "rise_from": 0.2, "count": "exact"},
    "exact in a band": {"count": "exact", "band": (0.3, 0.8)},
    "all": {"band": (1.0, 1.0)},
    "pairs": {"views": "complementary"},
    "pairs in a band": {"views": "complementary", "band": (0.25, 0.75), "noise_levels": "uniform", "alignment": "in_place"},
    "none": {"corruption_kind": "none"},
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("cuts", [[0, 3, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_micro_batches_put_together_are_the_batch(stores, name, cuts):
    """Also where a cut goes through a pair."""
    whole = stream(stores, [2.0, 1.0], **CHOICES[name]).batch(5)
    parts = [stream(stores, [2.0, 1.0], **CHOICES[name]).batch(5, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert sum((part.row_ids for part in parts), []) == whole.row_ids
    for number, tensor in enumerate(tensors(whole)):
        assert torch.equal(torch.cat([tensors(part)[number] for part in parts]), tensor)
    assert_same(stream(stores, [2.0, 1.0], **CHOICES[name]).batch(5), whole)


@pytest.mark.parametrize("name", CHOICES)
def test_masked_tokens_are_counted_without_reading_them(stores, name, monkeypatch):
    import dlmconvert.data.loader as loader

    monkeypatch.setattr(loader, "COUNTED_ROWS", 3)
    batches = stream(stores, **CHOICES[name])
    for step in (0, 7):
        batch = batches.batch(step)
        assert batches.num_masked(step) == int(batch.masked_BL.sum()) > 0
        assert batches.num_eligible(step) == int(batch.eligible_BL.sum())
        assert not (batch.masked_BL & ~batch.eligible_BL).any() and bool((batch.t_BL > 0).all())


def test_counts_of_rows(stores):
    for step in range(10):
        exact, forced = stream(stores, count="exact").batch(step), stream(stores, count="at_least_one", eps=1e-6).batch(step)
        for batch in (exact, forced):
            assert bool((batch.masked_BL.sum(1) >= 1).all())
        torch.testing.assert_close(exact.t_BL[:, 0], exact.masked_BL.sum(1) / exact.eligible_BL.sum(1))
        assert stream(stores, band=(1.0, 1.0)).batch(step).masked_BL.equal(exact.eligible_BL)


def test_pairs_are_one_row_in_two_views(stores):
    batches = stream(stores[:1], views="complementary", rows_per_step=8)
    rows = []
    for step in range(6):
        batch = batches.batch(step)
        assert batch.row_ids[::2] == batch.row_ids[1::2]
        assert torch.equal(batch.masked_BL[::2] ^ batch.masked_BL[1::2], batch.eligible_BL[::2])
        torch.testing.assert_close(batch.t_BL[::2] + batch.t_BL[1::2], torch.ones(4, batch.t_BL.shape[1]))
        assert batches.num_masked(step) * 2 == batches.num_eligible(step)
        rows += batch.row_ids[::2]
    # The text is read as ever, at half the pace.
    plain = stream(stores[:1], rows_per_step=4)
    assert rows == sum((plain.batch(step).row_ids for step in range(6)), [])


@pytest.mark.parametrize("band", [None, (0.2, 0.8)])
def test_noise_rises_to_the_whole_range_and_is_then_what_it_would_be(stores, band):
    rising, plain = (stream(stores, band=band, noise_levels="offset", **words).batch for words in ({"rise_steps": 10, "rise_from": 0.3}, {}))
    low, high = band or (1e-3, 1.0)
    for step in range(10):
        limit = low + (high - low) * (0.3 + 0.07 * step)
        assert low <= float(rising(step).t_BL.min()) and limit - (limit - low) / 8 <= float(rising(step).t_BL.max()) <= limit + 1e-6
    for step in (10, 37):
        assert_same(rising(step), plain(step))


@pytest.mark.parametrize("alignment", ["shift", "in_place"])
def test_pieces_are_the_row_cut_up(stores, alignment):
    """The same tokens, positions and documents; under `shift` the first token of a piece stays clean, for nothing predicts it."""
    whole, cut = (stream(stores, alignment=alignment, **words).batch(3) for words in ({}, {"piece_length": lambda step: step + 1}))
    length = cut.x_0_BL.shape[1]
    assert length == 4 and cut.row_ids == whole.row_ids
    for name in ("x_0_BL", "positions_BL", "segments_BL"):
        assert torch.equal(getattr(cut, name), getattr(whole, name).reshape(-1, length))
    expected_BL = whole.eligible_BL.reshape(-1, length).clone()
    if alignment == "shift":
        expected_BL[:, 0] = False
    assert torch.equal(cut.eligible_BL, expected_BL) and not (cut.masked_BL & ~expected_BL).any()
    assert torch.equal(cut.x_t_BL == cut.x_0_BL, ~cut.masked_BL)
