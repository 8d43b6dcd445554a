"""Where a model is right and what it shows: recall by kind of target and user, accuracy by code, coverage, Gini, novelty."""

from typing import Any

import numpy as np

HEAD = 0.2
"""Share of the items, the most popular ones, that are the head."""
HISTORY_LENGTHS = (0, 5, 10, 20, 50)
"""Least length of each bucket."""


def recall_by_target(values: dict[str, np.ndarray], targets: np.ndarray, train_counts: np.ndarray) -> dict[str, Any]:
    """`users` and the mean of each metric for targets of the head, the tail, and cold ones.

    Cold items have no training interaction. The head is the most popular fifth of the catalogue; items with as many
    interactions as its last one are in it as well.

    Args:
        values: of each metric float [U].
        targets: int32 [U] items.
        train_counts: int64 [n_items] training interactions of each item.
    """
    last = np.sort(train_counts)[::-1][max(0, round(HEAD * len(train_counts)) - 1)]
    counts = train_counts[targets]
    head = counts >= max(1, last)
    return _by(values, {"head": head, "tail": ~head & (counts > 0), "cold": counts == 0})


def recall_by_history(values: dict[str, np.ndarray], lengths: np.ndarray) -> dict[str, Any]:
    """`users` and the mean of each metric by the length of the history, int64 [U]."""
    ends = (*HISTORY_LENGTHS[1:], None)
    names = [f"{a} to {b - 1}" if b else f"{a} or more" for a, b in zip(HISTORY_LENGTHS, ends, strict=True)]
    bucket = np.searchsorted(HISTORY_LENGTHS, lengths, side="right") - 1
    return _by(values, {name: bucket == i for i, name in enumerate(names)})


def exposure(items: np.ndarray, k: int, train_counts: np.ndarray) -> dict[str, float]:
    """What the first `k` places of all lists show of the catalogue.

    Args:
        items: int32 [U, K] lists, -1 where there is no item.
        k: places of each list that count.
        train_counts: int64 [n_items].

    Returns: `coverage@k`, the share of the catalogue that stands in at least one list; `gini@k` of how often each item of the
        catalogue does, 0 where all do equally often, towards 1 where few do; `novelty@k`, the mean of -log2 p(i) over the
        entries (Zhou et al., PNAS 2010), p(i) the item's share of training interactions with one more for every item.
    """
    n = len(train_counts)
    shown = items[:, :k]
    shown = shown[shown >= 0]
    if not len(shown):
        return {f"coverage@{k}": 0.0, f"gini@{k}": 0.0, f"novelty@{k}": 0.0}
    times = np.sort(np.bincount(shown, minlength=n))
    gini = float(((2 * np.arange(1, n + 1) - n - 1) * times).sum() / (n * times.sum()))
    information = -np.log2((train_counts + 1) / (train_counts.sum() + n))
    return {f"coverage@{k}": float((times > 0).mean()), f"gini@{k}": gini, f"novelty@{k}": float(information[shown].mean())}


def code_metrics(items: np.ndarray, targets: np.ndarray, codes: np.ndarray, k: int) -> dict[str, Any]:
    """Metrics over codes instead of items, as many papers report them; beside item-level ones, never in their place.

    Args:
        items: int32 [U, K] lists, -1 where there is no item.
        targets: int32 [U] items.
        codes: int32 [n_items, L] tokens, -1 after the end of a code.
        k: distinct codes of each list that count, at most.

    Returns: `code_recall@k`, the share of users whose target's code is among the first k distinct codes: where items share a
        code, this counts the wrong ones as hits; `level_accuracy` [L], the share of users whose first item has the target's
        tokens up to and including the level.
    """
    _, group = np.unique(codes, axis=0, return_inverse=True)
    group = group.reshape(-1)
    hits = 0
    for row, target in zip(items, targets, strict=True):
        distinct = list(dict.fromkeys(group[row[row >= 0]].tolist()))[:k]
        hits += int(group[target]) in distinct
    first = items[:, 0]
    same = (codes[np.maximum(first, 0)] == codes[targets]) & (first >= 0)[:, None]
    right = np.logical_and.accumulate(same, axis=1).mean(axis=0)
    return {f"code_recall@{k}": hits / len(targets), "level_accuracy": [float(r) for r in right]}


def _by(values: dict[str, np.ndarray], parts: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        name: {"users": int(chosen.sum())} | {metric: float(v[chosen].mean()) for metric, v in values.items() if chosen.any()}
        for name, chosen in parts.items()
    }
