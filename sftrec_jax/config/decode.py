"""Search and evaluation."""

from dataclasses import dataclass
from typing import Literal

from sftrec_jax.config.check import require


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
            require(value >= 1, f"decode.{name} is {value}; use 1 or more")
        require(
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
    task_users: int = 200
    """Users (drawn by `train.seed`) whose test interactions the tasks of `tasks` are asked about."""
    templates: tuple[str, ...] = ()
    """Templates of prompts that training does not use: test is ranked with each of them, too (P5's zero-shot evaluation)."""
    accept_leaks: tuple[str, ...] = ()
    """Findings of the leak linter, by name, that do not stop `prepare` and `evaluate`; recorded in the protocol card."""

    def __post_init__(self) -> None:
        require(self.users is None or self.users >= 1, f"evaluate.users is {self.users}; use 1 or more, or null for all")
        for name in ("unconstrained_users", "grounding_users", "task_users"):
            require(getattr(self, name) >= 0, f"evaluate.{name} is {getattr(self, name)}; use 0 or more")
        require(0 < self.counter_decay <= 1, f"evaluate.counter_decay is {self.counter_decay}; use a value in (0, 1]")
