"""How items are named in tokens."""

import math
from dataclasses import dataclass
from typing import Literal

from sftrec_jax.config.check import require


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
        require(self.max_title_tokens >= 1, f"items.max_title_tokens is {self.max_title_tokens}; use 1 or more")
        for name in ("collaborative_dim", "collaborative_window", "collaborative_scale"):
            value = getattr(self, name)
            require(value > 0, f"items.{name} is {value}; use a positive value")
        for name in ("cluster_branches", "cluster_leaf"):
            value = getattr(self, name)
            require(value >= 2, f"items.{name} is {value}; use 2 or more")
        require(
            (self.tokenizer == "file") == (self.codes_file is not None),
            f"items.tokenizer is {self.tokenizer} and items.codes_file {self.codes_file}; set both, or neither",
        )
        with_codebook = ("atomic", "rqvae", "rqkmeans", "pq", "opq")
        require(
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
            require(value >= 1, f"embedding.{name} is {value}; use 1 or more")
        for name in ("text_weight", "collaborative_weight", "file_weight"):
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), f"embedding.{name} is {value}; use a positive number")
        require(
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
    collisions: Literal["extra", "item", "nearest", "lists"] = "extra"
    """Items with equal codes: one more level that counts them (TIGER), or that has a token of each item's own (as the last one of
    `cid`), the nearest free code (LC-Rec, MiniOneRec), or shared."""
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
            require(value >= 1, f"semantic.{name} is {value}; use 1 or more")
        require(self.codes >= 2, f"semantic.codes is {self.codes}; use 2 or more")
        require(all(size >= 1 for size in self.hidden), f"semantic.hidden is {list(self.hidden)}; use sizes of 1 or more")
        for name in ("learning_rate", "commitment"):
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), f"semantic.{name} is {value}; use a positive number")
