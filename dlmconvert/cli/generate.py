"""`dlmconvert sample` and `dlmconvert infill`."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlmconvert.errors import UserError, nearest

if TYPE_CHECKING:
    from dlmconvert.cli.trace_page import TraceWatcher

_ROWS_AT_ONCE = 8
# Names of sampling/order.py and sampling/budget.py, without importing torch for --help.
_ORDERS = ("random", "confidence", "entropy", "margin", "left_to_right", "first_hitting")
_BUDGETS = ("even", "ancestral", "bernoulli", "dream", "llada")
_DEFAULTS = {"max_new_tokens": 64, "steps": 64, "alg": "random", "temperature": 0.95, "top_p": 0.9, "top_k": None}  # arXiv 2410.17891

Model = Annotated[str | None, typer.Argument(help="Run folder, model folder or exported folder; the latest run in ./runs when left out.")]
Prompt = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given several times.")]
PromptsFile = Annotated[Path | None, typer.Option(help="One prompt a line, or JSON lines with a field `prompt` (.jsonl).")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Tokens to generate after the prompt.", min=1)]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; fewer are faster and coarser.", min=1)]
Order = Annotated[str | None, typer.Option(help=f"Which positions settle first: {', '.join(_ORDERS)}.")]
Budget = Annotated[str | None, typer.Option(help=f"How many settle at a step, whatever the model says: {', '.join(_BUDGETS)}.")]
Threshold = Annotated[
    float | None, typer.Option(help="Settle all that the model is at least this sure of (0.9), instead of fixed steps.", min=0.0)
]
Factor = Annotated[
    float | None, typer.Option(help="Fast-dLLM's factor rule (0.7 to 1.9; larger is faster), instead of fixed steps.", min=0.0)
]
EntropyBound = Annotated[float | None, typer.Option(help="EB-Sampler's bound in nats (0.001 to 1), instead of fixed steps.", min=0.0)]
BlockLength = Annotated[int | None, typer.Option(help="Fill block after block from the left, this many tokens each.", min=1)]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1, tokens that stand in the text already become less probable.")]
CfgScale = Annotated[float | None, typer.Option(help="Classifier-free guidance, 0 is off; twice the forwards.", min=0.0)]
Temperature = Annotated[float | None, typer.Option(help="0 takes the most probable token.", min=0.0)]
TopP = Annotated[float | None, typer.Option(help="Keep the most probable tokens that together have this probability; 1 keeps all.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many of the most probable tokens; 0 keeps all.", min=0)]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
NumSamples = Annotated[int, typer.Option(help="Samples for each prompt.", min=1)]
Trace = Annotated[bool, typer.Option("--trace", help="Show the canvas while tokens settle.")]
TraceHtml = Annotated[Path | None, typer.Option(help="Write a page that plays the denoising step by step.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a sample, on standard output.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


def sample(
    model: Model = None,
    prompt: Prompt = None,
    prompts_file: PromptsFile = None,
    max_new_tokens: MaxNewTokens = None,
    steps: Steps = None,
    order: Order = None,
    budget: Budget = None,
    threshold: Threshold = None,
    factor: Factor = None,
    entropy_bound: EntropyBound = None,
    block_length: BlockLength = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    cfg_scale: CfgScale = None,
    seed: Seed = 0,
    num_samples: NumSamples = 1,
    trace: Trace = False,
    trace_html: TraceHtml = None,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Continue prompts (or an empty one) by denoising a canvas of masked tokens."""
    asked = _asked(
        steps, order, temperature, top_p, top_k, budget, threshold, factor, entropy_bound, block_length, repetition_penalty, cfg_scale
    )
    asked |= {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    texts = [*(prompt or []), *_read_prompts(prompts_file)] or [""]
    _generate("sample", model, texts, asked, seed, num_samples, trace, trace_html, as_json, device)


def infill(
    model: Model = None,
    text: Annotated[str | None, typer.Argument(help="Text with gaps: [[MASK:24]] is a gap of 24 tokens.", metavar="TEXT")] = None,
    prompt: Prompt = None,
    prompts_file: PromptsFile = None,
    steps: Steps = None,
    order: Order = None,
    budget: Budget = None,
    threshold: Threshold = None,
    factor: Factor = None,
    entropy_bound: EntropyBound = None,
    block_length: BlockLength = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    cfg_scale: CfgScale = None,
    seed: Seed = 0,
    num_samples: NumSamples = 1,
    trace: Trace = False,
    trace_html: TraceHtml = None,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Fill the gaps of a text, with both sides in view: dlmconvert infill "def f(x):[[MASK:24]]    return y"."""
    if text is None and model is not None and "[[" in model:
        model, text = None, model  # MODEL was left out
    asked = _asked(
        steps, order, temperature, top_p, top_k, budget, threshold, factor, entropy_bound, block_length, repetition_penalty, cfg_scale
    )
    texts = [*([] if text is None else [text]), *(prompt or []), *_read_prompts(prompts_file)]
    if not texts:
        raise UserError("no text to fill", "", 'give one with a gap: dlmconvert infill "Once upon a time[[MASK:16]] happily."')
    _generate("infill", model, texts, asked, seed, num_samples, trace, trace_html, as_json, device)


def _asked(
    steps, alg, temperature, top_p, top_k, budget, threshold, factor, entropy_bound, block_length, repetition_penalty, cfg_scale
) -> dict[str, Any]:
    """The sampler's options that were typed. Raises UserError for a name that does not exist."""
    asked = {name: value for name, value in locals().items() if value is not None}
    for option, value, valid in (("order", alg, _ORDERS), ("budget", budget, _BUDGETS)):
        if value is not None and value not in valid:
            raise UserError(f"--{option} {value} is no {option}", nearest(value, valid))
    return asked


@dataclass
class _Row:
    """One sample to make: `tokens` has None where it is to be filled, `num_start` start tokens in front are not shown.

    num_filled: of the tokens to be filled, those that were; fewer when the text ended early.
    """

    prompt: str
    tokens: list[int | None]
    num_start: int
    number: int
    num_filled: int = 0

    @property
    def num_masked(self) -> int:
        return sum(token is None for token in self.tokens)


def _generate(verb, model, texts, asked, seed, num_samples, trace, trace_html, as_json, device) -> None:
    """Load, sample batch by batch, show."""
    if trace_html is not None and trace_html.exists():
        raise UserError(f"{trace_html} exists already", "nothing is overwritten", "name another file for --trace-html, or remove this one")
    parts = [_parts(verb, text) for text in texts]

    from dlmconvert.backbone.load import load_denoiser
    from dlmconvert.cli.console import console
    from dlmconvert.cli.trace_page import TraceWatcher
    from dlmconvert.runs.folder import find_model
    from dlmconvert.sampling.api import SAVED_OPTIONS, with_defaults

    location = find_model(model)
    if location.note:
        console.print(location.note, markup=False, highlight=False, soft_wrap=True)
    with console.status("loading the model"):
        denoiser = load_denoiser(location.path, device=device)
    saved = _saved_settings(location.path)
    settings = with_defaults(asked, {**_DEFAULTS, **{name: saved[name] for name in SAVED_OPTIONS if name in saved}})
    eos = settings.setdefault("eos_token_id", denoiser.tokenizer.eos_token_id)
    rows = []
    for text, text_parts in zip(texts, parts, strict=True):
        tokens, num_start = _encode(verb, text, text_parts, settings["max_new_tokens"], denoiser)
        rows += [_Row(text, tokens, num_start, number) for number in range(num_samples)]
    watcher = TraceWatcher(denoiser.tokenizer, settings.get("steps"), trace, trace_html is not None)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = rows[start : start + _ROWS_AT_ONCE]
        began = time.perf_counter()
        filled, nfe = _fill(verb, denoiser, batch, settings, seed, watcher)
        seconds = time.perf_counter() - began
        for place, (row, tokens) in enumerate(zip(batch, filled, strict=True)):
            _show(verb, denoiser.tokenizer, row, tokens, eos, seed, nfe, seconds / len(batch), as_json, first=start + place == 0)
        if not as_json:
            made = sum(row.num_filled for row in batch)
            console.print(f"{made} tokens in {nfe} forwards, {made / seconds:.0f} tokens/s, seed {seed}", style="dim", highlight=False)
    if trace_html is not None:
        _write_page(trace_html, location.path, verb, settings, seed, watcher)
        console.print(f"trace: {trace_html}", markup=False, highlight=False, soft_wrap=True)


def _fill(verb, denoiser, batch: list[_Row], settings, seed, watcher) -> tuple[list[list[int]], int]:
    """(rows of tokens, forwards). A row's draws are keyed by its sample number, so a prompt of a file gives what it gives alone."""
    from dlmconvert.sampling.api import OPTIONS, Options
    from dlmconvert.sampling.canvas import build_canvas
    from dlmconvert.sampling.denoise import denoise

    try:
        options = Options(**{name: value for name, value in settings.items() if name in OPTIONS}, seed=seed)
        canvas = build_canvas([row.tokens for row in batch], 0, denoiser.device, [row.number for row in batch])
        # Text follows a gap, so it must not end there.
        ends = {"end_ids": options.ends} if verb == "sample" else {"banned_ids": options.ends}
        steps = denoise(denoiser, canvas, **options.of_the_loop(), **ends)
    except ValueError as error:
        raise UserError(str(error)) from error
    nfe, tokens_BL = 0, canvas.tokens_BL
    filled_B = canvas.masked_BL.sum(dim=1)
    with watcher.watching(batch):
        for step in steps:
            nfe, tokens_BL = step.nfe, step.tokens_BL
            filled_B = filled_B - step.given_back_BL.sum(dim=1)
            watcher.see(step)
    for row, num_filled in zip(batch, filled_B.tolist(), strict=True):
        row.num_filled = num_filled
    return canvas.rows(tokens_BL), nfe


def _parts(verb: str, text: str) -> list[str | int]:
    """Text and gap lengths. Raises UserError with the position of a malformed gap."""
    from dlmconvert.sampling.text import parse_gaps

    if verb == "sample":
        return [text]
    try:
        return parse_gaps(text)
    except ValueError as error:
        raise UserError(str(error), f"text: {text[:60]!r}") from error


def _encode(verb: str, text: str, parts: list[str | int], max_new_tokens: int, denoiser: Any) -> tuple[list[int | None], int]:
    """(row of tokens with None where it is to be filled, start tokens in front). Raises UserError when the model is too short."""
    from dlmconvert.sampling.text import encode_row

    try:
        tokens, num_start = encode_row(denoiser.tokenizer, parts if verb == "infill" else [*parts, max_new_tokens])
    except ValueError as error:
        raise UserError(str(error)) from error
    longest = getattr(denoiser.model.config, "max_position_embeddings", None)
    if longest is not None and len(tokens) > longest:
        raise UserError(
            f"the canvas has {len(tokens)} tokens, the model was made for {longest}",
            f"text: {text[:60]!r}",
            "shorten the text or the gaps" if verb == "infill" else "shorten the prompt, or lower --max-new-tokens",
        )
    return tokens, num_start


def _show(verb, tokenizer, row: _Row, tokens: list[int], eos, seed, nfe, seconds, as_json: bool, first: bool) -> None:
    """One sample on standard output: JSON, or the text with its generated part in colour on a terminal."""
    from dlmconvert.cli.console import out
    from dlmconvert.sampling.canvas import cut_at
    from dlmconvert.sampling.text import decode_pieces

    if verb == "sample":
        num_given = len(row.tokens) - row.num_masked
        tokens = tokens[:num_given] + cut_at(tokens[num_given:], eos)
    is_generated = [token is None for token in row.tokens[: len(tokens)]]
    pieces = decode_pieces(tokenizer, tokens, is_generated, row.num_start)
    text = "".join(piece for piece, _ in pieces)
    if as_json:
        filled = [piece for piece, generated in pieces if generated]
        result = {"prompt": row.prompt, "text": text, "generated": filled, "sample": row.number}
        numbers = {"num_tokens": row.num_filled, "nfe": nfe, "tokens_per_forward": round(row.num_filled / max(nfe, 1), 3)}
        out(json.dumps({**result, "seed": seed, **numbers, "tokens_per_second": round(row.num_filled / seconds, 1)}))
        return
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        text = "".join(f"\x1b[32m{piece}\x1b[0m" if generated else piece for piece, generated in pieces)
    out(text if first else f"\n{text}")


def _read_prompts(path: Path | None) -> list[str]:
    """Prompts of a file. Raises UserError that names the file and the line."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts-file {path} cannot be read", str(error)) from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)["prompt"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number} is not a JSON object with a field `prompt`", str(error)) from error
        prompts.append(line)
    if not prompts:
        raise UserError(f"--prompts-file {path} holds no prompt")
    return prompts


def _saved_settings(folder: Path) -> dict[str, Any]:
    """What the folder's generation_config.json sets, without its nulls."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        return {name: value for name, value in json.loads(path.read_text(encoding="utf-8")).items() if value is not None}
    except (json.JSONDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read", str(error), "repair it, or remove it to use the built-in defaults") from error


def _write_page(path: Path, model: Path, verb: str, settings: dict[str, Any], seed: int, watcher: TraceWatcher) -> None:
    from dlmconvert.cli.trace_page import render_trace_page

    hidden = ("eos_token_id", "pad_token_id", *(() if verb == "sample" else ("max_new_tokens",)))
    shown = {name: value for name, value in settings.items() if value is not None and name not in hidden}
    page = render_trace_page(str(model), {**shown, "seed": seed}, watcher.steps_seen, watcher.kept)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--trace-html {path} cannot be written", str(error)) from error
