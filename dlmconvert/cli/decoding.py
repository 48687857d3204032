"""What `sample`, `infill` and `chat` share: the model with its settings, a row to fill, and a view of it while it fills."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dlmconvert.cli.sampler import DEFAULTS
from dlmconvert.errors import UserError

STOPPED = 130  # what shells say of a command that Ctrl-C ended


@dataclass
class Decoder:
    """A loaded model and how to sample from it: what was asked for, over generation_config.json, over DEFAULTS.

    location: the ModelLocation. settings: names of `Options`, and max_new_tokens; of a helper, where it lies. helper: its model.
    longest: positions of the model, None when unlimited.
    """

    location: Any
    denoiser: Any
    settings: dict[str, Any]
    helper: Any = None

    @property
    def tokenizer(self) -> Any:
        return self.denoiser.tokenizer

    @property
    def longest(self) -> int | None:
        return self.denoiser.longest

    @property
    def ends(self) -> set[int]:
        ends = self.settings.get("eos_token_id")
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    def num_steps(self, rows: Sequence[Row]) -> int | None:
        """The most steps that one of these rows takes; None: as many as it has tokens to fill."""
        from dlmconvert.sampling.blocks import SavedSteps

        steps = self.settings.get("steps")
        return max(steps.over(row.num_masked) for row in rows) if isinstance(steps, SavedSteps) else steps

    def shown_settings(self, *hidden: str, rows: Sequence[Row] = ()) -> dict[str, Any]:
        """The settings that a reader of the result wants to know. rows: those that were made with them."""
        hidden = ("eos_token_id", "pad_token_id", *hidden)
        settings = self.settings | ({"steps": self.num_steps(rows)} if rows else {})
        return {name: value for name, value in settings.items() if value is not None and name not in hidden}


def load_decoder(model: str | None, asked: dict[str, Any], device: str, compile: bool = False) -> Decoder:
    """The model, told to the user where the name was left out. Raises UserError."""
    from dlmconvert.backbone.head import compile_for_decoding
    from dlmconvert.backbone.load import load_denoiser, resolve_checkpoint
    from dlmconvert.cli.console import console
    from dlmconvert.runs.folder import find_model
    from dlmconvert.runs.samplers import saved_settings
    from dlmconvert.sampling.options import with_defaults
    from dlmconvert.sampling.text import end_ids

    location = find_model(model)
    if location.note:
        console.print(f"model {location.note}", markup=False, highlight=False, soft_wrap=True)
    saved = saved_settings(location.path)  # before transformers reads it, whose words are others
    with console.status("loading the model"):
        denoiser = load_denoiser(location.path, device=device)
        helper = load_denoiser(resolve_checkpoint(asked["helper"]), device=device, attention="causal") if asked.get("helper") else None
        if compile:
            compile_for_decoding(denoiser.model, *(() if helper is None else (helper.model,)))
    settings = with_defaults(asked, with_defaults(saved, _defaults_of(denoiser)))
    settings.setdefault("eos_token_id", end_ids(denoiser.tokenizer) or None)
    return Decoder(location, denoiser, settings, helper)


def _defaults_of(denoiser: Any) -> dict[str, Any]:
    """DEFAULTS; a block model takes as many steps as it has tokens to fill, since a fixed number may be too few for its blocks."""
    from dlmconvert.sampling.cache import is_block_model

    return {**DEFAULTS, "steps": None, "alg": "confidence"} if is_block_model(denoiser) else DEFAULTS


@dataclass
class Row:
    """One text to make: `tokens` has None where it is to be filled, `num_start` start tokens in front are not shown.

    number: of the sample, the key of its random draws. num_filled: of the tokens to be filled, those that were; fewer when the text
    ended early.
    """

    prompt: str
    tokens: list[int | None]
    num_start: int
    number: int
    num_filled: int = 0

    @property
    def num_masked(self) -> int:
        return sum(token is None for token in self.tokens)


def denoising(verb: str, decoder: Decoder, batch: list[Row], seed: int):
    """(canvas, steps, whether settled tokens may still change). Raises UserError for settings that contradict each other."""
    from dlmconvert.sampling.api import with_lengths
    from dlmconvert.sampling.canvas import build_canvas
    from dlmconvert.sampling.denoise import denoise
    from dlmconvert.sampling.options import OPTIONS, Options

    try:
        own = {"seed": seed, "helper": decoder.helper}
        options = Options(**{name: value for name, value in decoder.settings.items() if name in OPTIONS} | own)
        rows = with_lengths(decoder.denoiser, [row.tokens for row in batch], options.ends, decoder.denoiser.device)
        for row, tokens in zip(batch, rows, strict=True):
            row.tokens = list(tokens)
        canvas = build_canvas(rows, 0, decoder.denoiser.device, [row.number for row in batch])
        # Text follows a gap, so it must not end there.
        ends = {"banned_ids": options.ends} if verb == "infill" else {"end_ids": options.ends}
        return canvas, denoise(decoder.denoiser, canvas, **options.of_the_loop(), **ends), options.may_change
    except ValueError as error:
        raise UserError(str(error)) from error


class View:
    """Rows on the screen while their tokens settle.

    On a terminal the whole canvas, redrawn, and gone when it is done. Elsewhere (`plain`) one row's text is written as far as it has
    settled from the left; `written` says how much of it stands there.
    """

    INTERVAL = 0.05  # seconds between two drawings; decoding for the eye must not cost the model's time

    def __init__(self, tokenizer: Any, ends: set[int], live: bool, plain: bool):
        self.tokenizer, self.ends, self.live_wanted, self.plain = tokenizer, ends, live, plain
        self.rows, self.live, self.drawn, self.written, self.texts = [], None, 0.0, "", {}
        self.may_change = False

    @contextmanager
    def watching(self, rows: list[Row], may_change: bool = False):
        """rows: on a terminal as many as fit; elsewhere only one alone is followed. Only its generated part when num_start says so."""
        from dlmconvert.cli.console import console

        self.rows, self.written, self.may_change, self.drawn = rows, "", may_change, 0.0
        if not self.live_wanted:
            yield self
            return
        from rich.live import Live

        with Live(console=console, auto_refresh=False, transient=True) as self.live:
            yield self
        self.live = None

    def see(self, step: Any) -> None:
        if self.live is not None:
            now = time.monotonic()
            if now - self.drawn >= self.INTERVAL:
                self.live.update(self._canvas(step, console_size()), refresh=True)
                self.drawn = now
        elif self.plain and len(self.rows) == 1 and not self.may_change:
            self._write(settled_text(self.tokenizer, self.rows[0], step.tokens_BL[0].tolist(), step.masked_BL[0].tolist(), self.ends))

    def finish(self, text: str) -> bool:
        """The rest of a row's text. False: nothing of it stands on the screen, or it turned out otherwise: it is still to be shown whole."""
        if not self.written or not text.startswith(self.written):
            return False
        self._write(text)
        return True

    def _write(self, text: str) -> None:
        if text.startswith(self.written) and len(text) > len(self.written):
            sys.stdout.write(text[len(self.written) :])
            sys.stdout.flush()
            self.written = text

    def _canvas(self, step: Any, size: tuple[int, int]):
        from rich.console import Group
        from rich.text import Text

        from dlmconvert.cli.console import console

        width, height = size
        lines = []
        state = (step.tokens_BL.tolist(), step.masked_BL.tolist(), step.committed_BL.tolist())
        for row, tokens, masked, committed in zip(self.rows, *state, strict=True):
            canvas = Text()
            for place in range(row.num_start, len(row.tokens)):
                if masked[place]:
                    canvas.append("_", style="dim")
                elif row.tokens[place] is not None or tokens[place] not in self.ends:
                    style = "bold green" if committed[place] else "green" if row.tokens[place] is None else ""
                    canvas.append(self._text(tokens[place]), style=style)
            lines += canvas.wrap(console, width)
        # Where the end is still masked, the top is what changes least.
        return Group(*lines[-height:], Text(f"{step.nfe} forwards, {int(step.masked_BL.sum())} masked", style="dim"))

    def _text(self, token: int) -> str:
        from dlmconvert.sampling.text import token_text

        if token not in self.texts:
            self.texts[token] = token_text(self.tokenizer, token)
        return self.texts[token]


def console_size() -> tuple[int, int]:
    """(columns, lines that a redrawn canvas may take)."""
    from dlmconvert.cli.console import console

    return console.width, max(3, console.height - 3)


def settled_text(tokenizer: Any, row: Row, tokens: list[int], masked: list[bool], ends: set[int]) -> str:
    """The text of a row as far as it has no hole and no end, without a character of which bytes are missing."""
    place = row.num_start
    while place < len(row.tokens) and not masked[place] and not (row.tokens[place] is None and tokens[place] in ends):
        place += 1
    text = tokenizer.decode(tokens[row.num_start : place], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd")


def in_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
