"""The exact ranking of the whole catalogue, and how much of it a beam misses.

Every score is a sum of log-probabilities, none above 0, so an item scores no higher than any prefix of it. A search that never
threw away a prefix above its K-th item has therefore found the K best of the whole catalogue. Users whose search cannot show
that are searched again with four times the beams, at last with all that the catalogue can hold: then nothing is thrown away.
The result is that of scoring every item; only the prefixes that matter are computed. (Where normalisation leaves rounding
errors above 0, two items closer than `CLOSE` may stand in either order.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftrec_jax.decode.batches import Progress
from sftrec_jax.decode.choose import Certified
from sftrec_jax.decode.pruning import Pruner
from sftrec_jax.decode.recommender import Ranking, Recommender

CLOSE = 1e-4
"""Log-probability by which the K-th item must be above all that was thrown away."""
WIDER = 4
BEAMS_PER_BATCH = 4096
"""Beams of all users of a batch together, at most, but for a batch of one user."""


@dataclass(frozen=True, eq=False)
class Exact:
    """The K best items of the whole catalogue for each user."""

    ranking: Ranking
    widths: np.ndarray
    """int64 [U] beams with which the list was shown to be exact."""


def exact_ranking(
    recommender: Recommender,
    prompts: Sequence[np.ndarray],
    exclude: Sequence[np.ndarray] | None,
    k: int,
    progress: Progress | None = None,
) -> Exact:
    """The exact `k` best items after each prompt, whatever `decode.beam` says; see `Recommender.rank` for arguments.

    Items that share a code count one by one, and stand together.
    """
    recommender.check(prompts)
    recommender.check_k(k, recommender.tree.n_items, "the catalogue", 0)
    most = max(recommender.index.frontier)
    searched = min(k, recommender.tree.n_leaves)
    ranking, widths = Ranking.empty(len(prompts), k), np.zeros(len(prompts), np.int64)
    left = np.arange(len(prompts))
    width = min(most, max(recommender.config.beam, searched))
    while len(left):
        some = [prompts[row] for row in left.tolist()]
        left_out = None if exclude is None else [exclude[row] for row in left.tolist()]
        pruner = Pruner(recommender.tree, recommender.index, recommender.groups, len(left), left_out, None)
        lists, shown = Ranking.empty(len(left), k), np.zeros(len(left), bool)

        def store(
            rows: np.ndarray, found: Any, lists: Ranking = lists, shown: np.ndarray = shown, pruner: Pruner = pruner
        ) -> None:
            masked, plain, lost = found
            part, lost = plain if masked is None else masked, lost[: len(rows)]
            recommender.items(lists, rows, part, pruner)
            shown[rows] = (part.scores[: len(rows), -1] > lost + CLOSE) | (lost == -np.inf)
            if progress is not None:
                progress(int(shown[rows].sum()))

        size = max(1, min(recommender.config.batch_users, BEAMS_PER_BATCH // width))
        recommender.search(some, pruner, searched, width, size, lambda rows, size: Certified(), store)
        ranking.items[left[shown]], ranking.scores[left[shown]] = lists.items[shown], lists.scores[shown]
        widths[left[shown]], left = width, left[~shown]
        width = min(most, width * WIDER)
    return Exact(ranking, widths)


def missed(found: Ranking, exact: Ranking) -> np.ndarray:
    """int64 [U] how many items of the exact lists are not in those found; items that tie with the last may replace each other."""
    out = np.zeros(len(exact.items), np.int64)
    for user, items in enumerate(exact.items):
        items = items[items >= 0]
        if not len(items):
            continue
        last = exact.scores[user, len(items) - 1]
        better = items[exact.scores[user, : len(items)] > last + CLOSE]
        tied = (found.scores[user] >= last - CLOSE) & ~np.isin(found.items[user], better)
        out[user] = (~np.isin(better, found.items[user])).sum() + max(0, len(items) - len(better) - tied.sum())
    return out
