"""Training examples of several tasks as one: pairs of a prompt and an answer, and mixtures of all that rows are packed from."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from sftrec_jax.data.segments import PackedBatch
from sftrec_jax.errors import UserError

if TYPE_CHECKING:
    from sftrec_jax.train.batches import Packable


@dataclass(frozen=True, eq=False)
class Pairs:
    """Prompts with an answer each, every token of which is a target."""

    tokens: np.ndarray
    """int32 [P]: prompt, answer, prompt, answer, ..."""
    starts: np.ndarray
    """int64 [n + 1], where each prompt begins."""
    answers: np.ndarray
    """int64 [n], where each answer begins."""
    task: str
    """For messages."""

    @classmethod
    def of(cls, prompts: list[np.ndarray], answers: list[np.ndarray], task: str) -> "Pairs":
        """From int32 token arrays; a prompt and an answer have at least one token each."""
        runs = [run for pair in zip(prompts, answers, strict=True) for run in pair]
        edges = np.concatenate([[0], np.cumsum([len(run) for run in runs], dtype=np.int64)])
        tokens = np.concatenate([np.zeros(0, np.int32), *runs]).astype(np.int32)
        return cls(tokens, edges[::2], edges[1::2], task)

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]; the last token of an answer is not fed."""
        return np.diff(self.starts) - 1

    @property
    def targets(self) -> np.ndarray:
        """int64 [n] tokens of the answers."""
        return self.starts[1:] - self.answers

    @property
    def target_items(self) -> np.ndarray:
        """int64 [n], ones: an answer is one target."""
        return np.ones(len(self), np.int64)

    @property
    def lengths_apart(self) -> np.ndarray:
        """int64 [n]: as they are."""
        return self.lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return int(self.targets.max(initial=0))

    def within(self, tokens: int, targets: int) -> "Pairs":
        """The same, if each fits a row. Raises UserError for one that does not: it cannot be divided."""
        over = (self.lengths > tokens) | (self.targets > targets)
        if over.any():
            at = int(over.argmax())
            raise UserError(
                f"tasks.{self.task}: an example takes {self.lengths[at]} tokens, more than train.row_length {tokens}; raise "
                "that, or lower items.max_title_tokens"
            )
        return self

    def pack(self, rows: list[np.ndarray], row_length: int, targets_per_row: int) -> PackedBatch:
        """The arrays of rows that hold the pairs with these indices."""
        out = PackedBatch.empty(len(rows), row_length, targets_per_row)
        for b, row in enumerate(rows):
            at = target_at = 0
            for number, pair in enumerate(row.tolist(), start=1):
                begin, answer, end = self.starts[pair], self.answers[pair], self.starts[pair + 1]
                length, targets = int(end - begin - 1), int(end - answer)
                here, there = slice(at, at + length), slice(target_at, target_at + targets)
                out.tokens[b, here] = self.tokens[begin : end - 1]
                out.positions[b, here] = np.arange(length)
                out.segments[b, here] = number
                out.forks[b, here] = np.arange(1, length + 1)
                out.target_positions[b, there] = at + (answer - begin - 1) + np.arange(targets)
                out.labels[b, there] = self.tokens[answer:end]
                out.weights[b, there] = 1.0
                at, target_at = at + length, target_at + targets
        return out


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several kinds of examples, numbered one kind after the other, each with the share of it that an epoch takes."""

    parts: "tuple[Packable, ...]"
    weights: tuple[float, ...]
    """How often each example of a part is seen in an epoch, on average: 0.5 half of them, 2 each twice."""
    names: tuple[str, ...] = ()
    """What each part is called where it is shown."""

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @cached_property
    def _joined(self) -> dict[str, np.ndarray]:
        names = ("lengths", "targets", "target_items", "lengths_apart")
        return {name: np.concatenate([getattr(part, name) for part in self.parts]) for name in names}

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n] tokens of each."""
        return self._joined["lengths"]

    @property
    def targets(self) -> np.ndarray:
        """int64 [n] target tokens of each."""
        return self._joined["targets"]

    @property
    def target_items(self) -> np.ndarray:
        """int64 [n] targets of each, an item or a text as one."""
        return self._joined["target_items"]

    @property
    def lengths_apart(self) -> np.ndarray:
        """int64 [n] tokens of each, had each target a prompt of its own."""
        return self._joined["lengths_apart"]

    @property
    def longest(self) -> int:
        """Tokens of the longest target."""
        return max(part.longest for part in self.parts)

    def within(self, tokens: int, targets: int) -> "Mixture":
        """The same in parts that fit a row."""
        return Mixture(tuple(part.within(tokens, targets) for part in self.parts), self.weights, self.names)

    @property
    def edges(self) -> np.ndarray:
        """int64 [parts + 1]: the number of each part's first example, and of all."""
        return np.concatenate([[0], np.cumsum([len(part) for part in self.parts])]).astype(np.int64)

    def chosen(self, seed: int, epoch: int) -> np.ndarray:
        """int64: the examples of an epoch, a function of (seed, epoch). As often as the weight's whole part says, and a share
        once more, drawn anew in every epoch."""
        picked, begin = [], 0
        for number, (part, weight) in enumerate(zip(self.parts, self.weights, strict=True)):
            whole, rest = divmod(weight, 1.0)
            picked += [np.arange(len(part))[None].repeat(int(whole), axis=0).reshape(-1) + begin]
            some = round(rest * len(part))
            rng = np.random.default_rng([seed, epoch, number])
            picked.append(np.sort(rng.choice(len(part), some, replace=False)) + begin)
            begin += len(part)
        return np.concatenate(picked)

    def pack(self, rows: list[np.ndarray], row_length: int, targets_per_row: int) -> PackedBatch:
        """The arrays of rows that hold the examples with these indices; in a row the parts stand one behind the other."""
        edges = self.edges
        out = PackedBatch.empty(len(rows), row_length, targets_per_row)
        for number, part in enumerate(self.parts):
            own = [row[(row >= edges[number]) & (row < edges[number + 1])] - edges[number] for row in rows]
            if any(len(row) for row in own):
                _append(out, part.pack(own, row_length, targets_per_row))
        return out


def _append(out: PackedBatch, more: PackedBatch) -> None:
    """Puts what the rows of `more` hold behind what those of `out` hold."""
    used, added = ((x.segments > 0).sum(1) for x in (out, more))
    targets_used, targets_added = ((x.weights > 0).sum(1) for x in (out, more))
    if (used + added > out.tokens.shape[1]).any() or (targets_used + targets_added > out.labels.shape[1]).any():
        raise ValueError("a row holds more than its capacities")
    last = out.segments.max(1)
    for row in np.flatnonzero(added):
        here, there = slice(used[row], used[row] + added[row]), slice(0, added[row])
        for name in ("tokens", "positions", "branches", "forks"):
            getattr(out, name)[row, here] = getattr(more, name)[row, there]
        out.segments[row, here] = more.segments[row, there] + last[row]
        here, there = slice(targets_used[row], targets_used[row] + targets_added[row]), slice(0, targets_added[row])
        for name in ("labels", "weights"):
            getattr(out, name)[row, here] = getattr(more, name)[row, there]
        out.target_positions[row, here] = more.target_positions[row, there] + used[row]
