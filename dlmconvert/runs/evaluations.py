"""`dlmconvert eval`: which rows, which models, in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlmconvert.errors import UserError
from dlmconvert.recipe.schema import Evaluation, TextSource
from dlmconvert.runs.folder import ModelLocation
from dlmconvert.runs.stage import Reporter, StageContext, StopFlag


def evaluate_model(
    location: ModelLocation,
    evaluation: Evaluation,
    reporter: Reporter,
    *,
    data: str | None,
    source: str | None,
    row_length: int | None,
    device: str,
) -> list[dict[str, Any]]:
    """NELBO of the model, and NLL of the AR source when there is one, on the same rows.

    data: a text of the user's own; without it the run's held-out rows. Raises UserError when there is neither.
    """
    import tempfile

    from dlmconvert.backbone.load import load_tokenizer, resolve_checkpoint

    tokenizer = load_tokenizer(location.path)
    with tempfile.TemporaryDirectory(prefix="dlmconvert-eval-") as scratch:
        if data is not None:
            rows = _rows_of_text(data, tokenizer, row_length or _row_length(location), Path(scratch))
        elif location.run is not None:
            from dlmconvert.runs.rows import text_rows
            from dlmconvert.runs.stages import _forbidden_id

            context = StageContext(location.run, location.run.recipe(), reporter, StopFlag())
            rows = text_rows(context, load_tokenizer(location.run.model_folder("prepare")), _forbidden_id(location.run))[2]
            if rows is None:
                raise UserError("this run held nothing out (data.validation=0)", "", "name a text: dlmconvert eval MODEL --data FILE")
        else:
            raise UserError(f"{location.path} is not in a run folder, so there is no held-out text", "", "name a text: dlmconvert eval MODEL --data FILE")
        asked: list[tuple[str, Path, str | None]] = [("NELBO of the model", location.path, None)]
        if source is not None:
            asked.append(("NLL of the AR source", resolve_checkpoint(source), "causal"))
        elif location.run is not None:
            asked.append(("NLL of the AR source", location.run.model_folder("prepare"), "causal"))
        return _score(asked, rows, tokenizer, evaluation, reporter, device)


def _score(asked: Any, rows: Any, tokenizer: Any, evaluation: Evaluation, reporter: Reporter, device: str) -> list[dict[str, Any]]:
    from dlmconvert.backbone.load import load_denoiser
    from dlmconvert.evaluation.nelbo import measure_likelihood

    results = []
    for what, folder, attention in asked:
        denoiser = load_denoiser(folder, device, attention=attention)
        if denoiser.tokenizer is not None and denoiser.tokenizer.get_vocab().items() - tokenizer.get_vocab().items() - _own_tokens(denoiser.tokenizer):
            raise UserError(f"{folder} has another tokenizer than the model", "likelihoods of other tokens cannot be compared", "score it by itself")
        if denoiser.spec.attention == "causal":
            what = "NLL" + what.removeprefix("NELBO") if what.startswith("NELBO") else what
        with reporter.progress(what, min(evaluation.rows, rows.num_rows) * (1 if denoiser.spec.attention == "causal" else evaluation.draws)) as bar:
            found = measure_likelihood(
                denoiser, rows, num_rows=evaluation.rows, draws=evaluation.draws, batch=evaluation.batch, seed=evaluation.seed,
                advance=bar.advance,
            )  # fmt: skip
        results.append({"what": what, **found.to_dict()})
    return results


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
