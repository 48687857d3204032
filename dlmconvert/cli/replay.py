"""dlmconvert replay: one training step again, under a lens."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

SHOWN_ROWS = 8


def replay(
    run: Annotated[str, typer.Argument(help="Run folder or name.")],
    step: Annotated[int, typer.Argument(min=1, help="The step, as metrics.jsonl and messages number it (from 1).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Where it runs: engine.device, engine.offload_optimizer, engine.offload_parameters, engine.nvme, engine.threads.")] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="pretrain, adapt or sft (default: the one that was trained last).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Everything that was found, for scripts.")] = False,
    processes: Annotated[int | None, typer.Option("--processes", min=1, metavar="N", help="As many as the run had: for a model that does not fit into one (default: one).")] = None,
) -> None:
    """Run one training step alone, from the checkpoint before it: losses of its rows, gradients of its layers, where it breaks."""
    from dlmconvert.cli.launching import Launching, together
    from dlmconvert.runs.folder import find_run
    from dlmconvert.runs.replay import check_place_words
    from dlmconvert.runs.runner import with_overrides

    check_place_words(overrides or [])

    def find(words: list[str]) -> tuple[Any, Any]:
        folder, _ = find_run(run)
        return folder, with_overrides(folder, words)

    def work(place: Any, words: list[str], ranks: Any) -> None:
        from dlmconvert.cli.console import ConsoleReporter, console, out
        from dlmconvert.runs.follow import SilentReporter
        from dlmconvert.runs.replay import replay_step

        folder, recipe = find(words)
        if recipe.engine.compile:  # what looks into the modules would be compiled away
            recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"compile": False})})
        if place.rank == 0:
            console.print(f"run folder {folder.path} (nothing in it is changed)")
        found = replay_step(folder, recipe, step, stage, SilentReporter() if place.rank else ConsoleReporter(), ranks)
        if place.rank == 0:
            out(json_module.dumps(_plain(found.to_dict()), indent=1) if json else "\n".join(lines_of(found)))

    together([], Launching(processes=processes), overrides or [], find, work)


def lines_of(replayed: Any) -> list[str]:
    """The report as text: the verdict first."""
    import math

    from dlmconvert.training.nonfinite import row_text

    found = replayed.found
    lines = [f"{replayed.stage} step {replayed.step}: loss {found.loss:.6g}, gradient norm {found.gradient_norm:.6g}, learning rate {found.learning_rate:.3g}"]
    if found.nonfinite_weights:
        lines.append(f"  weights that are not finite before the step: {_some(found.nonfinite_weights)}")
    if found.first_nonfinite:
        lines.append(f"  first output that is not finite: {found.first_nonfinite}")
    elif not math.isfinite(found.loss):
        lines.append("  every module's output is finite: the loss itself is not (a noise level t near 0 makes its weight 1/t too large)")
    if found.nonfinite_gradients:
        lines.append(f"  gradients that are not finite: {_some(found.nonfinite_gradients)}")
    if math.isfinite(found.loss) and math.isfinite(found.gradient_norm):
        lines.append("  everything is finite")
    broken = [row for row in found.rows if not math.isfinite(row.loss)]
    shown = broken or sorted(found.rows, key=lambda row: -row.loss)
    title = f"rows whose loss is not finite, {len(broken)} of {len(found.rows)}" if broken else f"rows of the largest loss, of {len(found.rows)}"
    lines += ["", f"  {title}:", f"  {'loss':>10} {'masked CE':>10} {'t':>8} {'masked':>7}  row"]
    lines += [f"  {row.loss:>10.4g} {row.cross_entropy:>10.4g} {row.t:>8.4f} {row.masked:>7}  {row_text(row.row_id)}" for row in shown[:SHOWN_ROWS]]
    lines += ["", "  gradient norm of each layer, before clipping:"]
    lines += [f"  {norm:>10.4g}  {layer}" for layer, norm in found.gradient_norms.items()]
    return lines


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _plain(value: Any) -> Any:
    """Strict JSON has no NaN: numbers that are not finite become words."""
    import math

    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
