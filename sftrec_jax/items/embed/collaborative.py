"""Item vectors from who is taken after whom, in training interactions only."""

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from sftrec_jax.data.dataset import Dataset

NOISE = 1e-6
"""Rows this much shorter than the longest are what the solver's rounding left of zeros."""


def cooccurrence(dataset: Dataset, window: int) -> sp.csr_matrix:
    """Symmetric float64 [n_items, n_items]: pairs d <= `window` steps apart in a training history count 1 / d.

    Where the data came as examples, a pair counts where its later item is the target, so each counts once.
    """
    n = len(dataset.item_ids)
    total = sp.csr_matrix((n, n))
    owner = np.repeat(np.arange(len(dataset.user_ids)), np.diff(dataset.offsets))
    items, trains = dataset.items, dataset.trains
    for step in range(1, window + 1):
        pairs = (owner[:-step] == owner[step:]) & trains[step:]
        first, second = items[:-step][pairs], items[step:][pairs]
        total = total + sp.csr_matrix((np.full(len(first), 1.0 / step), (first, second)), (n, n))
    return sp.csr_matrix(total + total.T)


def collaborative_vectors(dataset: Dataset, dim: int, window: int, seed: int) -> np.ndarray:
    """Item vectors whose inner products approximate log(1 + co-occurrence).

    The truncated SVD U S V' of the matrix gives U sqrt(S) (Levy and Goldberg 2014 factorise PMI this way; the plain
    logarithm keeps popularity in, which a ranking needs), whose rows are then shortened to the square root of their
    length. Items without training interactions get zeros.

    Args:
        dataset: only `train_history` of each user is read.
        dim: columns; those beyond the number of items - 1 are zeros.
        window: steps within which two items count as taken together.
        seed: of the solver's start.

    Returns: float32 [n_items, dim], mean squared length 1 over items with interactions.
    """
    counts = cooccurrence(dataset, window)
    counts.data = np.log1p(counts.data)
    vectors = _factor(counts, len(dataset.item_ids), dim, seed)
    if not vectors.any():
        return vectors.astype(np.float32)
    # Lengths follow popularity (0.1 to 6 on MovieLens); their square root ranks better: see docs/log.md.
    lengths = np.linalg.norm(vectors, axis=1)
    vectors /= np.sqrt(np.maximum(lengths, 1e-12))[:, None]
    vectors /= np.sqrt(lengths[lengths > 0].mean())
    return vectors.astype(np.float32)


def ppmi_vectors(dataset: Dataset, dim: int, window: int, seed: int) -> np.ndarray:
    """Item vectors from the positive pointwise mutual information of co-occurrence (Levy and Goldberg 2014).

    The information of items i and j is log(c_ij * c / (c_i * c_j)), c the sums over rows, columns and everything, with
    negative values put to 0. Its truncated SVD U S V' gives U sqrt(S), whose rows are then scaled to length 1.

    Args:
        dataset: only `train_history` of each user is read.
        dim: columns; those beyond the number of items - 1 are zeros.
        window: steps within which two items count as taken together.
        seed: of the solver's start.

    Returns: float32 [n_items, dim], rows of length 1; zeros for items that training interactions never put beside another
        item, or only in a group so small that it has no share in the `dim` largest factors.
    """
    counts = cooccurrence(dataset, window).tocoo()
    marginal = np.asarray(counts.sum(axis=1)).ravel()
    information = np.log(counts.data * marginal.sum() / (marginal[counts.row] * marginal[counts.col]))
    positive = information > 0
    matrix = sp.csr_matrix((information[positive], (counts.row[positive], counts.col[positive])), counts.shape)
    vectors = _factor(matrix, len(dataset.item_ids), dim, seed)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    shown = lengths > NOISE * lengths.max()
    return np.where(shown, vectors / np.where(shown, lengths, 1.0), 0.0).astype(np.float32)


def _factor(matrix: sp.csr_matrix, n: int, dim: int, seed: int) -> np.ndarray:
    """U sqrt(S) of the `dim` largest of n singular values, float64 [n, dim]; zero columns where there are not so many."""
    rank = min(dim, n - 1)
    if matrix.nnz == 0 or rank < 1:
        return np.zeros((n, dim))
    start = np.random.default_rng(seed).standard_normal(n)
    left, singular, _ = svds(matrix, k=rank, v0=start)
    assert left is not None and singular is not None  # both are computed unless asked otherwise
    order = np.argsort(-singular)
    vectors = left[:, order] * np.sqrt(np.maximum(singular[order], 0.0))
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), np.arange(rank)])  # the sign of a factor is arbitrary
    return np.pad(vectors, ((0, 0), (0, dim - rank)))
