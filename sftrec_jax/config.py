"""Frozen dataclasses for a run, one per section; `config_file` fills them from YAML files such as those under `configs/`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from sftrec_jax.errors import UserError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class DataConfig:
    """Where interactions and the catalogue come from, and how they are filtered and split."""

    source: str = "movielens-latest-small"
    """`movielens-latest-small` (embedded), a .csv, .tsv, .parquet, .jsonl, .inter or .txt file, or `tfds:NAME[:SPLIT]`."""
    catalogue: str | None = None
    """One row an item (.csv, .tsv, .parquet, .jsonl, .item); null: the ids in the log serve as titles."""
    user_column: str = "user_id"
    """Column of the log that names the user."""
    item_column: str = "item_id"
    """Column of the log that names the item."""
    time_column: str | None = "timestamp"
    """Column of the log with the time (number or ISO date); null: rows of a user are in order already."""
    rating_column: str | None = None
    """Column of the log with a rating; null: none is read."""
    catalogue_item_column: str = "item_id"
    """Column of the catalogue that names the item."""
    title_column: str = "title"
    """Column of the catalogue with the title."""
    keyphrase_column: str | None = None
    """Column of the catalogue with a keyphrase (`items.tokenizer: keyphrase`); null: none is read."""
    history_column: str | None = None
    """Column with the items before `item_column`, as a list: the sources then hold examples, split already, and filters, times
    and `split` do not apply (BIGRec, D3, MiniOneRec); null: the source is a log."""
    valid_source: str | None = None
    """Examples of validation, where `history_column` is set; `source` has those of train."""
    test_source: str | None = None
    """Examples of test, where `history_column` is set."""
    text_columns: tuple[str, ...] = ()
    """Columns of the catalogue that are joined to the text of an item (`embedding.text`); empty: the title alone."""
    min_rating: float | None = None
    """Interactions rated lower are left out; needs `rating_column`."""
    user_core: int = 3
    """Users with fewer interactions are left out (repeated together with `item_core` until stable)."""
    item_core: int = 0
    """Items with fewer interactions are left out, from the catalogue too; 0 keeps items that nobody took."""
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """`leave_one_out`: a user's last item is test, the one before validation. `temporal`: two global points in time."""
    valid_fraction: float = 0.1
    """Temporal split: share of interactions between the two points in time."""
    test_fraction: float = 0.1
    """Temporal split: share of interactions after the second point in time."""
    tie_seed: int = 0
    """Interactions of a user with equal times are ordered by a hash of (tie_seed, user, item)."""

    def __post_init__(self) -> None:
        _require(self.user_core >= 0, f"data.user_core is {self.user_core}; use 0 or more")
        _require(self.item_core >= 0, f"data.item_core is {self.item_core}; use 0 or more")
        fractions = (self.valid_fraction, self.test_fraction)
        _require(
            all(0 < f < 1 for f in fractions) and sum(fractions) < 1,
            f"data.valid_fraction {fractions[0]} and data.test_fraction {fractions[1]} must lie in (0, 1) and sum below 1",
        )
        _require(
            self.min_rating is None or self.rating_column is not None,
            f"data.min_rating is {self.min_rating} but data.rating_column is not set; name the column",
        )
        _require(
            self.history_column is not None or (self.valid_source is None and self.test_source is None),
            "data.valid_source or data.test_source is set but data.history_column is not; name the column with the histories",
        )


