"""`dlmconvert sample` and `dlmconvert infill`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlmconvert.cli.decoding import STOPPED, Decoder, Row, View, denoising, in_colour, load_decoder
from dlmconvert.cli.prompts import ResultsFile, checked_text, read_prompts, refuse_existing, refuse_same
from dlmconvert.cli.sampler import with_sampler
from dlmconvert.errors import Interrupted, UserError

if TYPE_CHECKING:
    from dlmconvert.cli.trace_page import TraceWatcher

_ROWS_AT_ONCE = 8

Model = Annotated[str | None, typer.Argument(help="Run folder, model folder or exported folder; the latest run in ./runs when left out.")]
Prompt = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given several times.")]
Prompts = Annotated[Path | None, typer.Option("--prompts", help="A file: one prompt a line, or JSON lines with a field `prompt` (.jsonl).")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Tokens to generate after the prompt.", min=1)]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
NumSamples = Annotated[int, typer.Option(help="Samples for each prompt.", min=1)]
Trace = Annotated[bool, typer.Option("--trace", help="Show the canvas while tokens settle, step by step.")]
TraceHtml = Annotated[Path | None, typer.Option(help="Write a page that plays the denoising step by step.")]
Out = Annotated[Path | None, typer.Option(help="Write the results to a new file, one JSON object a line, instead of the screen.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a sample, on standard output.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile the model: half a minute at the start, faster forwards after it.")]


@with_sampler
def sample(
    model: Model = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
    num_samples: NumSamples = 1,
    trace: Trace = False,
    trace_html: TraceHtml = None,
    out: Out = None,
    as_json: AsJson = False,
    device: Device = "auto",
    compile: Compile = False,
    *,
    asked: dict,
) -> None:
    """Continue prompts (or an empty one) by denoising a canvas of masked tokens."""
    asked |= {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    texts = [*(prompt or []), *read_prompts(prompts)] or [""]
    _generate("sample", model, texts, asked, seed, num_samples, trace, trace_html, out, as_json, device, compile)


@with_sampler
def infill(
    model: Model = None,
    text: Annotated[str | None, typer.Argument(help="Text with gaps: [[MASK:24]] is a gap of 24 tokens, [[MASK:4-24]] of 4 to 24.", metavar="TEXT")] = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    num_samples: NumSamples = 1,
    trace: Trace = False,
    trace_html: TraceHtml = None,
    out: Out = None,
    as_json: AsJson = False,
    device: Device = "auto",
    compile: Compile = False,
    *,
    asked: dict,
) -> None:
    """Fill the gaps of a text, with both sides in view: dlmconvert infill "def f(x):[[MASK:24]]    return y"."""
    if text is None and model is not None and "[[" in model:
        model, text = None, model  # MODEL was left out
    texts = [*([] if text is None else [text]), *(prompt or []), *read_prompts(prompts)]
    if not texts:
        raise UserError("no text to fill", "", 'give one with a gap: dlmconvert infill "Once upon a time[[MASK:16]] happily."')
    _generate("infill", model, texts, asked, seed, num_samples, trace, trace_html, out, as_json, device, compile)


def _generate(verb, model, texts, asked, seed, num_samples, trace, trace_html, out_file, as_json, device, compile) -> None:
    """Load, sample batch by batch, show."""
    refuse_existing(trace_html, "--trace-html")
    results = ResultsFile(out_file)
    refuse_same(out_file, "--out", trace_html, "--trace-html")
    texts = [checked_text(text, "the prompt") for text in texts]
    parts = [_parts(verb, text) for text in texts]

    from dlmconvert.cli.console import console
    from dlmconvert.cli.trace_page import TraceWatcher

    decoder = load_decoder(model, asked, device, compile)
    rows = []
    for text, text_parts in zip(texts, parts, strict=True):
        tokens, num_start = _encode(verb, text, text_parts, decoder)
        rows += [Row(text, tokens, num_start, number) for number in range(num_samples)]
    watcher = TraceWatcher(decoder.tokenizer, trace, trace_html is not None)
    on_screen = not (as_json or out_file or trace)
    live = on_screen and console.is_terminal and sys.stdout.isatty()
    view = View(decoder.tokenizer, decoder.ends if verb == "sample" else set(), live, on_screen and not live and len(rows) == 1)
    made = forwards = seconds = 0
    try:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            batch = rows[start : start + _ROWS_AT_ONCE]
            began = time.perf_counter()
            filled, nfe = _fill(verb, decoder, batch, seed, watcher, view)
            taken = time.perf_counter() - began
            for place, (row, tokens) in enumerate(zip(batch, filled, strict=True)):
                record, pieces = _record(verb, decoder, row, tokens, seed, nfe, taken / len(batch))
                results.add(record)
                _show(record, pieces, view, as_json, out_file is not None, first=start + place == 0)
            made, forwards, seconds = made + sum(row.num_filled for row in batch), forwards + nfe, seconds + taken
    except (KeyboardInterrupt, Interrupted) as stop:
        kept = "" if out_file is None else f"; {results.count} of {len(rows)} results: {out_file}"
        console.print(f"stopped{kept}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(STOPPED) from stop
    if not as_json:
        console.print(f"{made} tokens in {forwards} forwards, {made / seconds:.0f} tokens/s, seed {seed}", style="dim", highlight=False)
    if out_file is not None:
        console.print(f"{results.count} results: {out_file}", markup=False, highlight=False, soft_wrap=True)
    if trace_html is not None:
        _write_page(trace_html, decoder, rows, verb, seed, watcher)
        console.print(f"trace: {trace_html}", markup=False, highlight=False, soft_wrap=True)


def _fill(verb: str, decoder: Decoder, batch: list[Row], seed: int, watcher: TraceWatcher, view: View) -> tuple[list[list[int]], int]:
    """(rows of tokens, forwards). A row's draws are keyed by its sample number, so a prompt of a file gives what it gives alone."""
    canvas, steps, may_change = denoising(verb, decoder, batch, seed)
    nfe, tokens_BL = 0, canvas.tokens_BL
    filled_B = canvas.masked_BL.sum(dim=1)
    with watcher.watching(batch, decoder.num_steps(batch)), view.watching(batch, may_change):
        for step in steps:
            nfe, tokens_BL = step.nfe, step.tokens_BL
            filled_B = filled_B - step.given_back_BL.sum(dim=1)
            watcher.see(step)
            view.see(step)
    for row, num_filled in zip(batch, filled_B.tolist(), strict=True):
        row.num_filled = num_filled
    return canvas.rows(tokens_BL), nfe


