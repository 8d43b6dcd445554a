"""Which item gets which number: orders of the catalogue for numbered item names."""

from collections.abc import Sequence

import numpy as np

from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.histories import text_hashes


def sequential_order(dataset: Dataset) -> np.ndarray:
    """Numbers items by their first appearance in the training histories, user after user (Hua et al. 2023).

    P5 walks whole histories, so a user's held-out items have the numbers after those of the history and can be read off it.
    Here held-out items are not looked at: those that no training history has come last, in the order of a hash of their ids.

    Returns: int64 [n_items], the number of each item, a permutation of 0 to n_items - 1.
    """
    lengths = np.diff(dataset.offsets)
    positions = np.arange(len(dataset.items)) - np.repeat(dataset.offsets[:-1], lengths)
    walked = dataset.items[positions < np.repeat(dataset.train_end, lengths)]
    items, first = np.unique(walked, return_index=True)
    seen = items[np.argsort(first)]
    by_hash = _hash_order(dataset.item_ids, 0)
    return _numbers(np.concatenate([seen, by_hash[~np.isin(by_hash, seen)]]))


def random_order(item_ids: Sequence[str] | np.ndarray, seed: int) -> np.ndarray:
    """Numbers items by a hash of (seed, id), whatever their order in the catalogue: int64 [n_items]."""
    return _numbers(_hash_order(item_ids, seed))


def collaborative_order(paths: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Numbers items along the leaves of their clusters (see `cluster_paths`): int64 [n_items]."""
    return _numbers(np.asarray(sorted(range(len(paths)), key=lambda row: paths[row]), np.int64))


def _hash_order(item_ids: Sequence[str] | np.ndarray, seed: int) -> np.ndarray:
    """int64 [n_items] rows in the order of their hashes."""
    ids = [str(item) for item in item_ids]
    hashes = text_hashes(ids, seed, "order")
    # the id comes second only to settle a collision of two 64-bit hashes
    return np.asarray(sorted(range(len(ids)), key=lambda row: (hashes[row], ids[row])), np.int64)


def _numbers(order: np.ndarray) -> np.ndarray:
    """The place of each row in `order`."""
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.arange(len(order))
    return numbers
