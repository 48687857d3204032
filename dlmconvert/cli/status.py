"""dlmconvert status: where runs stand, from any terminal."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer


def status(
    run: Annotated[str | None, typer.Argument(help="Run folder or name (default: every run in ./runs).")] = None,
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Where a run stands: stages, last metrics, time left, checkpoints, whether its process lives."""
    from pathlib import Path

    from dlmconvert.cli.console import out
    from dlmconvert.runs.folder import RUNS, find_run, runs_in
    from dlmconvert.runs.status import status_of, status_text

    folders = [find_run(run)[0]] if run else runs_in(Path(RUNS))
    if not folders:
        find_run(None)  # says that there is none, and what to do
    states = [status_of(folder) for folder in folders]
    if json:
        out(json_module.dumps(states if run is None else states[0], indent=1))
        return
    for state in states:
        out(status_text(state))
