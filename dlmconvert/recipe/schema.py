"""Every key of a recipe: its type, its unit, its default, and what it means.

The docstring below a field is what `dlmconvert recipes keys` prints. Unknown keys are errors; values are frozen once loaded.
A field marked SAFE may change while a run is under way: it has no influence on the numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from dlmconvert.recipe.contradictions import method_contradictions

SAFE = {"safe_to_change": True}

Positive = Annotated[int, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)


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


class Attention(Section):
    """Which positions may see which, and the path there from causal attention."""

    pattern: Literal["bidirectional", "causal"] = "bidirectional"
    """The pattern at the end of training."""
    anneal: Literal["none", "random", "window"] = "none"
    """`none`: at once. `random`: a drawn share of the non-causal pairs is open, growing to all (arXiv 2410.17891). `window`: each position sees so many positions ahead, growing to the whole row."""
    anneal_steps: Annotated[float, Field(gt=0)] | None = None
    """Optimizer steps until everything is open; below 1 a fraction of the stage's steps."""


class Corruption(Section):
    """q(x_t given x_0)."""

    kind: Literal["masking", "none"] = "masking"
    """Each eligible token becomes the mask token with probability t; `none` leaves the row clean (the AR objective)."""
    eps: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """Lower end of the noise level t in [eps, 1]."""
    noise_levels: Literal["uniform", "stratified", "offset", "antithetic"] = "uniform"
    """One independent t a row, or spread over the global batch (lower variance, same mean): one a stratum, evenly spaced from one drawn `offset`, or rows 2j and 2j + 1 at opposite ends (`antithetic`)."""
    band: tuple[float, float] | None = None
    """[low, high] in place of [eps, 1], the weight kept (arXiv 2503.09573): no longer a bound. Validation uses the full range."""
    count: Literal["bernoulli", "at_least_one", "exact"] = "bernoulli"
    """How many tokens of a row of n are masked: each with probability t; the same but never none; or l, uniform on 1..n, in place of t (weight n/l, the lowest variance; `eps` is not used)."""
    views: Literal["single", "complementary"] = "single"
    """`complementary`: rows 2j and 2j + 1 of the global batch are one row of text, and what one masks the other shows (arXiv 2509.26328): each token is predicted once, from half as much text."""


class Objective(Section):
    """How denoising errors are weighed and summed."""

    weight: Literal["elbo", "unweighted", "cart"] = "elbo"
    """`elbo`: 1/t on masked tokens (arXiv 2406.07524); `unweighted`: 1; `cart`: by the distance to clean tokens (arXiv 2508.15487)."""
    cart_p: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of `cart` only: 1 counts the two neighbours, smaller values look further."""
    normaliser: Literal["eligible", "masked", "masked_micro_batch"] = "eligible"
    """Divide the sum once by the global count of eligible tokens or of masked tokens, or, as DiffuLLaMA's code does, each micro-batch by its masked tokens."""


class Method(Section):
    """The four choices of a conversion. A `name` fills in the row of a published method; single keys override it."""

    name: str = "diffullama"
    """A row of `dlmconvert/methods.py`."""
    attention: Attention = Attention()
    alignment: Literal["shift", "in_place"] = "shift"
    """Which hidden state predicts token i: i-1, as the AR model did, or i."""
    corruption: Corruption = Corruption()
    objective: Objective = Objective()


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
    """Stop tokenising a source after so many tokens."""
    documents: Literal["joined", "isolated"] = "joined"
    """`joined`: tokens of a row see all of it, as DiffuLLaMA; `isolated`: attention stops at document boundaries and positions restart."""
    cache: str | None = Field(default=None, json_schema_extra=SAFE)
    """Folder for prepared rows. Empty: `.tokens` beside the run folder, shared by all runs there."""
    workers: Positive | None = Field(default=None, json_schema_extra=SAFE)
    """Processes that tokenise. Empty: one a CPU core."""


class Lora(Section):
    """Low-rank adapters (peft) instead of full-parameter training."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale of the adapters; the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"
    """Module names, or `all-linear`: every linear layer but the output head."""


class Rates(Section):
    """Learning rate of each kind of parameter, as a multiple of `learning_rate`: 0 freezes it. Norms keep 1."""

    attention: Annotated[float, Field(ge=0)] = 1.0
    mlp: Annotated[float, Field(ge=0)] = 1.0
    """All other parts of a layer, experts and routers among them."""
    embeddings: Annotated[float, Field(ge=0)] = 1.0
    """With the mask token's row; frozen, that row stays as `source.mask_init` made it."""
    head: Annotated[float, Field(ge=0)] = 1.0
    """The output matrix. Where it is tied to the embeddings, give both one value."""


