"""`dlmconvert tune-sampler`: the fastest sampler settings at a quality that the user names, written into the model's folder."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from dlmconvert.cli.bench import Answers, Batch, NewTokens, PromptsFile, Repeats, Source
from dlmconvert.cli.generate import Compile, Device, Model
from dlmconvert.errors import EXIT_FAILED, UserError

# What a sampler that was tuned replaces in generation_config.json.
_REPLACED = (
    "alg", "alg_temp", "budget", "threshold", "factor", "entropy_bound", "eps", "steps", "block_length", "cache", "draft_length",
    "revision", "revision_strength", "initial_length",
)  # fmt: skip
_SHARED = ("temperature", "top_p", "top_k", "repetition_penalty", "cfg_scale")


def tune_sampler(
    model: Model = None,
    prompts: PromptsFile = None,
    floor: Annotated[str, typer.Option("--floor", help="5%: at most that much worse than the best setting; 2.1: at most 2.1 nats a token (with --answers: an accuracy of at least ...).")] = "5%",
    answers: Answers = None,
    source: Source = None,
    new_tokens: NewTokens = 64,
    batch: Batch = 1,
    repeats: Repeats = 3,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.0, help="Default: that of generation_config.json, else 0.")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    device: Device = "auto",
    compile: Compile = False,
) -> None:
    """Find the fastest sampler above a quality floor and write it into the model's generation_config.json (the old one is kept as .bak)."""
    limit = parse_floor(floor, answers is not None)

    from dlmconvert.cli.console import ConsoleReporter, console, out
    from dlmconvert.cli.decoding import STOPPED
    from dlmconvert.cli.decoding_task import load_models, make_task, quiet_profiler, show_table
    from dlmconvert.runs.folder import find_model
    from dlmconvert.runs.samplers import saved_settings

    quiet_profiler()
    location = find_model(model)
    console.print(f"model {location.note}", markup=False, highlight=False, soft_wrap=True)
    denoiser, ar = load_models(location, source, device, compile)
    if ar is None and answers is None:
        raise UserError("nothing can judge the texts", f"{location.path} is in no run folder, so its AR source is not known", "name it with --source MODEL, or give --answers FILE")

    from dlmconvert.evaluation.benchmark import Stopped, check_sampler, mark_front
    from dlmconvert.evaluation.tuning import Floor, tune

    task = make_task(location, denoiser, prompts, answers, new_tokens, batch, seed, compile)
    saved = saved_settings(location.path)
    base = {name: saved[name] for name in _SHARED if name in saved}
    base["temperature"] = temperature if temperature is not None else saved.get("temperature", 0.0)

    def works(settings: dict[str, Any]) -> bool:
        try:
            check_sampler(denoiser, task, {**base, **settings})
        except ValueError:
            return False
        return True

    reporter = ConsoleReporter()
    try:
        with _Bars(reporter) as bars:
            tuned = tune(denoiser, ar, task, Floor(*limit), base=base, works=works, repeats=repeats, begin=bars.begin, advance=bars.advance)
    except Stopped as stop:
        mark_front(stop.results)
        if json:
            out(json_module.dumps({"chosen": None, "stopped": True, "floor": floor, "samplers": [result.to_dict() for result in stop.results]}, indent=1, default=str))
        elif stop.results:
            show_table(sorted(stop.results, key=lambda result: -result.speed))
        reporter.warn(f"stopped: {len(stop.results)} settings were tried, and nothing was written to {location.path.name}/generation_config.json")
        raise typer.Exit(STOPPED) from stop
    mark_front(tuned.results)
    order = sorted(tuned.results, key=lambda result: -result.speed)
    if not json:
        show_table(order)
    if tuned.chosen is None:
        best = tuned.best
        found = f"accuracy {best.accuracy:.3f}" if best.accuracy is not None else f"{best.nats_per_token:.3f} nats a token"
        raise UserError(f"no setting reaches the floor {floor}", f"the best, {best.name}, has {found}", "name a lower floor", exit_code=EXIT_FAILED)
    path, kept = write_settings(location.path, tuned.chosen.settings, task.num_new)
    chosen = tuned.chosen.to_dict()
    if json:
        facts = {"chosen": chosen, "floor": floor, "written": str(path), "kept": None if kept is None else str(kept)}
        out(json_module.dumps(facts | {"samplers": [result.to_dict() for result in order]}, indent=1, default=str))
        return
    out(f"\nfastest within the floor {floor}: {tuned.chosen.name}, {tuned.chosen.speed:,.0f} tokens/s")
    out(f"  written to {path}" + ("" if kept is None else f" (before: {kept.name})"))
    exports = location.run.path / "export" if location.run is not None else None
    if exports is not None and exports.is_dir() and exports.resolve() not in path.resolve().parents:
        reporter.warn(f"what was exported before keeps its sampler; dlmconvert export {location.run.path} --to DIR takes this one")


def parse_floor(text: str, is_accuracy: bool) -> tuple[float, bool]:
    """`5%` -> (0.05, True); `2.1` -> (2.1, False). Raises UserError."""
    number, is_relative = (text.strip()[:-1], True) if text.strip().endswith("%") else (text.strip(), False)
    try:
        value = float(number) / (100 if is_relative else 1)
    except ValueError as error:
        raise UserError(f"--floor {text} is no floor", "", "write 5% (worse than the best setting at most) or a number") from error
    if not value >= 0 or ((is_relative or is_accuracy) and value > 1):
        raise UserError(f"--floor {text} is out of range", "a share lies between 0 and 1" if is_accuracy else "", "write 5% or a number of nats a token")
    return value, is_relative


def write_settings(folder: Path, settings: dict[str, Any], num_new: int) -> tuple[Path, Path | None]:
    """(generation_config.json with these sampler settings, what it was before as .bak or None). Other keys stay as they are."""
    from dlmconvert.runs.folder import write_atomically

    path, kept, values = folder / "generation_config.json", None, {}
    if path.is_file():
        before = path.read_text(encoding="utf-8")
        values = json_module.loads(before)
        number = 1
        while (kept := path.with_name(f"{path.name}.bak{'' if number == 1 else number}")).exists():
            number += 1
        write_atomically(kept, before)
    values = {name: value for name, value in values.items() if name not in _REPLACED}
    values |= {name: value for name, value in settings.items() if value is not None}
    if "steps" in settings or "max_new_tokens" not in values:
        values["max_new_tokens"] = num_new  # steps were chosen for this length
    values["do_sample"] = bool(settings.get("temperature"))
    if not values["do_sample"]:  # transformers warns about these keys without sampling
        values = {name: value for name, value in values.items() if name not in ("temperature", "top_p", "top_k")}
    write_atomically(path, json_module.dumps(values, indent=2, sort_keys=True) + "\n")
    return path, kept


class _Bars:
    """One progress bar a phase."""

    def __init__(self, reporter: Any):
        self.reporter, self.context, self.bar = reporter, None, None

    def __enter__(self) -> _Bars:
        return self

    def begin(self, what: str, passes: int) -> None:
        self.__exit__()
        self.context = self.reporter.progress(what, passes)
        self.bar = self.context.__enter__()

    def advance(self, name: str) -> None:
        self.bar.advance(1, name)

    def __exit__(self, *error: Any) -> None:
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.context = None
