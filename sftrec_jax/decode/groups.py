"""Items that share a code: the search ranks codes, and a code found stands for all of its items."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftrec_jax.items.codes import ItemCodes


@dataclass(frozen=True, eq=False)
class CodeGroups:
    """Items grouped by equal codes; a group for each item where all codes are distinct.

    Inside a group items stand in the order of a hash of their titles. Any order does, as long as it says nothing: that of a
    catalogue often follows popularity or time, and would be right more often than the model knows.
    """

    codes: np.ndarray
    """int32 [G, L] the distinct codes, in the order in which the catalogue has them first."""
    group: np.ndarray
    """int64 [n_items] group of each item."""
    members: np.ndarray
    """int32 [n_items] items, one group after the other."""
    offsets: np.ndarray
    """int64 [G + 1]; the items of group g are members[offsets[g] : offsets[g + 1]]."""

    @classmethod
    def of(cls, codes: ItemCodes) -> "CodeGroups":
        """Groups the items of a catalogue."""
        _, first, inverse = np.unique(codes.codes, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        number = np.empty(len(order), np.int64)
        number[order] = np.arange(len(order))
        group = number[inverse.reshape(-1)]
        sizes = np.bincount(group)
        hashes = np.zeros(len(group), np.uint64)
        for item in np.flatnonzero(sizes[group] > 1):
            digest = hashlib.blake2b(str(codes.titles[item]).encode(), digest_size=8).digest()
            hashes[item] = int.from_bytes(digest, "big")
        members = np.lexsort((hashes, group)).astype(np.int32)
        return cls(codes.codes[np.sort(first)], group, members, np.concatenate([[0], np.cumsum(sizes)]))

    @property
    def shared(self) -> int:
        """Number of items whose code another item has, too."""
        sizes = np.diff(self.offsets)
        return int(sizes[sizes > 1].sum())

    def excluded(self, items: np.ndarray) -> np.ndarray:
        """int64 groups of which every item is among `items` (indices, repeats allowed)."""
        groups, counts = np.unique(self.group[np.unique(items).astype(np.int64)], return_counts=True)
        return groups[counts == np.diff(self.offsets)[groups]]

    def expand(self, groups: np.ndarray, scores: np.ndarray, exclude: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """One user's list of items from the list of groups.

        Args:
            groups: int32 [K] groups, best first, -1 where the list is shorter.
            scores: float32 [K].
            exclude: indices of items to leave out, or None.
            k: length of the list.

        Returns: int32 [k] items, float32 [k] the scores of their groups; -1 and -inf where there is no item.
        """
        items, found = np.full(k, -1, np.int32), np.full(k, -np.inf, np.float32)
        live = groups >= 0
        parts = [self.members[self.offsets[g] : self.offsets[g + 1]] for g in groups[live]]
        if parts:
            every, score = np.concatenate(parts), np.repeat(scores[live], [len(p) for p in parts])
            if exclude is not None and len(exclude):
                kept = ~np.isin(every, exclude)
                every, score = every[kept], score[kept]
            count = min(k, len(every))
            items[:count], found[:count] = every[:count], score[:count]
        return items, found

    def ties(
        self, ranked: np.ndarray, targets: np.ndarray, exclude: Sequence[np.ndarray] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where each target's group stands in its list, and how many items it has there: see `ranking_metrics`.

        Args:
            ranked: int32 [U, K] items, as `Recommender.rank` gives them.
            targets: int32 [U] items.
            exclude: the items that were left out of each list, or None.

        Returns: int64 [U] place of the group's first item, 0 where the list has none or the target itself was left out;
            int64 [U] items of the group that were not left out, at least 1.
        """
        own = self.group[targets]
        hits = (ranked >= 0) & (self.group[ranked] == own[:, None])
        first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)
        tied = np.diff(self.offsets)[own]
        if exclude is not None:
            for user, items in enumerate(exclude):
                gone = np.unique(items).astype(np.int64)
                tied[user] -= (self.group[gone] == own[user]).sum()
                if targets[user] in gone:
                    first[user] = 0
        return first, np.maximum(tied, 1)
