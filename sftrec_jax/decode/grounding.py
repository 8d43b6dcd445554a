"""Grounding without constraint: what the model writes freely stands for the items nearest to it in embedding space."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from scipy.spatial.distance import cdist

from sftrec_jax.decode.recommender import Ranking
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.pool import Progress, mean_pooled

USERS, ITEMS = 64, 8192
"""Users and items compared at once: distances are float64, and so are the vectors while they are compared."""


class Grounder:
    """Ranks items by the distance of their tokens' vector to that of a generated sequence, as BIGRec does (Bao et al. 2023).

    BIGRec takes the last layer's hidden state at the last token of a title, from the base model before fine-tuning, and
    ranks by L2 distance to the best of four beams. Here a vector is the mean over the tokens, terminator included
    (`mean_pooled`), and the model is the one given: new item tokens mean nothing to another. The weight by which BIGRec may
    favour popular items, or those of a collaborative model, is left out; it is tuned on validation data.

    Args:
        decoder: its parameters stay where they are, on `mesh`.
        codes: tokens of every item. Items with equal codes have one vector, 4 bytes times the hidden size for each item.
        mesh: see `mean_pooled`.
        progress: called with the number of codes just finished.

    Raises: UserError where a vector is not finite.
    """

    def __init__(self, decoder: Decoder, codes: ItemCodes, mesh: Mesh, progress: Progress | None = None):
        self._decoder, self._mesh = decoder, mesh
        distinct, row_of_item = np.unique(codes.codes, axis=0, return_inverse=True)
        self._row_of = {_key(row): number for number, row in enumerate(distinct)}
        self._codes = self._pooled([row[row >= 0] for row in distinct], progress)
        self.vectors: np.ndarray = self._codes[row_of_item]
        """float32 [n_items, D]"""

    def rank(self, tokens: np.ndarray, scores: np.ndarray, k: int, exclude: Sequence[np.ndarray] | None) -> Ranking:
        """The `k` items nearest to the best sequence of each user.

        Args:
            tokens: int32 [U, K, L] generated token ids, -1 after the end (see `Recommender.generate`).
            scores: float32 [U, K] their log-probabilities, -inf where there is no sequence.
            k: length of the lists.
            exclude: U arrays of item indices that must not be returned, or None.

        Returns: items, nearest first, and as scores the distances times -1. Equally near items stand in the order of the
            catalogue. A user without any sequence has an empty list.
        Raises: UserError for `k` beyond the catalogue.
        """
        if tokens.shape[:2] != scores.shape:
            raise ValueError(f"tokens are {list(tokens.shape)} but scores {list(scores.shape)}")
        written = np.flatnonzero((scores > -np.inf).any(axis=1))
        best = tokens[written, scores[written].argmax(axis=1)]
        queries = self._queries(best)
        left_out = None if exclude is None else [exclude[user] for user in written.tolist()]
        found = nearest(queries, self.vectors, k, left_out)
        shape = (len(tokens), k)
        items, distances = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
        items[written], distances[written] = found.items, found.scores
        return Ranking(items, distances)

    def _queries(self, sequences: np.ndarray) -> np.ndarray:
        """float32 [m, D]; a sequence that names an item has that item's vector, so that nothing else can be as near."""
        known = np.asarray([self._row_of.get(_key(row), -1) for row in sequences], np.int64)
        foreign = np.flatnonzero(known < 0)
        vectors = self._codes[known]
        vectors[foreign] = self._pooled([row[row >= 0] for row in sequences[foreign]], None)
        return vectors

    def _pooled(self, sequences: Sequence[np.ndarray], progress: Progress | None) -> np.ndarray:
        vectors = mean_pooled(self._decoder, sequences, self._mesh, progress=progress)
        if not np.isfinite(vectors).all():
            raise UserError("the model's hidden states are not finite: its weights are broken; use an earlier checkpoint")
        return vectors


def nearest(queries: np.ndarray, vectors: np.ndarray, k: int, exclude: Sequence[np.ndarray] | None) -> Ranking:
    """The `k` rows of `vectors` with the least L2 distance to each query.

    Args:
        queries: float32 [U, D].
        vectors: float32 [n, D].
        k: length of the lists.
        exclude: U arrays of rows that must not be returned, or None.

    Returns: rows, nearest first, the lower of two equally near ones first, and as scores the distances times -1; -1 and -inf
        where exclusion leaves fewer than `k`.
    Raises: UserError for `k` below 1 or over n.
    """
    n = len(vectors)
    if not 1 <= k <= n:
        raise UserError(f"{k} items a user were asked for but the catalogue has {n}; use a number from 1 to {n}")
    if exclude is not None and len(exclude) != len(queries):
        raise ValueError(f"{len(queries)} queries but {len(exclude)} lists of items to exclude")
    items, scores = np.full((len(queries), k), -1, np.int32), np.full((len(queries), k), -np.inf, np.float32)
    for begin in range(0, len(queries), USERS):
        part = queries[begin : begin + USERS]
        # Differences before squares: the common |a|^2 - 2ab + |b|^2 loses the small distances, which decide the order.
        distances = np.concatenate([cdist(part, vectors[i : i + ITEMS]) for i in range(0, n, ITEMS)], axis=1)
        for row, distance in enumerate(distances, start=begin):
            if exclude is not None:
                distance[np.asarray(exclude[row], np.int64)] = np.inf
            order = np.argsort(distance, kind="stable")[:k]
            order = order[distance[order] < np.inf]
            items[row, : len(order)], scores[row, : len(order)] = order, -distance[order]
    return Ranking(items, scores)


def _key(row: np.ndarray) -> bytes:
    """Equal for equal token sequences, however many -1 follow."""
    return row[row >= 0].astype(np.int32).tobytes()