@dataclass(frozen=True)
class ItemsConfig:
    """How an item is named in tokens."""

    tokenizer: Literal["atomic", "numeric", "title", "keyphrase", "cid", "rqvae", "rqkmeans", "pq", "opq", "file"] = "atomic"
    """`atomic`: one new token an item. `numeric`: a number in the model's own tokens (P5). `title`, `keyphrase`: the words and a
    terminator. `cid`: the path in a tree of clusters of the train co-occurrence graph (OpenP5). `rqvae`, `rqkmeans`, `pq`, `opq`:
    semantic ids from `embedding` (see `semantic`). `file`: codes from `codes_file`."""
    order: Literal["catalogue", "random", "sequential", "collaborative"] = "catalogue"
    """`atomic`, `numeric`: which item gets which number. `sequential`: by first appearance in train; `collaborative`: items
    taken together stand together (the leaves of `cid`)."""
    max_title_tokens: int = 64
    """Longer titles and keyphrases are cut here, terminator not counted."""
    codes_file: str | None = None
    """`file`: an `index.json` as LETTER and MiniOneRec publish them, such as {"0": ["<a_183>", "<b_70>"]}; may be gzipped."""
    codes_keys: Literal["id", "row"] = "id"
    """`file`: its keys are item ids, or (LETTER) places in the catalogue from 0."""
    init: Literal["text", "mean", "codebook", "collaborative"] = "text"
    """First value of a new token's row: mean of the tokens of its items' titles, mean of the table, `codebook` (the mean and the
    projected vector of its code, or of the item), or `text` with train co-occurrence added."""
    collaborative_dim: int = 128
    """`collaborative`: dimensions of the co-occurrence vectors (train only)."""
    collaborative_window: int = 20
    """`collaborative`: items up to this many steps apart count as taken together."""
    collaborative_scale: float = 0.5
    """`collaborative`: length of the co-occurrence part over that of the text part."""
    cluster_branches: int = 16
    """`cid` and `order: collaborative`: clusters that a cluster is divided into."""
    cluster_leaf: int = 64
    """`cid` and `order: collaborative`: a cluster of at most this many items is not divided."""

    def __post_init__(self) -> None:
        _require(self.max_title_tokens >= 1, f"items.max_title_tokens is {self.max_title_tokens}; use 1 or more")
        for name in ("collaborative_dim", "collaborative_window", "collaborative_scale"):
            value = getattr(self, name)
            _require(value > 0, f"items.{name} is {value}; use a positive value")
        for name in ("cluster_branches", "cluster_leaf"):
            value = getattr(self, name)
            _require(value >= 2, f"items.{name} is {value}; use 2 or more")
        _require(
            (self.tokenizer == "file") == (self.codes_file is not None),
            f"items.tokenizer is {self.tokenizer} and items.codes_file {self.codes_file}; set both, or neither",
        )
        with_codebook = ("atomic", "rqvae", "rqkmeans", "pq", "opq")
        _require(
            self.init != "codebook" or self.tokenizer in with_codebook,
            f"items.init is codebook, but items.tokenizer {self.tokenizer} has none; use text, mean or collaborative",
        )


@dataclass(frozen=True)
class EmbeddingConfig:
    """Item vectors: blocks with rows of length 1, each times its weight, side by side."""

    text: Literal["none", "tfidf", "sentence", "lm"] = "tfidf"
    """From `data.text_columns`: TF-IDF and SVD, `sentence_model`, or the base model's mean last hidden state."""
    text_weight: float = 1.0
    """Length of the text block's rows."""
    collaborative: Literal["none", "ppmi", "cooccurrence"] = "none"
    """From training interactions only: SVD of the positive pointwise mutual information, or of log(1 + co-occurrence)."""
    collaborative_weight: float = 1.0
    """Length of the collaborative block's rows."""
    file: str | None = None
    """A `.npy` float array [items of the catalogue, dimensions], rows in the order of the catalogue."""
    file_weight: float = 1.0
    """Length of the rows from `file`."""
    sentence_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """`sentence`: folder or hub id of a sentence-transformers model (extra `text`)."""
    dim: int = 128
    """Dimensions of `tfidf` and of the collaborative block."""
    window: int = 5
    """Collaborative block: items up to this many steps apart count as taken together."""
    seed: int = 0
    """Start of the solvers."""

    def __post_init__(self) -> None:
        for name in ("dim", "window"):
            value = getattr(self, name)
            _require(value >= 1, f"embedding.{name} is {value}; use 1 or more")
        for name in ("text_weight", "collaborative_weight", "file_weight"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), f"embedding.{name} is {value}; use a positive number")
        _require(
            self.text != "none" or self.collaborative != "none" or self.file is not None,
            "embedding: text and collaborative are none and file is not set; choose at least one",
        )


