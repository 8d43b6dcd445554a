"""How sure a metric is: bootstrap intervals over users, and paired tests of one ranking against another."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

DRAWS = 1000
LEVEL = 0.95


class Difference(NamedTuple):
    """One ranking against another over the same users."""

    difference: float
    """Mean of the first minus mean of the second."""
    low: float
    high: float
    """The interval of that (percentile bootstrap over users)."""
    p: float
    """Of a paired randomisation test: how often a difference at least as large comes about if the two were exchanged at random
    for each user."""


def draw(users: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """`count` of them, in their order; all of them for None."""
    if count is None or count >= len(users):
        return users
    return np.sort(np.random.default_rng(seed).permutation(users)[:count])


def intervals(values: Mapping[str, np.ndarray], seed: int = 0, draws: int = DRAWS) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap (Efron 1979) of the mean over users, 95 %.

    Args:
        values: of each metric float [U], a value a user, the same users in all.
        seed: draws the users.
        draws: samples of U users with replacement.
    """
    means = _resampled(np.stack(list(values.values()), axis=1), seed, draws)
    tail = 100 * (1 - LEVEL) / 2
    return {name: _interval(means[:, i], tail) for i, name in enumerate(values)}


def paired(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], seed: int = 0, draws: int = DRAWS
) -> dict[str, Difference]:
    """The metrics that both have, `first` against `second`; values float [U] of the same users in the same order.

    The test is Fisher's randomisation test (Smucker, Allan and Carterette, CIKM 2007); its least p is 1 / (draws + 1).
    """
    names = [name for name in first if name in second]
    differences = np.stack([first[name] - second[name] for name in names], axis=1)
    means, tail = _resampled(differences, seed, draws), 100 * (1 - LEVEL) / 2
    seen = np.abs(differences.mean(axis=0))
    rng = np.random.default_rng([seed, 1])
    # Rounding must not decide whether an exchange that changes nothing is as large.
    as_large = np.zeros(len(names), np.int64)
    for _ in range(draws):
        signs = rng.integers(0, 2, len(differences)) * 2.0 - 1
        as_large += np.abs(signs @ differences) / len(differences) >= seen * (1 - 1e-9)
    return {
        name: Difference(float(differences[:, i].mean()), *_interval(means[:, i], tail), float((1 + as_large[i]) / (1 + draws)))
        for i, name in enumerate(names)
    }


def _interval(means: np.ndarray, tail: float) -> tuple[float, float]:
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def _resampled(values: np.ndarray, seed: int, draws: int) -> np.ndarray:
    """float64 [draws, M]: means of values [U, M] over users drawn with replacement, the same ones for all M."""
    n, rng = len(values), np.random.default_rng([seed, 0])
    if n == 0:
        raise ValueError("no users to evaluate")
    return np.stack([np.bincount(rng.integers(0, n, n), minlength=n) @ values for _ in range(draws)]) / n
