"""Verbs that run stages, and those that say where a run stands."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Recipe keys, as in train.steps=200.")]
Processes = Annotated[int | None, typer.Option("--processes", min=1, metavar="N", help="Train in N processes of this machine: one a GPU; on the CPU too. More than one means DeepSpeed.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start a new run folder beside the old one; nothing is deleted.")]


def run(
    recipe: Annotated[str, typer.Argument(help="Recipe name, recipe file, Hub id, or checkpoint folder.")],
    overrides: Overrides = None,
    fresh: Fresh = False,
    processes: Processes = None,
) -> None:
    """Every stage of a recipe, each resumable."""
    _run_recipe(recipe, overrides or [], fresh, None, processes)


def adapt(
    recipe: Annotated[str, typer.Argument(help="Recipe name, recipe file, Hub id, or checkpoint folder.")],
    overrides: Overrides = None,
    fresh: Fresh = False,
    processes: Processes = None,
) -> None:
    """Turn the AR model into a diffusion model (prepares it first)."""
    _run_recipe(recipe, overrides or [], fresh, ["adapt"], processes)


def _run_recipe(what: str, overrides: list[str], fresh: bool, targets: list[str] | None, processes: int | None) -> None:
    from dlmconvert.recipe.load import load_recipe
    from dlmconvert.runs.folder import new_or_latest

    def find(words):
        loaded = load_recipe(what, words)
        return new_or_latest(loaded, fresh), loaded

    def begin(words):
        from dlmconvert.cli.console import console

        folder, loaded = find(words)
        console.print(f"run folder {folder.path}")
        return folder, loaded, targets or [*loaded.stages, "report"]

    _in_ranks(processes, overrides, find, begin)


def _in_ranks(processes: int | None, overrides: list[str], find, begin) -> None:
    """Run stages in this process, or in as many as asked for: started here, or by torchrun, srun, mpirun.

    find(overrides) -> (run folder, recipe). begin(overrides) -> (run folder, recipe, targets), having said which folder it is.
    """
    import os

    from dlmconvert.cli.console import ConsoleReporter
    from dlmconvert.cli.outcome import Told, outcome_of
    from dlmconvert.recipe.load import dump_recipe
    from dlmconvert.runs.engines import engine_words
    from dlmconvert.runs.launch import follow, joined, launch
    from dlmconvert.runs.runner import run_stages
    from dlmconvert.training.ranks import Place, check_place, place_of

    place = place_of(os.environ)
    check_place(place, processes)
    if place is None and (processes or 1) > 1:
        outcome = launch(processes, lambda: outcome_of(lambda: _in_ranks(processes, overrides, find, begin)))
        if outcome.code:
            raise Told(outcome)
        return
    place = place or Place()
    words = engine_words(*find(overrides), overrides, place.count, processes)
    with joined(place, dump_recipe(find(words)[1])) as ranks:
        if ranks.rank > 0:
            return follow(ranks)
        reporter = ConsoleReporter()
        folder, recipe, targets = begin(words)
        if words != overrides:
            reporter.say(f"{place.count} processes: engine.name=deepspeed (the recipe says single)" if place.count > 1 else "engine.name=deepspeed, as this run was begun")
        worked = run_stages(folder, recipe, targets, reporter, words, ranks)
        _show_result(folder, worked)


def sft(
    words: Annotated[list[str] | None, typer.Argument(metavar="[RUN] [KEY=VALUE ...]", help="Run folder or name (default: the latest), then keys.")] = None,
    processes: Processes = None,
) -> None:
    """Fine-tune the adapted model on conversations: only the answers are masked and scored."""
    from dlmconvert.runs.folder import find_run
    from dlmconvert.runs.runner import with_overrides

    name, overrides = split_words(words or [])

    def find(words):
        folder, _ = find_run(name)
        return folder, with_overrides(folder, words)

    def begin(words):
        from dlmconvert.cli.console import console

        folder, which = find_run(name)
        console.print(f"run folder {folder.path}" + ("" if name else f" ({which.split(',')[0]})"))
        return folder, with_overrides(folder, words), ["sft"]

    _in_ranks(processes, overrides, find, begin)


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
