"""A batch is a pure function of (settings, step): the same under every split, after every interruption, for every reader."""

import collections

import numpy as np
import pytest
import torch
from data_examples import story, write_jsonl

from dlmconvert.data.chat import ensure_chat_template
from dlmconvert.data.conversations import Layout, conversation_rows
from dlmconvert.data.loader import PERIOD, BatchStream, Mixture, period_counts, positions
from dlmconvert.data.packing import prepare_rows
from dlmconvert.diffusion.schedules import noise_levels
from dlmconvert.recipe.schema import TextSource

MASK_ID = 1


@pytest.fixture
def chat_store(tmp_path, tokenizer):
    ensure_chat_template(tokenizer)
    path = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": story(i, 8), "response": story(i, 4)} for i in range(20)])
    return conversation_rows(
        str(path), tokenizer=tokenizer, tokenizer_fingerprint="t", layout=Layout(64, 0, 0, pad_to=8),
        cache_folder=tmp_path / "cache", validation=0,
    )[0]  # fmt: skip


def stream(stores, weights=None, **settings):
    mixture = Mixture(stores, weights or [1.0] * len(stores), settings.get("seed", 0))
    defaults = {
        "rows_per_step": 8, "seed": 0, "corruption_kind": "masking", "eps": 1e-3, "noise_levels": "stratified", "mask_token_id": MASK_ID,
        "alignment": "shift", "isolated": True,
    }  # fmt: skip
    return BatchStream(mixture, **(defaults | settings))


def tensors(batch):
    return [batch.x_0_BL, batch.x_t_BL, batch.masked_BL, batch.eligible_BL, batch.t_BL, batch.segments_BL, batch.positions_BL]


