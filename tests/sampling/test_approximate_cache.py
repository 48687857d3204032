"""Fast-dLLM's prefix and dual cache of bidirectional models: against a slow, obvious one built on plain forwards of transformers."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import MASK, denoiser_of

from dlmconvert.backbone.key_values import cache_argument
from dlmconvert.sampling.canvas import build_canvas, canvas_after_prompts
from dlmconvert.sampling.denoise import denoise, generate

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15], [16]]
NEW = 10


class StaleModel:
    """One row, whose layers are asked through hooks: queries of a window against keys and values as they were at the last full
    forward, those of the window as they are now. Nothing is cached but the inputs of each attention layer."""

    def __init__(self, denoiser):
        self.denoiser, self.stored = denoiser, None

    @torch.no_grad()
    def logits(self, state: list[int], window: range | None, held: tuple[int, ...] = ()) -> torch.Tensor:
        """logits_LV; of a window only its own rows mean anything. window None: the full forward, which is remembered. Behind them a row for
        each of `held`: of a mask in its place that sees all columns but that one, and itself."""
        from transformers.cache_utils import Cache, DynamicLayer

        model, whole = self.denoiser.model, list(range(len(state)))
        stored, lag = self.stored, int(self.denoiser.alignment == "shift")

        class Layer(DynamicLayer):
            def update(self, keys, values, *args, **kwargs):
                if window is not None:
                    old_keys, old_values = stored[self.number]
                    old_keys, old_values = old_keys.clone(), old_values.clone()
                    own = len(window)
                    old_keys[:, :, list(window)], old_values[:, :, list(window)] = keys[:, :, :own], values[:, :, :own]
                    keys, values = torch.cat([old_keys, keys[:, :, own:]], 2), torch.cat([old_values, values[:, :, own:]], 2)
                self.now = keys[:, :, : len(whole)].clone(), values[:, :, : len(whole)].clone()
                return keys, values

            def get_seq_length(self):
                return 0

        layers = [Layer() for _ in range(model.config.num_hidden_layers)]
        for number, layer in enumerate(layers):
            layer.number = number
        columns = whole if window is None else list(window)
        seen = torch.zeros(len(columns) + len(held), len(whole) + len(held), dtype=torch.bool)
        seen[:, : len(whole)] = True
        for number, i in enumerate(held):
            seen[len(columns) + number, i], seen[len(columns) + number, len(whole) + number] = False, True
        logits_QV = model(
            input_ids=torch.tensor([[state[i] for i in columns] + [MASK] * len(held)]), position_ids=torch.tensor([columns + [i - lag for i in held]]), use_cache=True,
            **{cache_argument(type(model)): Cache(layers=layers)}, attention_mask=torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None],
        ).logits[0]  # fmt: skip
        self.stored = [layer.now for layer in layers]
        logits_LV = torch.full((len(state), logits_QV.shape[1]), float("nan"))
        logits_LV[columns] = logits_QV[: len(columns)]
        return torch.cat([logits_LV, logits_QV[len(columns) :]])


def slow_cached_decoder(denoiser, row, kind, block_length) -> list[int]:
    """Greedy, most confident first, one token a step."""
    shift = int(denoiser.alignment == "shift")
    state = [MASK if token is None else token for token in row]
    holes = [i for i, token in enumerate(row) if token is None]
    model = StaleModel(denoiser)
    for start in range(0, len(holes), block_length):
        block = holes[start : start + block_length]
        first, end, fresh = block[0], block[-1] + 1, True
        while block:
            window = None if fresh else range(max(first - shift, 0), len(row) if kind == "prefix" else end)
            fresh = False
            logits = model.logits(state, window)
            logits[:, MASK] = float("-inf")
            best = max(block, key=lambda i: float(torch.softmax(logits[i - shift], -1).max()))
            state[best] = int(logits[best - shift].argmax())
            block.remove(best)
    return state


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("family, alignment", [("gpt2", "shift"), ("llama", "in_place"), ("llama", "shift"), ("qwen3", "in_place")])
def test_the_slow_decoder_agrees_also_for_gaps(kind, family, alignment):
    denoiser = denoiser_of(family, alignment=alignment)
    rows = [[5, None, None, 6, 7, None, None, None, 8, 9, None], [1, 2] + [None] * 9, [3] + [None] * 4]
    canvas = build_canvas(rows, 0)
    tokens = canvas.rows(generate(denoiser, canvas, order="confidence", block_length=4, cache=kind).tokens_BL)
    assert tokens == [slow_cached_decoder(denoiser, row, kind, 4) for row in rows]


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("alignment", ["shift", "in_place"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(order="entropy", threshold=0.05, block_length=4),
        dict(order="random", num_steps=6, temperature=0.8, top_p=0.9, block_length=4),
        dict(order="margin", factor=1.2, cfg_scale=0.5, block_length=3),
        dict(order="confidence", entropy_bound=3.0, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_a_row_of_a_batch_is_the_row_alone_whatever_is_combined(kind, alignment, settings):
    denoiser = denoiser_of("llama", alignment=alignment)
    longest = max(map(len, PROMPTS))
    inputs_BP = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    seen_BP = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    left = canvas_after_prompts(inputs_BP, seen_BP, NEW, row_keys=[4, 5, 6])
    right = build_canvas([p + [None] * NEW for p in PROMPTS], 0, row_keys=[4, 5, 6])
    of_left, of_right = (canvas.rows(generate(denoiser, canvas, seed=3, cache=kind, **settings).tokens_BL) for canvas in (left, right))
    assert of_left == of_right
    for row, prompt in enumerate(PROMPTS):
        alone = build_canvas([prompt + [None] * NEW], 0, row_keys=[4 + row])
        assert alone.rows(generate(denoiser, alone, seed=3, cache=kind, **settings).tokens_BL) == [of_right[row]]


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_the_first_step_of_each_block_is_exact_and_one_token_blocks_are_the_uncached_sampler(kind):
    denoiser = denoiser_of("llama")
    canvas = build_canvas([p + [None] * NEW for p in PROMPTS], 0)
    plain, cached = (generate(denoiser, canvas, order="left_to_right", block_length=1, cache=cache).tokens_BL for cache in (None, kind))
    assert torch.equal(plain, cached)
    first_plain, first_cached = (
        next(iter(denoise(denoiser, canvas, order="confidence", block_length=4, cache=cache))) for cache in (None, kind)
    )
    assert torch.equal(first_plain.tokens_BL, first_cached.tokens_BL)
    torch.testing.assert_close(first_plain.confidence_BL, first_cached.confidence_BL)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_logits_hook_sees_the_block_and_changes_nothing_by_looking(kind):
    denoiser = denoiser_of("llama")
    canvas = build_canvas([p + [None] * NEW for p in PROMPTS], 0)
    shapes = []

    def look(step, x_BL, logits_BLV):
        shapes.append(logits_BLV.shape)
        return logits_BLV

    how = dict(order="confidence", block_length=4, cache=kind, threshold=0.1)
    assert torch.equal(generate(denoiser, canvas, **how).tokens_BL, generate(denoiser, canvas, logits_hook=look, **how).tokens_BL)
    assert set(shapes) == {(3, max(map(len, PROMPTS)) + NEW, 300)}
    with pytest.raises(ValueError, match="tokens hook"):
        denoise(denoiser, canvas, tokens_hook=lambda step, x, logits: x, **how)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("settings", [dict(order="confidence", threshold=0.02), dict(order="random", num_steps=12, temperature=0.9, seed=4)], ids=str)
def test_rows_begin_their_blocks_together_and_are_what_they_are_alone(kind, settings):
    """Rows need different numbers of steps for a block. One full forward a block for all of them, windows that are alike, no mask; and
    what a row draws does not depend on how long it waited."""
    denoiser = denoiser_of("llama", alignment="in_place")
    rows = [[5, 6, 7, 8] + [None] * 12, [9, 10, 11, 12] + [None] * 12, [13, 14, 15, 16] + [None] * 12]
    canvas, widths, masks, forward = build_canvas(rows, 0, row_keys=[3, 4, 5]), [], [], denoiser.forward_columns

    def counted(tokens_BQ, positions_BQ, kept, seen, *rest):
        widths.append(tokens_BQ.shape[1])
        masks.append(seen)
        return forward(tokens_BQ, positions_BQ, kept, seen, *rest)

    denoiser.forward_columns = counted
    done = generate(denoiser, canvas, cache=kind, block_length=4, **settings)
    assert all(seen is None for seen in masks)
    if "threshold" in settings:  # a random draw may leave a row its whole block at the first step, and then it begins a step later
        assert widths.count(16) == 3 and done.nfe == len(widths)
    alone = [generate(denoiser, build_canvas([row], 0, row_keys=[3 + number]), cache=kind, block_length=4, **settings) for number, row in enumerate(rows)]
    assert [one.tokens_BL[0].tolist() for one in alone] == done.tokens_BL.tolist()
    assert max(one.nfe for one in alone) < done.nfe <= sum(one.nfe for one in alone)
