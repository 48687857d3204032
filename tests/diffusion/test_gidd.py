"""GIDD against its released implementation, its own limit, and by enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import known_answers

from dlmconvert.diffusion import gidd
from dlmconvert.diffusion.fused_head import linear_cross_entropy, linear_scored
from dlmconvert.training.terms import gidd_score

WEIGHTS = {"elbo_weight": "elbo", "clip_weight_0_2": "gidd_clamped"}


def mixture_of(inputs):
    share = inputs["p_uniform"] or math.exp(-20) / (2 + math.exp(-20))  # released code takes exp(-20) for B = 2 p / (1 - p) of nothing
    return gidd.Mixture(share, inputs["vocab_size"] - 1)


def test_coefficients_and_weights_of_the_released_code():
    for case in known_answers("06_gidd_hybrid_noise.json")["coefficient_cases"]:
        inputs, mask = case["inputs"], case["inputs"]["mask_token_id"]
        mixture = gidd.Mixture(inputs["p_uniform"], inputs["vocab_size"] - 1) if inputs["p_uniform"] else None
        for found in case["expected"]:
            if mixture is None:  # the limit of masks alone: its own key is `masking`
                mixture_here = gidd.Mixture(found["B"] / (2 + found["B"]), inputs["vocab_size"] - 1)
            else:
                mixture_here = mixture
            t_N = torch.full((3,), found["t"], dtype=torch.float64)
            kept, masked, uniform = (float(x[0]) for x in mixture_here.masses(t_N))
            assert (mixture_here.scale, kept, masked, uniform) == pytest.approx([found[k] for k in ("B", "alpha", "mask_mass", "uniform_mass")], rel=1e-6)
            x_0_N, x_t_N = torch.full((3,), (mask + 1) % inputs["vocab_size"]), torch.tensor([mask, (mask + 2) % inputs["vocab_size"], (mask + 1) % inputs["vocab_size"]])
            for key, weight in WEIGHTS.items():
                expected = [found[key][kind] for kind in ("mask", "other", "same")]
                assert gidd.training_weights(x_t_N, x_0_N, t_N, mixture_here, mask, weight).tolist() == pytest.approx(expected, rel=1e-6)
            expected = [2.0, 1.0, min(2.0, found["dynamic_weight_log_snr_same"])]
            assert gidd.training_weights(x_t_N, x_0_N, t_N, mixture_here, mask, "gidd_dynamic").tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_of_the_released_code(dtype):
    cases = known_answers("06_gidd_hybrid_noise.json")["loss_cases"]
    for case in cases:
        inputs, expected = case["inputs"], case["expected"]
        if not inputs["p_uniform"]:
            continue
        mixture = mixture_of(inputs)
        logits = torch.tensor(inputs["logits"], dtype=dtype)
        x_0, z = torch.tensor(inputs["x_0"]).flatten(), torch.tensor(inputs["z_t"]).flatten()
        t = torch.tensor(inputs["t"], dtype=dtype)[:, None].expand(logits.shape[:2]).flatten()
        kl, divergence, ce = gidd.divergences(logits.flatten(0, 1), x_0, z, t, mixture, inputs["mask_token_id"], inputs["vocab_size"])
        rtol, atol = (1e-6, 1e-9) if dtype == torch.float64 else (5e-3, 2e-4)
        torch.testing.assert_close(kl, torch.tensor(expected["kl"], dtype=dtype).flatten(), rtol=rtol, atol=atol)
        torch.testing.assert_close(divergence, torch.tensor(expected["is_div"], dtype=dtype).flatten(), rtol=rtol, atol=atol)
        weights = gidd.elbo_weights(z, x_0, t, mixture, inputs["mask_token_id"])
        torch.testing.assert_close(weights * (kl + divergence), torch.tensor(expected["elbo"], dtype=dtype).flatten(), rtol=rtol, atol=atol)
        clamped = gidd.training_weights(z, x_0, t, mixture, inputs["mask_token_id"], "gidd_clamped")
        torch.testing.assert_close(clamped * (kl + divergence), torch.tensor(expected["loss_clip_0_2"], dtype=dtype).flatten(), rtol=rtol, atol=atol)
        assert (ce > 0).all()


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_the_integral_over_t_is_the_cross_entropy(share):
    """One token: whatever the share of random tokens, the bound is -log p(x), here by quadrature and enumeration of z."""
    mixture, mask, vocab = gidd.Mixture(share, 3), 3, 4
    logits = torch.tensor([[0.3, -0.8, 1.1, 5.0]], dtype=torch.float64)
    x_0 = torch.tensor([2])
    p = torch.softmax(logits[:, :3], 1)
    angles = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 * math.pi
    t_N, dt_N = (1 - angles.cos()) / 2, angles.sin() / 2 * math.pi / 20000  # fine at both ends
    kept, masked, uniform = mixture.masses(t_N)
    total = 0.0
    for z in range(4):
        q_N = masked if z == mask else uniform / 3 + (kept if z == 2 else 0)
        many = logits.expand(len(t_N), vocab), x_0.expand(len(t_N)), torch.full((len(t_N),), z), t_N
        kl, divergence, _ = gidd.divergences(*many, mixture, mask, vocab)
        weights = gidd.elbo_weights(many[2], many[1], t_N, mixture, mask)
        total += float((q_N * weights * (kl + divergence) * dt_N).sum())
    assert total == pytest.approx(-float(p[0, 2].log()), rel=1e-4)


def test_what_is_drawn():
    """Shares as the formula says, only eligible tokens, and never the mask token as a random one."""
    mixture, mask = gidd.Mixture(0.3, 9), 4
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.full((200, 100), 2)
    u, v = (torch.rand(200, 100, generator=generator, dtype=torch.float64) for _ in range(2))
    eligible = torch.arange(100).expand(200, 100) >= 10
    t = torch.full((200, 100), 0.6, dtype=torch.float64)
    x_t = gidd.draw_tokens(x_0, eligible, t, u, v, mixture, mask)
    assert (x_t[:, :10] == 2).all()
    kept, masked, uniform = (float(x[0, 0]) for x in mixture.masses(t))
    shares = torch.bincount(x_t[:, 10:].flatten(), minlength=10) / (200 * 90)
    expected = [masked if i == mask else uniform / 9 + (kept if i == 2 else 0) for i in range(10)]
    assert shares.tolist() == pytest.approx(expected, abs=0.012) and len(shares) == 10
    assert set(gidd.random_tokens(v, 9, mask).unique().tolist()) == set(range(10)) - {mask}
    assert set(gidd.random_tokens(v, 9, 9).unique().tolist()) == set(range(9))


def test_any_loss_in_chunks_is_the_loss_at_once():
    """Cross-entropy written as a score has the gradients of the fused head; GIDD's those of autograd; also with no target at all."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((13, 6), (11, 6), (11,)))
    x_0, x_t, weights = torch.randint(0, 9, (13,), generator=generator), torch.randint(0, 11, (13,), generator=generator), torch.rand(13, generator=generator)
    t = torch.rand(13, generator=generator).clamp(0.05, 0.95)

    def by_cross_entropy(logits, chunk):
        ce = torch.nn.functional.cross_entropy(logits, x_0[chunk], reduction="none")
        return (weights[chunk] * ce).sum(), ce[None]

    def gradients(make):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        loss, values = make(*leaves)
        (3 * loss).backward()
        return [loss.detach(), values, *(x.grad for x in leaves)]

    score = gidd_score(gidd.Mixture(0.2, 9), x_0, x_t, t, weights, 10, 9)
    pairs = [
        (lambda h, w, b: linear_cross_entropy(h, w, b, x_0, weights), lambda h, w, b: linear_scored(h, w, b, by_cross_entropy, 4 * 11 * 3)),
        (lambda h, w, b: score(torch.nn.functional.linear(h, w, b), slice(0, 13)), lambda h, w, b: linear_scored(h, w, b, score, 4 * 11 * 5)),
    ]
    for one, other in pairs:
        for a, b in zip(gradients(one), gradients(other), strict=True):
            torch.testing.assert_close(a.detach(), b.detach().reshape(a.shape), rtol=1e-5, atol=1e-6)
    loss, values = linear_scored(hidden[:0].requires_grad_(), weight, bias, score)
    loss.backward()
    assert loss.item() == 0 and values.shape == (2, 0)