@dataclass(frozen=True)
class SemanticConfig:
    """Semantic ids: how item vectors become codes."""

    levels: int = 3
    """Codes an item (L), the extra one of `collisions: extra` not counted."""
    codes: int = 256
    """Codes a level (K)."""
    balanced: bool = False
    """Codes are used evenly: on every level (`rqkmeans`), on the last one by Sinkhorn (`rqvae`, LC-Rec)."""
    collisions: Literal["extra", "nearest", "lists"] = "extra"
    """Items with equal codes: one more level that counts them (TIGER), the nearest free code (LC-Rec, MiniOneRec), or shared."""
    latent: int = 32
    """`rqvae`: dimensions of the space that is quantised."""
    hidden: tuple[int, ...] = (512, 256)
    """`rqvae`: hidden layers of the encoder; the decoder mirrors them."""
    epochs: int = 200
    """`rqvae`: passes over the items, fewer where `max_steps` is reached."""
    max_steps: int = 40_000
    """`rqvae`: most steps; 200 epochs of Amazon Beauty take 9,600, of a million items 40,000 are 10 epochs."""
    batch: int = 256
    """`rqvae`: items a step."""
    learning_rate: float = 3e-3
    """`rqvae`: peak rate of AdamW."""
    commitment: float = 0.25
    """`rqvae`: weight of the commitment loss."""
    seed: int = 0
    """Initialisation and order."""

    def __post_init__(self) -> None:
        for name in ("levels", "latent", "epochs", "max_steps", "batch"):
            value = getattr(self, name)
            _require(value >= 1, f"semantic.{name} is {value}; use 1 or more")
        _require(self.codes >= 2, f"semantic.codes is {self.codes}; use 2 or more")
        _require(all(size >= 1 for size in self.hidden), f"semantic.hidden is {list(self.hidden)}; use sizes of 1 or more")
        for name in ("learning_rate", "commitment"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), f"semantic.{name} is {value}; use a positive number")


@dataclass(frozen=True)
class PromptConfig:
    """How a history is written, and what is a target."""

    format: Literal["stream", "instruct"] = "stream"
    """`stream`: item tokens only, every item a target. `instruct`: a worded prompt, then one target."""
    max_history: int = 100
    """At most this many of the newest items go into a prompt."""
    windows: Literal["last", "all"] = "all"
    """Training on histories longer than `max_history`: the `last` window only, or `all` of them, from the newest back."""
    history: Literal["titles", "tokens"] = "titles"
    """`instruct`: items of the history as titles or as item tokens."""
    prefix: str = "Items that the user took, oldest first:\n"
    """`instruct`: text before the history."""
    separator: str = "\n"
    """`instruct`: text after each item of the history."""
    suffix: str = "The next item:\n"
    """`instruct`: text between history and target."""
    stride: int = 1
    """`instruct`, targets with more than `max_history` items before them: by how many items the beginning of their prompts moves
    at once. 1: each sees the newest `max_history`, as in inference; half of that: half of it to all, and neighbours share."""

    def __post_init__(self) -> None:
        _require(self.max_history >= 1, f"prompt.max_history is {self.max_history}; use 1 or more")
        _require(
            1 <= self.stride <= self.max_history,
            f"prompt.stride is {self.stride}; use 1 to prompt.max_history ({self.max_history}) items",
        )


@dataclass(frozen=True)
class TasksConfig:
    """What is trained, and how often an epoch sees each example: 1 once, 0.5 half of them, 2 each twice, 0 never."""

    sequential: float = 1.0
    """The next item of a history, as `prompt` says: what recommending asks for."""
    title_to_item: float = 0.0
    """An item's tokens from its title,"""
    item_to_title: float = 0.0
    """and its title from its tokens."""
    text_to_item: float = 0.0
    """An item's tokens from what `data.text_columns` say of it,"""
    item_to_text: float = 0.0
    """and that from its tokens, cut at `items.max_title_tokens`."""
    titles_to_item: float = 0.0
    """The next item's tokens after a history in titles,"""
    items_to_title: float = 0.0
    """and the next item's title after a history in item tokens."""
    templates: str | None = None
    """Folder with Jinja templates such as `title_to_item.j2` in place of the built-in ones."""

    def __post_init__(self) -> None:
        weights = {name: value for name, value in vars(self).items() if name != "templates"}
        for name, value in weights.items():
            _require(value >= 0 and math.isfinite(value), f"tasks.{name} is {value}; use a weight of 0 or more")
        _require(sum(weights.values()) > 0, "tasks: every weight is 0, so nothing would be trained; set tasks.sequential to 1")


