"""A tied embedding's rows, added to the head's gradient in place: torch's own gradient, without a second matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from memory_stream import make_engine
from tiny_models import VOCAB, rewritten

from dlmconvert.backbone.embedding import add_rows_in_place


def gradients(model, tokens_BL, num_forwards=1, before=None):
    model.train()
    for p in model.parameters():
        p.grad = None if before is None else torch.full_like(p, before)
    loss = sum(model(input_ids=tokens_BL.roll(shift, 1)).logits.float().square().mean() for shift in range(num_forwards))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize(("num_forwards", "before"), [(1, None), (2, None), (1, 0.5), (2, 0.5)])
def test_the_gradient_is_torchs_own(family, num_forwards, before):
    """Also with two forwards of one backward pass, and on top of an earlier micro-batch's; also of a copy of the model."""
    tokens_BL = torch.randint(0, 7, (3, 16), generator=torch.Generator().manual_seed(0))  # each of them many times
    model = rewritten(family)
    expected = gradients(copy.deepcopy(model), tokens_BL, num_forwards, before)
    add_rows_in_place(model)
    for one in (model, copy.deepcopy(model)):
        found = gradients(one, tokens_BL, num_forwards, before)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_what_is_not_tied_or_frozen_is_torchs():
    untied = rewritten("llama")
    add_rows_in_place(untied)
    assert type(untied.get_input_embeddings()) is torch.nn.Embedding
    frozen = rewritten("gpt2").requires_grad_(False)
    add_rows_in_place(frozen)
    assert not frozen(input_ids=torch.zeros((1, 4), dtype=torch.int64)).logits.requires_grad


def test_an_engine_of_one_device_makes_no_second_matrix():
    engine = make_engine("gpt2")
    embedding, seen = engine.model.get_input_embeddings(), []
    assert type(embedding).__name__ == "_TiedEmbedding" and embedding.weight.shape[0] == VOCAB
    embedding.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    targets_BL = torch.arange(12).expand(2, 12) % 3 == 1
    tokens_BL, positions_BL = torch.full((2, 12), 5), torch.arange(12).expand(2, 12)
    from dlmconvert.diffusion.attention import BIDIRECTIONAL

    loss, _ = engine.denoiser(tokens_BL, targets_BL, positions_BL, BIDIRECTIONAL, torch.ones(8), torch.full((8,), 9))
    engine.backward(loss)
    (head,) = seen  # what the graph brings is the head's share alone
    rows = (embedding.weight.grad - head).abs().sum(1)
    assert rows.nonzero().flatten().tolist() == [5]