def assert_same(one, two):
    assert one.row_ids == two.row_ids
    for a, b in zip(tensors(one), tensors(two), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("cuts", [[0, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 3, 8], [0, 4, 8]])
def test_micro_batches_put_together_are_the_batch(stores, cuts):
    whole = stream(stores, [2.0, 1.0]).batch(5)
    parts = [stream(stores, [2.0, 1.0]).batch(5, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert sum((part.row_ids for part in parts), []) == whole.row_ids
    for number, tensor in enumerate(tensors(whole)):
        assert torch.equal(torch.cat([tensors(part)[number] for part in parts]), tensor)


def test_any_step_can_be_read_at_any_time(stores):
    straight = stream(stores)
    in_order = [straight.batch(step) for step in range(40)]
    other = stream(stores)
    for step in [39, 0, 17, 17, 3, 38]:
        assert_same(other.batch(step), in_order[step])


def test_seeds_and_steps_differ(stores):
    assert stream(stores).batch(0).row_ids != stream(stores).batch(1).row_ids
    assert stream(stores).batch(0).row_ids != stream(stores, seed=1).batch(0).row_ids


def test_every_row_once_an_epoch(stores):
    store = stores[0]
    mixture = Mixture([store], [1.0], seed=3)
    orders = []
    for epoch in range(3):
        sources, epochs, rows = mixture.slots(epoch * store.num_rows, store.num_rows)
        assert (sources == 0).all() and (epochs == epoch).all()
        assert sorted(rows.tolist()) == list(range(store.num_rows))
        orders.append(rows.tolist())
    assert orders[0] != orders[1] != orders[2]
    across = mixture.slots(store.num_rows - 2, 4)
    assert across[1].tolist() == [0, 0, 1, 1] and across[2].tolist() == orders[0][-2:] + orders[1][:2]


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.9995, 0.0005], [1, 1e-9]])
def test_sources_share_the_slots_by_weight(stores, weights):
    mixture = Mixture(stores, weights, seed=0)
    counts = period_counts(weights, PERIOD)
    sources, epochs, rows = mixture.slots(0, 3 * PERIOD)
    for period in range(3):
        assert np.bincount(sources[period * PERIOD : (period + 1) * PERIOD], minlength=2).tolist() == counts.tolist()
    for source, store in enumerate(stores):  # each source is read through, epoch after epoch
        mine = [(int(e), int(r)) for s, e, r in zip(sources, epochs, rows, strict=True) if s == source]
        assert [e for e, _ in mine] == [i // store.num_rows for i in range(len(mine))]
        assert max(collections.Counter(mine).values()) == 1
    for first, count in ((0, 7), (995, 12), (1234, 5), (2999, 1)):
        for one, two in zip(mixture.slots(first, count), (sources, epochs, rows), strict=True):
            assert one.tolist() == two[first : first + count].tolist()


def test_period_counts():
    assert period_counts([1, 1, 1], 1000).tolist() == [334, 333, 333]
    assert period_counts([0.7, 0.2, 0.1], 10).tolist() == [7, 2, 1]
    assert period_counts([1, 0.0001], 10).tolist() == [9, 1]
    assert period_counts([5, 1e-6, 1e-6, 1e-6], 4).tolist() == [1, 1, 1, 1]


def test_masks_depend_on_the_row_and_not_on_where_it_stands(stores):
    """The same draws for a row in another global batch of the same seed: only the noise level differs."""
    one, two = stream(stores[:1], rows_per_step=8, eps=0.4999), stream(stores[:1], rows_per_step=4, eps=0.4999)
    whole, half = one.batch(0), two.batch(1)
    assert whole.row_ids[4:] == half.row_ids
    for row in range(4):
        a, b = whole.masked_BL[4 + row], half.masked_BL[row]
        fewer, more = (a, b) if whole.t_BL[4 + row, 0] <= half.t_BL[row, 0] else (b, a)
        assert not (fewer & ~more).any()


def test_a_new_epoch_has_new_masks(stores):
    store = stores[0]
    seen = collections.defaultdict(list)
    batches = stream([store], rows_per_step=1, noise_levels="uniform", eps=0.45)
    for step in range(2 * store.num_rows):
        batch = batches.batch(step)
        seen[batch.row_ids[0][2]].append(batch.masked_BL[0])
    assert sum(not torch.equal(a, b) for a, b in seen.values()) > store.num_rows // 2


def test_noise_levels_are_those_of_the_global_batch(stores):
    batch = stream(stores).batch(9, 2, 5)
    assert torch.equal(batch.t_BL[:, 0], noise_levels(0, 9, 8, 1e-3, "stratified")[2:5].float()) and batch.t_BL.dtype == torch.float32


@pytest.mark.parametrize("alignment", ["shift", "in_place"])
def test_what_is_masked_and_what_stays_clean(stores, alignment):
    batches = stream(stores, alignment=alignment)
    for step in range(20):
        batch = batches.batch(step)
        assert not (batch.masked_BL & ~batch.eligible_BL).any()
        assert (batch.x_t_BL[batch.masked_BL] == MASK_ID).all()
        assert torch.equal(batch.x_t_BL[~batch.masked_BL], batch.x_0_BL[~batch.masked_BL])
        first_of_segment = torch.ones_like(batch.masked_BL)
        first_of_segment[:, 1:] = batch.segments_BL[:, 1:] != batch.segments_BL[:, :-1]
        assert torch.equal(batch.eligible_BL, ~first_of_segment if alignment == "shift" else torch.ones_like(first_of_segment))
        assert batches.num_eligible(step) == int(batch.eligible_BL.sum())


def test_without_corruption_every_eligible_token_is_a_target(stores):
    batch = stream(stores, corruption_kind="none").batch(0)
    assert torch.equal(batch.x_t_BL, batch.x_0_BL) and torch.equal(batch.masked_BL, batch.eligible_BL) and (batch.t_BL == 1).all()


@pytest.mark.parametrize("alignment", ["shift", "in_place"])
def test_conversations_go_through_the_same_stream(chat_store, alignment):
    batches = stream([chat_store], alignment=alignment)
    for step in range(4):
        batch = batches.batch(step)
        assert batch.segments_BL is not None and (batch.segments_BL.max(dim=1).values <= 1).all()
        assert not batch.eligible_BL[batch.segments_BL == 1].any() and (batch.eligible_BL.sum(dim=1) >= 2).all()
        assert batches.num_eligible(step) == int(batch.eligible_BL.sum())


def test_segments_are_none_for_joined_text_and_the_count_needs_no_rows(tmp_path, tokenizer, stories):
    (store,), _ = prepare_rows(
        [TextSource(path=str(stories))], tokenizer=tokenizer, tokenizer_fingerprint="t", row_length=16, cache_folder=tmp_path / "cache",
        separator_id=0, validation=0, workers=1,
    )  # fmt: skip
    batches = stream([store], isolated=False)
    batch = batches.batch(0)
    assert batch.segments_BL is None and batch.positions_BL.tolist() == [list(range(16))] * 8
    assert batches.num_eligible(0) == int(batch.eligible_BL.sum()) == 8 * 15


def test_positions_restart_with_each_document():
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    assert positions(segments, True).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert positions(segments, False).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
