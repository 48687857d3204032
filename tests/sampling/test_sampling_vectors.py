"""The pieces against answers of the original implementations (shared/vectors)."""

from __future__ import annotations

import torch
from tiny_predictors import vectors

from dlmconvert.sampling.budget import ancestral, even
from dlmconvert.sampling.filters import apply_filters, keep_top_p
from dlmconvert.sampling.order import best, confidence, margin, negative_entropy


def test_algorithm_2_commits_the_positions_of_diffullama():
    for case in vectors("05_transfer_counts.json")["diffullama_cases"]:
        n, num_steps, u = (case["inputs"][name] for name in ("n_masked", "diffusion_steps", "u"))
        masked_BL = torch.ones(1, n, dtype=torch.bool)
        commit_t, after = [0] * n, []
        for step in range(num_steps - 1):
            u_BL = torch.tensor([u[step]], dtype=torch.float64)
            count_B = ancestral(masked_BL, torch.tensor([n]), u_BL, step, num_steps)
            chosen_BL = best(-u_BL, masked_BL, count_B)
            for place in chosen_BL[0].nonzero()[:, 0].tolist():
                commit_t[place] = num_steps - 1 - step
            masked_BL &= ~chosen_BL
            after.append(int(masked_BL.sum()))
        assert commit_t == case["expected"]["commit_t"]
        assert after == case["expected"]["n_masked_after"]
        last_B = ancestral(masked_BL, torch.tensor([n]), torch.full((1, n), 1 - 2.0**-53, dtype=torch.float64), num_steps - 1, num_steps)
        assert int(last_B[0]) == int(masked_BL.sum())


def test_scores_and_orders():
    for case in vectors("10_order_scores.json")["cases"]:
        logits_NV = torch.tensor(case["inputs"]["logits"], dtype=torch.float64)
        expected = case["expected"]
        x_hat_N = logits_NV.argmax(dim=-1)
        assert x_hat_N.tolist() == expected["token"]
        scores = _scores(logits_NV, x_hat_N)
        for name in ("confidence", "margin", "neg_entropy"):
            torch.testing.assert_close(scores[name], torch.tensor(expected[name]["score"], dtype=torch.float64), rtol=1e-5, atol=1e-6)
            order = expected[name]["order_best_first"]
            for count in range(len(order) + 1):
                chosen = best(scores[name][None], torch.ones(1, len(order), dtype=torch.bool), torch.tensor([count]))
                assert sorted(order[:count]) == chosen[0].nonzero()[:, 0].tolist()
        for filtered in expected["after_filters"]:
            kept_NV = apply_filters(logits_NV, 1.0, filtered["top_p"], filtered["top_k"])
            after = _scores(kept_NV, x_hat_N)
            for name, key in (("confidence", "confidence"), ("margin", "margin"), ("neg_entropy", "neg_entropy_released_epsilon")):
                torch.testing.assert_close(after[name], torch.tensor(filtered[key], dtype=torch.float64), rtol=1e-5, atol=1e-6)


def _scores(logits_NV, x_hat_N):
    log_p_NV = torch.log_softmax(logits_NV, dim=-1)
    return {"confidence": confidence(log_p_NV, x_hat_N), "margin": margin(log_p_NV), "neg_entropy": negative_entropy(log_p_NV)}


def test_top_p_keeps_the_published_sets():
    for case in vectors("13_top_p_filter.json")["cases"]:
        logits_NV = torch.tensor(case["inputs"]["logits"])
        kept_NV = keep_top_p(logits_NV, case["inputs"]["top_p"])
        assert torch.isfinite(kept_NV).long().tolist() == case["expected"]["kept"]
        torch.testing.assert_close(torch.softmax(kept_NV, -1), torch.tensor(case["expected"]["probs_after"]), rtol=1e-5, atol=1e-7)


def test_dreams_even_rows_are_per_row_and_touch_no_clean_token():
    # Dream takes one count from the batch mean; here each row has its own.
    quirk = vectors("05_transfer_counts.json")["dream_batched_quirk"]["inputs"]
    rows, num_steps, length = quirk["n_masked_rows"], quirk["steps"], quirk["length"]
    masked_BL = torch.arange(length)[None, :] < torch.tensor(rows)[:, None]
    start_BL, start_B = masked_BL.clone(), masked_BL.sum(1)
    for step in range(num_steps):
        count_B = even(masked_BL, start_B, torch.zeros(masked_BL.shape), step, num_steps)
        assert count_B.tolist() == [n * (step + 1) // num_steps - n * step // num_steps for n in rows]
        chosen_BL = best(torch.zeros(masked_BL.shape), masked_BL, count_B)
        assert not bool((chosen_BL & ~start_BL).any())
        masked_BL &= ~chosen_BL
    assert not bool(masked_BL.any())
