"""Stages in order, each resumable; drift is refused before anything starts."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

from dlmconvert.errors import Interrupted, UserError
from dlmconvert.recipe.load import flat, set_key, validate
from dlmconvert.recipe.schema import Recipe
from dlmconvert.runs.folder import RunFolder, write_atomically
from dlmconvert.runs.stage import Reporter, Stage, StageContext, StopFlag
from dlmconvert.runs.stages import STAGES


def order_of(targets: Iterable[str], recipe: Recipe) -> list[Stage]:
    """The stages that `targets` need, and they themselves, each once and in order."""
    ordered: list[Stage] = []

    def visit(name: str) -> None:
        stage = STAGES[name]
        for needed in stage.needs(recipe):
            visit(needed)
        if stage not in ordered:
            ordered.append(stage)

    for target in targets:
        visit(target)
    return ordered


def combine(run: RunFolder, recipe: Recipe, stages: list[Stage], overrides: list[str]) -> Recipe:
    """The asked-for recipe, with the run's own values for stages that have started and are not part of this command.

    `dlmconvert adapt RECIPE` after `dlmconvert sft sft.data=...` must not forget where the conversations were.
    """
    if not (run.path / "recipe.yaml").is_file():
        return recipe
    named = {stage.name for stage in stages}
    others = [s for s in STAGES.values() if s.name not in named and run.stage_state(s.name)]
    if not others:
        return recipe
    asked = recipe.model_dump(mode="json")
    mine = {key for stage in stages for key in stage.keys(recipe)} | {word.partition("=")[0] for word in overrides}
    before = flat(run.recipe().model_dump(mode="json"))
    for stage in others:
        for key in stage.keys(recipe):
            if key not in mine and key in before:
                section = asked
                *path, last = key.split(".")
                for name in path:
                    section[name] = section[name] if isinstance(section.get(name), dict) else {}
                    section = section[name]
                section[last] = before[key]
    return validate(asked, str(run.path / "recipe.yaml"))


def with_overrides(run: RunFolder, overrides: list[str]) -> Recipe:
    """The run's recipe with the `key=value` words of a later stage's command."""
    values = run.recipe().model_dump(mode="json")
    for word in overrides:
        set_key(values, word)
    return validate(values, f"{run.path / 'recipe.yaml'} with {' '.join(overrides)}" if overrides else str(run.path / "recipe.yaml"))


def refuse_drift(run: RunFolder, recipe: Recipe, stages: list[Stage]) -> None:
    """Raise UserError with a diff when a key that a started stage has read has another value now."""
    lines = []
    for stage in stages:
        recorded = run.stage_state(stage.name).get("keys")
        if recorded is None:
            continue
        now = stage.keys(recipe)
        for key in sorted(set(recorded) | set(now)):
            if recorded.get(key) != now.get(key):
                lines.append(f"  {key}: {_show(recorded.get(key))} -> {_show(now.get(key))}   (read by {stage.name})")
    if lines:
        raise UserError(
            f"{run.path} was started with other values:",
            "\n".join(dict.fromkeys(lines)),
            "run it as it was started, or add --fresh to start a new folder beside it (nothing is deleted)",
        )


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def run_stages(run: RunFolder, recipe: Recipe, targets: list[str], reporter: Reporter, overrides: list[str] | None = None) -> bool:
    """Go through the stages. Returns False when everything was finished already.

    Raises SavedAndLeft after SIGTERM or Ctrl-C, UserError for what the user can put right.
    """
    stages = order_of(targets, recipe)
    recipe = combine(run, recipe, stages, overrides or [])
    refuse_drift(run, recipe, stages)
    if all(stage.finished(run, recipe) for stage in stages):
        return False
    run.hold()
    try:
        run.write_recipe(recipe)
        state = run.state()
        state.setdefault("created", time.time())
        run.write_state(state)
        write_atomically(run.path / "environment.json", environment_text())
        stop = StopFlag()
        with signals_set(stop):
            context = StageContext(run, recipe, reporter, stop)
            for number, stage in enumerate(stages, 1):
                if stage.finished(run, recipe):
                    reporter.say(f"[{number}/{len(stages)}] {stage.title}: done before")
                    continue
                reporter.say(f"[{number}/{len(stages)}] {stage.title}")
                _run_stage(stage, context)
    finally:
        run.release()
    return True


def _run_stage(stage: Stage, context: StageContext) -> None:
    run = context.run
    before = run.stage_state(stage.name)
    run.update_stage(stage.name, status="started", keys=stage.keys(context.recipe), started=before.get("started", time.time()))
    began = time.monotonic()
    try:
        facts = stage.work(context)
    finally:
        spent = before.get("seconds", 0.0) + time.monotonic() - began
        run.update_stage(stage.name, seconds=spent)
    run.update_stage(stage.name, status="done", finished=time.time(), facts=facts)


@contextmanager
def signals_set(stop: StopFlag):
    """SIGTERM and Ctrl-C ask the training loop to save and leave; a second one, or one outside the loop, leaves at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        again = stop.requested is not None
        stop.requested = signal.Signals(number).name
        if again or not stop.deferred:
            raise Interrupted(stop.requested)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment_text() -> str:
    """Versions and machine, for whoever has to explain a number later. Reads package metadata only."""
    import json
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in ("dlmconvert", "torch", "transformers", "peft", "tokenizers", "datasets", "safetensors", "deepspeed"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    values = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count(), "packages": packages}
    return json.dumps(values, indent=1) + "\n"
