"""The functions that users call: `diffusion_generate` (Dream's signature, arXiv 2508.15487) and `infill`.

The command line, the evaluator and an exported model call the same two, with the same options (`Options`).

Shapes: B rows, P tokens of the prompts, L = P + max_new_tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cache import is_block_model
from .canvas import Canvas, Predictor, build_canvas, canvas_after_prompts
from .denoise import denoise
from .length import STEPS_OF_A_CANDIDATE, Gap, choose_lengths
from .options import CALL_OPTIONS, Options, asked_options, check_numbers, configured
from .step import Step
from .streaming import Follower


@dataclass(frozen=True)
class DiffusionOutput:
    """sequences: what the call returns without return_dict_in_generate. nfe: forwards of the batch. history: tokens_BL after each
    step with the mask token where nothing stands yet, or None."""

    sequences: Any
    nfe: int
    history: tuple[torch.Tensor, ...] | None = None


def diffusion_generate(
    predictor: Predictor,
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    generation_config: Any = None,
    streamer: Any = None,
    stopping_criteria: Any = None,
    **options: Any,
) -> torch.Tensor | DiffusionOutput:
    """Prompts and `max_new_tokens` generated tokens: int64 (B, P + max_new_tokens), padded on the side where the inputs were.

    inputs, attention_mask: (B, P) prompts padded on either side, 0 marks padding. Tokens of the prompt are all given, a mask token
        among them too: gaps are for `infill`.
    generation_config: a GenerationConfig with options; those given by name come first.
    streamer: of transformers (TextStreamer, TextIteratorStreamer), for one row. It is fed the text as it settles from the left.
    stopping_criteria: a list of transformers' StoppingCriteria; they are asked about the text that has settled from the left, and
        what follows a stop becomes `pad_token_id` (default: the end token).
    options: max_new_tokens, do_sample (False is temperature 0), output_history, return_dict_in_generate, and see Options.
        eos_token_id: when given, what follows the first end token of the generated part becomes `pad_token_id` (default: the end
        token), and a row is done as soon as it has its end token and nothing is masked left of it.
    Raises ValueError for unknown options, with the nearest name, and for options that contradict each other.
    """
    if generation_config is not None:
        options = configured("diffusion_generate", options, generation_config)
    check_numbers(options)
    max_new_tokens, output_history, return_dict = (options.pop(name, None) for name in CALL_OPTIONS)
    how = asked_options("diffusion_generate", options)
    if max_new_tokens is None or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if stopping_criteria is not None and how.pad_token_id is None and not how.ends:
        raise ValueError("stopping_criteria need pad_token_id: something must stand after the place where a row stops")
    canvas = canvas_after_prompts(inputs, attention_mask, max_new_tokens, how.row_keys)
    steps = denoise(predictor, canvas, end_ids=how.ends, **how.of_the_loop())
    follower = None
    if streamer is not None or stopping_criteria is not None:
        follower = Follower(canvas, how.ends, streamer, stopping_criteria, how.may_change)
    tokens_BL, nfe, history = _followed(steps, canvas, follower, output_history)
    sequences_BL = _pad_after_end(tokens_BL, canvas, how.ends, how.pad_token_id)
    if follower is not None:
        sequences_BL = _pad_after_stop(sequences_BL, canvas, follower.close(tokens_BL), how)
    return DiffusionOutput(sequences_BL, nfe, history) if return_dict else sequences_BL


def infill(
    predictor: Predictor,
    rows: Sequence[Sequence[int | None | Gap]],
    *,
    device: torch.device | str | None = None,
    generation_config: Any = None,
    streamer: Any = None,
    **options: Any,
) -> list[list[int]] | DiffusionOutput:
    """Fill the None of each row; rows may have any gaps and any lengths. Returns whole rows of tokens, without padding.

    rows: instead of None, (low, high) is a gap of so many tokens as fit best (length.py).
    device: of the canvas; default the predictor's. generation_config: as in `diffusion_generate`.
    streamer: as there, for one row. It is fed the text left of the first gap, then what follows as far as it has no hole.
    options: do_sample, output_history, return_dict_in_generate, and see Options. eos_token_id bans these tokens: text follows a gap,
        so it must not end there.
    """
    if generation_config is not None:
        options = configured("infill", options, generation_config)
        options.pop("max_new_tokens", None)
    output_history, return_dict = (options.pop(name, None) for name in CALL_OPTIONS[1:])
    how = asked_options("infill", options)
    if torch.is_tensor(rows) or not all(isinstance(row, Sequence) for row in rows):
        raise ValueError("rows must be lists of tokens with None where one is to be filled, such as [[5, None, 7]]")
    device = device or getattr(predictor, "device", "cpu")
    canvas = build_canvas(with_lengths(predictor, rows, how.ends, device), how.pad_token_id or 0, device, how.row_keys)
    steps = denoise(predictor, canvas, banned_ids=how.ends, **how.of_the_loop())
    follower = None if streamer is None else Follower(canvas, (), streamer, may_change=how.may_change)
    tokens_BL, nfe, history = _followed(steps, canvas, follower, output_history)
    if follower is not None:
        follower.close(tokens_BL)
    filled = canvas.rows(tokens_BL)
    return DiffusionOutput(filled, nfe, history) if return_dict else filled


def with_lengths(
    predictor: Predictor, rows: Sequence[Sequence[int | None | Gap]], banned_ids: Sequence[int], device: torch.device | str
) -> Sequence[Sequence[int | None]]:
    """The rows with every gap of bounds (low, high) as long as fits best: None for each of its tokens.

    Raises ValueError for bounds without meaning, and for block models: they do not see what follows a gap.
    """
    if not any(isinstance(item, tuple) for row in rows for item in row):
        return rows
    if is_block_model(predictor):
        raise ValueError("a gap takes the length that fits what follows, and a block model does not see that: give one length")

    def fill(tried: list[list[int | None]]) -> tuple[list[list[int]], list[list[float]]]:
        canvas = build_canvas(tried, 0, device)
        tokens_BL, c_BL = canvas.tokens_BL, torch.ones(canvas.tokens_BL.shape, device=canvas.tokens_BL.device)
        for step in denoise(predictor, canvas, order="confidence", num_steps=STEPS_OF_A_CANDIDATE, banned_ids=banned_ids):
            tokens_BL, c_BL = step.tokens_BL, torch.where(step.committed_BL, step.confidence_BL, c_BL)
        return canvas.rows(tokens_BL), [c_L[: len(row)].tolist() for c_L, row in zip(c_BL, tried, strict=True)]

    return choose_lengths(predictor, rows, fill, device)


def _followed(
    steps: Iterator[Step], canvas: Canvas, follower: Follower | None, keep_history: bool | None
) -> tuple[torch.Tensor, int, tuple[torch.Tensor, ...] | None]:
    """(tokens_BL after the last step that was needed, forwards, tokens_BL after each step when they are asked for)."""
    tokens_BL, nfe, history = canvas.tokens_BL, 0, []
    for step in steps:
        tokens_BL, nfe = step.tokens_BL, step.nfe
        if keep_history:
            history.append(tokens_BL)
        if follower is not None and follower.see(step.tokens_BL, step.masked_BL):
            break
    return tokens_BL, nfe, tuple(history) if keep_history else None


def _pad_after_end(tokens_BL: torch.Tensor, canvas: Canvas, ends: list[int], pad_token_id: int | None) -> torch.Tensor:
    """What follows the first end token among the generated positions becomes padding, as transformers' generate leaves it."""
    if not ends:
        return tokens_BL
    end_BL = torch.isin(tokens_BL, torch.tensor(ends, device=tokens_BL.device)) & canvas.masked_BL
    after_BL = (end_BL.cumsum(dim=1) - end_BL.to(torch.int64) > 0) & canvas.masked_BL
    return tokens_BL.masked_fill(after_BL, ends[0] if pad_token_id is None else pad_token_id)


def _pad_after_stop(tokens_BL: torch.Tensor, canvas: Canvas, kept: list[int | None], how: Options) -> torch.Tensor:
    """What follows the first `kept` generated tokens of a row becomes padding; None keeps them all."""
    number_BL = canvas.masked_BL.cumsum(dim=1)  # of each generated token in its row, from 1
    most_B = torch.tensor([canvas.masked_BL.shape[1] if count is None else count for count in kept], device=tokens_BL.device)
    behind_BL = canvas.masked_BL & (number_BL > most_B[:, None])
    return tokens_BL.masked_fill(behind_BL, how.ends[0] if how.pad_token_id is None else how.pad_token_id) if bool(behind_BL.any()) else tokens_BL
