"""Canvas, filters, budgets, tie-breaking, draws."""

from __future__ import annotations

import pytest
import torch
from tiny_predictors import chi_square_limit, plan

from dlmconvert.sampling.blocks import groups
from dlmconvert.sampling.budget import ancestral, even
from dlmconvert.sampling.canvas import build_canvas, canvas_after_prompts, check_predictable, cut_at
from dlmconvert.sampling.draw import draw_tokens
from dlmconvert.sampling.filters import ban, check_filters, keep_top_k, penalise_repetition
from dlmconvert.sampling.order import best


def test_build_canvas_pads_on_the_right():
    canvas = build_canvas([[5, None, 6], [7, None]], pad_token_id=0)
    assert canvas.tokens_BL.shape == (2, 3)
    assert canvas.masked_BL.tolist() == [[False, True, False], [False, True, False]]
    assert canvas.segments_BL.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert canvas.positions_BL.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert [len(row) for row in canvas.rows()] == [3, 2]
    assert build_canvas([[5, None]], 0).segments_BL is None


@pytest.mark.parametrize("rows, keys", [([], None), ([[1], []], None), ([[1]], [1, 2])])
def test_build_canvas_refuses(rows, keys):
    with pytest.raises(ValueError):
        build_canvas(rows, 0, row_keys=keys)


def test_prompts_in_a_tensor_keep_their_side():
    left = canvas_after_prompts(torch.tensor([[0, 0, 5], [6, 7, 8]]), torch.tensor([[0, 0, 1], [1, 1, 1]]), 2)
    assert left.masked_BL.tolist() == [[False, False, False, True, True]] * 2
    assert left.positions_BL.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert left.segments_BL.tolist() == [[1, 1, 0, 0, 0], [0] * 5]
    right = canvas_after_prompts(torch.tensor([[5, 0, 0], [6, 7, 8]]), torch.tensor([[1, 0, 0], [1, 1, 1]]), 2)
    assert right.masked_BL.tolist() == [[False, True, True, False, False], [False, False, False, True, True]]
    assert right.segments_BL.tolist() == [[0, 0, 0, 1, 1], [0] * 5]
    assert right.positions_BL[0, :3].tolist() == [0, 1, 2]
    assert canvas_after_prompts(torch.tensor([[5, 6]]), None, 2).segments_BL is None
    with pytest.raises(ValueError, match="holes"):
        canvas_after_prompts(torch.tensor([[5, 0, 5]]), torch.tensor([[1, 0, 1]]), 2)
    with pytest.raises(ValueError, match="holes"):
        canvas_after_prompts(torch.tensor([[0, 5], [5, 0]]), torch.tensor([[0, 1], [1, 0]]), 2)


def test_shift_refuses_a_row_without_a_given_first_token():
    check_predictable(build_canvas([[None, 1]], 0), "in_place")
    with pytest.raises(ValueError, match="row 1 .*shift"):
        check_predictable(build_canvas([[1, None], [None, 1]], 0), "shift")
    with pytest.raises(ValueError, match="row 0 "):  # a row of padding only has no start either
        check_predictable(canvas_after_prompts(torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 0], [1, 1]]), 2), "shift")


def test_cut_at():
    assert cut_at([4, 5, 2, 6], 2) == [4, 5]
    assert cut_at([4, 5, 2, 6], [9, 5]) == [4]
    assert cut_at([4, 5], 2) == cut_at([4, 5], None) == [4, 5]


def test_ban_removes_the_mask_and_what_does_not_exist():
    logits_NV = torch.zeros(2, 6, dtype=torch.bfloat16)
    banned_NV = ban(logits_NV, mask_token_id=1, vocab_size=4, extra=[0])
    assert banned_NV.dtype == torch.float32
    assert torch.isfinite(banned_NV).tolist() == [[False, False, True, True, False, False]] * 2
    assert bool(torch.isfinite(logits_NV).all())
    assert ban(logits_NV, mask_token_id=9, vocab_size=6).isfinite().all()


def test_top_k():
    assert torch.isfinite(keep_top_k(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2)).tolist() == [[False, True, True, False]]
    assert keep_top_k(torch.zeros(1, 3), 9).isfinite().all()


@pytest.mark.parametrize(
    "values", [(-1, None, None), (float("nan"), None, None), (1, 0, None), (1, 1.5, None), (1, None, 0), (1, None, None, 0)]
)
def test_filters_without_meaning_are_refused(values):
    with pytest.raises(ValueError):
        check_filters(*values)


