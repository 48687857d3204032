"""Every key of a recipe: its type, its unit, its default, and what it means.

The docstring below a field is what `dlmconvert recipes keys` prints. Unknown keys are errors; values are frozen once loaded.
A field marked SAFE may change while a run is under way: it has no influence on the numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dlmconvert.recipe.contradictions import method_contradictions
from dlmconvert.recipe.method import Method
from dlmconvert.recipe.optimization import Engine, Optimization, engine_contradictions
from dlmconvert.recipe.section import SAFE, Positive, Section


class Source(Section):
    """The autoregressive checkpoint that is converted."""

    model: str | None = None
    """A Hub id (`gpt2`) or a folder with a Hugging Face checkpoint. Empty: built from `scratch`."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer when the checkpoint has none of its own."""
    trust_remote_code: bool = False
    """Run the checkpoint's own modelling code. Never done unless asked for."""
    mask_token: int | str | None = None
    """Token id, or its text, that stands for [MASK]; may be an ordinary word piece. Empty: chosen and explained by `prepare`."""
    mask_init: Literal["mean", "keep", "normal"] = "mean"
    """Embedding of the mask token: the mean of all rows, the row as it is (an existing word piece keeps its row under every setting), or normal with the mean and spread of the rows."""
    scratch: dict[str, Any] | None = None
    """A transformers config (`model_type`, `hidden_size`, ...) for a model with random weights, in place of a checkpoint."""
    scratch_tokenizer: Literal["bpe", "bytes"] = "bpe"
    """Tokenizer of a `scratch` model without `tokenizer`: byte-level BPE trained on `data.train`, or plain bytes."""
    if_missing: Literal["error", "scratch"] = "error"
    """When `model` is neither a folder, nor in the local cache, nor reachable: stop, or build `scratch` and say so."""
    seed: int = 0
    """Seed of random weights and of a drawn mask row."""


class TextSource(Section):
    """One corpus of a mixture."""

    path: str
    """A file or folder (.txt, .jsonl, .parquet; globs allowed), a Hub dataset id, or `builtin:python` (the source of the running interpreter's standard library)."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the training rows, relative to the other sources."""
    text_field: str = "text"
    """Field of a JSONL, Parquet or Hub record that holds the text."""
    name: str | None = None
    """Configuration name of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset."""
    streaming: bool = False
    """Stream a Hub dataset while tokenising; needs `data.max_tokens`."""
    separator: str | None = None
    """Text that separates documents inside a .txt file (for example `<|endoftext|>` or two line ends). Empty: a file is a document."""


def _kind(value: Any) -> str:
    """Which form a text setting has been given in: mistakes are then told for that form only. The names are no identifiers, so
    that they never pass for keys in a message."""
    if isinstance(value, list | tuple):
        return "<list>"
    if isinstance(value, dict | TextSource):
        return "<source>"
    return "<path>" if isinstance(value, str) else "<fraction>"


OneSource = Annotated[Annotated[str, Tag("<path>")] | Annotated[TextSource, Tag("<source>")], Discriminator(_kind)]
Texts = Annotated[Annotated[str, Tag("<path>")] | Annotated[list[OneSource], Tag("<list>")], Discriminator(_kind)]
HeldOut = Annotated[
    Annotated[float, Field(ge=0, lt=1), Tag("<fraction>")] | Annotated[str, Tag("<path>")] | Annotated[list[OneSource], Tag("<list>")],
    Discriminator(_kind),
]


class Data(Section):
    """Text, and how it becomes rows of tokens."""

    train: Texts | None = None
    """One path, or a list (a weighted mixture)."""
    validation: HeldOut = 0.02
    """Held-out text: a path, or the fraction of the documents of `train` that is kept out of training."""
    row_length: Annotated[int, Field(ge=8)] = 512
    """Tokens in a row (the context length in training)."""
    max_tokens: Positive | None = None
    """Train on the first so many tokens of each source; a held-out fraction gets its share beside them."""
    documents: Literal["joined", "isolated"] = "joined"
    """`joined`: tokens of a row see all of it, as DiffuLLaMA; `isolated`: attention stops at document boundaries and positions restart."""
    cache: str | None = Field(default=None, json_schema_extra=SAFE)
    """Folder for prepared rows. Empty: `.tokens` beside the run folder, shared by all runs there."""
    workers: Positive | None = Field(default=None, json_schema_extra=SAFE)
    """Processes that tokenise. Empty: one a CPU core."""


class Pretrain(Optimization):
    """AR training of a `scratch` source before it is converted, on `data.train`."""


class Train(Optimization):
    """The adaptation."""


