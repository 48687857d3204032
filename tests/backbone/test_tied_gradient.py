"""The gradient of a tied embedding: the same numbers, one copy of the matrix less at the peak."""

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from dlmconvert.backbone import denoiser as module
from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.diffusion.attention import BIDIRECTIONAL

ROWS, WIDTH = 20_000, 16


def _gradient_and_peak(monkeypatch, plain: bool) -> tuple[torch.Tensor, int]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=16)).eval()
    denoiser = Denoiser(model, DlmSpec(mask_token_id=3, vocab_size=ROWS))
    if plain:
        monkeypatch.setattr(module, "_let_tied_gradients_add_in_place", lambda logits: None)
    tokens = torch.arange(8)[None]
    targets = tokens == 4  # one target: the logits are nothing beside the matrices

    def backward():
        model.zero_grad(set_to_none=True)
        denoiser(tokens, targets, tokens, BIDIRECTIONAL).logsumexp(-1).sum().backward()

    backward()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        backward()
    total = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return model.transformer.wte.weight.grad.clone(), peak


def test_same_gradient_and_one_matrix_less(monkeypatch):
    ours, peak = _gradient_and_peak(monkeypatch, plain=False)
    plain, plain_peak = _gradient_and_peak(monkeypatch, plain=True)
    assert torch.equal(ours, plain)
    matrix = ROWS * WIDTH * 4
    assert plain_peak - peak > 0.9 * matrix
