"""`dlmconvert bench`: the decoding speed and the quality of every sampler beside the AR source."""

from __future__ import annotations

import json as json_module
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dlmconvert.cli.generate import Compile, Device, Model
from dlmconvert.cli.prompts import refuse_existing, refuse_same
from dlmconvert.errors import UserError

PromptsFile = Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts, one a line or .jsonl (default: beginnings of the run's held-out rows).")]
Answers = Annotated[Path | None, typer.Option("--answers", metavar="FILE", help="The answer to each prompt, one a line or .jsonl: the quality is then the share of texts that hold it.")]
Source = Annotated[str | None, typer.Option("--source", metavar="MODEL", help="AR model that it was converted from (default: the run's source).")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens after each prompt.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Prompts at once.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed passes; the table shows their median.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="Of all samplers that name none, and of the AR source.")]


def bench(
    model: Model = None,
    source: Source = None,
    samplers: Annotated[str | None, typer.Option("--samplers", metavar="LIST|FILE", help="threshold=0.9+block_length=32,order=entropy+steps=16,helper=source+draft_length=16, or a file with one a line (default: a list of all kinds).")] = None,
    prompts: PromptsFile = None,
    answers: Answers = None,
    new_tokens: NewTokens = 64,
    batch: Batch = 1,
    repeats: Repeats = 3,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="Write everything as JSON to a new file, and the plot beside it as PNG.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    device: Device = "auto",
    compile: Compile = False,
) -> None:
    """Time every sampler of a list beside the AR source with its KV cache: same prompts, same lengths, one run."""
    from dlmconvert.cli.console import ConsoleReporter, console, out
    from dlmconvert.cli.decoding import STOPPED
    from dlmconvert.cli.decoding_task import load_helpers, load_models, make_task, quiet_profiler, read_samplers, show_table
    from dlmconvert.runs.folder import find_model

    quiet_profiler()
    plot = None if to is None else to.with_suffix(".png")
    refuse_existing(to, "--to")
    refuse_existing(plot, "--to")
    refuse_same(to, "--to", plot, "the plot beside it")
    location = find_model(model)
    console.print(f"model {location.note}", markup=False, highlight=False, soft_wrap=True)
    denoiser, ar = load_models(location, source, device, compile)

    from dlmconvert.evaluation.benchmark import SOURCE_AS_HELPER, Sampler, Stopped, benchmark, check_sampler, default_samplers

    reporter = ConsoleReporter()
    if ar is None:
        reporter.warn("no AR source is known: no AR decoding and no likelihood beside the samplers; name it with --source MODEL")
    task = make_task(location, denoiser, prompts, answers, new_tokens, batch, seed, compile)
    chosen = None if samplers is None else read_samplers(samplers, temperature)
    named = chosen if chosen is not None else [Sampler("", {"helper": SOURCE_AS_HELPER})] if ar is not None else []
    task = replace(task, helpers=load_helpers(named, location, source, denoiser.device, compile))

    def works(settings: dict[str, Any]) -> bool:
        try:
            check_sampler(denoiser, task, settings)
        except ValueError:
            return False
        return True

    if chosen is None:
        chosen = [*saved_sampler(location.path, new_tokens), *default_samplers(new_tokens, temperature, works)]
    else:
        for sampler in chosen:
            try:
                check_sampler(denoiser, task, sampler.settings)
            except ValueError as error:
                raise UserError(f"--samplers {sampler.name}: {error}") from error
    num_samplers, stopped = len(chosen) + (ar is not None), False
    try:
        with reporter.progress("passes", num_samplers * (1 + repeats)) as bar:
            results = benchmark(denoiser, ar, chosen, task, repeats=repeats, advance=lambda name: bar.advance(1, name))
    except Stopped as stop:
        results, stopped = stop.results, True
        reporter.warn(f"stopped: {len(results)} of {num_samplers} samplers were measured" + ("" if results else ", and nothing was written"))
        if not results:
            raise typer.Exit(STOPPED) from stop
    facts = facts_of(location, denoiser, task, source, repeats, temperature) | {"compiled": compile} | {"stopped": stopped, "samplers": [result.to_dict() for result in results]}
    if to is not None:
        write_results(to, plot, facts, results)
    if json:
        out(json_module.dumps(facts, indent=1, default=str))
    else:
        show_table(results)
        out("* nothing else is both faster and better. NFE: forwards. First token: the first of any text of a batch, from the left. Memory: the peak beside the weights")
        for path in (to, plot):
            if path is not None:
                out(f"  {path}")
    if stopped:
        raise typer.Exit(STOPPED)


def saved_sampler(folder: Path, new_tokens: int) -> list[Any]:
    """The setting that the folder's generation_config.json names for so many tokens, when it names one."""
    from dlmconvert.evaluation.benchmark import Sampler
    from dlmconvert.runs.samplers import saved_settings
    from dlmconvert.sampling.options import OPTIONS, with_defaults

    saved = with_defaults({"max_new_tokens": new_tokens}, saved_settings(folder))
    settings = {name: value for name, value in saved.items() if name in OPTIONS and not name.endswith("token_id")}
    return [Sampler("generation_config.json", settings)] if set(settings) - {"temperature", "top_p", "top_k"} else []


def facts_of(location: Any, denoiser: Any, task: Any, source: str | None, repeats: int, temperature: float) -> dict[str, Any]:
    """What the numbers were measured on."""
    import platform

    import torch

    device = denoiser.device
    return {
        "model": str(location.path),
        "source": source or (str(location.run.model_folder("prepare")) if location.run is not None else None),
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "dtype": str(denoiser.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.processor() or platform.machine()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "prompts": len(task.prompts),
        "prompt_lengths": [len(prompt) for prompt in task.prompts],
        "new_tokens": task.num_new,
        "batch": task.batch,
        "repeats": repeats,
        "temperature": temperature,
        "seed": task.seed,
        "texts_may_end": task.answers is not None,
    }


def write_results(path: Path, plot: Path, facts: dict[str, Any], results: list[Any]) -> None:
    from dlmconvert.evaluation.benchmark_plot import plot_tradeoff

    title = f"{'/'.join(Path(facts['model']).parts[-3:])}: {facts['prompts']} prompts, {facts['new_tokens']} new tokens, batch {facts['batch']}, {facts['device']}"
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(json_module.dumps(facts, indent=1, default=str) + "\n")
        plot_tradeoff(results, title, plot)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or path}: {error.strerror}", "", "name another file: --to FILE") from error
