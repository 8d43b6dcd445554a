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


def ranking_metrics(ranked: np.ndarray, targets: np.ndarray, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """Means over users of `recall@k`, `ndcg@k` and `mrr@k`, and `mrr`, which is `mrr@k` at the largest k.

    With one target, recall is the hit rate, NDCG of a hit at rank r is 1 / log2(r + 1), and MRR's share is 1 / r.

    Args:
        ranked: int32 [U, K] item indices, best first, K at least the largest k; -1 is no item.
        targets: int32 [U] item indices.
        ks: cut-offs, 1 or more.

    Raises: ValueError without users, or where a list is shorter than a cut-off: the metric would be silently capped.
    """
    ranks = first_hit_ranks(ranked, targets)
    longest = np.asarray(ranked).shape[1]
    if len(ranks) == 0:
        raise ValueError("no users to evaluate")
    if not ks or min(ks) < 1 or max(ks) > longest:
        raise ValueError(f"the cut-offs {tuple(ks)} must lie between 1 and the length of the lists, {longest}")
    place = np.maximum(ranks, 1)
    metrics: dict[str, float] = {}
    for k in sorted(set(ks)):
        hit = (ranks > 0) & (ranks <= k)
        metrics[f"recall@{k}"] = float(hit.mean())
        metrics[f"ndcg@{k}"] = float((hit / np.log2(place + 1)).mean())
        metrics[f"mrr@{k}"] = float((hit / place).mean())
    metrics["mrr"] = metrics[f"mrr@{max(ks)}"]
    return metrics