class Sft(Optimization):
    """Supervised fine-tuning on conversations: only the assistant's tokens are masked and scored."""

    data: str | None = None
    """JSONL file, Hub dataset, or `builtin:python-docstrings`. Records hold `messages`, or the two fields named below."""
    validation: Annotated[float, Field(ge=0, lt=1)] | str = 0.02
    """Held-out conversations: a path or a fraction."""
    prompt_field: str = "prompt"
    response_field: str = "response"
    split: str = "train"
    """Split of a Hub dataset."""
    row_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens in a row. Empty: `data.row_length`."""
    pad_to: Literal["row", "turn"] | Positive = "row"
    """Trained end tokens are added up to the end of the `row`, up to a multiple of a number of tokens, or (`turn`) a single one closes the answer; the rest of the row is invisible."""
    too_long: Literal["truncate", "skip"] = "truncate"
    """A conversation longer than the row loses the start of its prompt, or is left out; both are counted."""


class Evaluation(Section):
    """What `dlmconvert run` measures at its end, and `dlmconvert eval` by default."""

    rows: Positive = 64
    """Held-out rows that are scored."""
    draws: Positive = 8
    """Noise draws a row of the exact-count NELBO estimator."""
    batch: Positive = 16
    """Rows in one forward."""
    seed: int = 0
    infill: str | None = None
    """Text with one `[[MASK:n]]` gap that is filled in at the end, or `builtin:python` (a held-out function)."""


class Export(Section):
    """The folder that users download."""

    profile: Literal["native"] = "native"
    """File format; see docs/formats.md."""
    stage: Literal["sft", "adapt"] | None = None
    """Which stage's model is exported. Empty: the last one that is finished."""
    steps: Positive = 64
    """Sampling steps in generation_config.json. Block models, and the bounds below, take what they need instead."""
    max_new_tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0)] = 0.9
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    order: Literal["random", "confidence", "entropy", "margin", "left_to_right", "first_hitting"] = "random"
    """Which masked positions are filled first (docs/sampling.md)."""
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Commit every token that the model is at least this sure of, in place of fixed steps."""
    factor: Annotated[float, Field(gt=0)] | None = None
    """Fast-dLLM's factor rule (0.7 to 1.9), in place of fixed steps."""
    entropy_bound: Annotated[float, Field(ge=0)] | None = None
    """EB-Sampler's bound in nats (0.001 to 1), in place of fixed steps."""
    block_length: Positive | None = None
    """Fill block after block from the left. Block models have their own."""
    cache: Literal["none", "prefix", "dual", "block"] | None = None
    """`prefix`, `dual`: approximate, bidirectional models; `block`: exact, block models, which take it by default."""


class Run(Section):
    """Where everything lies."""

    folder: str | None = Field(default=None, json_schema_extra=SAFE)
    """Run folder. Empty: `runs/<name>`."""
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default=[], json_schema_extra=SAFE)
    """Where the lines of metrics.jsonl go besides: `tensorboard`, `wandb` (pip install 'dlmconvert[trackers]')."""


class Recipe(Section):
    """One experiment, whole."""

    name: str = "default"
    """Name of the recipe; the run folder is called after it."""
    stages: list[Literal["adapt", "sft", "export"]] = ["adapt", "export"]
    """What `dlmconvert run` goes through (prepare always comes first)."""
    source: Source = Source()
    pretrain: Pretrain | None = None
    method: Method = Method()
    data: Data = Data()
    train: Train = Train()
    sft: Sft = Sft()
    eval: Evaluation = Evaluation()
    export: Export = Export()
    engine: Engine = Engine()
    run: Run = Run()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = list(contradictions(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def contradictions(recipe: Recipe):
    """Every pair of values that cannot both be meant, as sentences that begin with the key."""
    source = recipe.source
    if source.model is None and source.scratch is None:
        yield "source.model is empty: name a Hub id or a folder (source.model=gpt2), or give source.scratch"
    if source.if_missing == "scratch" and source.scratch is None:
        yield "source.if_missing=scratch needs source.scratch (the config of the model that is built)"
    if source.scratch is not None and "model_type" not in source.scratch:
        yield "source.scratch needs `model_type`, as in {model_type: gpt2, ...}"
    if source.model is not None and source.scratch is not None and source.if_missing == "error":
        yield "source.model and source.scratch are both set: leave one out, or set source.if_missing=scratch"
    if recipe.pretrain is not None and source.scratch is None:
        yield "pretrain trains random weights: it needs source.scratch"
    yield from method_contradictions(recipe)
    yield from engine_contradictions(recipe.engine)
    for section, values in (("pretrain", recipe.pretrain), ("train", recipe.train), ("sft", recipe.sft)):
        if values is None:
            continue
        if values.micro_batch > values.rows_per_step:
            yield f"{section}.micro_batch={values.micro_batch} is larger than {section}.rows_per_step={values.rows_per_step}"
        if values.warmup_steps > values.steps:
            yield f"{section}.warmup_steps={values.warmup_steps} is longer than {section}.steps={values.steps}"
    bounds = [name for name in ("threshold", "factor", "entropy_bound") if getattr(recipe.export, name) is not None]
    if len(bounds) > 1:
        yield f"export.{bounds[0]} and export.{bounds[1]} both say how many tokens a step commits: leave one out"
    if len(set(recipe.stages)) != len(recipe.stages):
        yield f"stages names a stage twice: {recipe.stages}"
    streamed = [s for s in text_sources(recipe.data.train) if s.streaming]
    if streamed and recipe.data.max_tokens is None:
        yield f"data.train {streamed[0].path!r} is streamed: bound it with data.max_tokens"


def text_sources(value: Any) -> list[TextSource]:
    """The value of `data.train` or `data.validation` as a list of sources (empty for a fraction or nothing)."""
    if value is None or isinstance(value, float | int):
        return []
    items = value if isinstance(value, list) else [value]
    return [item if isinstance(item, TextSource) else TextSource(path=item) for item in items]
