"""Streamers, stopping criteria and generation configs, as transformers' generate takes them, on a predictor that is a hash."""

from __future__ import annotations

import time

import pytest
import torch
from tiny_predictors import HashPredictor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

from dlmconvert.sampling.api import diffusion_generate, infill
from dlmconvert.sampling.options import configured

PROMPT = torch.tensor([[3, 4, 5]])
PADDED = (torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]))


class Keeper(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.values.append(value)

    def end(self):
        self.ended += 1


def hook_that_rewrites(step, x_BL, logits_BLV):
    if step == 2:
        x_BL[:, 3] = 9
    return x_BL


@pytest.mark.parametrize(
    "how",
    [{"alg": alg} for alg in ("left_to_right", "random", "entropy", "first_hitting")]
    + [{"threshold": 0.2}, {"alg": "confidence", "block_length": 2}, {"alg": "random", "eos_token_id": 1}]
    + [{"alg": "left_to_right", "generation_tokens_hook_func": hook_that_rewrites}],
    ids=lambda how: " ".join(str(getattr(value, "__name__", value)) for value in how.values()),
)
def test_what_is_streamed_is_what_is_returned(how):
    streamer = Keeper()
    predictor = HashPredictor(favourite=1 if "eos_token_id" in how else None)
    tokens = diffusion_generate(predictor, PROMPT, max_new_tokens=8, streamer=streamer, **how)
    assert streamer.ended == 1 and streamer.values[0].tolist() == PROMPT.tolist()
    streamed = [token for value in streamer.values[1:] for token in value.tolist()]
    assert all(value.ndim == 1 and len(value) for value in streamer.values[1:])
    expected = tokens[0, 3:].tolist()
    assert streamed == (expected[: expected.index(1) + 1] if "eos_token_id" in how else expected)
    if how == {"alg": "left_to_right"}:
        assert len(streamer.values) == 1 + 8, "one token a step, each told at once"


@pytest.mark.parametrize("how", [{"alg": "left_to_right"}, {"alg": "random"}, {"alg": "entropy", "steps": 2}, {"revision": "remdm", "steps": 4}], ids=str)
def test_gaps_are_streamed_with_the_text_between_them(how):
    for row in ([3, 4, None, None, 5, None, 6], [3, None, None], [3, (1, 2), 5]):
        streamer = Keeper()
        (filled,) = infill(HashPredictor(), [row], streamer=streamer, seed=2, **how)
        assert filled == infill(HashPredictor(), [row], seed=2, **how)[0], "a streamer changes nothing"
        first = next(place for place, token in enumerate(row) if not isinstance(token, int))
        assert streamer.ended == 1 and streamer.values[0].tolist() == [filled[:first]]
        streamed = [value.tolist() for value in streamer.values[1:]]
        assert sum(streamed, []) == filled[first:]
        if how == {"alg": "left_to_right"} and row[2:3] == [None] and len(row) == 7:
            assert [len(piece) for piece in streamed] == [1, 2, 2], "what follows a gap comes with its last token"
    with pytest.raises(ValueError, match="one row"):
        infill(HashPredictor(), [[3, None], [4, None]], streamer=Keeper())


def test_a_criterion_stops_where_a_left_to_right_decoder_would():
    how = dict(max_new_tokens=10, seed=3, alg="random", steps=4, temperature=1.0, pad_token_id=0)
    plain = diffusion_generate(HashPredictor(), *PADDED, **how)
    for place in (0, 4, 9):
        wanted = plain[1, 4 + place].item()
        seen = []

        def criterion(input_ids, scores, wanted=wanted, seen=seen):
            seen.append(input_ids[0].tolist())
            return torch.tensor([input_ids[0, -1].item() == wanted])

        stopped = diffusion_generate(HashPredictor(), *PADDED, stopping_criteria=StoppingCriteriaList([criterion]), **how)
        for row, prompt in enumerate(([3, 4, 5, 6], [7, 8])):
            text = plain[row, 4:].tolist()
            kept = text.index(wanted) + 1 if wanted in text else len(text)
            assert stopped[row, 4:].tolist() == text[:kept] + [0] * (len(text) - kept)
            assert max((ids for ids in seen if ids[: len(prompt)] == prompt), key=len) == prompt + text[:kept]


def test_a_stop_of_all_rows_ends_the_work():
    output = diffusion_generate(
        HashPredictor(), PROMPT, max_new_tokens=8, alg="left_to_right", pad_token_id=0, return_dict_in_generate=True,
        stopping_criteria=[lambda input_ids, scores: input_ids.shape[1] >= 6],
    )  # fmt: skip
    assert output.nfe == 3 and output.sequences[0, 6:].tolist() == [0] * 5 and 23 not in output.sequences
    late = MaxTimeCriteria(max_time=0.0, initial_timestamp=time.time() - 1)
    output = diffusion_generate(
        HashPredictor(), PROMPT, max_new_tokens=8, alg="left_to_right", pad_token_id=0, stopping_criteria=[late], return_dict_in_generate=True
    )
    assert output.nfe == 1 and 23 not in output.sequences and output.sequences.shape == (1, 11)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="one row"):
        diffusion_generate(HashPredictor(), *PADDED, max_new_tokens=2, streamer=Keeper())
    with pytest.raises(ValueError, match="pad_token_id"):
        diffusion_generate(HashPredictor(), PROMPT, max_new_tokens=2, stopping_criteria=[lambda ids, scores: True])
    with pytest.raises(ValueError, match="did you mean 'streamer'"):
        diffusion_generate(HashPredictor(), PROMPT, max_new_tokens=2, steamer=Keeper())
    with pytest.raises(ValueError, match="generation_config.num_beams"):
        diffusion_generate(HashPredictor(), PROMPT, generation_config=GenerationConfig(max_new_tokens=2, num_beams=4))
    with pytest.raises(ValueError, match="generation_config.step asks for; did you mean 'steps'"):
        diffusion_generate(HashPredictor(), PROMPT, generation_config=GenerationConfig(max_new_tokens=2, step=4))