@dataclass(frozen=True)
class ModelConfig:
    """The base model and the numeric types."""

    base: str = "smollm2-135m"
    """`smollm2-135m`, a local Hugging Face folder, a `.gguf` file, a hub id, or a `config.json` with `from_scratch`."""
    revision: str | None = None
    """Hub revision; null: the default branch."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; null: the base's own."""
    from_scratch: bool = False
    """Initialise the base at random from its config instead of reading weights."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and of frozen weights; `auto`: bfloat16 on TPU and GPU, on CPU what measured faster."""
    quantise: Literal["none", "int8", "int4", "nf4"] = "none"
    """Hold the frozen kernels of the layers in 8 or 4 bits with a scale for every 64 inputs (QLoRA; extra `quant`)."""
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """What the backward pass computes again: nothing (`none`, most memory), all but products with weights (`dots`), or whole
    layers (`full`). `auto`: none where the activations of the layers take at most a quarter of a device's memory, else full."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters, with the meaning that PEFT gives these names."""

    r: int = 16
    """Rank."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`, module names such as `q_proj`, `v_proj`, or a regular expression that module paths such as
    `model.layers.3.self_attn.q_proj` match as a whole; one that matches nothing is an error."""
    use_rslora: bool = False
    """The update is scaled by alpha / sqrt(r)."""
    use_dora: bool = False
    """Train the lengths of the kernel's columns too (DoRA)."""
    init: Literal["default", "pissa"] = "default"
    """`default`: A random, B zero. `pissa`: A and B take the principal part of the kernel, the base keeps the rest."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of other modules than most: name, end of a path or regular expression -> rank; the first that matches counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """The same for alpha."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers, from 0, that get adapters; null: all."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained as a whole beside the adapters: `embed_tokens`, `lm_head`, norms such as `input_layernorm`."""
    trainable_token_indices: tuple[int, ...] = ()
    """Ids of tokens of the base whose rows are trained beside those of new tokens."""
    start: str | None = None
    """Folder of a PEFT adapter, or of an earlier run, to begin with; it says rank, alpha, targets and kind."""

    def __post_init__(self) -> None:
        for name, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
            for key, value in getattr(self, name).items():
                _require(value >= least and value > 0, f"lora.{name}: {key} is {value}; use a positive number")
        _require(self.r >= 1, f"lora.r is {self.r}; use 1 or more (train.method: full trains without adapters)")
        _require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; use a value in [0, 1)")
        _require(self.alpha > 0, f"lora.alpha is {self.alpha}; use a positive value")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    method: Literal["rows", "embeddings", "lora", "full"] = "lora"
    """`rows`: new token rows only. `embeddings`: the token table, and the head where it is not tied. `lora`: adapters and new
    token rows. `full`: every parameter."""
    rows_first: float = 0.0
    """Share of the steps, from the first, in which only new token rows are trained; then the rest joins in."""
    epochs: float = 1.0
    """Passes over the training examples."""
    max_steps: int | None = None
    """At most this many optimizer steps, however many `epochs` would make; null: as `epochs` says."""
    share_prefixes: Literal["auto", "on", "off"] = "auto"
    """Whether prompts that begin alike are written once, with a branch for each target (`prompt.format: instruct`; a stream is
    written once anyway). `auto`: where loss and gradients are those of the examples one by one: without adapter dropout."""
    row_length: int = 512
    """Tokens in a packed row (T)."""
    batch_rows: int = 4
    """Packed rows in one forward and backward pass (B)."""
    accumulate: int = 1
    """Passes per optimizer step, weighted by their target tokens."""
    learning_rate: float = 2e-4
    """Peak learning rate of the adapters (method lora) or of everything (full)."""
    loraplus_lr_ratio: float | None = None
    """Rate of adapters' B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354), 1 or more; null: the same."""
    rows_learning_rate: float | None = None
    """Peak learning rate of new token rows; null: `learning_rate`."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the rate rises from 0."""
    final_fraction: float = 0.1
    """The cosine ends at this share of the peak."""
    weight_decay: float = 0.0
    """AdamW weight decay (matrices of adapters only; never on token rows)."""
    beta1: float = 0.9
    """AdamW."""
    beta2: float = 0.999
    """AdamW."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    validate_every: int | None = None
    """Optimizer steps between validations; null: about four in a run."""
    validate_users: int = 200
    """Users (drawn by `seed`) in a validation."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the best by validation."""
    seed: int = 0
    """Adapter initialisation, dropout, order of examples."""

    def __post_init__(self) -> None:
        for name in ("row_length", "batch_rows", "accumulate", "validate_users", "keep_checkpoints"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name} is {value}; use 1 or more")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), f"train.{name} is {value}; use a positive number")
        for name in ("warmup_fraction", "final_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"train.{name} is {value}; use a value in [0, 1]")
        _require(
            0 <= self.rows_first < 1,
            f"train.rows_first is {self.rows_first}; use a share in [0, 1) (train.method: rows trains nothing else)",
        )
        for name in ("max_steps", "validate_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name} is {value}; use 1 or more, or null")
        ratio = self.loraplus_lr_ratio
        _require(
            ratio is None or (ratio >= 1 and math.isfinite(ratio)), f"train.loraplus_lr_ratio is {ratio}; use 1 or more, or null"
        )
        _require(self.clip_norm >= 0, f"train.clip_norm is {self.clip_norm}; use 0 (never) or more")


@dataclass(frozen=True)
class MeshConfig:
    """Devices. Axis sizes multiply to the number of devices; -1 takes what is left."""

    data: int = -1
    """Rows of a batch are divided."""
    fsdp: int = 1
    """Rows of a batch and parameters are divided."""
    context: int = 1
    """Tokens of each row are divided, for rows longer than a device holds; in attention, heads are."""
    tensor: int = 1
    """Heads and hidden units are divided."""
    auto: bool = False
    """Choose the sizes by what the model needs and a device holds (`mesh: auto` in a file, `--mesh auto`)."""

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.context, self.tensor)
        said = f"data {sizes[0]}, fsdp {sizes[1]}, context {sizes[2]}, tensor {sizes[3]}"
        _require(
            all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
            f"mesh is {said}; sizes are 1 or more, at most one is -1",
        )
        _require(not self.auto or sizes == (-1, 1, 1, 1), f"mesh is auto and {said}; leave one of the two out")


