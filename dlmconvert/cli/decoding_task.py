"""What `bench` and `tune-sampler` share: the prompts, the AR source, lists of samplers, and the table."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlmconvert.cli.prompts import read_prompts
from dlmconvert.cli.sampler import parse_setting
from dlmconvert.errors import UserError

if TYPE_CHECKING:
    from dlmconvert.evaluation.benchmark import Result, Sampler, Task

_FULL_WIDTH, _WIDE = 130, 200  # columns that the whole table needs; of a table in a file
_HELD_OUT_PROMPTS = 8
_HELD_OUT_PROMPT_LENGTH = 32


def quiet_profiler() -> None:
    # torch's profiler measures the memory, and would talk on stderr. Must be set before torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def load_models(location: Any, source: str | None, device: str, compile: bool = False) -> tuple[Any, Any]:
    """(denoiser, AR source or None). The source is the one that is named, else the run's. Raises UserError when the tokens differ."""
    from dlmconvert.backbone.head import compile_for_decoding
    from dlmconvert.backbone.load import load_denoiser
    from dlmconvert.cli.console import console

    with console.status("loading the models"):
        denoiser, folder = load_denoiser(location.path, device=device), source_folder(location, source)
        ar = None if folder is None else load_source(folder, denoiser)
        if compile:
            compile_for_decoding(denoiser.model, *(() if ar is None else (ar,)))
        return denoiser, ar


def load_source(folder: Path, denoiser: Any) -> Any:
    """The AR model as transformers runs it: causal, with its KV cache."""
    from dlmconvert.backbone.load import load_config, load_model, load_tokenizer

    theirs, ours = load_tokenizer(folder).get_vocab(), denoiser.tokenizer.get_vocab()
    different = [token for token, number in theirs.items() if number < denoiser.vocab_size and ours.get(token) != number]
    if different:
        raise UserError(f"{folder} has other tokens than the model", f"{different[0]!r} is {theirs[different[0]]} there", "name the AR model that it was converted from: --source MODEL")
    config = load_config(folder)
    for name in ("dlm", "is_causal"):  # of a run's `source` folder
        if hasattr(config, name):
            delattr(config, name)
    config.use_cache = True
    return load_model(folder, config).to(denoiser.device).eval()


def make_task(location: Any, denoiser: Any, prompts: Path | None, answers: Path | None, num_new: int, batch: int, seed: int, compile: bool = False) -> Task:
    """The prompts of a file, else beginnings of the run's held-out rows. Raises UserError when there are none, or they are too long."""
    from dlmconvert.evaluation.benchmark import Task
    from dlmconvert.sampling.text import encode_row, end_ids

    if prompts is not None:
        texts = read_prompts(prompts)
        rows = [[token for token in encode_row(denoiser.tokenizer, [text, 1])[0] if token is not None] for text in texts]
    else:
        rows = _held_out_prompts(location)
    expected = read_prompts(answers, "--answers", ("answer",)) if answers is not None else None
    if expected is not None and (prompts is None or len(expected) != len(rows)):
        found = f"{len(expected)} answers for {len(rows)} prompts" if prompts is not None else "the prompts that they belong to are not named"
        raise UserError(f"--answers {answers}: {found}", "", "one answer for each prompt of --prompts, in the same order")
    longest, most = denoiser.longest, max(len(row) for row in rows) + num_new
    if longest is not None and most > longest:
        raise UserError(f"a prompt and {num_new} new tokens are {most} tokens, the model was made for {longest}", "", "lower --new-tokens, or shorten the prompts")
    return Task(rows, num_new, batch, end_ids(denoiser.tokenizer), expected, seed, is_compiled=compile)


def _held_out_prompts(location: Any) -> list[list[int]]:
    import numpy as np

    from dlmconvert.backbone.load import load_tokenizer
    from dlmconvert.cli.console import ConsoleReporter
    from dlmconvert.runs.evaluations import Subject, _held_out_rows

    if location.run is None:
        raise UserError(f"{location.path} is not in a run folder, so there is no held-out text", "", "name a file of prompts: --prompts FILE")
    with ExitStack() as stack:
        rows = stack.enter_context(_held_out_rows(Subject(location, "cpu"), load_tokenizer(location.path), ConsoleReporter()))
        found = rows.rows(np.arange(min(rows.num_rows, 4 * _HELD_OUT_PROMPTS)))
        length = min(_HELD_OUT_PROMPT_LENGTH, found.tokens_BL.shape[1])
        whole = (found.segments_BL[:, :length] == found.segments_BL[:, :1]).all(dim=1)
        chosen = found.tokens_BL[whole][:_HELD_OUT_PROMPTS, :length]
        return (chosen if len(chosen) else found.tokens_BL[:_HELD_OUT_PROMPTS, :length]).tolist()


