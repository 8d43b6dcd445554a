"""Items with equal codes: counting them, telling them apart, and codes for items that come later.

Whatever is decided between items is decided by distance and then by a hash of the item id: the order of the catalogue, which
often follows popularity or time, must not reach the codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from sftrec_jax.data.histories import text_hashes
from sftrec_jax.errors import UserError
from sftrec_jax.items.quantise.quantiser import Quantiser

_COSTS = 2**22
"""Costs (float32) that are held at once."""


def collision_rate(levels: np.ndarray) -> float:
    """1 - distinct codes / items, of int32 [n, L]: 0 where every item has its own."""
    return 1 - len(np.unique(group_index(levels))) / len(levels)


def group_index(levels: np.ndarray) -> np.ndarray:
    """int64 [n]: the place of each row's code among the distinct codes in rising order, of int32 [n, L]."""
    order, first = _rising(levels)
    index = np.empty(len(levels), np.int64)
    index[order] = np.cumsum(first) - 1
    return index


def collision_groups(levels: np.ndarray) -> list[np.ndarray]:
    """Rows (int64, rising) of each code that several items share, in rising order of the codes."""
    index = group_index(levels)
    order = np.argsort(index, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(index))[:-1])
    return [group for group in groups if len(group) > 1]


def resolve_extra(levels: np.ndarray, item_ids: Sequence[str] | np.ndarray, seed: int = 0) -> np.ndarray:
    """One level more that counts items of equal codes from 0 (TIGER, Rajput et al. 2023): int32 [n, L] to [n, L + 1].

    Within a group the numbers follow a hash of (seed, item id).
    """
    index = group_index(levels)
    order = np.lexsort((_hashes(item_ids, seed), index))
    count = np.bincount(index)
    number = np.empty(len(levels), np.int32)
    number[order] = np.arange(len(levels)) - np.repeat(np.cumsum(count) - count, count)
    return np.concatenate([levels.astype(np.int32), number[:, None]], axis=1)


