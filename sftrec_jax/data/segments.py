"""Training examples of all histories as segments of packed rows: which targets share one prompt, and the arrays of any of them.

A segment writes a history once, as its trunk (branch 0), and each target as a branch that sees the trunk up to its fork and
itself. Where a target's tokens are those with which the trunk goes on, the trunk is its branch. So every target sees the very
tokens, at the very positions, that it would see alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np

from sftrec_jax.data.windows import Windows, one_by_one, split


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Rows of packed examples; B rows, T tokens, K targets a row.

    Padding is segment 0, position 0, branch 0, fork 1; unused targets have position 0, label 0 and weight 0.
    """

    tokens: np.ndarray
    """int32 [B, T]"""
    positions: np.ndarray
    """int32 [B, T], as if each example stood alone"""
    segments: np.ndarray
    """int32 [B, T], 1, 2, ... in a row"""
    branches: np.ndarray
    """int32 [B, T], 0 is the trunk"""
    forks: np.ndarray
    """int32 [B, T], how much of the trunk a token may see; on the trunk positions + 1"""
    target_positions: np.ndarray
    """int32 [B, K], indices into the row"""
    labels: np.ndarray
    """int32 [B, K]"""
    weights: np.ndarray
    """float32 [B, K]"""

    @classmethod
    def empty(cls, rows: int, row_length: int, targets_per_row: int) -> "PackedBatch":
        """Rows of padding."""
        shape, target_shape = (rows, row_length), (rows, targets_per_row)
        tokens, positions, segments, branches = (np.zeros(shape, np.int32) for _ in range(4))
        target_positions, labels = (np.zeros(target_shape, np.int32) for _ in range(2))
        forks, weights = np.ones(shape, np.int32), np.zeros(target_shape, np.float32)
        return cls(tokens, positions, segments, branches, forks, target_positions, labels, weights)


@dataclass(frozen=True, eq=False)
class Example:
    """One training sequence. The hidden state at `target_positions[j]` predicts `labels[j]`; the last label is not fed."""

    tokens: np.ndarray
    """int32 [n]"""
    target_positions: np.ndarray
    """int32 [m], rising, below n"""
    labels: np.ndarray
    """int32 [m]"""
    weights: np.ndarray
    """float32 [m]"""


@dataclass(frozen=True, eq=False)
class Pieces:
    """The token runs that prompts and targets are made of, in one array."""

    tokens: np.ndarray
    """int32 [P]"""
    heads: np.ndarray
    """int64 [n_heads + 1]: what stands before the first item, tokens[heads[h]:heads[h + 1]], of one kind of user each."""
    suffix: slice
    """Where `tokens` has what stands between history and target."""
    texts: np.ndarray
    """int64 [n_runs + 1]: a run is what an item of a history is written as, tokens[texts[r]:texts[r + 1]]."""
    codes: np.ndarray
    """int64 [n_items + 1]: item i as target is tokens[codes[i]:codes[i + 1]]."""
    on_trunk: np.ndarray
    """bool [n_runs], whether history and target give the item the same tokens, but for the target's last, which is not fed."""
    numbers: np.ndarray
    """int64 [n + 1]: what stands before the first, second, ... item of a prompt, or [0] for nothing."""

    @classmethod
    def of(
        cls,
        heads: Sequence[np.ndarray],
        suffix: np.ndarray,
        texts: Sequence[np.ndarray] | None,
        codes: np.ndarray,
        owners: np.ndarray | None = None,
        numbers: Sequence[np.ndarray] = (),
    ) -> "Pieces":
        """From int32 arrays; `codes` [n_items, L] with -1 after the end.

        Args:
            texts: runs; None: run i is item i in codes.
            owners: int64 [n_runs] item of each run; None: run i is of item i.
        """
        code_lengths = (codes >= 0).sum(axis=1)
        head_at = np.cumsum([0, *map(len, heads)])
        number_at = head_at[-1] + np.cumsum([0, *map(len, numbers)])
        suffix_at = slice(int(number_at[-1]), int(number_at[-1]) + len(suffix))
        code_at = suffix_at.stop + np.concatenate([[0], np.cumsum(code_lengths)])
        runs = [*heads, *numbers, suffix, codes[codes >= 0]]
        if texts is None:
            text_at, same = code_at, np.ones(len(codes), bool)
        else:
            text_at = code_at[-1] + np.concatenate([[0], np.cumsum([len(t) for t in texts], dtype=np.int64)])
            runs += texts
            own = range(len(codes)) if owners is None else owners.tolist()
            fed = (codes[item, : code_lengths[item] - 1] for item in own)
            same = np.fromiter((_begins(t, f) for t, f in zip(texts, fed, strict=True)), bool, len(texts))
        tokens = np.concatenate(runs).astype(np.int32)
        same &= len(suffix) == 0 and not numbers
        return cls(tokens, head_at, suffix_at, text_at, code_at, same, number_at if numbers else np.zeros(1, np.int64))