@pytest.mark.parametrize("n", [1, 5, 16, 17])
@pytest.mark.parametrize("num_steps", [1, 3, 16, 40])
def test_even_budget_sums_to_n(n, num_steps):
    masked_BL = torch.ones(1, n, dtype=torch.bool)
    counts = []
    for step in range(num_steps):
        count_B = even(plan(masked_BL, [n], step, num_steps))
        masked_BL &= ~best(torch.zeros(1, n), masked_BL, count_B)
        counts.append(int(count_B))
    assert sum(counts) == n and max(counts) - min(counts) <= 1


def test_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits_NV = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    tokens_BL = torch.tensor([[1, 2, 2, 8], [3, 3, 0, 7]])
    visible_BL = torch.tensor([[True, True, True, False], [True, False, True, True]])
    flat_N = torch.tensor([3, 0, 1, 5, 4])  # a masked one; a single 1, one of two 2; a masked one, a single 3
    ours_NV = penalise_repetition(logits_NV, flat_N, tokens_BL, visible_BL, 1.7)
    for place, (row, column) in enumerate(divmod(flat, 4) for flat in flat_N.tolist()):
        others_L = visible_BL[row] & (torch.arange(4) != column)  # a token does not repeat itself
        visible = tokens_BL[row][others_L][None]
        assert torch.equal(RepetitionPenaltyLogitsProcessor(1.7)(visible, logits_NV[place : place + 1].clone())[0], ours_NV[place])


@pytest.mark.parametrize("n", [1, 5, 16, 17])
@pytest.mark.parametrize("block_length", [1, 4, 5, 40])
def test_steps_are_shared_by_the_blocks(n, block_length):
    num_blocks = -(-n // block_length)

    def layout(length, block_length, num_steps):
        canvas = build_canvas([[None] * length], 0)
        return groups(canvas, canvas.masked_BL, block_length, num_steps)

    for num_steps in range(num_blocks, 2 * n + 3):
        shares = layout(n, block_length, num_steps).steps_BK[0].tolist()
        assert len(shares) == num_blocks and sum(shares) == num_steps and min(shares) >= 1
        if n % block_length == 0 and num_steps % num_blocks == 0:  # LLaDA's case
            assert set(shares) == {num_steps // num_blocks}
    with pytest.raises(ValueError, match="too few"):
        layout(n + 1, 1, n)
    with pytest.raises(ValueError, match="block_length"):
        layout(n, 0, n)


def test_blocks_are_cut_from_the_masked_positions_across_gaps():
    canvas = build_canvas([[1, None, None, 2, None, 3, None, None]], 0)
    layout = groups(canvas, canvas.masked_BL, 2, None)
    assert layout.number_BL[canvas.masked_BL].tolist() == [0, 0, 1, 1, 2]
    assert layout.spans == [[(1, 3, False), (4, 7, False), (7, 8, False)]]


def test_ties_commit_exactly_the_count_from_left_to_right():
    candidates_BL = torch.tensor([[False, True, True, True], [True, True, False, False]])
    chosen_BL = best(torch.zeros(2, 4), candidates_BL, torch.tensor([2, 5]))
    assert chosen_BL.tolist() == [[False, True, True, False], [True, True, False, False]]


def test_ancestral_reveal_step_is_uniform():
    num_steps, length = 5, 20000
    masked_BL = torch.ones(1, length, dtype=torch.bool)
    counts = []
    for step in range(num_steps):
        u_BL = torch.rand(1, length, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        count_B = ancestral(plan(masked_BL, [length], step, num_steps, u_BL))
        masked_BL &= ~best(-u_BL, masked_BL, count_B)
        counts.append(int(count_B))
    expected = length / num_steps
    assert sum((c - expected) ** 2 / expected for c in counts) < chi_square_limit(num_steps - 1)


@pytest.mark.parametrize("filters", [dict(temperature=1.0), dict(temperature=0.7, top_p=0.8), dict(temperature=1.5, top_k=3)])
def test_draws_follow_the_filtered_softmax(filters):
    from dlmconvert.sampling.filters import apply_filters

    filters = {"top_p": None, "top_k": None, **filters}
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, float("-inf")])
    num_draws = 20000
    draws_N = draw_tokens(logits_V.expand(num_draws, 6), torch.zeros(num_draws).long(), torch.arange(num_draws), seed=3, step=0, **filters)
    p_V = torch.softmax(apply_filters(logits_V[None], **filters)[0], -1)
    counts_V = torch.bincount(draws_N, minlength=6).double()
    assert counts_V[p_V == 0].sum() == 0
    expected_V = p_V.double() * num_draws
    kept_V = p_V > 0
    statistic = ((counts_V - expected_V)[kept_V] ** 2 / expected_V[kept_V]).sum()
    assert statistic < chi_square_limit(int(kept_V.sum()) - 1)
