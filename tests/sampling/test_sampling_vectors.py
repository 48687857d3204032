"""The pieces against answers of the original implementations (shared/vectors)."""

from __future__ import annotations

import torch
from tiny_predictors import plan, vectors

from dlmconvert.sampling.budget import ancestral, dream, entropy_bound, factor, grid_probability, least, llada, threshold
from dlmconvert.sampling.filters import apply_filters, keep_top_p
from dlmconvert.sampling.order import best, confidence, margin, negative_entropy, ranked


def test_algorithm_2_commits_the_positions_of_diffullama():
    for case in vectors("05_transfer_counts.json")["diffullama_cases"]:
        n, num_steps, u = (case["inputs"][name] for name in ("n_masked", "diffusion_steps", "u"))
        masked_BL = torch.ones(1, n, dtype=torch.bool)
        commit_t, after = [0] * n, []
        for step in range(num_steps - 1):
            u_BL = torch.tensor([u[step]], dtype=torch.float64)
            count_B = ancestral(plan(masked_BL, [n], step, num_steps, u_BL))
            chosen_BL = best(-u_BL, masked_BL, count_B)
            for place in chosen_BL[0].nonzero()[:, 0].tolist():
                commit_t[place] = num_steps - 1 - step
            masked_BL &= ~chosen_BL
            after.append(int(masked_BL.sum()))
        assert commit_t == case["expected"]["commit_t"]
        assert after == case["expected"]["n_masked_after"]
        last_B = ancestral(plan(masked_BL, [n], num_steps - 1, num_steps, torch.full((1, n), 1 - 2.0**-53, dtype=torch.float64)))
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


def _counts(budget, rows, num_steps, eps=1e-3) -> list[list[int]]:
    """What each row commits at each step."""
    masked_BL = torch.arange(max(rows))[None, :] < torch.tensor(rows)[:, None]
    counts = []
    for step in range(num_steps):
        count_B = budget(plan(masked_BL, rows, step, num_steps, eps=eps))
        masked_BL = masked_BL & ~best(torch.zeros(masked_BL.shape), masked_BL, count_B)
        counts.append(count_B.tolist())
    assert not bool(masked_BL.any())
    return [list(row) for row in zip(*counts, strict=True)]


def test_llada_counts():
    for case in vectors("05_transfer_counts.json")["llada_cases"]:
        rows = case["inputs"].get("n_masked_rows") or [case["inputs"]["n_masked"]]
        expected = case["expected"]["counts"]
        assert _counts(llada, rows, case["inputs"]["steps"]) == (expected if isinstance(expected[0], list) else [expected])


def test_dream_counts_and_probabilities():
    for case in vectors("05_transfer_counts.json")["dream_cases"]:
        n, num_steps, eps = (case["inputs"][name] for name in ("n_masked", "steps", "eps"))
        assert _counts(dream, [n], num_steps, eps) == [case["expected"]["counts"]]
        masked_BL = torch.ones(1, n, dtype=torch.bool)
        p = [float(grid_probability(plan(masked_BL, [n], step, num_steps, eps=eps))) for step in range(num_steps)]
        given = case["expected"]["p_transfer_origin"]
        p = p if len(given) == num_steps else p[:3] + p[-3:]
        torch.testing.assert_close(torch.tensor(p), torch.tensor(given), rtol=1e-4, atol=1e-6)


def test_dream_in_a_batch_counts_per_row_and_touches_no_clean_token():
    # Dream takes one count from the batch mean; here each row has its own.
    quirk = vectors("05_transfer_counts.json")["dream_batched_quirk"]
    rows = quirk["inputs"]["n_masked_rows"]
    left = [
        [n - sum(counts[: j + 1]) for j in range(len(counts))]
        for n, counts in zip(rows, _counts(dream, rows, quirk["inputs"]["steps"]), strict=True)
    ]
    assert left == quirk["correct_masked_after_each_step_per_row"]


