"""Decoding side by side: samplers of a diffusion model, and its AR source with its KV cache, on the same prompts in one run.

Every sampler is run once on the first batch to warm up (and to measure its memory), then `repeats` times on all prompts, by turns with
the others, so that a slow moment of the machine hits them all. Tokens do not change between repeats; the clock does.

Shapes: B rows of a batch, L positions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.errors import Interrupted
from dlmconvert.evaluation.quality import accuracy, distinct, source_nats
from dlmconvert.sampling.canvas import build_canvas, cut_at
from dlmconvert.sampling.denoise import denoise
from dlmconvert.sampling.options import OPTIONS, Options

AR = "AR source, KV cache"
SOURCE_AS_HELPER = "source"  # the AR source beside the model that was made of it (APD)


@dataclass(frozen=True)
class Sampler:
    """settings: names of `Options`; None is the AR source."""

    name: str
    settings: dict[str, Any] | None


@dataclass(frozen=True)
class Task:
    """What every sampler does. prompts: rows of tokens. num_new: tokens after each prompt. batch: rows at once. end_ids: texts may
    end when there are `answers`; else these tokens are banned, so that all make texts of one length. helpers: the AR models that
    samplers name (APD), with a causal `predict`. is_compiled: the models compile when they meet a new kind of batch; before anything is
    measured every batch is decoded once."""

    prompts: Sequence[Sequence[int]]
    num_new: int
    batch: int = 1
    end_ids: Sequence[int] = ()
    answers: Sequence[str] | None = None
    seed: int = 0
    helpers: Mapping[str, Any] = field(default_factory=dict)
    is_compiled: bool = False

    @property
    def batches(self) -> list[range]:
        """The numbers of the prompts of each batch."""
        return [range(first, min(first + self.batch, len(self.prompts))) for first in range(0, len(self.prompts), self.batch)]


@dataclass
class Pass:
    """One pass over the prompts. texts: tokens that were made, up to the end. num_filled: tokens that were made at all, the end
    token included. nfe: forwards, a batch counted once. firsts: of each batch the seconds until the first new token of any of its rows,
    counted from the left, stands: what a reader of the stream sees first."""

    texts: list[list[int]] = field(default_factory=list)
    num_filled: int = 0
    num_row_forwards: int = 0
    nfe: int = 0
    seconds: float = 0.0
    firsts: list[float] = field(default_factory=list)


@dataclass
class Result:
    """seconds, seconds_to_first_token: one a repeat. nfe: forwards a batch, on average. memory_bytes: the most that a forward and its
    sampler needed beside the weights; None where it cannot be measured. nats, distinct_n, accuracy: see quality.py."""

    name: str
    settings: dict[str, Any] | None
    num_tokens: int
    nfe: float
    tokens_per_forward: float
    seconds: list[float]
    seconds_to_first_token: list[float]
    memory_bytes: int | None
    nats_per_token: float | None = None
    nats_standard_error: float | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    distinct_3: float | None = None
    accuracy: float | None = None
    accuracy_standard_error: float | None = None
    is_on_front: bool = False
    texts: list[list[int]] = field(default_factory=list)

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of each repeat."""
        return [self.num_tokens / seconds for seconds in self.seconds]

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)

    def to_dict(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "texts"}
        first = statistics.median(self.seconds_to_first_token)
        return values | {
            "tokens_per_second": self.speed,
            "tokens_per_second_range": [min(self.speeds), max(self.speeds)],
            "median_seconds_to_first_token": first,
        }


