"""`dlmconvert plan`: what a recipe costs, without weights and without a GPU."""

from __future__ import annotations

from typing import Annotated

import typer


def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe name, recipe file, Hub id, or checkpoint folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Recipe keys, as in train.steps=200.")] = None,
    memory: Annotated[float | None, typer.Option("--memory", metavar="GB", help="Memory of the device (default: this machine's).", min=0.001)] = None,
    tflops: Annotated[float | None, typer.Option("--tflops", metavar="N", help="Sustained TFLOP/s of a training step (default: timed here).", min=1e-6)] = None,
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Parameters, tokens, memory, time and disk of a recipe, beforehand; exit code 3 when it cannot fit."""
    from rich.markup import escape
    from rich.table import Table

    from dlmconvert.cli.console import console, out
    from dlmconvert.errors import EXIT_DOES_NOT_FIT
    from dlmconvert.planning.plan import plan_recipe
    from dlmconvert.recipe.load import load_recipe

    result = plan_recipe(
        load_recipe(recipe, overrides),
        memory_bytes=None if memory is None else round(memory * 1e9),
        flops_per_second=None if tflops is None else tflops * 1e12,
    )
    if json:
        import json as json_module

        out(json_module.dumps(result.to_dict(), indent=1))
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        previous = ""
        for section, name, value in result.rows:
            table.add_row(section if section != previous else "", name, escape(value))
            previous = section
        out(table)
        for note in result.notes:
            console.print(escape(f"note: {note}"), soft_wrap=True)
    if result.fits() is False:
        for line in result.advice:
            console.print(escape(f"next: {line}"), soft_wrap=True)
        raise typer.Exit(EXIT_DOES_NOT_FIT)
