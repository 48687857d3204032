"""Verbs that run stages, and those that say where a run stands."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Recipe keys, as in train.steps=200.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start a new run folder beside the old one; nothing is deleted.")]


def run(
    recipe: Annotated[str, typer.Argument(help="Recipe name, recipe file, Hub id, or checkpoint folder.")],
    overrides: Overrides = None,
    fresh: Fresh = False,
) -> None:
    """Every stage of a recipe, each resumable."""
    _run_recipe(recipe, overrides or [], fresh, None)


def adapt(
    recipe: Annotated[str, typer.Argument(help="Recipe name, recipe file, Hub id, or checkpoint folder.")],
    overrides: Overrides = None,
    fresh: Fresh = False,
) -> None:
    """Turn the AR model into a diffusion model (prepares it first)."""
    _run_recipe(recipe, overrides or [], fresh, ["adapt"])


def _run_recipe(what: str, overrides: list[str], fresh: bool, targets: list[str] | None) -> None:
    from dlmconvert.cli.console import ConsoleReporter, console
    from dlmconvert.recipe.load import load_recipe
    from dlmconvert.runs.folder import new_or_latest
    from dlmconvert.runs.runner import run_stages

    loaded = load_recipe(what, overrides)
    folder = new_or_latest(loaded, fresh)
    reporter = ConsoleReporter()
    console.print(f"run folder {folder.path}")
    worked = run_stages(folder, loaded, targets or [*loaded.stages, "report"], reporter, overrides)
    _show_result(folder, worked)


def sft(
    words: Annotated[list[str] | None, typer.Argument(metavar="[RUN] [KEY=VALUE ...]", help="Run folder or name (default: the latest), then keys.")] = None,
) -> None:
    """Fine-tune the adapted model on conversations: only the answers are masked and scored."""
    from dlmconvert.cli.console import ConsoleReporter, console
    from dlmconvert.runs.folder import find_run
    from dlmconvert.runs.runner import run_stages, with_overrides

    name, overrides = split_words(words or [])
    folder, which = find_run(name)
    console.print(f"run folder {folder.path}" + ("" if name else f" ({which.split(',')[0]})"))
    recipe = with_overrides(folder, overrides)
    reporter = ConsoleReporter()
    worked = run_stages(folder, recipe, ["sft"], reporter, overrides)
    _show_result(folder, worked)


def export(
    words: Annotated[list[str] | None, typer.Argument(metavar="[RUN] [KEY=VALUE ...]", help="Run folder or name (default: the latest), then keys.")] = None,
    hf: Annotated[bool, typer.Option("--hf", help="A Hugging Face folder (the default).")] = True,
    to: Annotated[str | None, typer.Option("--to", metavar="DIR", help="Where to (default: export/<profile> in the run folder).")] = None,
    profile: Annotated[str | None, typer.Option("--profile", metavar="P", help="File format (docs/formats.md).")] = None,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", metavar="STEP", help="A kept checkpoint (step-001000) in place of the finished model.")] = None,
) -> None:
    """Write the folder that users download: loads with plain transformers, verified in a fresh process."""
    from dlmconvert.cli.console import ConsoleReporter, console, out
    from dlmconvert.runs.exports import export_run
    from dlmconvert.runs.folder import find_run
    from dlmconvert.runs.runner import with_overrides

    name, overrides = split_words(words or [])
    if profile:
        overrides.append(f"export.profile={profile}")
    folder, which = find_run(name)
    console.print(f"run folder {folder.path}" + ("" if name else f" ({which.split(',')[0]})"))
    target = export_run(folder, with_overrides(folder, overrides), ConsoleReporter(), to=to, checkpoint=checkpoint)
    out(str(target))


def split_words(words: list[str]) -> tuple[str | None, list[str]]:
    """[RUN] [KEY=VALUE ...]: the run's name, if any, and the overrides. Raises UserError for two names."""
    from dlmconvert.errors import UserError

    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise UserError(f"one run at a time: {' and '.join(map(repr, names))}", "", "recipe keys are written KEY=VALUE")
    return (names[0] if names else None), [word for word in words if "=" in word]


def _show_result(folder, worked: bool) -> None:
    from dlmconvert.cli.console import out
    from dlmconvert.runs.report import result_text

    if not worked:
        out("everything is done already")
    out(result_text(folder))


def status(
    run: Annotated[str | None, typer.Argument(help="Run folder or name (default: every run in ./runs).")] = None,
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Where a run stands: stages, last metrics, checkpoints, whether a process holds it."""
    from pathlib import Path

    from dlmconvert.cli.console import out
    from dlmconvert.runs.folder import RUNS, find_run, runs_in
    from dlmconvert.runs.report import status_of, status_text

    folders = [find_run(run)[0]] if run else runs_in(Path(RUNS))
    if not folders:
        find_run(None)  # says that there is none, and what to do
    states = [status_of(folder) for folder in folders]
    if json:
        out(json_module.dumps(states if run is None else states[0], indent=1))
        return
    for state in states:
        out(status_text(state))


def report(
    run: Annotated[str | None, typer.Argument(help="Run folder or name (default: the latest).")] = None,
) -> None:
    """One HTML page with the curves and the numbers."""
    from dlmconvert.cli.console import console, out
    from dlmconvert.runs.folder import find_run
    from dlmconvert.runs.report import write_report

    folder, which = find_run(run)
    if run is None:
        console.print(which)
    out(str(write_report(folder)))