def load_helpers(samplers: Sequence[Sampler], location: Any, source: str | None, device: Any, compile: bool = False) -> dict[str, Any]:
    """The AR models that samplers name for APD: `source` is the model's own source, else a checkpoint. Raises UserError."""
    from dlmconvert.backbone.head import compile_for_decoding
    from dlmconvert.backbone.load import load_denoiser, resolve_checkpoint
    from dlmconvert.evaluation.benchmark import SOURCE_AS_HELPER

    found = {}
    for name in dict.fromkeys(sampler.settings["helper"] for sampler in samplers if sampler.settings.get("helper") is not None):
        folder = resolve_checkpoint(name) if name != SOURCE_AS_HELPER else source_folder(location, source)
        if folder is None:
            raise UserError(f"helper={name}: no AR source is known", "", "name it with --source MODEL, or a checkpoint with helper=MODEL")
        found[name] = load_denoiser(folder, device=device, attention="causal")
        if compile:
            compile_for_decoding(found[name].model)
    return found


def source_folder(location: Any, source: str | None) -> Path | None:
    """The checkpoint of --source, else of the run that the model lies in."""
    from dlmconvert.backbone.load import resolve_checkpoint

    if source is not None:
        return resolve_checkpoint(source)
    prepared = None if location.run is None else location.run.model_folder("prepare")
    return prepared if prepared is not None and (prepared / "config.json").is_file() else None


def read_samplers(text: str, temperature: float) -> list[Sampler]:
    """`threshold=0.9+block_length=32,order=entropy+steps=16`, or a file: YAML or JSON (a list of mappings), or a sampler a line.

    Raises UserError that names the sampler.
    """
    from dlmconvert.evaluation.benchmark import Sampler, name_of

    if Path(text).is_file():
        entries = _entries_of_file(Path(text))
    else:
        entries = [entry.split("+") for entry in text.split(",") if entry.strip()]
    samplers = []
    for entry in entries:
        settings = dict(parse_setting(setting, may_name_helper=True) for setting in entry)
        for name in ("seed", "max_new_tokens"):
            if name in settings:
                raise UserError(f"{name} in --samplers {'+'.join(entry)}", "it is the same for all samplers", "give it as an option of the command")
        samplers.append(Sampler(name_of(settings), {"temperature": temperature, **settings}))
    if not samplers:
        raise UserError(f"--samplers {text} names no sampler", "", "for example: --samplers threshold=0.9,order=entropy+steps=16")
    twice = [s.name for s in samplers if sum(s.name == other.name for other in samplers) > 1]
    if twice:
        raise UserError(f"--samplers names {twice[0]} twice")
    return samplers


def _entries_of_file(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--samplers {path} cannot be read", str(error)) from error
    if path.suffix in (".yaml", ".yml", ".json"):
        import yaml

        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--samplers {path} is no YAML", str(error).splitlines()[0]) from error
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise UserError(f"--samplers {path} is no list of samplers", "", "write - {threshold: 0.9, block_length: 32} a line")
        return [[f"{name}={value}" for name, value in entry.items()] for entry in values]
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line.replace("+", " ").split() for line in lines if line]


def show_table(results: Sequence[Result]) -> None:
    """A table: speed, cost and quality of each sampler; * marks the front. Narrow terminals get fewer columns."""
    from rich.console import Console

    from dlmconvert.cli.console import out

    if sys.stdout.isatty():
        return out(_table(results, is_narrow=Console().width < _FULL_WIDTH))
    wide = Console(file=io.StringIO(), width=_WIDE, highlight=False)
    wide.print(_table(results, is_narrow=False))
    out("\n".join(line.rstrip() for line in wide.file.getvalue().rstrip().splitlines()))


def _table(results: Sequence[Result], is_narrow: bool) -> Any:
    from rich.table import Table

    by_accuracy, judged = results[0].accuracy is not None, results[0].nats_per_token is not None
    ar = next((result.speed for result in results if result.settings is None), None)
    rows = [_cells(result, ar) for result in results]
    shown = ["tokens/s", *(["x AR"] if ar else []), "NFE", "tokens/NFE", "first token", "memory", *(["nats/token"] if judged else [])]
    shown += ["distinct-2", *(["accuracy"] if by_accuracy else [])]
    if all(result.memory_bytes is None for result in results):
        shown.remove("memory")
    if is_narrow:
        shown = [name for name in shown if name not in ("tokens/NFE", "first token", "memory")]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("sampler", overflow="fold", min_width=20)
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for result, cells in zip(results, rows, strict=True):
        table.add_row("*" if result.is_on_front else "", result.name, *(cells[name] for name in shown))
    return table


def _cells(result: Result, ar: float | None) -> dict[str, str]:
    facts = result.to_dict()
    low, high = facts["tokens_per_second_range"]
    spread = f" +- {50 * (high - low) / result.speed:.0f}%" if len(result.seconds) > 1 else ""
    return {
        "tokens/s": f"{result.speed:,.0f}{spread}",
        "x AR": f"{result.speed / ar:.2f}" if ar else "",
        "NFE": f"{result.nfe:.1f}",
        "tokens/NFE": f"{result.tokens_per_forward:.2f}",
        "first token": f"{1000 * facts['median_seconds_to_first_token']:,.0f} ms",
        "memory": "" if result.memory_bytes is None else f"{result.memory_bytes / 2**20:,.1f} MB",
        "nats/token": _with_error(result.nats_per_token, result.nats_standard_error),
        "distinct-2": "" if result.distinct_2 is None else f"{result.distinct_2:.2f}",
        "accuracy": _with_error(result.accuracy, result.accuracy_standard_error),
    }


def _with_error(value: float | None, error: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if error is None else f"{value:.2f} +- {error:.2f}"
