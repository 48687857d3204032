"""`dlmconvert plan`: what a recipe costs, without weights and without a GPU. `--dry-run` of the training commands prints the same."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Gpu = Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="Plan for this GPU, as in h100-80gb (default: this machine's device).")]


def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe name, recipe file, Hub id, or checkpoint folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Recipe keys, as in train.steps=200.")] = None,
    processes: Annotated[int | None, typer.Option("--processes", metavar="N", help="Processes in all, one a GPU.", min=1)] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", metavar="N", help="Machines that the processes are spread over.", min=1)] = None,
    gpu: Gpu = None,
    memory: Annotated[float | None, typer.Option("--memory", metavar="GB", help="Memory of one device (default: the GPU's, or this machine's).", min=0.001)] = None,
    mfu: Annotated[float | None, typer.Option("--mfu", metavar="SHARE", help="Share of the peak that a step reaches (default: an assumption, which is printed).", min=1e-6, max=1)] = None,
    tflops: Annotated[float | None, typer.Option("--tflops", metavar="N", help="Sustained TFLOP/s of one device in a training step, in place of peak and share.", min=1e-6)] = None,
    price: Annotated[float | None, typer.Option("--price", metavar="P", help="Price of one device and hour, in any currency.", min=0)] = None,
    unique_tokens: Annotated[float | None, typer.Option("--unique-tokens", metavar="N", help="Tokens of data.train, as in 1e9 (default: estimated).", min=1)] = None,
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Parameters, tokens, memory, time, money and disk of a recipe, beforehand; exit code 3 when it does not fit as typed."""
    from dlmconvert.errors import EXIT_WRONG_INPUT, UserError
    from dlmconvert.recipe.load import load_recipe

    if mfu is not None and tflops is not None:
        raise UserError("--mfu and --tflops both say how fast a step is", "", "give one of them", exit_code=EXIT_WRONG_INPUT)
    loaded = load_recipe(recipe, overrides)
    show_plan(
        loaded, json=json, processes=processes, nodes=nodes, gpu=gpu, memory_bytes=None if memory is None else round(memory * 1e9), mfu=mfu,
        flops_per_second=None if tflops is None else tflops * 1e12, price=price, unique_tokens=None if unique_tokens is None else round(unique_tokens),
    )  # fmt: skip


def show_plan(recipe: Any, *, json: bool = False, **machine: Any) -> None:
    """Print the plan of a recipe. machine: the arguments of `plan_recipe`. Raises typer.Exit(3) when it does not fit as typed."""
    from rich.markup import escape

    from dlmconvert.cli.console import console, out
    from dlmconvert.errors import EXIT_DOES_NOT_FIT
    from dlmconvert.planning.plan import plan_recipe

    result = plan_recipe(recipe, **machine)
    if json:
        import json as json_module

        out(json_module.dumps(result.to_dict(), indent=1))
    else:
        _print(result)
    for note in result.notes:
        console.print(escape(f"note: {note}"), soft_wrap=True)
    if result.fits() is False:
        for line in result.advice:
            console.print(escape(f"next: {line}"), soft_wrap=True)
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _print(result: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    from dlmconvert.cli.console import out
    from dlmconvert.planning.text import settings_rows

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    previous = ""
    for section, name, value in result.rows:
        table.add_row(section if section != previous else "", name, escape(value))
        previous = section
    out(table)
    for stage in result.stages:
        heads, rows, unit = settings_rows(stage, result.machine)
        title = f"\n{stage.name}: peak memory of one process, {unit}, for micro-batches of so many rows (* fits, \\[ ] recommended)"
        options = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold")
        for place, head in enumerate(heads):
            options.add_column(head, justify="left" if place < 3 else "right", no_wrap=True)
        for row in rows:
            options.add_row(*map(escape, row))
        out(options)
