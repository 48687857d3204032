"""`dlmconvert eval`: likelihood of held-out text under a converted model, beside its AR source."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer


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
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """NELBO in nats a token and bits a byte, with its standard error, beside the AR source's NLL."""
    from dlmconvert.cli.console import ConsoleReporter, console, out
    from dlmconvert.recipe.schema import Evaluation
    from dlmconvert.runs.evaluations import evaluate_model
    from dlmconvert.runs.folder import find_model

    location = find_model(model)
    console.print(f"model {location.note}")
    defaults = location.run.recipe().eval if location.run is not None else Evaluation()
    chosen = Evaluation(rows=rows or defaults.rows, draws=draws or defaults.draws, batch=batch or defaults.batch, seed=seed)
    results = evaluate_model(location, chosen, ConsoleReporter(), data=data, source=source, row_length=row_length, device=device)
    if json:
        out(json_module.dumps(results, indent=1))
        return
    from rich.table import Table

    table = Table("", "nats a token", "standard error", "bits a byte", "tokens", "draws", box=None)
    for row in results:
        bound = "<= " if row["kind"] == "nelbo" else ""
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        table.add_row(row["what"], f"{bound}{row['nats_per_token']:.4f}", "" if row["standard_error"] is None else f"{row['standard_error']:.4f}", bits, f"{row['tokens']:,}", str(row["draws"]))
    out(table)
