"""`dlmconvert compare`: variants of one recipe, trained on the same batches, each in a run folder of its own, in one table."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlmconvert.errors import UserError
from dlmconvert.recipe.load import load_recipe
from dlmconvert.recipe.schema import Recipe
from dlmconvert.runs.engines import engine_config
from dlmconvert.runs.folder import RUNS, RunFolder, write_atomically
from dlmconvert.runs.inputs import check_inputs
from dlmconvert.runs.runner import combine, order_of, refuse_drift, run_stages
from dlmconvert.runs.stage import Reporter
from dlmconvert.runs.stages import STAGES, nats_text

_ASSIGNED = re.compile(r"[A-Za-z_][\w.]*=")
_OWN = ("name", "run.folder", "run", "stages")


@dataclass(frozen=True)
class Variant:
    """name: its folder. words: the `key=value` words of the command line and its own. recipe: what they come to."""

    name: str
    words: list[str]
    recipe: Recipe
    run: RunFolder
    target: str = "adapt"

    def finished(self) -> bool:
        return all(stage.finished(self.run, self.recipe) for stage in order_of([self.target], self.recipe))


def alternatives(option: str) -> list[tuple[str, ...]]:
    """One --vary: `a.b=1,2` -> [("a.b=1",), ("a.b=2",)]; `a=1+b=2,a=3` -> [("a=1", "b=2"), ("a=3",)].

    Commas inside brackets or quotes belong to the value; a value without a key is one of the first key of the alternative before it.
    """
    found: list[tuple[str, ...]] = []
    for item in _split(option, ",", lambda rest: True):
        if not _ASSIGNED.match(item):
            if not found:
                raise UserError(f"--vary {option!r} is not key=value,value", "", "as in --vary method.name=diffullama,dream")
            item = f"{found[-1][0].partition('=')[0]}={item}"
        found.append(tuple(_split(item, "+", lambda rest: _ASSIGNED.match(rest) is not None)))
    return found


def _split(text: str, at: str, splits: Callable[[str], Any]) -> list[str]:
    parts, depth, quote, begun = [], 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == at and depth == 0 and splits(text[place + 1 :]):
            parts.append(text[begun:place].strip())
            begun = place + 1
    return [*parts, text[begun:].strip()]


def variants_of(what: str, overrides: list[str], vary: list[str]) -> tuple[Variant | None, list[Variant]]:
    """The cross product of the --vary lists, and before it the AR model that is made first, if any.

    Raises UserError that names every variant which cannot be trained, and why.
    """
    products = [tuple(itertools.chain(*chosen)) for chosen in itertools.product(*map(alternatives, vary))]
    _check_keys(products, overrides)
    names = _names(products)
    found, refused = [], {}
    for name, own in zip(names, products, strict=True):
        words = [*overrides, *own]
        try:
            recipe = load_recipe(what, words)
            variant = Variant(name, words, recipe, RunFolder(folder_of(recipe) / name))
            if not variant.finished():
                check_inputs(recipe, [stage.name for stage in order_of(["adapt"], recipe)])
                if recipe.engine.name == "deepspeed":
                    engine_config(recipe.engine, recipe.train, 1, "adapt")
            found.append(variant)
        except UserError as error:
            refused[name] = error
    _refuse(refused, names, what)
    source, found = _with_one_source(found)
    for variant in [*([source] if source else []), *found]:
        try:
            stages = order_of([variant.target], variant.recipe)
            refuse_drift(variant.run, combine(variant.run, variant.recipe, stages, variant.words), stages)
        except UserError as error:
            next_step = "compare it as it was started, or start another comparison beside it: name=OTHER"
            refused[variant.name] = UserError(error.what, error.why, next_step)
    _refuse(refused, names, what)
    return source, found


def folder_of(recipe: Recipe) -> Path:
    """runs/<name>-compare, or beside `run.folder`."""
    base = Path(recipe.run.folder).expanduser() if recipe.run.folder else Path(RUNS) / recipe.name
    return base.with_name(f"{base.name}-compare")


def _check_keys(products: list[tuple[str, ...]], overrides: list[str]) -> None:
    keys = [[word.partition("=")[0] for word in words] for words in products]
    if len(products) < 2:
        raise UserError("one variant is no comparison", "", "give two or more values, as in --vary method.name=diffullama,dream")
    for key in dict.fromkeys(itertools.chain(*keys)):
        if any(one.count(key) > 1 for one in keys):
            raise UserError(f"{key} is varied twice", "a variant can have one value of it", f"list its values once: --vary {key}=A,B")
        if key in _OWN:
            raise UserError(f"{key} cannot be varied", "compare names the folders itself, and trains the stage `adapt`", "")
        given = [word for word in overrides if word.partition("=")[0] == key]
        if given and all(key in one for one in keys):
            raise UserError(f"{given[-1]} has no effect: every variant sets {key}", "", "leave it out, or do not vary it")
    repeated = [words for words, count in Counter(products).items() if count > 1]
    if repeated:
        raise UserError(f"the variant {' '.join(repeated[0])} is listed twice", "", "list each value once")


def _names(products: list[tuple[str, ...]]) -> list[str]:
    names = ["+".join(map(_slug, words)) for words in products]
    twice = {name for name, count in Counter(names).items() if count > 1 or len(name) > 120}
    marks = [hashlib.sha256(" ".join(words).encode()).hexdigest()[:6] for words in products]
    return [f"{name[:100]}-{mark}" if name in twice or len(name) > 120 else name for name, mark in zip(names, marks, strict=True)]


def _slug(word: str) -> str:
    """method.name=dream -> dream, method.attention.anneal=none -> anneal-none, data.row_length=64 -> data.row_length-64."""
    key, _, value = word.partition("=")
    value = re.sub(r"[^A-Za-z0-9_.]+", "-", value).strip("-.") or "empty"
    if key in ("method", "method.name"):
        return value
    return f"{key.rpartition('.')[2] if key.startswith(('method.', 'train.')) else key}-{value}"


def _refuse(refused: dict[str, UserError], names: list[str], what: str) -> None:
    if not refused:
        return
    errors = list(refused.values())
    if len(errors) == len(names) and len({str(error) for error in errors}) == 1:
        raise errors[0]  # not about the variants
    lines = []
    for name, error in refused.items():
        told = [error.what.removeprefix(f"{what}: "), *error.why.splitlines()]
        lines += [f"{name}: {told[0]}", *(f"  {line}" for line in told[1:])]
    next_steps = dict.fromkeys(error.next_step for error in errors if error.next_step)
    count = f"{len(errors)} of {len(names)} variants"
    raise UserError(f"{count} cannot be trained; nothing has been started", "\n".join(lines), " / ".join(next_steps), errors[0].exit_code)


def _with_one_source(variants: list[Variant]) -> tuple[Variant | None, list[Variant]]:
    """A recipe that makes its own AR model makes it once, in <folder>/source, when all variants ask for the same one."""
    first = variants[0]
    asked = [variant.recipe.pretrain and STAGES["pretrain"].keys(variant.recipe) for variant in variants]
    if asked[0] is None or any(keys != asked[0] for keys in asked):
        return None, variants
    source = replace(first, name="source", run=RunFolder(first.run.path.with_name("source")), target="pretrain")
    made = str(source.run.model_folder("pretrain"))
    words = [f"source.model={json.dumps(made)}", "source.scratch=null", "source.if_missing=error", "pretrain=null"]

    def taking(variant: Variant) -> Variant:
        checkpoint = variant.recipe.source.model_copy(update={"model": made, "scratch": None, "if_missing": "error"})
        return replace(variant, words=[*variant.words, *words], recipe=variant.recipe.model_copy(update={"source": checkpoint, "pretrain": None}))

    return source, [taking(variant) for variant in variants]


def train_variants(source: Variant | None, variants: list[Variant], reporter: Reporter) -> bool:
    """Prepare and adapt each one that is not finished. Returns False when all were. Interrupted, it continues when called again."""
    worked = False
    everything = [*([source] if source else []), *variants]
    for number, variant in enumerate(everything, 1):
        done = variant.finished()
        reporter.say(f"({number}/{len(everything)}) {variant.name}: " + ("done before" if done else f"run folder {variant.run.path}"))
        if not done:
            run_stages(variant.run, variant.recipe, [variant.target], reporter, variant.words)
            worked = True
    return worked


def measure_retentions(variants: list[Variant], reporter: Reporter) -> bool:
    """What is left of the source in each finished variant, once a variant: retention.json in its run folder, and plots/retention.png.

    On the rows that the AR NLL of the source was measured on; a variant that held nothing out is passed over. Returns False when
    there was nothing to do.
    """
    from dlmconvert.runs.evaluations import Subject, measure_retention
    from dlmconvert.runs.folder import ModelLocation

    waiting = [variant for variant in variants if not _retention_file(variant).is_file() and _measured(variant)]
    for number, variant in enumerate(waiting, 1):
        reporter.say(f"({number}/{len(waiting)}) {variant.name}: what is left of the source")
        location = ModelLocation(variant.run.model_folder("adapt"), str(variant.run.path), variant.run)
        rows = _measured(variant)["AR NLL of the source"]["rows"]
        evaluation = variant.recipe.eval.model_copy(update={"rows": rows})
        device = variant.recipe.engine.device
        found = measure_retention(Subject(location, device), evaluation, reporter)
        write_atomically(_retention_file(variant), json.dumps(found.to_dict(), indent=1) + "\n")
    return bool(waiting)


def _retention_file(variant: Variant) -> Path:
    return variant.run.path / "retention.json"


def _measured(variant: Variant) -> dict[str, dict[str, Any]]:
    return {one["what"]: one for one in variant.run.stage_state("adapt")["facts"].get("measured", [])}


# What came out of it


def tabulate(what: str, variants: list[Variant], retention: bool = True) -> dict[str, Any]:
    """Plain values of finished variants: {"recipe", "folder", "notes", "variants": [...]}; likelihoods are nats a token.

    retention: with what `measure_retentions` found (None for a variant without it).
    """
    rows = [_row(variant) | {"retention": _retention(variant) if retention else None} for variant in variants]
    return {"recipe": what, "folder": str(variants[0].run.path.parent), "notes": list(_notes(variants, rows)), "variants": rows}


def _row(variant: Variant) -> dict[str, Any]:
    from dlmconvert.training.metrics import read_metrics

    state = variant.run.stage_state("adapt")
    facts = state["facts"]
    measured = _measured(variant)
    lines = [line for line in read_metrics(variant.run.path / "adapt" / "metrics.jsonl") if "seconds_per_step" in line]
    seconds = facts["steps"] * sum(line["seconds_per_step"] for line in lines) / len(lines)
    return {
        "variant": variant.name,
        "words": variant.words,
        "run": str(variant.run.path),
        "method": variant.recipe.method.name,
        "after": measured.get("NELBO after adaptation") or measured.get("AR NLL after training"),
        "before": measured.get("NELBO before adaptation"),
        "source": measured.get("AR NLL of the source"),
        "steps": facts["steps"],
        "tokens_seen": facts["tokens_seen"],
        "epochs": facts["epochs"],
        "training_seconds": seconds,  # the logged steps' mean, times the steps: without tokenising, saving and measuring
        "tokens_per_second": facts["tokens_seen"] / seconds,
        "stage_seconds": state["seconds"],
        "rows": state["inputs"]["rows"],
    }


def _retention(variant: Variant) -> dict[str, Any] | None:
    if not _retention_file(variant).is_file():
        return None
    found = json.loads(_retention_file(variant).read_text())
    weights = {part["kind"]: part["relative"] for part in found["weights"]["by_kind"]}
    return {**found["agreement"], "own_tokens": found["own"], "weight_drift": found["weights"]["total"]["relative"], "weight_drift_by_kind": weights, "sentence": found["sentence"]}


def _notes(variants: Sequence[Variant], rows: list[dict[str, Any]]):
    kinds = {row["after"]["kind"] for row in rows if row["after"]}
    if len(kinds) == 2:
        causal = ", ".join(row["variant"] for row in rows if row["after"] and row["after"]["kind"] == "nll")
        yield f"{causal}: an exact NLL. The others are NELBOs, upper bounds on the NLL (<=)."
    if any(row["after"] is None for row in rows):
        yield "Nothing is held out (data.validation=0), so nothing was measured."
    settings = [(row["rows"], v.recipe.train.seed, v.recipe.train.rows_per_step) for v, row in zip(variants, rows, strict=True)]
    if any(setting != settings[0] for setting in settings):
        yield "The variants were not trained on the same batches (rows, train.seed or train.rows_per_step differ)."
    texts = {(row["source"]["rows"], row["source"]["tokens"]) for row in rows if row["source"]}
    draws = {row["before"]["draws"] for row in rows if row["before"]}
    if len(texts) > 1 or len(draws) > 1:
        yield "The variants were not measured alike (held-out rows, tokens or draws differ): their likelihoods do not compare."


def title_of(comparison: dict[str, Any]) -> str:
    """What the table shows, in words."""
    title = "held-out likelihood in nats a token, after and before adaptation"
    if any(row["retention"] for row in comparison["variants"]):
        title += (
            "; AR path: NLL of the converted model read from left to right; accepted: what the source would accept of it; "
            "own: what its AR path would accept of the tokens that it fills in; "
            "moved: its weights, ||W - W0|| / ||W0||"
        )
    return title


def table_of(comparison: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table as text, headings first. The columns of retention are there when a variant has them."""
    rows = comparison["variants"]
    kept = any(row["retention"] for row in rows)
    retention = ("AR path", "accepted", "own", "moved") if kept else ()
    headings = ("variant", "after", "before", "AR source", *retention, "steps", "tokens seen", "training s", "tokens/s")
    return [headings, *(_cells(row, kept) for row in rows)]