def default_samplers(num_new: int, temperature: float, works: Callable[[dict[str, Any]], bool]) -> list[Sampler]:
    """What `bench` compares when nothing is named. works: whether the model can run these settings (caches, blocks)."""
    fractions = sorted({max(1, num_new // part) for part in (1, 2, 4, 8)}, reverse=True)
    some = [fractions[0], fractions[min(2, len(fractions) - 1)]]
    block = min(32, max(1, num_new // 2))
    choices: list[dict[str, Any]] = [{"alg": "confidence", "steps": steps} for steps in fractions]
    choices += [{"alg": alg, "steps": steps} for alg in ("entropy", "margin", "random") for steps in some]
    choices += [{"threshold": tau} for tau in (0.9, 0.8, 0.7)]
    choices += [{"factor": 1.0}, {"entropy_bound": 0.1}, {"entropy_bound": 0.5}]
    choices += [{"alg": "confidence", "steps": num_new, "block_length": block}, {"threshold": 0.9, "block_length": block}]
    for cache in ("prefix", "dual"):
        choices += [{"alg": "confidence", "steps": num_new, "block_length": block, "cache": cache}]
        choices += [{"threshold": tau, "block_length": block, "cache": cache} for tau in (0.9, 0.7)]
    choices += [{"revision": "p2", "steps": some[-1]}, {"revision": "wino", "block_length": block}, {"revision": "wino", "block_length": block, "cache": "dual"}]
    choices += [{"threshold": 0.9, "revision": revision} for revision in ("gidd", "edits")]  # of models that were trained to doubt
    choices += [{"draft_length": length} for length in (4, 8)] + [{"helper": SOURCE_AS_HELPER, "draft_length": 16}]
    # A block model takes its exact cache and its own block length by itself.
    choices += [{"threshold": 0.9, "cache": "block"}, {"threshold": 0.9, "cache": "none"}, {"revision": "wino", "cache": "block"}]
    choices = [choice for number, choice in enumerate(choices) if choice not in choices[:number]]
    if not works({"cache": "block"}):
        choices = [choice for choice in choices if choice.get("cache") not in ("block", "none")]
    return [Sampler(name_of(choice), {"temperature": temperature, **choice}) for choice in choices if works(choice)]


def name_of(settings: dict[str, Any]) -> str:
    """`order=entropy+steps=16`: as `--samplers` reads it."""
    spelled = {"order" if name == "alg" else name: value for name, value in settings.items()}
    return "+".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in spelled.items())


def check_sampler(denoiser: Denoiser, task: Task, settings: dict[str, Any]) -> None:
    """Raises ValueError for settings that the model cannot run behind each of the prompts."""
    # How many blocks a row has depends on the length of its prompt.
    one_of_each_length = {len(prompt): number for number, prompt in enumerate(task.prompts)}
    _open(denoiser, task, list(one_of_each_length.values()), settings)


class Stopped(Exception):
    """Ctrl-C or SIGTERM. results: of the samplers that had come through at least one timed pass."""

    def __init__(self, results: list[Result]):
        super().__init__(f"stopped, {len(results)} samplers measured")
        self.results = results


def benchmark(
    denoiser: Denoiser,
    source: Any,
    samplers: Sequence[Sampler],
    task: Task,
    *,
    repeats: int = 3,
    decode_source: bool = True,
    measure_memory: bool = True,
    advance: Callable[[str], None] = lambda name: None,
) -> list[Result]:
    """Run all samplers, and the AR source beside them when there is one (a causal model of transformers, else None).

    decode_source: False only lets it judge. measure_memory: False saves a little time. advance: called with the sampler's name after each pass, 1 + repeats of them a sampler.
    Raises Stopped, with what was measured so far, when it is interrupted.
    """
    if source is not None and decode_source:
        temperature = next((s.settings.get("temperature", 0.0) for s in samplers), 0.0)
        samplers = [Sampler(AR, None), *samplers]
        source_settings = {"temperature": temperature}
    passes: dict[str, list[Pass]] = {sampler.name: [] for sampler in samplers}
    memory = {}

    def work(sampler: Sampler, batches: Sequence[range]) -> Pass:
        if sampler.settings is None:
            return run_source(source, task, batches, source_settings)
        return run_sampler(denoiser, task, batches, sampler.settings)

    stopped = None
    try:
        for sampler in samplers:
            if task.is_compiled:
                work(sampler, task.batches)
            warm_up = partial(work, sampler, task.batches[:1])
            memory[sampler.name] = peak_memory(warm_up, denoiser.device) if measure_memory else warm_up() and None
            advance(sampler.name)
        for turn in range(repeats):
            shift = turn * len(samplers) // max(repeats, 1)
            for sampler in [*samplers[shift:], *samplers[:shift]]:
                passes[sampler.name].append(work(sampler, task.batches))
                advance(sampler.name)
    except (KeyboardInterrupt, Interrupted) as interruption:
        stopped = interruption
    results = [_result(sampler, passes[sampler.name], memory[sampler.name]) for sampler in samplers if passes[sampler.name]]
    for result in results:
        judge(result, source, denoiser.tokenizer, task)
    mark_front(results)
    if stopped is not None:
        raise Stopped(results) from stopped
    return results


def _result(sampler: Sampler, passes: list[Pass], memory: int | None) -> Result:
    last = passes[-1]
    return Result(
        name=sampler.name,
        settings=sampler.settings,
        num_tokens=last.num_filled,
        nfe=last.nfe / max(1, len(last.firsts)),
        tokens_per_forward=last.num_filled / max(1, last.num_row_forwards),
        seconds=[p.seconds for p in passes],
        seconds_to_first_token=[statistics.mean(p.firsts) for p in passes],
        memory_bytes=memory,
        texts=last.texts,
    )


def judge(result: Result, source: Any, tokenizer: Any, task: Task) -> None:
    """Fill in the quality of a result's texts."""
    if source is not None:
        result.nats_per_token, result.nats_standard_error = source_nats(source, task.prompts, result.texts)
    result.distinct_1, result.distinct_2, result.distinct_3 = (distinct(result.texts, n) for n in (1, 2, 3))
    if task.answers is not None:
        texts = [tokenizer.decode(text, skip_special_tokens=True) for text in result.texts]
        result.accuracy, result.accuracy_standard_error = accuracy(texts, task.answers)


def loss_of(result: Result) -> float | None:
    """What is smaller the better the texts: 1 - accuracy where it was measured, else nats a token."""
    return 1 - result.accuracy if result.accuracy is not None else result.nats_per_token


def mark_front(results: Sequence[Result]) -> None:
    """The Pareto front: no other sampler (the AR source aside) is at least as fast and as good, and better in one of the two."""
    rivals = [result for result in results if result.settings is not None and loss_of(result) is not None]
    for result in rivals:
        result.is_on_front = not any(
            other.speed >= result.speed
            and loss_of(other) <= loss_of(result)
            and (other.speed, -loss_of(other)) != (result.speed, -loss_of(result))
            for other in rivals
        )


# --- one pass


def _open(denoiser: Denoiser, task: Task, batch: Sequence[int], settings: dict[str, Any]):
    """(canvas, steps). A row's draws are keyed by the number of its prompt, so that texts do not depend on the size of the batches."""
    own = {"seed": task.seed, "eos_token_id": list(task.end_ids)}
    if settings.get("helper") is not None:
        if settings["helper"] not in task.helpers:
            raise ValueError(f"there is no AR model {settings['helper']!r} to help")
        own["helper"] = task.helpers[settings["helper"]]
    options = Options(**{name: value for name, value in settings.items() if name in OPTIONS} | own)
    canvas = build_canvas([[*task.prompts[number], *[None] * task.num_new] for number in batch], 0, denoiser.device, list(batch))
    ends = {"end_ids": options.ends} if task.answers is not None else {"banned_ids": options.ends}
    return canvas, denoise(denoiser, canvas, **options.of_the_loop(), **ends)


def run_sampler(denoiser: Denoiser, task: Task, batches: Sequence[range], settings: dict[str, Any]) -> Pass:
    """One pass over the batches with a diffusion sampler."""
    done = Pass()
    for batch in batches:
        prompts = [task.prompts[number] for number in batch]
        canvas, steps = _open(denoiser, task, batch, settings)
        firsts_B = torch.tensor([len(prompt) for prompt in prompts], device=denoiser.device)[:, None]
        _synchronise(denoiser.device)
        began, first, step, num_given_back = time.perf_counter(), None, None, 0
        for step in steps:
            if first is None and not bool(step.masked_BL.gather(1, firsts_B).all()):
                first = time.perf_counter() - began
            num_given_back = num_given_back + step.given_back_BL.sum()
        _synchronise(denoiser.device)
        done.seconds += time.perf_counter() - began
        done.firsts.append(time.perf_counter() - began if first is None else first)
        done.nfe += step.nfe
        done.num_row_forwards += step.nfe * len(prompts)
        done.num_filled += task.num_new * len(prompts) - int(num_given_back)
        for row, prompt in zip(canvas.rows(step.tokens_BL), prompts, strict=True):
            done.texts.append(cut_at(row[len(prompt) :], list(task.end_ids) if task.answers is not None else None))
    return done


@torch.no_grad()
def run_source(source: Any, task: Task, batches: Sequence[range], settings: dict[str, Any]) -> Pass:
    """One pass over the batches with transformers' generate and its KV cache. Prompts are padded on the left."""
    from transformers import GenerationConfig

    done = Pass()
    temperature = settings.get("temperature") or 0.0
    length = {} if task.answers is not None or not task.end_ids else {"min_new_tokens": task.num_new}
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ends = list(task.end_ids) or None
    # Nothing of the source's own settings (a repetition penalty, say) gets in.
    source.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=(ends or [0])[0], use_cache=True)
    for batch in batches:
        prompts = [task.prompts[number] for number in batch]
        longest = max(len(prompt) for prompt in prompts)
        tokens_BL = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=source.device)
        real_BL = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=source.device)
        stamps: list[float] = []

        def stamp(input_ids, scores, stamps=stamps):
            if not stamps:
                _synchronise(source.device)
                stamps.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        torch.manual_seed(task.seed)
        _synchronise(source.device)
        began = time.perf_counter()
        found_BL = source.generate(
            input_ids=tokens_BL, attention_mask=real_BL, max_new_tokens=task.num_new, stopping_criteria=[stamp], **length, **sampling
        )
        _synchronise(source.device)
        done.seconds += time.perf_counter() - began
        done.firsts.append(stamps[0] - began)
        made_BL = found_BL[:, longest:].tolist()
        done.nfe += len(made_BL[0])
        for made in made_BL:
            text = cut_at(made, ends)
            filled = min(len(text) + 1, len(made)) if ends else len(made)
            done.num_filled += filled
            done.num_row_forwards += filled
            done.texts.append(text)
    return done


def peak_memory(work: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that the work had allocated at its peak, beside what was there before. None where the device does not say."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        work()
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as record:  # True would parse every event
        work()
    total = peak = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
