"""Frozen dataclasses for a run, one per section; YAML files under `configs/` fill them.

Every relative path in a YAML file is relative to that file. `load_config` resolves them.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

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


@dataclass(frozen=True)
class ItemsConfig:
    """How an item is named in tokens."""

    tokenizer: Literal["atomic", "title"] = "atomic"
    """`atomic`: one new token an item. `title`: the title's tokens and a terminator."""
    max_title_tokens: int = 64
    """Longer titles are cut here, terminator not counted."""
    init: Literal["text", "mean", "collaborative"] = "text"
    """First value of a new token's row: mean of its title's tokens, of the table, or `text` with train co-occurrence added."""
    collaborative_dim: int = 128
    """`collaborative`: dimensions of the co-occurrence vectors (train only)."""
    collaborative_window: int = 20
    """`collaborative`: items up to this many steps apart count as taken together."""
    collaborative_scale: float = 0.5
    """`collaborative`: length of the co-occurrence part over that of the text part."""

    def __post_init__(self) -> None:
        _require(self.max_title_tokens >= 1, f"items.max_title_tokens is {self.max_title_tokens}; use 1 or more")
        for name in ("collaborative_dim", "collaborative_window", "collaborative_scale"):
            value = getattr(self, name)
            _require(value > 0, f"items.{name} is {value}; use a positive value")


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

    def __post_init__(self) -> None:
        _require(self.max_history >= 1, f"prompt.max_history is {self.max_history}; use 1 or more")


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
    remat: Literal["none", "full"] = "full"
    """`full`: layers are recomputed in the backward pass (least memory)."""


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
    """`all-linear`, or module names such as `q_proj`, `v_proj`; one that matches nothing is an error."""

    def __post_init__(self) -> None:
        _require(self.r >= 1, f"lora.r is {self.r}; use 1 or more (train.method: full trains without adapters)")
        _require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; use a value in [0, 1)")
        _require(self.alpha > 0, f"lora.alpha is {self.alpha}; use a positive value")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    method: Literal["lora", "full"] = "lora"
    """`lora`: adapters and new token rows. `full`: every parameter."""
    epochs: float = 1.0
    """Passes over the training examples."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; null: as `epochs` says."""
    row_length: int = 512
    """Tokens in a packed row (T)."""
    batch_rows: int = 4
    """Packed rows in one forward and backward pass (B)."""
    accumulate: int = 1
    """Passes per optimizer step, weighted by their target tokens."""
    learning_rate: float = 2e-4
    """Peak learning rate of the adapters (or of everything with method full)."""
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
        for name in ("max_steps", "validate_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name} is {value}; use 1 or more, or null")
        _require(self.clip_norm >= 0, f"train.clip_norm is {self.clip_norm}; use 0 (never) or more")


@dataclass(frozen=True)
class MeshConfig:
    """Devices. Axis sizes multiply to the number of devices; -1 takes what is left."""

    data: int = -1
    """Rows of a batch are divided."""
    fsdp: int = 1
    """Rows of a batch and parameters are divided."""
    tensor: int = 1
    """Heads and hidden units are divided."""

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        _require(
            all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
            f"mesh is data {sizes[0]}, fsdp {sizes[1]}, tensor {sizes[2]}; sizes are 1 or more, at most one is -1",
        )


@dataclass(frozen=True)
class DecodeConfig:
    """Constrained beam search."""

    beam: int = 50
    """Beams (W) kept per user when an item has several tokens; with one token a user's list is exact anyway."""
    top_k: int = 20
    """Items returned per user (K)."""
    batch_users: int = 16
    """Users decoded together."""
    layout: Literal["auto", "dense", "csr"] = "auto"
    """Transition table: dense next-state table, level-order CSR; `auto`: dense while it fits in 64 MB."""

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

    def __post_init__(self) -> None:
        _require(self.users is None or self.users >= 1, f"evaluate.users is {self.users}; use 1 or more, or null for all")
        _require(self.unconstrained_users >= 0, f"evaluate.unconstrained_users is {self.unconstrained_users}; use 0 or more")


@dataclass(frozen=True)
class RunConfig:
    """A run: data, items, prompt, model, adapters, training, mesh, decoding, evaluation."""

    data: DataConfig = field(default_factory=DataConfig)
    items: ItemsConfig = field(default_factory=ItemsConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


PATH_FIELDS = {"data": ("source", "catalogue"), "model": ("base", "tokenizer")}


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return close[0] if close else ""


def _matches(value: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, arm) for arm in typing.get_args(annotation))
    if origin is Literal:
        return value in typing.get_args(annotation)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(isinstance(v, str) for v in value)
    if annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _describe(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(annotation))
    return getattr(annotation, "__name__", str(annotation)).replace("NoneType", "null").replace("None", "null")


def _section(cls: type, values: Any, name: str, where: str) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: section {name} is {values!r}; write `{name}:` with indented `key: value` lines below")
    hints = typing.get_type_hints(cls)
    clean = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {name}.{key}; the nearest known key is {name}.{_nearest(str(key), hints)}")
        if isinstance(value, str) and _matches(0.5, hints[key]) and not _matches(value, hints[key]):
            try:
                value = float(value)  # YAML 1.1 reads 1e-4 as text
            except ValueError:
                pass
        if not _matches(value, hints[key]):
            raise UserError(f"{where}: {name}.{key} is {value!r}; expected {_describe(hints[key])}")
        clean[key] = tuple(value) if isinstance(value, list) else value
    return cls(**clean)


def parse_config(values: Any, where: str) -> RunConfig:
    """Builds a RunConfig from nested dictionaries; `where` names the source in errors."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected sections such as `data:` and `train:`, found {type(values).__name__}")
    hints = typing.get_type_hints(RunConfig)
    for key in values:
        if key not in hints:
            raise UserError(f"{where}: unknown key {key}; the nearest known key is {_nearest(str(key), hints)}")
    return RunConfig(**{k: _section(hints[k], v, k, where) for k, v in values.items()})


def load_config(path: str | Path) -> RunConfig:
    """Reads a YAML file. Values that name an existing path relative to the file become absolute paths."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the config ({error.strerror}); name a YAML file such as configs/quick.yaml"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the config as UTF-8") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    config = parse_config(values, str(path))
    return resolve_paths(config, path.parent)


def resolve_paths(config: RunConfig, folder: Path) -> RunConfig:
    """Makes path-like values absolute when they exist below `folder` or look like paths."""
    for section, names in PATH_FIELDS.items():
        part = getattr(config, section)
        for name in names:
            value = getattr(part, name)
            if value is None or value.startswith("tfds:") and not value.startswith(("tfds:.", "tfds:/")):
                continue
            scheme, rest = ("tfds:", value[5:]) if value.startswith("tfds:") else ("", value)
            if rest.startswith(("./", "../")) or (folder / rest).exists():
                part = dataclasses.replace(part, **{name: scheme + str((folder / rest).resolve())})
        config = dataclasses.replace(config, **{section: part})
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dictionaries (tuples become lists), ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def dump_config(config: RunConfig) -> str:
    """The YAML text that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def nearest_field(option: str) -> str | None:
    """None for `--section.field` that exists; else the nearest option that does."""
    known = [
        f"--{section}.{name}" for section, cls in typing.get_type_hints(RunConfig).items() for name in typing.get_type_hints(cls)
    ]
    option = option.replace("-", "_").replace("__", "--", 1) if option.startswith("--") else option
    positive = option.replace(".no_", ".")
    return None if option in known or positive in known else _nearest(option, known)
