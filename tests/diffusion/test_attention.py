"""The annealed pattern: the predicate, its dense realisation, known answers of DiffuLLaMA."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import known_answers

from dlmconvert.diffusion import attention
from dlmconvert.diffusion.attention import AttentionContext, additive, allowed, allowed_matrix, realise
from dlmconvert.diffusion.schedules import annealing_ratio

VECTOR = "01_annealed_attention_mask.json"


def test_the_rule_is_that_of_diffullama(monkeypatch):
    """Their draws in place of ours."""
    for case in known_answers(VECTOR)["cases"]:
        inputs, expected = case["inputs"], torch.tensor(case["expected"]["allowed"], dtype=torch.bool)
        if inputs["u"] is not None:
            u_LL = torch.tensor(inputs["u"], dtype=torch.float64)
            monkeypatch.setattr(attention, "counter_uniform", lambda purpose, seed, step, query, key, u=u_LL: u[query, key])
        matrix = allowed_matrix(inputs["L"], AttentionContext(open_ratio=inputs["ratio"]))
        assert torch.equal(matrix[0, 0], expected), case["name"]


def test_the_properties_of_real_draws():
    ratio = known_answers(VECTOR)["property"]["ratio"]
    length = 48
    future = torch.ones(length, length).triu(1).bool()
    seen = set()
    for step in range(50):
        matrix_LL = allowed_matrix(length, AttentionContext(open_ratio=ratio, seed=7, step=step))[0, 0]
        assert bool(matrix_LL[~future].all())
        share = float(matrix_LL[future].double().mean())
        assert abs(share - ratio) < 5 * (ratio * (1 - ratio) / (length * (length - 1) / 2)) ** 0.5
        seen.add(matrix_LL.numpy().tobytes())
    assert len(seen) == 50  # memoryless: a new draw every step
    # One draw for all rows of a batch: the matrix broadcasts over rows and heads.
    assert allowed_matrix(length, AttentionContext(open_ratio=ratio)).shape == (1, 1, length, length)


def test_the_schedule():
    for value in known_answers(VECTOR)["schedule"]["values"]:
        assert annealing_ratio(value["step"], value["anneal_steps"]) == pytest.approx(value["ratio"], rel=1e-12, abs=0)


def test_the_additive_form():
    for name, lowest in known_answers(VECTOR)["additive_min"].items():
        mask = additive(torch.tensor([[True, False]]), getattr(torch, name))
        assert mask.tolist() == [[0.0, lowest]]


@pytest.mark.parametrize("case", range(40))
def test_the_matrix_is_the_predicate(case):
    """Pair by pair; and documents only ever close pairs."""
    draw = random.Random(case)
    length, rows, ratio = draw.randint(1, 24), draw.randint(1, 3), draw.choice([0.0, draw.random(), draw.random(), 1.0])
    seed, step = draw.randrange(2**31), draw.randrange(10**6)
    segments_BL = torch.tensor([[draw.random() < 0.3 for _ in range(length)] for _ in range(rows)]).long().cumsum(1)
    context = AttentionContext(ratio, seed, step, segments_BL)
    joined_LL = allowed_matrix(length, AttentionContext(ratio, seed, step))[0, 0]
    matrix_B1LL = allowed_matrix(length, context)
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    assert torch.equal(matrix_B1LL[:, 0], joined_LL & same_BLL)
    assert bool(torch.diagonal(matrix_B1LL, dim1=-2, dim2=-1).all())  # no query without a key
    for b in range(rows):
        q, k = draw.randrange(length), draw.randrange(length)
        assert bool(allowed(torch.tensor(b), torch.tensor(q), torch.tensor(k), context)) == bool(matrix_B1LL[b, 0, q, k])


def test_a_larger_ratio_only_opens_pairs():
    """Within one step: the draw is compared with the ratio, so the masks of two ratios are nested."""
    low, high = (allowed_matrix(32, AttentionContext(r, seed=1, step=5)) for r in (0.2, 0.6))
    assert bool((high | ~low).all()) and int(high.sum()) > int(low.sum())


def test_a_longer_row_has_the_shorter_one_inside():
    long, short = (allowed_matrix(n, AttentionContext(0.5, seed=1, step=5))[0, 0] for n in (40, 16))
    assert torch.equal(long[:16, :16], short)


@pytest.mark.parametrize(("ratio", "is_causal"), [(0.0, True), (1.0, False)])
def test_both_ends_need_no_mask(ratio, is_causal):
    realised = realise(AttentionContext(ratio), 8, "sdpa", torch.float32, "cpu")
    assert realised.mask is None and realised.is_causal is is_causal


def test_the_dense_mask_has_the_form_that_the_kernel_reads():
    context = AttentionContext(0.5, seed=1)
    matrix = allowed_matrix(8, context)
    assert torch.equal(realise(context, 8, "sdpa", torch.float32, "cpu").mask, matrix)
    for other in ("eager", "flash_attention_2"):
        mask = realise(context, 8, other, torch.bfloat16, "cpu").mask
        assert mask.dtype == torch.bfloat16 and torch.equal(mask == 0, matrix)
