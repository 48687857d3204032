"""`dlmconvert eval`: which rows, which models, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlmconvert.errors import UserError
from dlmconvert.recipe.schema import Evaluation, TextSource
from dlmconvert.runs.folder import ModelLocation
from dlmconvert.runs.stage import Reporter, StageContext, StopFlag

if TYPE_CHECKING:
    from dlmconvert.evaluation.retention import Retention


_DISTRACTORS = 3  # four choices, as most multiple-choice tasks have


@dataclass(frozen=True)
class Subject:
    """A model, the text that it is measured on, and what it is measured beside.

    data: a text of the user's own, in rows of row_length; without it the run's held-out rows. source: the AR model that it was converted
    from; without it the run's.
    """

    location: ModelLocation
    device: str
    data: str | None = None
    source: str | None = None
    row_length: int | None = None


def evaluate_model(subject: Subject, evaluation: Evaluation, reporter: Reporter, delta_nll: bool = False) -> list[dict[str, Any]]:
    """NELBO of the model, and NLL of the AR source when there is one, on the same rows.

    delta_nll: how much likelier the second half of a row is than those of other rows (evaluation/delta_nll.py), instead of the
    likelihood. Raises UserError when there is no text, or too little.
    """
    from dlmconvert.backbone.load import load_tokenizer, resolve_checkpoint

    location, source = subject.location, subject.source
    tokenizer = load_tokenizer(location.path)
    with _held_out_rows(subject, tokenizer, reporter) as rows:
        asked: list[tuple[str, Path, str | None]] = [("NELBO of the model", location.path, None)]
        if source is not None:
            asked.append(("NLL of the AR source", resolve_checkpoint(source), "causal"))
        elif location.run is not None:
            asked.append(("NLL of the AR source", location.run.model_folder("prepare"), "causal"))
        if delta_nll and min(evaluation.rows, rows.num_rows) <= _DISTRACTORS:
            least = f"{_DISTRACTORS + 1} rows: a text and {_DISTRACTORS} others"
            raise UserError(f"delta-NLL needs at least {least}", f"{min(evaluation.rows, rows.num_rows)} are scored here", "--rows, or more text: --data FILE")
        return _score(asked, rows, tokenizer, evaluation, reporter, subject.device, delta_nll)


def measure_retention(subject: Subject, evaluation: Evaluation, reporter: Reporter, plot: Path | None = None) -> Retention:
    """What is left of the AR source, on the rows that `evaluate_model` scores.

    plot: a PNG that does not exist yet; without it the run's plots/retention.png, or none outside of a run. Raises UserError when
    there is no source.
    """
    from dlmconvert.backbone.load import load_denoiser, load_tokenizer, resolve_checkpoint
    from dlmconvert.evaluation.retention import Retention, causal_agreement, tensor_files, weight_drift

    location, source = subject.location, subject.source
    if plot is not None and plot.exists():
        raise UserError(f"{plot} exists already", "nothing is overwritten", "name another file for --plot, or remove this one")
    if source is None and location.run is None:
        raise UserError(f"{location.path} is not in a run folder, so its source is not known", "", "name the AR model that it was converted from: --source MODEL")
    before = resolve_checkpoint(source) if source is not None else location.run.model_folder("prepare")
    tokenizer = load_tokenizer(location.path)
    with _held_out_rows(subject, tokenizer, reporter) as rows:
        after = load_denoiser(location.path, subject.device, attention="causal")
        with reporter.progress("weights", len(tensor_files(location.path))) as bar:
            weights = weight_drift(location.path, before, after.spec, bar.advance)
        source_model = load_denoiser(before, subject.device, attention="causal")
        _require_same_tokens(source_model, tokenizer, before)
        with reporter.progress("both models, left to right", min(evaluation.rows, rows.num_rows)) as bar:
            agreement = causal_agreement(after, source_model, rows, num_rows=evaluation.rows, batch=evaluation.batch, advance=bar.advance)
        del source_model
        own = _own_tokens_of(after, location, rows, evaluation, reporter)
    found = Retention(weights, agreement, own)
    if plot is None and location.run is not None:
        plot = location.run.path / "plots" / "retention.png"
    if plot is not None:
        try:
            plot_retention(found, plot)
        except OSError as error:
            raise UserError(f"cannot write {plot}: {error.strerror}", "", "name another file: --plot FILE") from error
        reporter.say(f"plot: {plot}")
    return found


def _own_tokens_of(model: Any, location: ModelLocation, rows: Any, evaluation: Evaluation, reporter: Reporter) -> Any:
    """What the AR path of a loaded model makes of the tokens that it fills in; None of a model that fills in none."""
    from dlmconvert.backbone.denoiser import Denoiser
    from dlmconvert.backbone.load import source_config
    from dlmconvert.backbone.spec import DlmSpec
    from dlmconvert.evaluation.own_tokens import own_acceptance

    section = getattr(source_config(location.path, False), "dlm", None)
    if section is None or section["trained"] == "ar":
        return None
    denoiser = Denoiser(model.model, DlmSpec(**section), adapters=model.adapters).eval()
    with reporter.progress("its own tokens, left to right", min(evaluation.rows, rows.num_rows)) as bar:
        return own_acceptance(denoiser, rows, num_rows=evaluation.rows, batch=evaluation.batch, seed=evaluation.seed, advance=bar.advance)


def plot_retention(retention: Retention, path: Path) -> None:
    """A PNG: drift by layer and kind, cosine by layer, and what is left of the predictions."""
    from matplotlib.figure import Figure

    from dlmconvert.evaluation.retention import KINDS

    weights, agreement = retention.weights, retention.agreement
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for kind in KINDS:
        parts = [part for part in weights.parts if part.kind == kind and part.relative is not None]
        inside = [part for part in parts if part.layer is not None]
        if inside:
            left.plot([part.layer for part in inside], [part.relative for part in inside], "o-", markersize=3, label=kind)
        elif parts:
            left.axhline(parts[0].relative, linestyle="--", linewidth=1, label=kind, color=f"C{KINDS.index(kind)}")
    left.set(title="weight drift", xlabel="layer", ylabel="||W - W0|| / ||W0||")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    middle.plot(range(-1, len(agreement.cosine) - 1), agreement.cosine, "o-", markersize=3)
    middle.set(title="hidden states, causal path", xlabel="layer (-1: embeddings)", ylabel="mean cosine")
    shares = {"same greedy\ntoken": agreement.greedy, "accepted\nby the source": agreement.acceptance}
    if retention.own is not None:
        shares["own tokens\naccepted"] = retention.own.acceptance
    right.bar(list(shares), list(shares.values()), color=["C0", "C1", "C2"][: len(shares)])
    right.set(title=f"AR perplexity {agreement.perplexity_before:.4g} -> {agreement.perplexity_after:.4g}", ylabel="share", ylim=(0, 1))
    for axis in (left, middle):
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")


@contextmanager
def _held_out_rows(subject: Subject, tokenizer: Any, reporter: Reporter) -> Iterator[Any]:
    """Rows of the subject's text, else the run's held-out rows. Raises UserError when there is neither."""
    import tempfile

    from dlmconvert.backbone.load import load_tokenizer

    location = subject.location
    with tempfile.TemporaryDirectory(prefix="dlmconvert-eval-") as scratch:
        if subject.data is not None:
            rows = _rows_of_text(subject.data, tokenizer, subject.row_length or _row_length(location), Path(scratch))
        elif location.run is not None:
            from dlmconvert.runs.rows import text_rows
            from dlmconvert.runs.stages import _forbidden_id

            context = StageContext(location.run, location.run.recipe(), reporter, StopFlag())
            rows = text_rows(context, load_tokenizer(location.run.model_folder("prepare")), _forbidden_id(location.run))[2]
            if rows is None:
                raise UserError("this run held nothing out (data.validation=0)", "", "name a text: dlmconvert eval MODEL --data FILE")
        else:
            raise UserError(f"{location.path} is not in a run folder, so there is no held-out text", "", "name a text: dlmconvert eval MODEL --data FILE")
        yield rows


def _score(asked: Any, rows: Any, tokenizer: Any, evaluation: Evaluation, reporter: Reporter, device: str, delta_nll: bool) -> list[dict[str, Any]]:
    from dlmconvert.backbone.load import load_denoiser
    from dlmconvert.evaluation.delta_nll import measure_delta_nll
    from dlmconvert.evaluation.nelbo import measure_likelihood

    results = []
    for what, folder, attention in asked:
        denoiser = load_denoiser(folder, device, attention=attention)
        _require_same_tokens(denoiser, tokenizer, folder)
        if denoiser.spec.attention == "causal":
            what = "NLL" + what.removeprefix("NELBO") if what.startswith("NELBO") else what
        forwards = min(evaluation.rows, rows.num_rows) * (1 if denoiser.spec.attention == "causal" else evaluation.draws)
        how = {"num_rows": evaluation.rows, "draws": evaluation.draws, "batch": evaluation.batch, "seed": evaluation.seed}
        with reporter.progress(what, forwards * (1 + _DISTRACTORS if delta_nll else 1)) as bar:
            if delta_nll:
                half = rows.row_length // 2
                found = measure_delta_nll(denoiser, rows, num_distractors=_DISTRACTORS, prefix_length=half, advance=bar.advance, **how)
            else:
                found = measure_likelihood(denoiser, rows, advance=bar.advance, **how)
        results.append({"what": what, **found.to_dict()})
    return results


def _require_same_tokens(denoiser: Any, tokenizer: Any, folder: Path) -> None:
    if denoiser.tokenizer is not None and denoiser.tokenizer.get_vocab().items() - tokenizer.get_vocab().items() - _own_tokens(denoiser.tokenizer):
        raise UserError(f"{folder} has another tokenizer than the model", "likelihoods of other tokens cannot be compared", "score it by itself")


def _own_tokens(tokenizer: Any) -> set[tuple[str, int]]:
    return {(str(token), token_id) for token_id, token in tokenizer.added_tokens_decoder.items()}


def _rows_of_text(data: str, tokenizer: Any, row_length: int, cache: Path) -> Any:
    from dlmconvert.data.packing import prepare_rows
    from dlmconvert.runs.rows import document_marks, tokenizer_fingerprint

    prefix_id, separator_id = document_marks(tokenizer)
    stores, _ = prepare_rows(
        [TextSource(path=data)],
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        row_length=row_length,
        cache_folder=cache,
        prefix_id=prefix_id,
        separator_id=separator_id,
        validation=0.0,
        workers=1,
    )
    return stores[0]


def _row_length(location: ModelLocation) -> int:
    if location.run is not None:
        return location.run.recipe().data.row_length
    from dlmconvert.backbone.load import source_config

    longest = getattr(source_config(location.path).get_text_config(), "max_position_embeddings", None)
    return min(512, longest or 512)
