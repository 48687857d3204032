"""Stages in order, each resumable; drift is refused before anything starts."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from typing import Any

from dlmconvert.errors import Interrupted, SavedAndLeft, UserError
from dlmconvert.recipe.load import section_at, set_key, validate
from dlmconvert.recipe.schema import Recipe
from dlmconvert.runs.engines import check_engine
from dlmconvert.runs.folder import RunFolder, write_atomically
from dlmconvert.runs.inputs import check_inputs
from dlmconvert.runs.stage import Reporter, Stage, StageContext, StopFlag
from dlmconvert.runs.stages import STAGES
from dlmconvert.training.ranks import Solo


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
    """The asked-for recipe, with what the run knows of the stages that are not part of this command.

    `dlmconvert adapt RECIPE` after `dlmconvert sft sft.data=...` must not forget where the conversations were: sections of a stage
    that has started are those it was started with, sections of one that has not keep the `key=value` words of earlier commands.
    """
    if not (run.path / "recipe.yaml").is_file():
        return recipe
    values, before = recipe.model_dump(mode="json"), run.recipe().model_dump(mode="json")
    ours = [section for stage in stages for section in stage.reads]
    remembered = run.state().get("overrides", {})
    for stage in STAGES.values():
        if stage in stages:
            continue
        for section in stage.reads:
            if any(_overlap(section, name) for name in ours):
                continue
            words = {key: word for key, word in remembered.items() if _overlap(section, key)}
            if run.stage_state(stage.name).get("keys") is not None:
                words = {}
                parent, name = _parent(values, section), section.rpartition(".")[2]
                parent[name] = _parent(before, section)[name]
            for word in [*words.values(), *(word for word in overrides if _overlap(section, _key(word)))]:
                set_key(values, word)
    return validate(values, str(run.path / "recipe.yaml"))


def _key(word: str) -> str:
    return word.partition("=")[0]


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")


def _parent(values: dict[str, Any], key: str) -> dict[str, Any]:
    for name in key.split(".")[:-1]:
        values = values[name]
    return values


def with_overrides(run: RunFolder, overrides: list[str]) -> Recipe:
    """The run's recipe with the `key=value` words of a later stage's command."""
    values = run.recipe().model_dump(mode="json")
    for word in overrides:
        set_key(values, word)
    return validate(values, f"{run.path / 'recipe.yaml'} with {' '.join(overrides)}" if overrides else str(run.path / "recipe.yaml"))


def refuse_drift(run: RunFolder, recipe: Recipe, stages: list[Stage]) -> None:
    """Raise UserError with a diff when a key that a started stage has read has another value now."""
    lines: list[str] = []
    engines: list[str] = []
    also = [stage for stage in STAGES.values() if stage not in stages]  # a later stage that has started: its keys may have been set here
    only_export = True
    for stage in [*stages, *also]:
        recorded = run.stage_state(stage.name).get("keys")
        if recorded is None:
            continue
        now = stage.keys(recipe)
        for key in sorted(set(recorded) | set(now)):
            if key.startswith("engine.") and stage.finished(run, recipe):
                continue  # a later stage may run on another engine
            if recorded.get(key) != now.get(key) and not _is_new_default(key, recorded, now):
                lines.append(f"  {key}: {_show(recorded.get(key))} -> {_show(now.get(key))}   (read by {stage.name})")
                engines += [stage.name] if key == "engine.name" and now.get(key) == "single" else []
                only_export = only_export and stage.name == "export"
    if engines and len(lines) == len(engines):  # nobody typed an engine: --processes did, and is missing now
        ranks = run.stage_state(engines[0]).get("process", {}).get("ranks", 1)
        raise UserError(
            f"{run.path} was begun under DeepSpeed ({engines[0]}, last in {ranks} process{'es' if ranks > 1 else ''}), this would train on a single device",
            "",
            f"add --processes {ranks}" + (", or --processes 1 to go on with one" if ranks > 1 else ""),
        )
    if lines:
        raise UserError(
            f"{run.path} was started with other values:",
            "\n".join(dict.fromkeys(lines)),
            "--to DIR writes another export beside it" if only_export else
            "run it as it was started, or start a new folder beside it: dlmconvert adapt RECIPE --fresh (nothing is deleted)",
        )


def _is_new_default(key: str, recorded: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a key came with a later version of this program and stands at its default: no reason to refuse an older run."""
    if key not in now or any(_overlap(key, name) for name in recorded):
        return False
    *path, last = key.split(".")
    section = section_at(path)
    return section is not None and now[key] == section.model_fields[last].get_default(call_default_factory=True)


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def run_stages(run: RunFolder, recipe: Recipe, targets: list[str], reporter: Reporter, overrides: list[str] | None = None, ranks: Any = None) -> bool:
    """Go through the stages. Returns False when everything was finished already.

    ranks: the processes that train together, of which this is rank 0; the others are in `launch.follow`.

    Raises SavedAndLeft after SIGTERM or Ctrl-C, UserError for what the user can put right.
    """
    stages = order_of(targets, recipe)
    recipe = combine(run, recipe, stages, overrides or [])
    refuse_drift(run, recipe, stages)
    if all(stage.finished(run, recipe) for stage in stages):
        return False
    ranks = ranks or Solo()
    unfinished = [stage.name for stage in stages if not stage.finished(run, recipe)]
    check_inputs(recipe, unfinished)
    check_engine(recipe, unfinished, ranks.count, reporter)
    run.hold()
    try:
        run.write_recipe(recipe)
        state = run.state()
        state.setdefault("created", time.time())
        state["overrides"] = state.get("overrides", {}) | {_key(word): word for word in overrides or []}
        run.write_state(state)
        write_atomically(run.path / "environment.json", environment_text())
        stop = StopFlag()
        with signals_set(stop):
            context = StageContext(run, recipe, reporter, stop, ranks)
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
    run.update_stage(stage.name, status="started", keys=before.get("keys") or stage.keys(context.recipe), started=before.get("started", time.time()))
    began = time.monotonic()
    try:
        facts = stage.work(context)
    except Exception as error:
        # A stage that failed before it had anything to lose may be started again with other values.
        lost = {} if isinstance(error, SavedAndLeft) or list(run.stage_folder(stage.name).glob("checkpoints/step-*")) else {"status": "failed", "keys": None}
        with suppress(UserError):  # a full disk: the first error says it
            run.update_stage(stage.name, seconds=before.get("seconds", 0.0) + time.monotonic() - began, **lost)
        raise
    except BaseException:
        run.update_stage(stage.name, seconds=before.get("seconds", 0.0) + time.monotonic() - began)
        raise
    run.update_stage(stage.name, seconds=before.get("seconds", 0.0) + time.monotonic() - began)
    run.update_stage(stage.name, status="done", finished=time.time(), facts=facts)


@contextmanager
def signals_set(stop: StopFlag):
    """SIGTERM, SIGUSR1 (what schedulers send before they take a machine away) and Ctrl-C ask the training loop to save and leave; a second one, or one outside the loop, leaves at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        again = stop.requested is not None
        stop.requested = signal.Signals(number).name
        if again or not stop.deferred:
            raise Interrupted(stop.requested)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
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