def _cells(row: dict[str, Any], kept: bool) -> tuple[str, ...]:
    after, retention = row["after"], row["retention"]
    left = ("-",) * 4
    if retention:
        drift, own = retention["weight_drift"], retention["own_tokens"]
        shares = (retention["acceptance"], None if own is None else own["acceptance"], drift)
        left = (f"{retention['nats_after']:.3f}", *("-" if share is None else f"{share:.1%}" for share in shares))
    return (
        row["variant"],
        "-" if after is None else ("NELBO <= " if after["kind"] == "nelbo" else "NLL ") + nats_text(after),
        *("-" if row[name] is None else nats_text(row[name]) for name in ("before", "source")),
        *(left if kept else ()),
        f"{row['steps']:,}",
        f"{row['tokens_seen']:,}",
        f"{row['training_seconds']:,.1f}",
        f"{row['tokens_per_second']:,.0f}",
    )


def table_text(comparison: dict[str, Any]) -> str:
    table = table_of(comparison)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = title_of(comparison).split("; ")
    for row in table:
        lines.append("  " + "  ".join(text.ljust(width) if place < 1 else text.rjust(width) for place, (text, width) in enumerate(zip(row, widths, strict=True))))
    return "\n".join(lines + [f"  {note}" for note in comparison["notes"]])


def write_comparison(comparison: dict[str, Any]) -> tuple[Path, Path]:
    """compare.json and compare.png in the folder of the comparison."""
    from dlmconvert.runs.compare_page import plot_variants

    folder = Path(comparison["folder"])
    write_atomically(folder / "compare.json", json.dumps(comparison, indent=1) + "\n")
    return folder / "compare.json", plot_variants(comparison, folder / "compare.png")