class Optimization(Section):
    """One stage of training."""

    steps: Positive = 1000
    """Optimizer steps."""
    rows_per_step: Positive = 16
    """Rows in the global batch."""
    micro_batch: Positive = Field(default=8)
    """Rows in one forward and backward; the rest of the global batch is accumulated."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After warm-up: cosine to `final_learning_rate`, constant, or constant and then linear decay over the last `decay_fraction` (warm-up, stable, decay)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the last step of `cosine` and `wsd`."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the steps that `wsd` decays over."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled (AdamW), on matrices only: biases, norms and embeddings are left alone."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm."""
    rates: Rates = Rates()
    lora: Lora | None = None
    """Train adapters; empty: all parameters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = 0
    """Order of the rows, noise, attention pairs."""
    save_steps: Positive = Field(default=500, json_schema_extra=SAFE)
    """Optimizer steps between checkpoints."""
    save_minutes: Annotated[float, Field(gt=0)] | None = Field(default=30.0, json_schema_extra=SAFE)
    """Minutes between checkpoints, whichever comes first."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(default=2, json_schema_extra=SAFE)
    """Newest checkpoints that are kept."""
    log_steps: Positive = Field(default=10, json_schema_extra=SAFE)
    """Optimizer steps between lines of metrics.jsonl."""
    validate_steps: Positive | None = Field(default=None, json_schema_extra=SAFE)
    """Optimizer steps between validation NELBOs (fixed noise). Empty: at the end only."""


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
    """Sampling steps in generation_config.json."""
    max_new_tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0)] = 0.9
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    order: Literal["random", "confidence", "entropy", "margin"] = "random"


class Engine(Section):
    """Where and in which precision the training runs."""

    name: Literal["single", "deepspeed"] = "single"
    """`single`: one device, no DeepSpeed. `deepspeed`: ZeRO, on one process or many (`--processes` switches to it)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: forward and backward in bfloat16, optimizer and master weights in float32 (single: autocast; deepspeed: bfloat16 copies of the weights)."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed deals to the processes: 0 nothing, 1 the optimizer, 2 gradients as well, 3 weights as well. bf16 with stage 0 runs as stage 1."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where DeepSpeed keeps the optimizer when not on the GPU: `cpu` from stage 1 on, `nvme` under stage 3."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO-3 keeps weights that are not in use."""
    nvme: str | None = None
    """Folder on a fast local disk for `nvme`."""
    deepspeed: dict[str, Any] = {}
    """More keys for the DeepSpeed JSON, which is derived from the recipe; a key that contradicts the recipe is an error."""
    compile: bool = False
    """torch.compile the model's forward."""
    threads: Positive | None = Field(default=None, json_schema_extra=SAFE)
    """CPU threads. Empty: torch's own choice."""


class Run(Section):
    """Where everything lies."""

    folder: str | None = Field(default=None, json_schema_extra=SAFE)
    """Run folder. Empty: `runs/<name>`."""


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


def anneal_steps_of(attention: Attention, steps: int) -> int:
    """Annealing steps as a whole number: 1 (open at once) without annealing, fractions resolved against `steps`."""
    if attention.anneal == "none":
        return 1
    assert attention.anneal_steps is not None
    if attention.anneal_steps < 1:
        return max(1, round(attention.anneal_steps * steps))
    return int(attention.anneal_steps)


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
    engine = recipe.engine
    if engine.offload_optimizer != "none" and engine.zero_stage == 0:
        yield f"engine.offload_optimizer={engine.offload_optimizer} needs engine.zero_stage=1 or more (nvme: 3)"
    if engine.offload_optimizer == "nvme" and engine.zero_stage in (1, 2):
        yield f"engine.offload_optimizer=nvme needs engine.zero_stage=3, not {engine.zero_stage}: set zero_stage=3, or offload to cpu"
    if engine.offload_parameters != "none" and engine.zero_stage != 3:
        yield f"engine.offload_parameters={engine.offload_parameters} needs engine.zero_stage=3, not {engine.zero_stage}"
    if "nvme" in (engine.offload_optimizer, engine.offload_parameters) and engine.nvme is None:
        yield "offloading to nvme needs a folder on a fast local disk: set engine.nvme"
    if engine.name == "deepspeed" and engine.compile:
        yield "engine.compile=true is for engine.name=single: leave it out under deepspeed"
    if engine.name == "deepspeed" and engine.device == "mps":
        yield "engine.name=deepspeed runs on cuda or cpu, not on engine.device=mps"
    for section, values in (("pretrain", recipe.pretrain), ("train", recipe.train), ("sft", recipe.sft)):
        if values is None:
            continue
        if values.micro_batch > values.rows_per_step:
            yield f"{section}.micro_batch={values.micro_batch} is larger than {section}.rows_per_step={values.rows_per_step}"
        if values.warmup_steps > values.steps:
            yield f"{section}.warmup_steps={values.warmup_steps} is longer than {section}.steps={values.steps}"
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
