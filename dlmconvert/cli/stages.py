"""Verbs that run stages, and the page that shows what came out."""

from __future__ import annotations

from typing import Annotated

import typer

from dlmconvert.cli.launching import ALONE, Launching, in_ranks, launched, write_slurm_job

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Recipe keys, as in train.steps=200.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start a new run folder beside the old one; nothing is deleted.")]


@launched
def run(
    recipe: Annotated[str, typer.Argument(help="Recipe name, recipe file, Hub id, or checkpoint folder.")],
    overrides: Overrides = None,
    fresh: Fresh = False,
    launching: Launching = ALONE,
) -> None:
    """Every stage of a recipe, each resumable."""
    _run_recipe("run", recipe, overrides or [], fresh, None, launching)


@launched
def adapt(
    recipe: Annotated[str, typer.Argument(help="Recipe name, recipe file, Hub id, or checkpoint folder.")],
    overrides: Overrides = None,
    fresh: Fresh = False,
    launching: Launching = ALONE,
) -> None:
    """Turn the AR model into a diffusion model (prepares it first)."""
    _run_recipe("adapt", recipe, overrides or [], fresh, ["adapt"], launching)


def _run_recipe(verb: str, what: str, overrides: list[str], fresh: bool, targets: list[str] | None, launching: Launching) -> None:
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

    if launching.slurm and not launching.dry_run:
        folder, recipe = find(overrides)
        words = [*(word for word in overrides if not word.startswith("run.folder=")), f"run.folder={folder.path}"]
        return _write_job([verb, what, *words], launching, find, overrides, targets or [*recipe.stages])
    in_ranks([verb, what, *overrides, *(["--fresh"] if fresh else [])], launching, overrides, find, begin)


def _write_job(command: list[str], launching: Launching, find, overrides: list[str], targets: list[str]) -> None:
    from dlmconvert.runs.engines import engine_words

    processes = [] if launching.processes is None else ["--processes", str(launching.processes)]
    folder, recipe = find(engine_words(*find(overrides), overrides, launching.processes or 1, launching.processes))
    write_slurm_job([*command, *processes], launching, folder, recipe, targets)


@launched
def sft(
    words: Annotated[list[str] | None, typer.Argument(metavar="[RUN] [KEY=VALUE ...]", help="Run folder or name (default: the latest), then keys.")] = None,
    launching: Launching = ALONE,
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

    if launching.slurm and not launching.dry_run:
        return _write_job(["sft", str(find(overrides)[0].path), *overrides], launching, find, overrides, ["sft"])
    in_ranks(["sft", *(words or [])], launching, overrides, find, begin)


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
