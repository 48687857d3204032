"""Training and sampling see the same logits for the same state, under both alignments."""

import pytest
import torch
from tiny_models import VOCAB, denoiser, rewritten

from dlmconvert.diffusion.attention import AttentionContext
from dlmconvert.sampling.canvas import build_canvas
from dlmconvert.sampling.denoise import denoise

LENGTH = 12
GAP = (4, 5, 9)


def _state(length: int, seed: int) -> tuple[list[int], list[int | None]]:
    """(the noised row as training sees it, the same row as a canvas)."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, VOCAB - 1, (length,), generator=generator).tolist()
    mask_id = VOCAB - 1
    return [mask_id if i in GAP else t for i, t in enumerate(clean)], [None if i in GAP else t for i, t in enumerate(clean)]


class _Recorder:
    """A predictor that remembers what its denoiser was asked first, and what it answered."""

    def __init__(self, inner):
        self.inner, self.first = inner, None
        self.mask_token_id, self.vocab_size, self.alignment, self.device = inner.mask_token_id, inner.vocab_size, inner.alignment, "cpu"

    def predict(self, tokens_BL, wanted_BL, positions_BL, segments_BL):
        logits_NV = self.inner.predict(tokens_BL, wanted_BL, positions_BL, segments_BL)
        if self.first is None:
            self.first = (wanted_BL.clone(), logits_NV.clone())
        return logits_NV


def _training_logits(model, row: list[int]) -> torch.Tensor:
    """What the loss is computed from at the last step of training: everything open, one document."""
    tokens_BL = torch.tensor([row])
    targets_BL = tokens_BL == VOCAB - 1
    model.train()
    try:
        return model(tokens_BL, targets_BL, torch.arange(len(row))[None], AttentionContext(open_ratio=1.0)).detach()
    finally:
        model.eval()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("alignment", ["shift", "in_place"])
def test_same_logits_for_the_same_state(family, alignment):
    model = denoiser(rewritten(family), alignment=alignment)
    row, canvas_row = _state(LENGTH, 0)
    recorder = _Recorder(model)
    next(iter(denoise(recorder, build_canvas([canvas_row], 0), num_steps=len(GAP), order="confidence")))
    wanted_BL, sampled_NV = recorder.first
    assert wanted_BL[0].nonzero().flatten().tolist() == list(GAP)
    # Training may compute a written-out activation in one kernel (GPT-2): the same function, rounded otherwise.
    close = {"rtol": 1e-5, "atol": 1e-5} if family == "gpt2" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(sampled_NV, _training_logits(model, row), **close)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("alignment", ["shift", "in_place"])
def test_padding_beside_a_longer_row_changes_nothing(family, alignment):
    model = denoiser(rewritten(family), alignment=alignment)
    short, long = _state(LENGTH, 1), _state(LENGTH + 5, 2)
    recorder = _Recorder(model)
    next(iter(denoise(recorder, build_canvas([short[1], long[1]], 0), num_steps=len(GAP), order="confidence")))
    _, sampled_NV = recorder.first
    expected_NV = torch.cat([_training_logits(model, short[0]), _training_logits(model, long[0])])
    torch.testing.assert_close(sampled_NV, expected_NV, rtol=1e-5, atol=1e-5)
