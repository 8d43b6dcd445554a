"""Popularity, recent popularity and first-order Markov: what a model has to beat. All count training interactions only.

Items that score the same are ordered by a seeded hash, never by index: an index often carries the order of a file or of
ids, and with it popularity or time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array


@dataclass(frozen=True, eq=False)
class Popularity:
    """Every user gets the items with the most training interactions."""

    order: np.ndarray
    """int32 [n_items] items, most popular first; those without interactions last."""

    @classmethod
    def fit(cls, offsets: np.ndarray, items: np.ndarray, trains: np.ndarray, n_items: int, seed: int = 0) -> Popularity:
        """Counts training targets.

        Args:
            offsets: int64 [U + 1]; the history of user u is items[offsets[u] : offsets[u + 1]].
            items: int32 [N] item indices.
            trains: bool [N], which of them are training targets (`Dataset.trains`).
            n_items: size of the catalogue.
            seed: of the order among equals.
        """
        counts = np.bincount(items[trains], minlength=n_items)
        return cls(np.lexsort((_hash(n_items, seed), -counts)).astype(np.int32))

    @classmethod
    def fit_recent(
        cls,
        offsets: np.ndarray,
        items: np.ndarray,
        trains: np.ndarray,
        n_items: int,
        timestamps: np.ndarray | None,
        seed: int = 0,
        share: float = 0.1,
    ) -> Popularity:
        """Counts only the newest training interactions; equals follow all of these. Arguments as for `fit`, and

        Args:
            timestamps: int64 [N] seconds; None where the source has no time: then the newest of each user count.
            share: of the training interactions, those with the time of the last one among these included.
        """
        if timestamps is None:
            user, places = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[trains], np.flatnonzero(trains)
            recent = np.zeros_like(trains)
            recent[places[np.append(user[1:] != user[:-1], True)] if len(places) else places] = True
        else:
            times = np.sort(timestamps[trains])
            recent = trains & (timestamps >= times[int((1 - share) * len(times))]) if len(times) else trains
        newest, all_counts = (np.bincount(items[chosen], minlength=n_items) for chosen in (recent, trains))
        return cls(np.lexsort((_hash(n_items, seed), -all_counts, -newest)).astype(np.int32))

    def rank(self, histories: Sequence[np.ndarray], k: int, mask_seen: bool) -> np.ndarray:
        """Best k items for each history.

        Args:
            histories: U arrays of item indices, oldest first; may be empty.
            k: length of a list.
            mask_seen: leave the items of the history out.

        Returns: int32 [U, k], -1 where the catalogue has no more items.
        """
        order = self.order.tolist()
        return lists(((order,) for _ in histories), histories, k, mask_seen)


@dataclass(frozen=True, eq=False)
class Markov:
    """The items that most often directly followed the user's last item in training; then the popular ones."""

    popularity: Popularity
    next_counts: csr_array
    """int64 [n_items, n_items]; row x, column y: how often y directly followed x."""

    @classmethod
    def fit(cls, offsets: np.ndarray, items: np.ndarray, trains: np.ndarray, n_items: int, seed: int = 0) -> Markov:
        """Counts direct transitions to training targets. Arguments as for `Popularity.fit`."""
        both = np.array(trains[1:])
        starts = np.asarray(offsets[1:-1])
        both[starts[(starts > 0) & (starts < len(items))] - 1] = False  # the next item is another user's
        pairs = (items[:-1][both], items[1:][both])
        counts = coo_array((np.ones(len(pairs[0]), np.int64), pairs), shape=(n_items, n_items)).tocsr()
        counts.sum_duplicates()
        return cls(Popularity.fit(offsets, items, trains, n_items, seed), counts)

    def rank(self, histories: Sequence[np.ndarray], k: int, mask_seen: bool) -> np.ndarray:
        """Best k items for each history: by transition count, then popularity. As `Popularity.rank`."""
        order = self.popularity.order.tolist()
        place = np.empty(len(order), np.int64)
        place[self.popularity.order] = np.arange(len(order))
        matrix = self.next_counts
        known: dict[int, list[int]] = {}

        def followers(item: int) -> list[int]:
            if item not in known:
                row = slice(int(matrix.indptr[item]), int(matrix.indptr[item + 1]))
                after, times = np.asarray(matrix.indices, np.int64)[row], np.asarray(matrix.data, np.int64)[row]
                known[item] = after[np.lexsort((place[after], -times))].tolist()
            return known[item]

        return lists(((followers(int(h[-1])), order) if len(h) else (order,) for h in histories), histories, k, mask_seen)


def lists(candidates: Iterable[tuple[list[int], ...]], histories: Sequence[np.ndarray], k: int, mask_seen: bool) -> np.ndarray:
    out = np.full((len(histories), k), -1, np.int32)
    for u, (sources, history) in enumerate(zip(candidates, histories, strict=True)):
        best = list(_first(sources, set(np.asarray(history).tolist()) if mask_seen else set(), k))
        out[u, : len(best)] = best
    return out


def _first(sources: tuple[list[int], ...], skip: set[int], k: int) -> Iterator[int]:
    for source in sources:
        for item in source:
            if k == 0:
                return
            if item not in skip:
                skip.add(item)
                k -= 1
                yield item


def _hash(n: int, seed: int) -> np.ndarray:
    # splitmix64 (Steele, Lea and Flood, OOPSLA 2014), a fixed function on every platform and numpy release.
    with np.errstate(over="ignore"):
        x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for salt in (np.uint64(seed % 2**64), np.uint64(0)):
            x = (x ^ salt) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return x