def _parts(verb: str, text: str) -> list[str | int | tuple[int, int]]:
    """Text and gap lengths. Raises UserError with the position of a malformed gap."""
    from dlmconvert.sampling.text import parse_gaps

    if verb == "sample":
        return [text]
    try:
        return parse_gaps(text)
    except ValueError as error:
        raise UserError(str(error), f"text: {text[:60]!r}") from error


def _encode(verb: str, text: str, parts: list[str | int | tuple[int, int]], decoder: Decoder) -> tuple[list[int | None], int]:
    """(row of tokens with None where it is to be filled, start tokens in front). Raises UserError when the model is too short.

    A gap of bounds gets the length that fits best; the model must have room for the longest that it tries.
    """
    from dlmconvert.sampling.api import with_lengths
    from dlmconvert.sampling.text import encode_row

    parts = parts if verb == "infill" else [*parts, decoder.settings["max_new_tokens"]]
    most = [part[1] if isinstance(part, tuple) else part for part in parts if not isinstance(part, str)]
    try:
        # Before anything of the whole length is made, or filled to compare it.
        short, _ = encode_row(decoder.tokenizer, [part if isinstance(part, str) else 1 for part in parts])
        length = len(short) + sum(most) - len(most)
        if decoder.longest is not None and length > decoder.longest:
            raise UserError(
                f"the canvas has {length} tokens, the model was made for {decoder.longest}",
                f"text: {text[:60]!r}",
                "shorten the text or the gaps" if verb == "infill" else "shorten the prompt, or lower --max-new-tokens",
            )
        row, num_start = encode_row(decoder.tokenizer, parts)
        (tokens,) = with_lengths(decoder.denoiser, [row], sorted(decoder.ends), decoder.denoiser.device)
    except ValueError as error:
        raise UserError(str(error)) from error
    return tokens, num_start


def _record(verb, decoder: Decoder, row: Row, tokens: list[int], seed, nfe, seconds) -> tuple[dict[str, Any], list[tuple[str, bool]]]:
    """(what --json and --out say of a sample, its text in pieces: (text, was it generated))."""
    from dlmconvert.sampling.canvas import cut_at
    from dlmconvert.sampling.text import decode_pieces

    if verb == "sample":
        num_given = len(row.tokens) - row.num_masked
        tokens = tokens[:num_given] + cut_at(tokens[num_given:], decoder.settings.get("eos_token_id"))
    is_generated = [token is None for token in row.tokens[: len(tokens)]]
    pieces = decode_pieces(decoder.tokenizer, tokens, is_generated, row.num_start)
    record = {
        "prompt": row.prompt,
        "text": "".join(piece for piece, _ in pieces),
        "generated": [piece for piece, generated in pieces if generated],
        "tokens": [token for token, generated in zip(tokens, is_generated, strict=True) if generated],
        "sample": row.number,
        "seed": seed,
        "num_tokens": row.num_filled,
        "nfe": nfe,
        "tokens_per_forward": round(row.num_filled / max(nfe, 1), 3),
        "tokens_per_second": round(row.num_filled / seconds, 1),
        "settings": decoder.shown_settings(*(() if verb == "sample" else ("max_new_tokens",)), rows=[row]),
    }
    return record, pieces


def _show(record: dict[str, Any], pieces: list[tuple[str, bool]], view: View, as_json: bool, is_kept: bool, first: bool) -> None:
    """One sample on standard output: JSON, or the text with its generated part in colour on a terminal."""
    from dlmconvert.cli.console import out

    text = record["text"]
    if as_json:
        out(json.dumps(record))
    elif view.finish(text):
        out()
    elif not is_kept:
        if in_colour():
            text = "".join(f"\x1b[32m{piece}\x1b[0m" if generated else piece for piece, generated in pieces)
        out(text if first else f"\n{text}")


def _write_page(path: Path, decoder: Decoder, rows: list[Row], verb: str, seed: int, watcher: TraceWatcher) -> None:
    from dlmconvert.cli.trace_page import render_trace_page

    shown = decoder.shown_settings(*(() if verb == "sample" else ("max_new_tokens",)), rows=rows)
    page = render_trace_page(str(decoder.location.path), {**shown, "seed": seed}, watcher.steps_seen, watcher.kept)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--trace-html {path} cannot be written", str(error)) from error
