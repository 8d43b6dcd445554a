"""Optimisation."""

import math
from dataclasses import dataclass
from typing import Literal

from sftrec_jax.config.check import require


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
    normaliser: Literal["full", "level"] = "full"
    """What probabilities of targets are taken over: all tokens, or (where items are as many new tokens each) those of the
    target's place in its item; the latter costs less and goes with `decode.normaliser: level`."""
    dropout: float = 0.0
    """Share of the values of token embeddings and of each sublayer's output that a step leaves out (Vaswani et al. 2017); for
    small models from scratch, which see their examples many times."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    validate_every: int | None = None
    """Optimizer steps between validations; null: about four in a run."""
    validate_users: int = 200
    """Users (drawn by `seed`) in a validation."""
    save_every: int | None = None
    """Optimizer steps between checkpoints, beside those of validations; null: as `save_minutes` says."""
    save_minutes: float = 10.0
    """Minutes after which a checkpoint is written in any case, so that a killed run loses no more; 0: never."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the best by validation."""
    keep_every: int | None = None
    """Checkpoints of steps that this number divides are kept, too; null: none of them."""
    checkpoints: str | None = None
    """Folder of the checkpoints: another one on this machine, or gs://BUCKET/PATH, s3://BUCKET/PATH; null: `checkpoints` in the
    run's folder."""
    best_metric: Literal["ndcg@5", "ndcg@10", "ndcg@20", "recall@5", "recall@10", "recall@20", "mrr@10", "mrr@20"] = "ndcg@10"
    """Validation metric that chooses the best checkpoint."""
    skip_spikes: float | None = None
    """An update is skipped whose loss lies more than so many standard deviations above the mean of the steps before (6 is usual);
    null: only one that is not finite."""
    stop_after_skips: int = 10
    """Training stops after so many skipped updates in a row."""
    seed: int = 0
    """Adapter initialisation, dropout, order of examples."""

    def __post_init__(self) -> None:
        for name in ("row_length", "batch_rows", "accumulate", "validate_users", "keep_checkpoints", "stop_after_skips"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name} is {value}; use 1 or more")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), f"train.{name} is {value}; use a positive number")
        for name in ("warmup_fraction", "final_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"train.{name} is {value}; use a value in [0, 1]")
        require(
            0 <= self.rows_first < 1,
            f"train.rows_first is {self.rows_first}; use a share in [0, 1) (train.method: rows trains nothing else)",
        )
        for name in ("max_steps", "validate_every", "save_every", "keep_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name} is {value}; use 1 or more, or null")
        place = self.checkpoints
        if place is not None:
            require(place.strip() != "", "train.checkpoints is empty; name a folder, or null")
            scheme, remote, rest = place.partition("://")
            bucket, _, path = rest.partition("/")
            require(
                not remote or (scheme in ("gs", "s3") and bucket != "" and path.strip("/") != ""),
                f"train.checkpoints is {place!r}; use a folder, gs://BUCKET/PATH or s3://BUCKET/PATH, or null",
            )
        minutes, spikes = self.save_minutes, self.skip_spikes
        require(minutes >= 0 and math.isfinite(minutes), f"train.save_minutes is {minutes}; use 0 (never) or more")
        require(
            spikes is None or (spikes > 0 and math.isfinite(spikes)),
            f"train.skip_spikes is {spikes}; use a positive number such as 6, or null",
        )
        require(0 <= self.dropout < 1, f"train.dropout is {self.dropout}; use a share in [0, 1)")
        ratio = self.loraplus_lr_ratio
        require(
            ratio is None or (ratio >= 1 and math.isfinite(ratio)), f"train.loraplus_lr_ratio is {ratio}; use 1 or more, or null"
        )
        require(self.clip_norm >= 0, f"train.clip_norm is {self.clip_norm}; use 0 (never) or more")
