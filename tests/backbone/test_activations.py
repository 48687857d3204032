"""Written-out GELUs in one kernel: the same function while training, the family's own arithmetic otherwise."""

import copy

import pytest
import torch
from tiny_models import rewritten
from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation

from dlmconvert.backbone.activations import TanhGelu, fuse_activations


@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation, AccurateGELUActivation])
def test_the_same_function_and_gradient(kind):
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64).requires_grad_()
    fused = TanhGelu(kind())
    results = [torch.stack([y.detach(), torch.autograd.grad(y.sum(), x)[0]]) for y in (fused.train()(x), fused.written_out(x))]
    torch.testing.assert_close(*results, rtol=0, atol=1e-5 if kind is FastGELUActivation else 1e-12)  # that one writes its constant with few digits
    assert torch.equal(fused.eval()(x), fused.written_out(x))


@pytest.mark.parametrize(("family", "found"), [("gpt2", 2), ("llama", 0)])
def test_only_written_out_ones_and_only_while_training(family, found):
    model = rewritten(family)  # without dropout
    source = copy.deepcopy(model)
    for _ in range(2):
        fuse_activations(model)
    assert sum(isinstance(module, TanhGelu) for module in model.modules()) == found
    assert list(model.state_dict()) == list(source.state_dict())
    tokens = torch.arange(8)[None] + 5
    assert torch.equal(model.eval()(tokens).logits, source(tokens).logits)
    torch.testing.assert_close(model.train()(tokens).logits, source.train()(tokens).logits, rtol=1e-4, atol=1e-5)