def resolve_nearest(
    levels: np.ndarray,
    quantiser: Quantiser,
    vectors: np.ndarray,
    item_ids: Sequence[str] | np.ndarray,
    taken: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Gives items with equal codes codes of their own, as near as they are free (LC-Rec, Zheng et al. 2024; MiniOneRec).

    Of a group the item nearest to the code keeps it. The others, nearest first, change as few levels at the end as it takes to
    find a free code, and take the cheapest: if the last level has no free code below the levels before it, the level before
    that changes too, and so on. No item that was alone changes.

    Args:
        levels: int32 [n, L].
        quantiser: gave `levels`; its costs order the free codes.
        vectors: float32 [n, E].
        item_ids: [n] distinct; a hash of them breaks ties.
        taken: int32 [m, L] codes of other items, which keep them.

    Returns: int32 [n, L], all rows distinct and none in `taken`, and how many items moved.
    Raises: UserError where there are fewer codes than items.
    """
    n, taken = len(levels), np.zeros((0, levels.shape[1]), np.int32) if taken is None else taken
    levels = levels.astype(np.int32)
    index = group_index(np.concatenate([levels, taken]))
    count = np.bincount(index)
    held = np.zeros(len(count), bool)
    held[index[n:]] = True
    _check_room(quantiser.sizes, n + int(held.sum()), n)
    candidates = np.flatnonzero((count[index[:n]] > 1) | held[index[:n]])
    hashes = _hashes(np.asarray(item_ids, object)[candidates], 0)
    # Sorted before anything is computed: a matrix product rounds by the place of a row, too.
    by_hash = np.argsort(hashes, kind="stable")
    candidates, hashes = candidates[by_hash], hashes[by_hash]
    distances = quantiser.distances(vectors[candidates], levels[candidates])
    group = index[candidates]
    order = np.lexsort((hashes, distances, group))
    keeps = np.zeros(len(candidates), bool)
    keeps[order] = np.diff(group[order], prepend=-1) != 0
    keeps &= ~held[group]
    movers = np.lexsort((hashes, distances))
    movers = candidates[movers[~keeps[movers]]]
    tree = _Tree(np.concatenate([levels, taken]), quantiser.sizes, n + int(held.sum()))
    out = levels.copy()
    last = len(quantiser.sizes) - 1
    step = max(1, _COSTS // quantiser.sizes[last])
    for begin in range(0, len(movers), step):
        some = movers[begin : begin + step]
        for row, costs in zip(some, quantiser.costs(vectors[some], levels[some], last), strict=True):
            out[row] = tree.take(levels[row], _level_costs(quantiser, vectors[row], levels[row], costs))
    return out, len(movers)


def extend_codes(
    existing: np.ndarray,
    mode: Literal["extra", "nearest", "lists"],
    quantiser: Quantiser,
    new_vectors: np.ndarray,
    new_ids: Sequence[str] | np.ndarray,
    extra_size: int,
) -> np.ndarray:
    """Codes for new items beside those of `existing` items, which do not change.

    Args:
        existing: int32 [n, L], with `extra` [n, L + 1].
        mode: `extra`: the quantiser's code with the smallest number that is free on the extra level; where none is, the nearest
            code that has one, as `resolve_nearest` finds it. `nearest`: see `resolve_nearest`. `lists`: the quantiser's code.
        quantiser: that of the existing items.
        new_vectors: float32 [m, E].
        new_ids: [m] distinct; where new items compete, a hash of them decides.
        extra_size: numbers that the extra level has; `extra` only.

    Returns: int32 [m, L], with `extra` [m, L + 1].
    Raises: UserError where there are fewer codes than items.
    """
    encoded = quantiser.encode(new_vectors)
    width = len(quantiser.sizes) + (mode == "extra")
    if existing.shape[1] != width:
        raise ValueError(f"existing codes have {existing.shape[1]} levels, not {width}")
    if mode == "lists":
        return encoded
    if mode == "nearest":
        return resolve_nearest(encoded, quantiser, new_vectors, new_ids, existing)[0]
    sizes = (*quantiser.sizes, extra_size)
    total = len(np.unique(group_index(existing))) + len(encoded)
    _check_room(sizes, total, len(encoded))
    tree = _Tree(existing, sizes, total)
    out = np.zeros((len(encoded), width), np.int32)
    for row in np.argsort(_hashes(new_ids, 0), kind="stable"):
        code = np.append(encoded[row], np.int32(0))
        out[row] = tree.take(code, _level_costs(quantiser, new_vectors[row], code, np.arange(extra_size)))
    return out


class _Tree:
    """Which codes are in use, as counts below prefixes."""

    def __init__(self, used: np.ndarray, sizes: Sequence[int], total: int) -> None:
        """`used`: int32 [m, L], equal rows count once. `total`: codes that will be in use in the end."""
        order, first = _rising(used)
        rows = used[order[first]]
        self.columns = [np.ascontiguousarray(column) for column in rows.T]
        self.sizes = tuple(sizes)
        # Python integers: 256 codes on 8 levels are more than an int64 holds.
        self.capacity = [math.prod(self.sizes[depth:]) for depth in range(len(self.sizes) + 1)]
        self.total = total
        self.counts: dict[bytes, np.ndarray] = {}

    def take(self, code: np.ndarray, costs: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
        """The free code that shares the longest beginning with `code` and is cheapest level by level; in use from now on.

        `costs(code, level)` gives [K_level] costs after code[:level].
        """
        code = code.copy()
        depth = len(self.sizes) - 1
        while not self._room(code[:depth]).any():
            depth -= 1
        for level in range(depth, len(self.sizes)):
            free = np.flatnonzero(self._room(code[:level]))
            code[level] = free[costs(code, level)[free].argmin()]
        for level in range(len(self.sizes)):
            if self._counted(level):
                self._below(code[:level])[code[level]] += 1
        return code

    def _room(self, prefix: np.ndarray) -> np.ndarray:
        """bool [K]: after `prefix` and which next code there is a free code."""
        depth = len(prefix)
        if not self._counted(depth):
            return np.ones(self.sizes[depth], bool)
        return self._below(prefix) < self.capacity[depth + 1]

    def _counted(self, depth: int) -> bool:
        # Below a prefix with room for all codes there is always a free one; counting there would only cost memory.
        return self.capacity[depth + 1] <= self.total

    def _below(self, prefix: np.ndarray) -> np.ndarray:
        """int64 [K]: codes in use that begin with `prefix` and each next code."""
        key = prefix.tobytes()
        if key not in self.counts:
            begin, end = 0, len(self.columns[0])
            for column, code in zip(self.columns, prefix, strict=False):
                within = column[begin:end]
                begin, end = begin + np.searchsorted(within, code), begin + np.searchsorted(within, code, "right")
            depth = len(prefix)
            ends = np.searchsorted(self.columns[depth][begin:end], np.arange(self.sizes[depth] + 1, dtype=np.int32))
            self.counts[key] = np.diff(ends)
        return self.counts[key]


def _level_costs(
    quantiser: Quantiser, vector: np.ndarray, known_for: np.ndarray, known: np.ndarray
) -> Callable[[np.ndarray, int], np.ndarray]:
    """Costs of a code's levels for one vector; those of the last level after `known_for` are `known` already."""
    last = len(known_for) - 1

    def costs(code: np.ndarray, level: int) -> np.ndarray:
        if level == len(quantiser.sizes) or (level == last and np.array_equal(code[:last], known_for[:last])):
            return known
        return quantiser.costs(vector[None], code[None], level)[0]

    return costs


def _rising(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order in which rows rise, int64 [n], and which rows in it differ from the one before, bool [n]."""
    # np.unique(axis=0) compares rows as structures: four times as slow for a million rows.
    order = np.lexsort(levels.T[::-1])
    rows = levels[order]
    first = np.ones(len(levels), bool)
    first[1:] = (rows[1:] != rows[:-1]).any(1)
    return order, first


def _check_room(sizes: Sequence[int], total: int, moving: int) -> None:
    if total > math.prod(sizes):
        raise UserError(
            f"{moving:,} items need a code of their own, {total - moving:,} codes are taken, but {' x '.join(map(str, sizes))} "
            f"make {math.prod(sizes):,}; raise semantic.codes or semantic.levels and prepare again"
        )


def _hashes(item_ids: Sequence[str] | np.ndarray, seed: int) -> np.ndarray:
    return text_hashes([str(item) for item in item_ids], seed, "code")
