"""A model beside the baselines that it has to beat: which there are, how sure each metric is, and who is better."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sftrec_jax.data.dataset import Dataset
from sftrec_jax.evaluate.baselines import Markov, Popularity
from sftrec_jax.evaluate.item_item import ItemItem
from sftrec_jax.evaluate.uncertainty import intervals, paired

BASELINES = ("popularity", "recent_popularity", "markov", "item_item")
COUNTER = "item_item"
"""The baseline below which a model has shown nothing."""


class Baseline(Protocol):
    """A ranking that training interactions give without a model."""

    def rank(self, histories: Sequence[np.ndarray], k: int, mask_seen: bool) -> np.ndarray:
        """int32 [U, k] best items for each history (item indices, oldest first), -1 where there are no more."""
        ...


def fit_baselines(dataset: Dataset, counter_decay: float = 0.8) -> dict[str, Baseline]:
    """The `BASELINES`, fitted on the training interactions alone; `counter_decay`: see `ItemItem.fit`."""
    fit = (dataset.offsets, dataset.items, dataset.trains, len(dataset.item_ids))
    recent = Popularity.fit_recent(*fit, dataset.timestamps if dataset.timed else None)
    every = (Popularity.fit(*fit), recent, Markov.fit(*fit), ItemItem.fit(*fit, decay=counter_decay))
    return dict(zip(BASELINES, every, strict=True))


def compare(values: Mapping[str, Mapping[str, np.ndarray]], seed: int) -> dict[str, Any]:
    """What stands beside the means in `metrics.json`.

    Args:
        values: of `model` and each baseline, of each metric float [U], the same users in the same order.
        seed: of the bootstrap and the tests.

    Returns: `ci`: of each row and metric [low, high], 95 % over users; `paired`: of each baseline and metric the model's
        `difference` with `low`, `high` and `p`; `below_counter`: whether the model's NDCG at the largest cut-off up to 10 is
        below the counter's.
    """
    others = {name: paired(values["model"], values[name], seed) for name in values if name != "model"}
    judged = max((n for n in values["model"] if n.startswith("ndcg@") and int(n[5:]) <= 10), key=lambda n: int(n[5:]))
    return {
        "ci": {name: {m: list(i) for m, i in intervals(row, seed).items()} for name, row in values.items()},
        "paired": {name: {m: d._asdict() for m, d in row.items()} for name, row in others.items()},
        "below_counter": others[COUNTER][judged].difference < 0,
    }
