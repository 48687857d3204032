"""What published experiments say about training on repeated data, beside a planned run. Facts are in one table; a sentence that is not
inside of what an experiment measured says so. Every experiment here trained from random weights: none measured a conversion.

Notation: N parameters, U unique tokens, D training tokens, D / U epochs, C = 6 N D (arXiv 2001.08361, the papers' own count).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Study:
    """What an experiment covered: ranges of parameters, unique tokens and epochs, from the smallest to the largest it trained."""

    arxiv: str
    title: str
    parameters: tuple[float, float]
    unique_tokens: tuple[float, float] | None
    epochs: tuple[float, float]
    data: str

    def covers(self, parameters: float, unique_tokens: float, epochs: float) -> list[str]:
        """What of a run lies outside, in words; empty when nothing does."""
        ranges = (("parameters", parameters, self.parameters), ("unique tokens", unique_tokens, self.unique_tokens), ("epochs", epochs, self.epochs))
        return [f"{short(value)} {name} (measured: {short(known[0])} to {short(known[1])})" for name, value, known in ranges if known and not known[0] <= value <= known[1]]


AR_REPEATED = Study("2305.16264", "Scaling Data-Constrained Language Models", (1e7, 9e9), None, (0, 1500), "English web text")
CRITICAL = Study("2507.15857", "Diffusion Beats Autoregressive in Data-Constrained Settings", (7e6, 2.5e9), (25e6, 100e6), (0, 800), "English web text (C4)")
CROSSOVER = Study("2511.03276", "Diffusion Language Models are Super Data Learners", (1e9, 8e9), (0.5e9, 96e9), (0, 192), "web text, 96B training tokens")

FRESH_EPOCHS = 4  # 2305.16264: up to here the loss of an AR model was almost that of fresh data
SPENT_EPOCHS = 16  # 2305.16264: about here further repetition had little left to give an AR model
# 2507.15857: C_crit(U) = 2.12 x 10^1.956 x U^2.174 FLOPs, where diffusion overtakes AR; a fit, over its own unique-token budgets. Taken from
# secondary sources, two of which give it in different form and agree within 3 percent (tests hold that); not checked against the typeset equation.
CRITICAL_FACTOR, CRITICAL_EXPONENT = 2.12 * 10**1.956, 2.174
ONE_MODEL = "one 1B model on 1B unique tokens for 480 epochs had not saturated (HellaSwag about 56, an AR model about 41)"
CODER = "a 1.7B coder on 10B unique Python tokens overtook its AR twin within about 1.5T training tokens"


@dataclass(frozen=True)
class Budget:
    """epochs: passes over the unique text. sentences: (kind, text); kinds are `measured`, `fit` (a published formula inside of its range),
    `outside` (nothing published covers it), `assumed`, and `repetition` (there is none). warns: an AR baseline at this budget would be past its best."""

    epochs: float
    unique_tokens: float
    warns: bool
    sentences: list[tuple[str, str]]


def critical_compute(unique_tokens: float) -> float:
    """FLOPs beyond which masked diffusion had the lower validation loss than AR on so many unique tokens (arXiv 2507.15857)."""
    return CRITICAL_FACTOR * unique_tokens**CRITICAL_EXPONENT


def data_budget(parameters: float, unique_tokens: float, training_tokens: float, is_diffusion: bool = True, is_bound: bool = False) -> Budget:
    """What is known about so many passes over so much text, for a model of this size.

    parameters: those that a token goes through. is_diffusion: False plans an AR baseline itself. is_bound: there may be less
    text than unique_tokens.
    """
    epochs = training_tokens / unique_tokens
    if epochs <= 1:
        none = "none, if there is as much text as that" if is_bound else "none"
        return Budget(epochs, unique_tokens, False, [("repetition", f"{none}: no token is seen twice, so neither overfitting by repetition nor the published crossovers arise")])
    sentences: list[tuple[str, str]] = [("assumed", "the studies below trained from random weights, this run starts from an AR model: they bound nothing here")]
    warns = epochs > FRESH_EPOCHS
    subject = "an AR baseline on this text" if is_diffusion else "this AR run"
    missing = AR_REPEATED.covers(parameters, unique_tokens, epochs)
    if missing:
        sentences.append(("outside", f"{subject}: outside of arXiv {AR_REPEATED.arxiv}: {'; '.join(missing)}"))
    elif epochs <= FRESH_EPOCHS:
        sentences.append(("measured", f"{subject} would not overfit: up to {FRESH_EPOCHS} epochs repeated text was almost as good as fresh (arXiv {AR_REPEATED.arxiv})"))
    elif epochs <= SPENT_EPOCHS:
        sentences.append(("measured", f"{subject} is at risk of overfitting: beyond {FRESH_EPOCHS} epochs repeated text was worth less and less (arXiv {AR_REPEATED.arxiv})"))
    else:
        also = "" if CROSSOVER.covers(parameters, unique_tokens, epochs) else f", and AR models of 1B and 8B parameters peaked after few epochs (arXiv {CROSSOVER.arxiv})"
        sentences.append(("measured", f"{subject} would overfit: beyond about {SPENT_EPOCHS} epochs repeated text had little left to give (arXiv {AR_REPEATED.arxiv}){also}"))
    sentences.extend(_crossover(parameters, unique_tokens, training_tokens, epochs))
    return Budget(epochs, unique_tokens, warns, sentences)


def _crossover(parameters: float, unique_tokens: float, training_tokens: float, epochs: float):
    """Whether diffusion overtakes AR at this budget: what was measured there, and nothing elsewhere."""
    covered = False
    if not CRITICAL.covers(parameters, unique_tokens, epochs):
        covered = True
        compute, critical = 6 * parameters * training_tokens, critical_compute(unique_tokens)
        side = "above" if compute > critical else "below"
        who = "diffusion" if compute > critical else "AR"
        yield (
            "fit",
            f"6 N D = {compute:.1e} FLOPs, {side} the {critical:.1e} where diffusion overtook AR on {short(unique_tokens)} unique tokens (a fit, arXiv {CRITICAL.arxiv}): "
            f"trained from random weights, {who} would have the lower validation loss",
        )
    if not CROSSOVER.covers(parameters, unique_tokens, epochs) and training_tokens <= 1.05 * CROSSOVER.unique_tokens[1]:  # type: ignore[index]
        covered = True
        if epochs > FRESH_EPOCHS:
            yield (
                "measured",
                f"at 1B and 8B parameters, {short(CROSSOVER.unique_tokens[0])} to {short(CROSSOVER.unique_tokens[1])} unique tokens and 96B training tokens diffusion overtook AR once text was "  # type: ignore[index]
                f"repeated enough: later with more unique text, earlier with a larger model (arXiv {CROSSOVER.arxiv}). At how many epochs is not in our table: no side is predicted for this run",
            )
        else:
            yield "measured", f"with little repetition AR fits faster at 1B and 8B parameters (arXiv {CROSSOVER.arxiv})"
    if not covered:
        reasons = [f"arXiv {study.arxiv}: {'; '.join(study.covers(parameters, unique_tokens, epochs)) or 'more than its 96B training tokens'}" for study in (CRITICAL, CROSSOVER)]
        yield "outside", f"whether diffusion overtakes AR here was not measured. Outside of {'. Outside of '.join(reasons)}"
        if epochs > FRESH_EPOCHS:
            yield "measured", f"nearest, not a prediction: {CODER}; {ONE_MODEL} (arXiv {CROSSOVER.arxiv})"
    if epochs > FRESH_EPOCHS:
        yield "measured", f"a rising validation loss need not mean worse answers there: choose checkpoints by tasks too (arXiv {CROSSOVER.arxiv})"


def short(number: float) -> str:
    """A large number for people: 124M, 65B."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"
