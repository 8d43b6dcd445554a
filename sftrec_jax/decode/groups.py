"""Items that share a code: the search ranks codes, and a code found stands for all of its items."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftrec_jax.decode.tree import CodeTree


@dataclass(frozen=True, eq=False)
class CodeGroups:
    """Items grouped by equal codes; a group for each item where all codes are distinct.

    Inside a group items stand in the order of a hash of their titles. Any order does, as long as it says nothing: that of a
    catalogue often follows popularity or time, and would be right more often than the model knows.
    """

    group: np.ndarray
    """int32 [n_items] group of each item: the leaf of the `CodeTree` that is its code."""
    members: np.ndarray
    """int32 [n_items] items, one group after the other."""
    offsets: np.ndarray
    """int64 [G + 1]; the items of group g are members[offsets[g] : offsets[g + 1]]."""

    @classmethod
    def of(cls, tree: CodeTree, titles: np.ndarray) -> "CodeGroups":
        """Groups the items of a catalogue."""
        group = np.empty(tree.n_items, np.int32)
        group[tree.order] = tree.rank
        offsets = np.append(np.flatnonzero(np.diff(tree.rank, prepend=-1)), tree.n_items)
        sizes = np.diff(offsets)
        members = tree.order.copy()
        places = np.flatnonzero(np.repeat(sizes > 1, sizes))
        hashes = [
            int.from_bytes(hashlib.blake2b(str(titles[item]).encode(), digest_size=8).digest(), "big") for item in members[places]
        ]
        members[places] = members[places][np.lexsort((np.asarray(hashes, np.uint64), tree.rank[places]))]
        return cls(group, members, offsets)

    @property
    def shared(self) -> int:
        """Number of items whose code another item has, too."""
        sizes = np.diff(self.offsets)
        return int(sizes[sizes > 1].sum())

    def leaves(self, items: np.ndarray) -> np.ndarray:
        """bool [G] groups with an item among those that `items` (bool [n_items]) marks."""
        kept = np.zeros(len(self.offsets) - 1, bool)
        kept[self.group[items]] = True
        return kept

    def excluded(self, items: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
        """int64 groups of which every item is among `items` (indices, repeats allowed) or not `allowed` (bool [n_items])."""
        items = np.unique(items).astype(np.int64)
        if allowed is not None:
            items = items[allowed[items]]
        groups, counts = np.unique(self.group[items], return_counts=True)
        sizes = np.diff(self.offsets)[groups]
        if allowed is not None:
            sizes = np.asarray([allowed[self.members[self.offsets[g] : self.offsets[g + 1]]].sum() for g in groups], np.int64)
        return groups[counts == sizes].astype(np.int64)

    def expand(
        self,
        groups: np.ndarray,
        scores: np.ndarray,
        exclude: np.ndarray | None,
        k: int,
        allowed: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One user's list of items from the list of groups.

        Args:
            groups: int [K] groups, best first.
            scores: float32 [K], -inf where the list is shorter.
            exclude: indices of items to leave out, or None.
            k: length of the list.
            allowed: bool [n_items] items that may be in the list, or None.

        Returns: int32 [k] items, float32 [k] the scores of their groups; -1 and -inf where there is no item.
        """
        items, found = np.full(k, -1, np.int32), np.full(k, -np.inf, np.float32)
        live = scores > -np.inf
        parts = [self.members[self.offsets[g] : self.offsets[g + 1]] for g in groups[live]]
        if parts:
            every, score = np.concatenate(parts), np.repeat(scores[live], [len(p) for p in parts])
            kept = np.ones(len(every), bool) if allowed is None else allowed[every]
            if exclude is not None and len(exclude):
                kept &= ~np.isin(every, exclude)
            every, score = every[kept][:k], score[kept][:k]
            items[: len(every)], found[: len(every)] = every, score
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