@dataclass(frozen=True)
class DecodeConfig:
    """Constrained beam search."""

    beam: int = 50
    """Beams (W) kept per user when an item has several tokens; with one token a user's list is exact anyway."""
    top_k: int = 20
    """Items returned per user (K)."""
    batch_users: int = 16
    """Users decoded together."""
    layout: Literal["auto", "dense", "compact", "csr", "bitmap"] = "auto"
    """Transition table: dense next-token table, level-order CSR, bitmap, compact (the best of CSR, bitmap and tail per level);
    auto: dense while it fits in 64 MB, else compact. All give the same lists."""
    normaliser: Literal["full", "items", "level", "children"] = "full"
    """What next-token probabilities are taken over: full (all tokens: exact log-probabilities of the model), items (all item
    tokens), level (item tokens of this place), children (tokens that may follow); all but full rank otherwise."""

    def __post_init__(self) -> None:
        for name in ("beam", "top_k", "batch_users"):
            value = getattr(self, name)
            _require(value >= 1, f"decode.{name} is {value}; use 1 or more")
        _require(
            self.beam >= self.top_k,
            f"decode.beam is {self.beam} and decode.top_k {self.top_k}; a beam below K caps Recall@K, raise decode.beam",
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """Full-catalogue evaluation."""

    users: int | None = None
    """Users (drawn by `train.seed`) evaluated on test; null: all."""
    unconstrained_users: int = 100
    """Users whose unconstrained output is checked for items that do not exist."""
    grounding_users: int = 0
    """Users for whom freely written text is also grounded by its nearest items, as BIGRec does, for comparison."""
    mask_seen: bool = True
    """Items of the history are left out of lists; false where users take items again and targets may be repeats."""
    counter_decay: float = 0.8
    """The item-item counter: weight of the j-th newest item of a history is this to the power j."""
    accept_leaks: tuple[str, ...] = ()
    """Findings of the leak linter, by name, that do not stop `prepare` and `evaluate`; recorded in the protocol card."""

    def __post_init__(self) -> None:
        _require(self.users is None or self.users >= 1, f"evaluate.users is {self.users}; use 1 or more, or null for all")
        for name in ("unconstrained_users", "grounding_users"):
            _require(getattr(self, name) >= 0, f"evaluate.{name} is {getattr(self, name)}; use 0 or more")
        _require(0 < self.counter_decay <= 1, f"evaluate.counter_decay is {self.counter_decay}; use a value in (0, 1]")


@dataclass(frozen=True)
class RunConfig:
    """A run: data, items, item vectors, semantic ids, prompt, tasks, model, adapters, training, mesh, decoding, evaluation."""

    data: DataConfig = field(default_factory=DataConfig)
    items: ItemsConfig = field(default_factory=ItemsConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
