"""The picture of a decoding benchmark: speed against quality, and the front that nothing beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlmconvert.evaluation.benchmark import Result, loss_of

_MARKERS = ("o", "s", "^")


def kind_of(result: Result) -> str:
    """What a sampler is, roughly: the colour of its point."""
    settings = result.settings
    if settings is None:
        return "AR source, KV cache"
    if settings.get("helper"):
        return "AR helper (APD)"
    if settings.get("draft_length"):
        return "self-speculation"
    if settings.get("revision"):
        return f"revision {settings['revision']}"
    if settings.get("cache") not in (None, "none"):
        return f"{settings['cache']} cache"
    budget = next((name for name in ("threshold", "factor", "entropy_bound") if settings.get(name) is not None), None)
    blocks = ", blocks" if settings.get("block_length") else ""
    return f"{(budget or settings.get('alg') or 'random').replace('_', ' ')}{blocks}"


def plot_tradeoff(results: Sequence[Result], title: str, path: Path) -> None:
    """A PNG. Without a quality that was measured the vertical axis is distinct-2. Raises OSError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    judged = all(loss_of(result) is not None for result in results)
    by_accuracy = judged and results[0].accuracy is not None

    def height(result: Result) -> float:
        if not judged:
            return result.distinct_2 or 0.0
        return result.accuracy if by_accuracy else result.nats_per_token

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    axis = figure.subplots()
    kinds = list(dict.fromkeys(kind_of(result) for result in results))
    for number, kind in enumerate(kinds):
        members = [result for result in results if kind_of(result) == kind]
        star = members[0].settings is None
        low = [result.speed - min(result.speeds) for result in members]
        high = [max(result.speeds) - result.speed for result in members]
        error = [(result.accuracy_standard_error if by_accuracy else result.nats_standard_error) or 0.0 for result in members] if judged else None
        axis.errorbar(
            [result.speed for result in members], [height(result) for result in members], xerr=[low, high], yerr=error,
            fmt="*" if star else _MARKERS[number // 10 % len(_MARKERS)], markersize=14 if star else 6, elinewidth=0.7, alpha=0.85,
            color="black" if star else f"C{number % 10}", label=kind,
        )  # fmt: skip
    front = sorted((result for result in results if result.is_on_front), key=lambda result: result.speed)
    if front:
        axis.plot([r.speed for r in front], [height(r) for r in front], "-", color="gray", linewidth=1, zorder=0, label="nothing is faster and better:")
    for number, result in enumerate(front, start=1):
        axis.annotate(str(number), (result.speed, height(result)), textcoords="offset points", xytext=(6, 6), fontsize=9)
        axis.plot([], [], " ", label=f"{number}  {result.name.replace('+', ' ')}")
    axis.set_xscale("log")
    axis.set_title(title)
    axis.set_xlabel("tokens a second (median, lowest to highest)")
    axis.set_ylabel("accuracy" if by_accuracy else "nats a token under the AR source (low is fluent)" if judged else "distinct-2")
    axis.grid(alpha=0.3, which="both")
    axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # labels of all nine would stand on each other
    for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        ticks(ScalarFormatter())
    axis.tick_params(axis="x", which="minor", labelsize=7)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110, format="png")
