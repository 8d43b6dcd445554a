"""Which examples share a row, and the arrays of packed rows.

The plan is a pure function of (lengths, targets, seed, epoch): any row of any epoch is known without an iterator, so
resuming is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from sftrec_jax.data.prompts import Example
from sftrec_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Rows of packed examples; B rows, T tokens, K targets a row.

    Padding is segment 0, position 0, branch 0, fork 1; unused targets have position 0, label 0 and weight 0.
    """

    tokens: np.ndarray
    """int32 [B, T]"""
    positions: np.ndarray
    """int32 [B, T], from 0 in each example"""
    segments: np.ndarray
    """int32 [B, T], 1, 2, ... in a row"""
    branches: np.ndarray
    """int32 [B, T], 0 is the trunk"""
    forks: np.ndarray
    """int32 [B, T], how much of the trunk a token may see: positions + 1"""
    target_positions: np.ndarray
    """int32 [B, K], indices into the row"""
    labels: np.ndarray
    """int32 [B, K]"""
    weights: np.ndarray
    """float32 [B, K]"""


def plan_epoch(
    lengths: np.ndarray, targets: np.ndarray, row_length: int, targets_per_row: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Puts every example of an epoch into exactly one row.

    Best fit under two capacities, tokens and targets: an example goes into the fullest row (by tokens) that holds it.
    Examples come in random and in decreasing order, and the plan with fewer rows is taken; then rows are shuffled. All
    of it depends on (seed, epoch) alone.

    Args:
        lengths: int64 [n] tokens of each example, at least 1.
        targets: int64 [n] targets of each example, at least 0.
        row_length: tokens in a row (T).
        targets_per_row: targets in a row (K).
        seed: of the run.
        epoch: from 0.

    Returns: one int64 array of example indices a row.
    Raises: UserError where one example exceeds a row.
    """
    lengths = np.asarray(lengths, np.int64)
    targets = np.asarray(targets, np.int64)
    if lengths.size == 0:
        return []
    if lengths.max() > row_length:
        raise UserError(
            f"the longest of {lengths.size} examples has {lengths.max()} tokens but a row has {row_length}; "
            f"raise train.row_length to {lengths.max()} or more, or lower prompt.max_history"
        )
    if targets.max() > targets_per_row:
        raise UserError(
            f"an example has {targets.max()} targets but a row has room for {targets_per_row}; raise the targets of a row"
        )
    # Raw bits of a counter-based generator: their stream is fixed, unlike that of numpy's permutation.
    source = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    shuffle = source.random_raw(lengths.size)
    need = lengths / row_length + targets / targets_per_row
    # Decreasing order wins by up to 1 % where tokens bind, random order by up to 8 % where short examples have many
    # targets (measured on 100,000 examples), so both are tried.
    orders = (np.argsort(shuffle, kind="stable"), np.lexsort((shuffle, -need)))
    tried = [(_best_fit(lengths[o], targets[o], row_length, targets_per_row), o) for o in orders]
    row_of, order = min(tried, key=lambda pair: int(pair[0].max()))
    grouped = np.argsort(row_of, kind="stable")
    starts = np.searchsorted(row_of[grouped], np.arange(1, row_of.max() + 1))
    rows = np.split(order[grouped], starts)
    return [rows[i] for i in np.argsort(source.random_raw(len(rows)), kind="stable")]


def _best_fit(lengths: np.ndarray, targets: np.ndarray, row_length: int, targets_per_row: int) -> np.ndarray:
    # Open rows lie in stacks by (tokens left, targets left). `open_targets[l]` has bit t set where a row has l tokens and
    # t targets left; `roomy[j]` has bit l set where one of the rows with l tokens left has steps[j] targets left or more.
    # Python's long integers find the next set bit in a few machine words: some microseconds an example.
    if targets_per_row >= row_length and (targets <= lengths).all():
        targets = np.zeros_like(targets)  # whatever fits by tokens fits by targets
    steps = np.unique(np.quantile(targets, np.linspace(0, 1, 33), method="higher"))
    step_of = np.searchsorted(steps, np.arange(targets_per_row + 2), side="right").tolist()  # how many steps t targets reach
    wanted = np.searchsorted(steps, targets).tolist()
    roomy = [0] * len(steps)
    open_targets = [0] * (row_length + 1)
    reached = [0] * (row_length + 1)  # steps that the roomiest row with l tokens left reaches
    stacks: dict[tuple[int, int], list[int]] = {}
    row_of: list[int] = []
    rows = 0
    for length, target, step in zip(lengths.tolist(), targets.tolist(), wanted, strict=True):
        above = roomy[step] >> length
        if above:
            left = length + (above & -above).bit_length() - 1
            fitting = open_targets[left] >> target
            free = target + (fitting & -fitting).bit_length() - 1
            stack = stacks[left, free]
            row = stack.pop()
            if not stack:
                open_targets[left] ^= 1 << free
                now = step_of[open_targets[left].bit_length() - 1] if open_targets[left] else 0
                for j in range(now, reached[left]):
                    roomy[j] ^= 1 << left
                reached[left] = now
        else:
            left, free, row = row_length, targets_per_row, rows
            rows += 1
        row_of.append(row)
        left, free = left - length, free - target
        if left:
            stack = stacks.setdefault((left, free), [])
            if not stack:
                open_targets[left] |= 1 << free
                for j in range(reached[left], step_of[free]):
                    roomy[j] |= 1 << left
                reached[left] = max(reached[left], step_of[free])
            stack.append(row)
    return np.asarray(row_of, np.int64)


def packing_efficiency(lengths: np.ndarray, rows: Sequence[np.ndarray], row_length: int) -> float:
    """Share of the tokens in `rows` that are not padding; 1.0 without rows."""
    if not rows:
        return 1.0
    return float(np.asarray(lengths)[np.concatenate(list(rows))].sum() / (len(rows) * row_length))


def pack_rows(examples: Sequence[Example], plan_rows: Sequence[np.ndarray], row_length: int, targets_per_row: int) -> PackedBatch:
    """The arrays of some rows of a plan.

    Args:
        examples: indexed by the entries of the rows.
        plan_rows: B arrays of example indices; an empty one gives a row of padding.
        row_length: T.
        targets_per_row: K.

    Raises: ValueError where a row holds more than its capacities.
    """
    shape, target_shape = (len(plan_rows), row_length), (len(plan_rows), targets_per_row)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    target_positions, labels = (np.zeros(target_shape, np.int32) for _ in range(2))
    weights = np.zeros(target_shape, np.float32)
    for b, row in enumerate(plan_rows):
        at, target_at = 0, 0
        for segment, index in enumerate(row, start=1):
            example = examples[int(index)]
            end, target_end = at + len(example.tokens), target_at + len(example.labels)
            if end > row_length or target_end > targets_per_row:
                raise ValueError(f"row {b} needs {end} tokens, {target_end} targets; it has {row_length}, {targets_per_row}")
            tokens[b, at:end] = example.tokens
            positions[b, at:end] = np.arange(end - at)
            segments[b, at:end] = segment
            target_positions[b, target_at:target_end] = example.target_positions + at
            labels[b, target_at:target_end] = example.labels
            weights[b, target_at:target_end] = example.weights
            at, target_at = end, target_end
    return PackedBatch(tokens, positions, segments, np.zeros(shape, np.int32), positions + 1, target_positions, labels, weights)