def test_a_generation_config_is_the_same_as_its_options():
    config = GenerationConfig(max_new_tokens=6, steps=3, alg="entropy", temperature=1.0, do_sample=True, return_dict_in_generate=True)
    output = diffusion_generate(HashPredictor(), PROMPT, generation_config=config, seed=4)
    plain = diffusion_generate(HashPredictor(), PROMPT, max_new_tokens=6, steps=3, alg="entropy", temperature=1.0, seed=4)
    assert output.nfe == 3 and torch.equal(output.sequences, plain)
    assert diffusion_generate(HashPredictor(), PROMPT, generation_config=config, max_new_tokens=2).sequences.shape == (1, 5)
    greedy = diffusion_generate(HashPredictor(), PROMPT, generation_config=config, do_sample=False, return_dict_in_generate=False)
    assert torch.equal(greedy, diffusion_generate(HashPredictor(), PROMPT, max_new_tokens=6, steps=3, alg="entropy"))


def test_the_call_comes_before_its_config_and_that_before_the_saved_one():
    saved = GenerationConfig(max_new_tokens=9, steps=64, alg="random", temperature=0.7, do_sample=True, eos_token_id=2, num_beams=3)
    assert configured("f", {}, None, saved) == {"max_new_tokens": 9, "steps": 64, "alg": "random", "temperature": 0.7, "eos_token_id": 2}
    found = configured("f", {"eos_token_id": None, "factor": 1.0}, GenerationConfig(threshold=0.8, block_length=4), saved)
    assert found == {"max_new_tokens": 9, "temperature": 0.7, "eos_token_id": None, "factor": 1.0, "block_length": 4}
    assert configured("f", {}, {"do_sample": False}, saved)["temperature"] == 0.0
