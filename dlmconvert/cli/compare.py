"""`dlmconvert compare`: variants of a recipe on the same batches, side by side."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer


def compare(
    recipe: Annotated[str, typer.Argument(help="Recipe name, recipe file, Hub id, or checkpoint folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Recipe keys of all variants, as in train.steps=200.")] = None,
    vary: Annotated[list[str] | None, typer.Option("--vary", metavar="KEY=A,B", help="Values to compare; several --vary: every combination. Keys that go together: KEY=A+OTHER=B.")] = None,
    report: Annotated[str | None, typer.Option("--report", metavar="FILE", help="Also write one HTML page.")] = None,
    retention: Annotated[bool, typer.Option("--retention/--no-retention", help="Measure what is left of the AR source in each variant.")] = True,
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Train variants of a recipe on the same batches and tabulate them; called again, it continues."""
    import os
    from pathlib import Path

    from dlmconvert.cli.console import ConsoleReporter, out
    from dlmconvert.errors import UserError
    from dlmconvert.runs.compare import measure_retentions, table_text, tabulate, train_variants, variants_of, write_comparison
    from dlmconvert.runs.compare_page import check_report, write_page
    from dlmconvert.training.launchers import place_of

    place = place_of(os.environ)
    if place is not None and place.count > 1:
        raise UserError(f"compare trains in one process, a launcher started {place.count}", "", "run the variants one by one: dlmconvert adapt RECIPE name=... method...")
    page = Path(report).expanduser() if report else None
    if page is not None:
        check_report(page)
    source, variants = variants_of(recipe, overrides or [], vary or [])
    reporter = ConsoleReporter()
    worked = train_variants(source, variants, reporter)
    if retention:
        worked |= measure_retentions(variants, reporter)
    comparison = tabulate(recipe, variants, retention)
    data, image = write_comparison(comparison)
    if page is not None:
        write_page(comparison, image, page)
    if json:
        out(json_module.dumps(comparison, indent=1))
        return
    if not worked:
        out("everything is done already")
    out("\n" + table_text(comparison) + "\n")
    for what, path in (("numbers", data), ("curves", image), ("report", page)):
        if path is not None:
            out(f"  {what:7} {path}")
