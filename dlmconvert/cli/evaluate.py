"""`dlmconvert eval`: likelihood of held-out text under a converted model, beside its AR source."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dlmconvert.evaluation.retention import Retention


def evaluate(
    model: Annotated[str | None, typer.Argument(help="Model folder, run, or export (default: the latest run).")] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="PATH", help="Text to score (default: the run's held-out rows).")] = None,
    source: Annotated[str | None, typer.Option("--source", metavar="MODEL", help="AR model to score beside it (default: the run's source).")] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Rows that are scored.")] = None,
    draws: Annotated[int | None, typer.Option("--draws", min=1, help="Noise draws a row.")] = None,
    row_length: Annotated[int | None, typer.Option("--row-length", min=8, help="Tokens in a row, with --data.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Rows in one forward.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    retention: Annotated[bool, typer.Option("--retention", help="How much of the AR source is left, instead of the likelihood.")] = False,
    delta_nll: Annotated[bool, typer.Option("--delta-nll", help="How much likelier true continuations are than others, instead of the likelihood.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="PNG of --retention (default: plots/retention.png of the run).")] = None,
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """NELBO in nats a token and bits a byte, with its standard error, beside the AR source's NLL. With --retention: what is left of that source."""
    from dlmconvert.cli.console import ConsoleReporter, console, out
    from dlmconvert.errors import UserError
    from dlmconvert.recipe.schema import Evaluation
    from dlmconvert.runs.evaluations import Subject, evaluate_model, measure_retention
    from dlmconvert.runs.folder import find_model

    location = find_model(model)
    console.print(f"model {location.note}")
    defaults = location.run.recipe().eval if location.run is not None else Evaluation()
    chosen = Evaluation(rows=rows or defaults.rows, draws=draws or defaults.draws, batch=batch or defaults.batch, seed=seed)
    reporter, subject = ConsoleReporter(), Subject(location, device, data, source, row_length)
    if retention and delta_nll:
        raise UserError("--retention and --delta-nll are two measurements", "", "ask for one at a time")
    if retention:
        if draws is not None or seed:
            reporter.warn("--draws and --seed have no part in --retention: it reads clean text")
        found = measure_retention(subject, chosen, reporter, plot)
        _show_retention(found, json)
        return
    if plot is not None:
        reporter.warn("--plot is ignored: it belongs to --retention")
    results = evaluate_model(subject, chosen, reporter, delta_nll)
    if json:
        out(json_module.dumps(results, indent=1))
        return
    if delta_nll:
        _show_delta_nll(results)
        return
    from rich.table import Table

    table = Table("", "nats a token", "standard error", "bits a byte", "tokens", "draws", box=None)
    for row in results:
        bound = "<= " if row["kind"] == "nelbo" else ""
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        table.add_row(row["what"], f"{bound}{row['nats_per_token']:.4f}", "" if row["standard_error"] is None else f"{row['standard_error']:.4f}", bits, f"{row['tokens']:,}", str(row["draws"]))
    out(table)


def _show_delta_nll(results: list[dict]) -> None:
    from rich.table import Table

    from dlmconvert.cli.console import out

    table = Table("", "delta-NLL", "standard error", "true continuation", "others", "true one chosen", "rows", "draws", box=None)
    for row in results:
        what, error = row["what"].partition(" of ")[2], row["standard_error"]
        bound = "<= " if row["kind"] == "nelbo" else ""
        numbers = (f"{bound}{row['truth']:.4f}", f"{bound}{row['distractors']:.4f}", f"{row['accuracy']:.1%}")
        table.add_row(what, f"{row['delta']:.4f}", "" if error is None else f"{error:.4f}", *numbers, str(row["rows"]), str(row["draws"]))
    out(table)


def _show_retention(found: Retention, json: bool) -> None:
    from rich.table import Table

    from dlmconvert.cli.console import console, out

    if json:
        out(json_module.dumps(found.to_dict(), indent=1))
        return
    weights, agreement = found.weights, found.agreement
    kinds = [part.kind for part in weights.by_kind]
    drift = {(part.layer, part.kind): part.relative for part in weights.parts}
    table = Table("layer", *(f"{kind} moved" for kind in kinds), "hidden cosine", box=None)
    layers = sorted({part.layer for part in weights.parts if part.layer is not None})
    for layer in [None, *layers]:
        cells = ["" if drift.get((layer, kind)) is None else f"{drift[layer, kind]:.2%}" for kind in kinds]
        at = 0 if layer is None else layer + 1
        table.add_row("outside" if layer is None else str(layer), *cells, f"{agreement.cosine[at]:.4f}" if at < len(agreement.cosine) else "")
    table.add_row("all", *("" if part.relative is None else f"{part.relative:.2%}" for part in weights.by_kind), "")
    out(table)
    out()
    read = Table("left to right", "source", "converted", box=None)
    read.add_row("AR perplexity", f"{agreement.perplexity_before:.4f}", f"{agreement.perplexity_after:.4f}")
    read.add_row("nats a token", f"{agreement.nats_before:.4f}", f"{agreement.nats_after:.4f}")
    read.add_row("same greedy token", "", f"{agreement.greedy:.2%}")
    read.add_row("accepted by the source", "", f"{agreement.acceptance:.2%}")
    if found.own is not None:
        read.add_row("own tokens accepted by its AR path", "", f"{found.own.acceptance:.2%}")
    out(read)
    out()
    if weights.not_compared:
        console.print(f"{len(weights.not_compared)} tensors that only one side has: {', '.join(weights.not_compared[:3])}", soft_wrap=True)
    out(found.to_dict()["sentence"])
