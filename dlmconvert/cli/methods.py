"""`dlmconvert methods`: the published methods by their four choices; with a name, one of them whole."""

from __future__ import annotations

from typing import Annotated

import typer


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method, with what differs from its paper.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """List the published methods; each is four choices (method.name=NAME; single choices may be changed)."""
    from dataclasses import asdict

    from dlmconvert.cli.console import out
    from dlmconvert.errors import UserError, nearest
    from dlmconvert.methods import METHODS

    if name is not None and name not in METHODS:
        raise UserError(f"{name!r} is not a published method", nearest(name, METHODS), "dlmconvert methods lists them all")
    if json:
        from json import dumps

        out(dumps([asdict(row) for row in METHODS.values()] if name is None else asdict(METHODS[name]), indent=1))
    elif name is not None:
        out(_whole(METHODS[name]))
    else:
        _table(METHODS.values())


def _table(rows) -> None:
    from rich.table import Table

    from dlmconvert.cli.console import out

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method", min_width=len("arXiv 2410.17891"), overflow="fold")
    for heading, longest_word in (("attention", "causal_in_block,"), ("alignment", "alignment"), ("corruption", "complementary"), ("objective", "unweighted,")):
        table.add_column(heading, min_width=len(longest_word))
    for row in rows:
        table.add_row(f"[bold]{row.name}[/]\n{row.paper}", *(text for _, text in axes(row.choices)))
    out(table)
    out("\ndlmconvert methods NAME: one method, and where it departs from its paper")


def _whole(row) -> str:
    lines = [f"{row.name}: {row.summary}", f"  paper       {row.paper}"]
    lines += [f"  {axis:11} {text}" for axis, text in axes(row.choices)]
    for heading, text in (("departs", row.departs), ("unverified", row.unverified)):
        if text:
            lines += ["", f"{heading}: {text}"]
    return "\n".join(lines)


def axes(choices: dict) -> list[tuple[str, str]]:
    """The four choices in words, defaults of the schema filled in."""
    from dlmconvert.recipe.method import Method

    method = Method.model_validate(choices)
    attention, corruption, objective = method.attention, method.corruption, method.objective
    path = {
        "none": "at once", "random": "annealed at random pairs", "window": "annealed by a growing window", "pieces": "in pieces of rows that grow",
        "block_growth": "growing from 1", "warm_up_stable_decay": "growing to the row and back",
    }[attention.anneal]  # fmt: skip
    if attention.block_length is not None:
        path = f"blocks of {attention.block_length} {path}"
    steps = f" over {_steps(attention.anneal_steps)}" if attention.anneal_steps is not None else ""
    noise = {
        "uniform": "t uniform", "stratified": "t stratified", "offset": "t evenly spaced", "antithetic": "t and 1 - t",
    }[corruption.noise_levels]  # fmt: skip
    if corruption.band is not None:
        noise += " in [{:g}, {:g}]".format(*corruption.band)
    if corruption.band_search_steps is not None:
        noise += f", its band looked for every {corruption.band_search_steps} steps"
    if corruption.rise_steps is not None:
        noise += f", the highest rising from {corruption.rise_from:g} over {_steps(corruption.rise_steps)}"
    extras = {"bernoulli": "", "at_least_one": ", at least one mask", "exact": ", exact counts"}[corruption.count]
    extras += " a block" if corruption.levels_per == "block" else ""
    extras += f", late in the block (half-life {corruption.half_life:g})" if corruption.half_life is not None else ""
    extras += ", complementary pairs" if corruption.views == "complementary" else ""
    extras += f", up to {corruption.edit_share:.0%} edits in the last {_steps(corruption.edit_steps)}" if corruption.edit_share else ""
    if corruption.embedding_noise and corruption.embedding_noise_steps:
        extras += f", noisy mask embeddings in the first {_steps(corruption.embedding_noise_steps)}"
    weight = {"elbo": "1/t", "unweighted": "unweighted", "cart": f"CART, p = {objective.cart_p:g}", "gidd_clamped": "GIDD, clamped", "gidd_dynamic": "GIDD, dynamic"}[objective.weight]
    divisor = {"eligible": "eligible tokens", "masked": "masked tokens", "masked_micro_batch": "masked tokens of a micro-batch"}[objective.normaliser]
    ar = f", + {objective.ar_weight:g} AR" if objective.ar_weight else ""
    ar += {"fixed": "", "annealed": " falling to 0", "balanced": " balanced"}[objective.ar_schedule]
    ar += f", + {objective.alignment_weight:g} (1 - cosine to the source)" if objective.alignment_weight else ""
    ar += f", + {objective.teacher_kl:g} KL to the source" if objective.teacher_kl else ""
    gidd = f"masks and up to {corruption.uniform_share:.0%} random tokens, {noise}{extras}"
    return [
        ("attention", attention.pattern if attention.pattern == "causal" else f"{attention.pattern}, {path}{steps}"),
        ("alignment", method.alignment.replace("_", " ")),
        ("corruption", {"masking": f"masking, {noise}{extras}", "gidd": gidd, "all_masked": "all masked", "none": "none"}[corruption.kind]),
        ("objective", f"{weight}, over {divisor}{ar}"),
    ]


def _steps(value: float) -> str:
    return f"{100 * value:g}% of the steps" if value < 1 else f"{value:g} steps"