def _selected(score_L, read_L, masked_L, count, fill: float) -> list[int]:
    """The columns that a reading budget commits, best first, as the loop does it."""
    masked_BL = torch.tensor([masked_L], dtype=torch.bool)
    score_BL, read_BL = (torch.tensor([x], dtype=torch.float64) for x in (score_L, read_L))
    order_BL = ranked(score_BL, masked_BL)
    num_masked = int(masked_BL.sum())
    count_B = count(read_BL.masked_fill(~masked_BL, fill).gather(1, order_BL))
    count_B = torch.maximum(count_B, least(plan(masked_BL, [num_masked], 0, num_masked)))
    columns = order_BL[0, : int(count_B)].tolist()
    assert sorted(columns) == best(score_BL, masked_BL, count_B)[0].nonzero()[:, 0].tolist()
    return columns


def test_threshold_and_factor_rules():
    cases = vectors("07_fast_dllm_selection.json")
    inf = float("inf")
    for case in cases["threshold_cases"]:
        c, masked, tau = (case["inputs"][name] for name in ("confidence", "masked", "tau"))
        assert sorted(_selected(c, c, masked, lambda x: threshold(x, tau), -inf)) == case["expected"]["committed"]  # noqa: B023
    for case in cases["factor_cases"]:
        c, masked, f = (case["inputs"][name] for name in ("confidence", "masked", "factor"))
        assert sorted(_selected(c, c, masked, lambda x: factor(x, f), -inf)) == case["expected"]["committed"]  # noqa: B023


def test_threshold_with_steps_is_sdars_dynamic_rule():
    for case in vectors("07_fast_dllm_selection.json")["sdar_dynamic"]["cases"]:
        c_BL = torch.tensor([case["inputs"]["confidence"]], dtype=torch.float64)
        masked_BL = torch.ones(c_BL.shape, dtype=torch.bool)
        num_masked, num_steps = masked_BL.shape[1], case["inputs"]["steps"]
        for step, expected in enumerate(case["expected"]["committed_per_step"]):
            sorted_BL = c_BL.masked_fill(~masked_BL, float("-inf")).gather(1, ranked(c_BL, masked_BL))
            count_B = torch.maximum(threshold(sorted_BL, case["inputs"]["tau"]), least(plan(masked_BL, [num_masked], step, num_steps)))
            committed_BL = best(c_BL, masked_BL, count_B)
            assert committed_BL[0].nonzero()[:, 0].tolist() == expected
            masked_BL &= ~committed_BL
        assert not bool(masked_BL.any())


def test_entropy_bound():
    cases = vectors("08_entropy_bounded_selection.json")
    for case in cases["given_entropies"]:
        h, proxy, masked, gamma = (case["inputs"][name] for name in ("entropy", "error_proxy", "masked", "gamma"))
        chosen = _selected([-x for x in proxy], h, masked, lambda x: entropy_bound(x, gamma), float("inf"))  # noqa: B023
        assert chosen == case["expected"]["committed_in_order"], case["name"]
    for case in cases["from_logits"]:
        log_p_NV = torch.log_softmax(torch.tensor(case["inputs"]["logits"], dtype=torch.float64), dim=-1)
        h_N = -negative_entropy(log_p_NV)
        torch.testing.assert_close(h_N, torch.tensor(case["expected"]["entropy"], dtype=torch.float64), rtol=1e-6, atol=1e-7)
        scores = {"entropy": -h_N, "confidence": confidence(log_p_NV, log_p_NV.argmax(-1)), "margin": margin(log_p_NV)}
        for name, expected in case["expected"]["selection"].items():
            for by_gamma in expected["by_gamma"]:
                gamma = float(by_gamma["gamma"])
                everything = [1] * len(h_N)
                chosen = _selected(scores[name].tolist(), h_N.tolist(), everything, lambda x: entropy_bound(x, gamma), float("inf"))  # noqa: B023
                assert chosen == by_gamma["committed_in_order"]
