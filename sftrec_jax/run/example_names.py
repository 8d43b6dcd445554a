"""Training examples by name, for messages: whose history, and which items or answers."""

from collections.abc import Callable

import numpy as np

from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.mixture import Mixture, Pairs
from sftrec_jax.data.segments import Segments
from sftrec_jax.train.batches import Packable

SHOWN = 3
"""Targets of a history that are named."""


def example_names(parts: Packable, dataset: Dataset) -> Callable[[int], str]:
    """A function from the index of a part of a batch plan to a few words on it."""
    pieces = parts.parts if isinstance(parts, Mixture) else (parts,)
    edges = np.cumsum([0, *map(len, pieces)])

    def name(index: int) -> str:
        which = int(np.searchsorted(edges, index, side="right")) - 1
        piece, at = pieces[which], int(index - edges[which])
        if isinstance(piece, Pairs):
            return f"task {piece.task}, example {at + 1}"
        if not isinstance(piece, Segments):
            return f"example {at + 1}"
        window = piece.windows
        user = int(np.searchsorted(dataset.offsets, window.begin[at], side="right")) - 1
        items = piece.items[window.first[at] : window.end[at]].tolist()
        more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
        return f"user {dataset.user_ids[user]}: {', '.join(str(dataset.titles[i]) for i in items[:SHOWN])}{more}"

    return name
