"""The head scored in chunks: the loss and the gradients of full logits, and a peak that does not grow with the targets."""

import pytest
import torch
from tiny_models import build
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.backbone.head import plain_head
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.diffusion.attention import BIDIRECTIONAL
from dlmconvert.diffusion.fused_head import linear_cross_entropy
from dlmconvert.diffusion.objective import cross_entropy


@pytest.mark.parametrize("chunk", [1, 100, 10**9])
@pytest.mark.parametrize("has_bias", [False, True])
def test_loss_and_gradients_of_full_logits(chunk, has_bias):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((7, 5), (11, 5), (11,)))
    x_0, weights = torch.randint(0, 11, (7,), generator=generator), torch.rand(7, generator=generator)
    weights[2] = 0.0
    results = []
    for fused in (False, True):
        tensors = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        b = tensors[2] if has_bias else None
        if fused:
            loss, ce = linear_cross_entropy(tensors[0], tensors[1], b, x_0, weights, chunk)
        else:
            ce = cross_entropy(torch.nn.functional.linear(tensors[0], tensors[1], b), x_0)
            loss = (weights * ce).sum()
        (3 * loss).backward()
        results.append([loss.detach(), ce.detach(), *(x.grad for x in tensors[: 2 + has_bias])])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_nothing_to_score_and_frozen_matrix():
    hidden = torch.randn(0, 5, requires_grad=True)
    loss, ce = linear_cross_entropy(hidden, torch.randn(11, 5), None, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    loss.backward()
    assert float(loss.detach()) == 0 and ce.numel() == 0 and hidden.grad.shape == (0, 5)


@pytest.mark.parametrize(("family", "is_plain"), [("gpt2", True), ("llama", True), ("gemma2", False)])
def test_same_loss_in_every_family(family, is_plain):
    """Gemma-2 caps its logits after the head: it keeps its own forward."""
    model = build(family)
    assert (plain_head(model) is not None) == is_plain
    denoiser = Denoiser(model, DlmSpec(mask_token_id=3, vocab_size=model.config.get_text_config().vocab_size))
    tokens = torch.arange(8)[None] + 5
    positions = torch.arange(8)[None]
    targets = positions % 3 == 1
    weights = torch.rand(int(targets.sum()))
    ce = cross_entropy(denoiser(tokens, targets, positions, BIDIRECTIONAL), tokens[targets])
    expected = (weights * ce).sum()
    gradients = torch.autograd.grad(expected, list(denoiser.parameters()), allow_unused=True)
    loss, ce_fused = denoiser(tokens, targets, positions, BIDIRECTIONAL, weights, tokens[targets])
    torch.testing.assert_close(ce_fused, ce.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, plain in zip(torch.autograd.grad(loss, list(denoiser.parameters()), allow_unused=True), gradients, strict=True):
        assert (ours is None) == (plain is None)
        if plain is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


ROWS, WIDTH = 20_000, 16


def _peak(num_targets: int, autocast: bool = False) -> int:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=4096)).eval()
    denoiser = Denoiser(model, DlmSpec(mask_token_id=3, vocab_size=ROWS))
    tokens = torch.arange(4096)[None]
    targets = (tokens > 0) & (tokens <= num_targets)

    def backward():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = denoiser(tokens, targets, tokens, BIDIRECTIONAL, torch.ones(num_targets), tokens[targets])
        loss.backward()

    backward()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        backward()
    total = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def test_peak_does_not_grow_with_the_targets():
    few, many = _peak(1600), _peak(3200)  # one chunk and two of 1600
    assert many - few < 0.05 * 1600 * ROWS * 4  # the logits of 1600 are 122 MiB


@pytest.mark.parametrize("autocast", [False, True])
def test_tied_gradients_add_in_place(autocast):
    """The embedding's two gradients need two matrices at the end of the backward pass, not a third for their sum."""
    matrix = ROWS * WIDTH * 4
    body = 4096 * WIDTH * 4 * 40
    assert _peak(1, autocast) < 2.6 * matrix + body
