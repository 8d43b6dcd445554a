"""Recall, NDCG and MRR of ranked item lists with one target a user."""

from collections.abc import Sequence

import numpy as np

DEFAULT_KS = (1, 5, 10, 20)


def first_hit_ranks(ranked: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Rank of the target in each list.

    Args:
        ranked: int32 [U, K] item indices, best first; -1 is no item and hits nothing.
        targets: int32 [U] item indices, 0 or more.

    Returns: int64 [U], 1 for the first place, 0 where the list lacks the target.
    Raises: ValueError for shapes that do not match or a negative target.
    """
    ranked, targets = np.asarray(ranked), np.asarray(targets)
    if ranked.ndim != 2 or targets.shape != ranked.shape[:1]:
        raise ValueError(f"ranked {list(ranked.shape)} and targets {list(targets.shape)} must be [U, K] and [U]")
    if (targets < 0).any():
        raise ValueError("targets must be items; leave users without a target out")
    hits = ranked == targets[:, None]
    if ranked.shape[1] == 0:
        return np.zeros(len(targets), np.int64)
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)


def user_metrics(
    ranked: np.ndarray,
    targets: np.ndarray,
    ks: Sequence[int] = DEFAULT_KS,
    ties: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """float64 [U] each: `recall@k`, `ndcg@k` and `mrr@k` of every user, and `mrr`, which is `mrr@k` at the largest k.

    With one target, recall is the hit rate, NDCG of a hit at rank r is 1 / log2(r + 1), and MRR's share is 1 / r.

    Where a model cannot tell the target from other items, its rank is any place of theirs with equal probability, and each
    metric is the expectation over these places (McSherry and Najork, ECIR 2008): a model that tells no items apart gets
    what chance gets, whatever order its lists have.

    Args:
        ranked: int32 [U, K] item indices, best first, K at least the largest k; -1 is no item.
        targets: int32 [U] item indices.
        ks: cut-offs, 1 or more.
        ties: int64 [U] place (from 1) of the first of the items that are tied with the target, itself among them, 0 where
            the list can have none of them or not the target; and int64 [U] the number of these items, 1 or more. They take
            places that follow one another, beyond the end of the list if need be. None: no target is tied.

    Raises: ValueError without users, or where a list is shorter than a cut-off: the metric would be silently capped.
    """
    ranks = first_hit_ranks(ranked, targets)
    longest = np.asarray(ranked).shape[1]
    if len(ranks) == 0:
        raise ValueError("no users to evaluate")
    if not ks or min(ks) < 1 or max(ks) > longest:
        raise ValueError(f"the cut-offs {tuple(ks)} must lie between 1 and the length of the lists, {longest}")
    first, tied = (ranks, np.ones_like(ranks)) if ties is None else ties
    if first.shape != ranks.shape or tied.shape != ranks.shape or (first < 0).any() or (tied < 1).any():
        raise ValueError("ties must be a place, 0 or more, and a number of items, 1 or more, for each user")
    places = np.arange(1, longest + 1)
    possible = (first > 0)[:, None] & (places >= first[:, None]) & (places < (first + tied)[:, None])
    possible &= np.asarray(ranked) >= 0  # a list that ends early has no later places
    gains = {"recall": np.ones(longest), "ndcg": 1 / np.log2(places + 1), "mrr": 1 / places}
    metrics: dict[str, np.ndarray] = {}
    for k in sorted(set(ks)):
        for name, gain in gains.items():
            metrics[f"{name}@{k}"] = (possible[:, :k] * gain[:k]).sum(axis=1) / tied
    metrics["mrr"] = metrics[f"mrr@{max(ks)}"]
    return metrics


def ranking_metrics(
    ranked: np.ndarray,
    targets: np.ndarray,
    ks: Sequence[int] = DEFAULT_KS,
    ties: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, float]:
    """Means of `user_metrics` over users."""
    return {name: float(values.mean()) for name, values in user_metrics(ranked, targets, ks, ties).items()}
