"""Lists scored by code string, as MiniOneRec does, beside the same lists scored by item.

A generative model names an item by its code. Where items share one, a hit on the string is not a hit on the item: string scoring
gives a model that writes the same code for every item a recall of 1. By item, the target's rank is any place among the items of
its code with equal probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftrec_jax.decode.groups import CodeGroups
from sftrec_jax.decode.tree import CodeTree
from sftrec_jax.evaluate.metrics import DEFAULT_KS, user_metrics


@dataclass(frozen=True, eq=False)
class CodeScoring:
    """Made by `of`."""

    groups: CodeGroups

    @classmethod
    def of(cls, codes: np.ndarray, titles: np.ndarray) -> "CodeScoring":
        """codes: int32 [n_items, L], -1 after the end of a code; titles: text [n_items], order items within a code by hash."""
        return cls(CodeGroups.of(CodeTree.of(codes), titles))

    def shared(self, items: np.ndarray) -> np.ndarray:
        """bool, the shape of `items`: whether another item has the code of the item."""
        return np.diff(self.groups.offsets)[self.groups.group[items]] > 1

    def written(self, ranked: np.ndarray, k: int) -> np.ndarray:
        """int32 [U, k] distinct codes that name the items of `ranked` (int32 [U, K]) in turn; -1 where there are no more."""
        out = np.full((len(ranked), k), -1, np.int32)
        for user, row in enumerate(ranked):
            codes = list(dict.fromkeys(self.groups.group[row[row >= 0]].tolist()))[:k]
            out[user, : len(codes)] = codes
        return out

    def by_string(self, written: np.ndarray, targets: np.ndarray, ks: Sequence[int] = DEFAULT_KS) -> dict[str, np.ndarray]:
        """Metrics of `user_metrics`: a code counts as a hit where it is the target's.

        Args:
            written: int32 [U, K] codes, see `written`.
            targets: int32 [U] items.
            ks: cut-offs up to K.
        """
        return user_metrics(written, self.groups.group[targets], ks)

    def by_item(
        self, written: np.ndarray, targets: np.ndarray, seen: Sequence[np.ndarray] | None, ks: Sequence[int] = DEFAULT_KS
    ) -> dict[str, np.ndarray]:
        """Metrics of the items that the codes stand for, those of a code tied. Arguments as for `by_string`, and

        Args:
            seen: items of each user that a list leaves out, or None.
        """
        k = written.shape[1]
        left_out: Sequence[np.ndarray | None] = [None] * len(written) if seen is None else seen
        scores = np.where(written >= 0, 0.0, -np.inf).astype(np.float32)
        items = [self.groups.expand(c, s, out, k)[0] for c, s, out in zip(written, scores, left_out, strict=True)]
        ranked = np.stack(items) if items else np.zeros((0, k), np.int32)
        return user_metrics(ranked, targets, ks, self.groups.ties(ranked, targets, seen))