def _begins(text: np.ndarray, fed: np.ndarray) -> bool:
    return len(fed) <= len(text) and bool((text[: len(fed)] == fed).all())


class Heads(NamedTuple):
    """Which head each history has."""

    begins: np.ndarray
    """int64 [H], rising: where histories begin."""
    numbers: np.ndarray
    """int64 [H], index into `Pieces.heads`."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Windows of histories, as tokens."""

    items: np.ndarray
    """int32 [N], all histories one after the other."""
    windows: Windows
    pieces: Pieces
    entries: np.ndarray | None = None
    """int64 [N], the run that each interaction is written as; None: run i for item i."""
    heads: Heads | None = None
    """None: all have the first."""

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def _run_of(self) -> np.ndarray:
        """int64 [N], the run that each interaction is written as."""
        return self.items if self.entries is None else self.entries

    @cached_property
    def _sums(self) -> np.ndarray:
        """int64 [3, N + 1]: tokens that the items before a position take on the trunk without numbers, as branches, and as
        labels."""
        p = self.pieces
        texts, codes = np.diff(p.texts)[self._run_of], np.diff(p.codes)[self.items]
        branch = np.where(p.on_trunk[self._run_of], 0, _size(p.suffix) + codes - 1)
        rows = np.stack([texts, branch, codes])
        return np.concatenate([np.zeros((3, 1), np.int64), np.cumsum(rows, axis=1)], axis=1)

    @cached_property
    def _numbered(self) -> np.ndarray:
        """int64 [n + 1], tokens of the first so many numbers; zeros where there are none."""
        p, longest = self.pieces, int((self.windows.end - self.windows.begin).max(initial=0))
        return np.zeros(longest + 1, np.int64) if len(p.numbers) == 1 else p.numbers - p.numbers[0]

    @cached_property
    def _head(self) -> np.ndarray:
        """int64 [n], the head of each segment."""
        if self.heads is None:
            return np.zeros(len(self), np.int64)
        return self.heads.numbers[np.searchsorted(self.heads.begins, self.windows.begin, side="right") - 1]

    @cached_property
    def _head_lengths(self) -> np.ndarray:
        return np.diff(self.pieces.heads)[self._head]

    @cached_property
    def _fed(self) -> np.ndarray:
        """int64 [N], tokens of each item as the last target of its segment."""
        return _size(self.pieces.suffix) + np.diff(self.pieces.codes)[self.items] - 1

    @cached_property
    def _sizes(self) -> tuple[np.ndarray, np.ndarray, int]:
        (trunk, branch, labels), w = self._sums, self.windows
        last = w.end - 1
        lengths = self._head_lengths + trunk[last] - trunk[w.begin] + self._numbered[last - w.begin]
        lengths += branch[last] - branch[w.first] + self._fed[last]
        some = np.unique(self.items[_runs(w.first, w.end)[1]])
        return lengths, labels[w.end] - labels[w.first], int(np.diff(self.pieces.codes)[some].max(initial=0))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n] tokens of each segment."""
        return self._sizes[0]

    @property
    def targets(self) -> np.ndarray:
        """int64 [n] target tokens of each segment."""
        return self._sizes[1]

    @property
    def longest(self) -> int:
        """Tokens of the longest target."""
        return self._sizes[2]

    @property
    def target_items(self) -> np.ndarray:
        """int64 [n] targets of each segment."""
        return self.windows.end - self.windows.first

    @cached_property
    def _apart(self) -> np.ndarray:
        trunk, w = self._sums[0], self.windows
        before, fed, numbered = (np.concatenate([[0], np.cumsum(x)]) for x in (trunk[:-1], self._fed, self._numbered))
        count = w.end - w.first
        own: np.ndarray = before[w.end] - before[w.first] + fed[w.end] - fed[w.first]
        own += numbered[w.end - w.begin] - numbered[w.first - w.begin]
        return own + count * (self._head_lengths - trunk[w.begin])

    @property
    def lengths_apart(self) -> np.ndarray:
        """int64 [n] tokens of each segment's targets where each has a prompt of its own."""
        return self._apart

    def within(self, tokens: int, targets: int) -> "Segments":
        """The same targets in segments that fit a row of so many tokens and target tokens."""
        if (self.lengths <= tokens).all() and (self.targets <= targets).all():
            return self
        trunk, branch, labels = self._sums
        # Numbers and heads count with the longest of each, so that a window's tokens are a sum over its items.
        trunk = trunk + np.arange(len(trunk)) * int(np.diff(self._numbered).max(initial=0))
        # Of a window's tokens, this part rises with its end and depends on nothing else.
        need = np.concatenate([[0], trunk[:-1] + branch[:-1] + self._fed])
        offset = np.stack([trunk - int(self._head_lengths.max(initial=0)), branch])
        return replace(self, windows=split(self.windows, need, offset, labels, tokens, targets))

    def apart(self) -> "Segments":
        """The same targets, each with a prompt of its own."""
        return replace(self, windows=one_by_one(self.windows))

    def pack(self, rows: list[np.ndarray], row_length: int, targets_per_row: int) -> PackedBatch:
        """The arrays of some rows.

        Args:
            rows: B arrays of indices of segments; an empty one gives a row of padding.
            row_length: T.
            targets_per_row: K.

        Raises: ValueError where a row holds more than its capacities.
        """
        chosen = np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64)
        counts = np.asarray([len(row) for row in rows], np.int64)
        row = np.repeat(np.arange(len(rows)), counts)
        starts = np.concatenate([[0], np.cumsum(counts)])
        at, target_at = (_running(x[chosen], starts) for x in (self.lengths, self.targets))
        used = [np.bincount(row, x[chosen], len(rows)) for x in (self.lengths, self.targets)]
        over = (used[0] > row_length) | (used[1] > targets_per_row)
        if over.any():
            b = int(over.argmax())
            raise ValueError(
                f"row {b} needs {used[0][b]:.0f} tokens, {used[1][b]:.0f} targets; it has {row_length}, {targets_per_row}"
            )
        number = np.arange(len(chosen)) - starts[:-1][row] + 1
        out = PackedBatch.empty(len(rows), row_length, targets_per_row)
        self._write(chosen, row * row_length + at, row * targets_per_row + target_at, number, at, out)
        return out

    def examples(self) -> list[Example]:
        """Each segment by itself; only for segments without branches, as `apart` gives them, and those of a stream."""
        batch = self.pack([np.arange(len(self))], int(self.lengths.sum()), int(self.targets.sum()))
        assert not batch.branches.any()
        at, target_at = (np.concatenate([[0], np.cumsum(x)]) for x in (self.lengths, self.targets))
        positions = batch.target_positions[0] - np.repeat(at[:-1], self.targets)
        return [
            Example(batch.tokens[0, a:b], positions[c:d].astype(np.int32), batch.labels[0, c:d], batch.weights[0, c:d])
            for a, b, c, d in zip(at[:-1], at[1:], target_at[:-1], target_at[1:], strict=True)
        ]

    def _write(
        self, chosen: np.ndarray, at: np.ndarray, target_at: np.ndarray, number: np.ndarray, row_at: np.ndarray, out: PackedBatch
    ) -> None:
        """Writes segments to flat places `at` of `out`, their targets to `target_at`; `row_at`: places in their rows."""
        p = self.pieces
        trunk, branch, labels = self._sums
        begin, first, end = (x[chosen] for x in (self.windows.begin, self.windows.first, self.windows.end))
        head, suffix, numbers = self._head_lengths[chosen], _size(p.suffix), self._numbered
        tokens, positions, segments, branches, forks = (
            x.reshape(-1) for x in (out.tokens, out.positions, out.segments, out.branches, out.forks)
        )

        def write(segment: np.ndarray, source: np.ndarray, length: np.ndarray, place: np.ndarray, position: np.ndarray,
                  own: np.ndarray | None = None, fork: np.ndarray | None = None) -> None:  # fmt: skip
            step = _steps(length)
            to = np.repeat(at[segment] + place, length) + step
            tokens[to] = p.tokens[np.repeat(source, length) + step]
            positions[to] = where = np.repeat(position, length) + step
            segments[to] = np.repeat(number[segment], length)
            branches[to] = 0 if own is None else np.repeat(own, length)
            forks[to] = where + 1 if fork is None else np.repeat(fork, length)

        def constant(like: np.ndarray, value: int) -> np.ndarray:
            return np.full(len(like), value, np.int64)

        every = np.arange(len(chosen))
        write(every, p.heads[self._head[chosen]], head, constant(every, 0), constant(every, 0))
        # The history, but for the last target.
        owner, item_at = _runs(begin, end - 1)
        nth = item_at - begin[owner]
        place = head[owner] + trunk[item_at] - trunk[begin[owner]] + numbers[nth]
        if len(p.numbers) > 1:
            length = np.diff(p.numbers)[nth]
            write(owner, p.numbers[nth], length, place, place)
            place = place + length
        run = self._run_of[item_at]
        write(owner, p.texts[run], np.diff(p.texts)[run], place, place)
        # Targets: the last one goes on where the trunk ends, others branch off unless the trunk has their tokens.
        owner, item_at = _runs(first, end)
        items = self.items[item_at]
        code_length = np.diff(p.codes)[items]
        fork = head[owner] + trunk[item_at] - trunk[begin[owner]] + numbers[item_at - begin[owner]]
        last = item_at == end[owner] - 1
        apart = ~last & ~p.on_trunk[self._run_of[item_at]]
        trunk_end = head + trunk[end - 1] - trunk[begin] + numbers[end - 1 - begin] + self._fed[end - 1]
        place = np.where(apart, trunk_end[owner] + branch[item_at] - branch[first[owner]], fork)
        for kind, branches_off in ((apart, True), (last, False)):
            o, to, position = owner[kind], place[kind], fork[kind]
            tree = (item_at[kind] - first[o] + 1, position) if branches_off else (None, None)
            write(o, constant(o, p.suffix.start), constant(o, suffix), to, position, *tree)
            write(o, p.codes[items[kind]], code_length[kind] - 1, to + suffix, position + suffix, *tree)
        # Labels: the first one is predicted by the token before the target, the others by the target's own tokens.
        step = _steps(code_length)
        to = np.repeat(target_at[owner] + labels[item_at] - labels[first[owner]], code_length) + step
        before = (place if suffix else fork) + suffix - 1
        at_label = np.where(step == 0, np.repeat(before, code_length), np.repeat(place + suffix - 1, code_length) + step)
        out.target_positions.reshape(-1)[to] = at_label + np.repeat(row_at[owner], code_length)
        out.labels.reshape(-1)[to] = p.tokens[np.repeat(p.codes[items], code_length) + step]
        out.weights.reshape(-1)[to] = 1.0


def _size(run: slice) -> int:
    return run.stop - run.start


def _running(sizes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """For each entry the sum of those before it in its row; row i is starts[i]:starts[i + 1]."""
    total = np.concatenate([[0], np.cumsum(sizes)])
    return total[:-1] - np.repeat(total[starts[:-1]], np.diff(starts))


def _steps(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ..., length - 1 for each length, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _runs(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owner and position of all positions in begin[i]..end[i] - 1."""
    counts = end - begin
    owner = np.repeat(np.arange(len(begin)), counts)
    return owner, np.repeat(begin, counts) + _steps(counts)
