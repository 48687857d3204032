"""The fastest sampler settings whose texts are good enough: a coarse grid, a refinement of the best candidate, a final race."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.evaluation.benchmark import Result, Sampler, Stopped, Task, benchmark, loss_of, name_of

_REFINEMENTS = 4
_FINALISTS = 3


@dataclass(frozen=True)
class Floor:
    """How bad texts may be. relative: `value` is a share by which they may be worse than the best setting's (more nats a token, or a
    lower accuracy); else the most nats a token, or the least accuracy."""

    value: float
    is_relative: bool

    def allows(self, result: Result, results: Sequence[Result]) -> bool:
        if result.accuracy is not None:
            best = max(r.accuracy for r in results)
            if best == 0:  # a share of nothing would allow everything
                return False
            return result.accuracy >= (best * (1 - self.value) if self.is_relative else self.value)
        best = min(r.nats_per_token for r in results if r.nats_per_token is not None)
        return result.nats_per_token is not None and result.nats_per_token <= (best * (1 + self.value) if self.is_relative else self.value)


@dataclass(frozen=True)
class Tuned:
    """results: every setting that was tried, in the order of trying; chosen: the fastest that the floor allows, None when none does."""

    results: list[Result]
    chosen: Result | None
    floor: Floor

    @property
    def best(self) -> Result:
        return min(self.results, key=loss_of)


def coarse_grid(num_new: int, works: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Every way to store keys that the model can run, with budgets from slow and careful to fast. Settings without a base."""
    block = min(32, max(1, num_new // 2))
    ways = [{}, {"block_length": block}, {"block_length": block, "cache": "prefix"}, {"block_length": block, "cache": "dual"}]
    steps = sorted({max(1, num_new // part) for part in (1, 2, 4, 8)}, reverse=True)
    budgets = [{"alg": "confidence", "steps": count} for count in steps]
    budgets += [{"threshold": tau} for tau in (0.95, 0.9, 0.8, 0.6)] + [{"entropy_bound": gamma} for gamma in (0.05, 0.2, 0.8)]
    # A block model keeps its keys exactly without being asked, and one with an AR path may draft for it.
    grid = [{**budget, **way} for way in ways for budget in budgets] + [{"draft_length": length} for length in (2, 4, 8, 16)]
    return [settings for settings in grid if works(settings)]


def neighbours(chosen: dict[str, Any], tried: Sequence[dict[str, Any]], num_new: int) -> dict[str, Any] | None:
    """The setting half way between `chosen` and the next faster one of its kind that was tried; None where there is nothing between."""
    name = next((name for name in ("threshold", "entropy_bound", "steps") if chosen.get(name) is not None), None)
    if name is None:
        return None
    same = [other[name] for other in tried if {**other, name: None} == {**chosen, name: None}]
    value = chosen[name]
    if name == "entropy_bound":
        faster = min((other for other in same if other > value), default=2 * value)
        middle = (value + faster) / 2
    else:
        faster = max((other for other in same if other < value), default=1 if name == "steps" else 0.0)
        middle = (value + faster) // 2 if name == "steps" else (value + faster) / 2
    middle = middle if name == "steps" else round(middle, 4)
    return None if middle in same or middle in (0, value) else {**chosen, name: middle}


def tune(
    denoiser: Denoiser,
    source: Any,
    task: Task,
    floor: Floor,
    *,
    base: dict[str, Any],
    works: Callable[[dict[str, Any]], bool],
    repeats: int = 3,
    advance: Callable[[str], None] = lambda name: None,
    begin: Callable[[str, int], None] = lambda what, passes: None,
) -> Tuned:
    """Try, refine, race. base: settings that all share (temperature, top_p, ...). source: judges; None when the task has answers.

    Raises Stopped, with all that was tried so far, when it is interrupted.
    begin: called with the name of a phase and its number of passes; advance: with the sampler's name after each of them.
    """

    def run(settings: Sequence[dict[str, Any]], repeats: int) -> list[Result]:
        samplers = [Sampler(name_of(choice), {**base, **choice}) for choice in settings]
        try:
            return benchmark(denoiser, source, samplers, task, repeats=repeats, decode_source=False, measure_memory=False, advance=advance)
        except Stopped as stop:
            again = {result.name for result in stop.results}
            raise Stopped([*(result for result in results if result.name not in again), *stop.results]) from stop

    results: list[Result] = []
    grid = coarse_grid(task.num_new, works)
    begin("coarse grid", 2 * len(grid))
    results = run(grid, 1)
    tried = list(grid)
    begin("refining", 2 * _REFINEMENTS)
    for _ in range(_REFINEMENTS):
        allowed = [(result, choice) for result, choice in zip(results, tried, strict=True) if floor.allows(result, results)]
        if not allowed:
            break
        middle = neighbours(max(allowed, key=lambda pair: pair[0].speed)[1], tried, task.num_new)
        if middle is None or not works(middle):
            break
        results += run([middle], 1)
        tried.append(middle)
    allowed = [(result, choice) for result, choice in zip(results, tried, strict=True) if floor.allows(result, results)]
    finalists = sorted(allowed, key=lambda pair: -pair[0].speed)[:_FINALISTS]
    if not finalists:
        return Tuned(results, None, floor)
    begin("final race", (1 + repeats) * len(finalists))
    raced = run([choice for _, choice in finalists], repeats)
    for (before, _), after in zip(finalists, raced, strict=True):
        results[results.index(before)] = after
    return Tuned(results, max(raced, key=lambda result: result.speed), floor)
