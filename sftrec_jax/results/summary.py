"""Seeds of one result together: means, how they spread, intervals over users, and where a repetition must fall."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sftrec_jax.evaluate.comparison import compare
from sftrec_jax.results.lists import Values

RANGE_LEVEL = 0.99


def prediction_range(values: Sequence[float], new: int) -> tuple[float, float]:
    """Where the mean of `new` further seeds falls with probability .99, were the metric normal over seeds.

    mean -+ t(.995, n - 1) s sqrt(1/n + 1/new), cut to [0, 1], of n >= 2 seeds with standard deviation s (Hahn and Meeker,
    *Statistical Intervals*, 1991).
    """
    from scipy.stats import t

    n = len(values)
    if n < 2 or new < 1:
        raise ValueError(f"{n} seeds and {new} new ones; a range needs two, for at least one")
    width = float(t.ppf((1 + RANGE_LEVEL) / 2, n - 1)) * float(np.std(values, ddof=1)) * float(np.sqrt(1 / n + 1 / new))
    mean = float(np.mean(values))
    return max(0.0, mean - width), min(1.0, mean + width)


def ranges(model: Sequence[Mapping[str, float]], intervals: Mapping[str, Sequence[float]], new: int) -> dict[str, list[float]]:
    """Of each metric [low, high] within which the mean of `new` repetitions must fall.

    Args:
        model: of each published seed its metrics.
        intervals: over users (`ci`), used for one seed, which tells nothing of others: mean -+ half of their width.
        new: seeds of the repetition.
    """
    if len(model) > 1:
        return {name: list(prediction_range([row[name] for row in model], new)) for name in model[0]}
    half = {name: (high - low) / 2 for name, (low, high) in intervals.items()}
    return {name: [max(0.0, model[0][name] - h), min(1.0, model[0][name] + h)] for name, h in half.items()}


def range_is(seeds: int) -> str:
    """What `range` is, in words."""
    if seeds > 1:
        return f"99 % prediction interval of the mean of {seeds} further seeds (Student's t over {seeds} seeds)"
    return "one seed: its value -+ half the width of the 95 % interval over users, which knows nothing of other seeds"


def summarise(metrics: Sequence[Mapping[str, Mapping[str, float]]], values: Sequence[Mapping[str, Values]], seed: int) -> Any:
    """Everything in a published result that follows from its seeds.

    Args:
        metrics: of each seed, of `model` and each baseline.
        values: of each seed, of the same rows, a value a user; the same users in the same order for all seeds.
        seed: of the bootstrap.

    Returns: `metrics` (means over seeds), `spread` (standard deviation of the model over seeds, null for one), `ci`, `paired` and
        `below_counter` as in `metrics.json` but of each user's mean over seeds and up to `@10`, `range` and `range_is`. Drawing
        users and not (seed, user) pairs keeps what a user's seeds share together, so tie seeds do not narrow the interval as if
        there were more users.
    """
    means = {row: {name: float(np.mean([one[row][name] for one in metrics])) for name in metrics[0][row]} for row in metrics[0]}
    model = [one["model"] for one in metrics]
    several = len(model) > 1
    spread = {name: float(np.std([row[name] for row in model], ddof=1)) for name in model[0]} if several else None
    names = [name for name in model[0] if name in values[0]["model"]]
    users = {row: {name: np.mean([one[row][name] for one in values], axis=0) for name in names} for row in metrics[0]}
    certain = compare(users, seed)
    about = {"metrics": means, "spread": spread} | certain
    return about | {"range": ranges(model, certain["ci"]["model"], len(model)), "range_is": range_is(len(model))}
