"""Co-occurrence vectors against plain loops, and proof that held-out interactions do not reach them."""

import dataclasses

import numpy as np

from sftrec_jax.data.dataset import Dataset
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.embed.collaborative import collaborative_vectors, cooccurrence
from sftrec_jax.model.load import initial_rows


def random_dataset(seed: int, users: int = 30, n_items: int = 12) -> Dataset:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 9, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = np.concatenate([rng.permutation(n_items)[:n] for n in lengths]).astype(np.int32)
    ids = np.array([str(i) for i in range(n_items)], object)
    names = np.array([str(u) for u in range(users)], object)
    return Dataset(names, ids, ids, offsets, items, np.arange(len(items)), lengths - 2, lengths - 2, lengths - 1, {})


def test_cooccurrence_equals_loops() -> None:
    for window in (1, 3, 20):
        dataset = random_dataset(window)
        expected = np.zeros((12, 12))
        for user in range(30):
            history = dataset.train_history(user)
            for i in range(len(history)):
                for j in range(i + 1, min(len(history), i + window + 1)):
                    expected[history[i], history[j]] += 1 / (j - i)
                    expected[history[j], history[i]] += 1 / (j - i)
        np.testing.assert_allclose(cooccurrence(dataset, window).toarray(), expected, rtol=1e-12)


def test_held_out_items_change_nothing() -> None:
    dataset = random_dataset(0)
    items = dataset.items.copy()
    for user in range(30):
        begin, end = dataset.offsets[user] + dataset.train_end[user], dataset.offsets[user + 1]
        items[begin:end] = (items[begin:end] + 5) % 12
    changed = dataclasses.replace(dataset, items=items)
    np.testing.assert_array_equal(collaborative_vectors(dataset, 4, 3, 0), collaborative_vectors(changed, 4, 3, 0))
    items = dataset.items.copy()
    items[0] = (items[0] + 5) % 12  # a training interaction does reach them
    changed = dataclasses.replace(dataset, items=items)
    assert np.abs(collaborative_vectors(dataset, 4, 3, 0) - collaborative_vectors(changed, 4, 3, 0)).max() > 1e-3


def test_directions_are_those_of_the_singular_vectors() -> None:
    dataset = random_dataset(1)
    vectors = collaborative_vectors(dataset, 5, 20, 0)
    left, singular, _ = np.linalg.svd(np.log1p(cooccurrence(dataset, 20).toarray()))
    expected = left[:, :5] * np.sqrt(singular[:5])
    expected /= np.sqrt(np.linalg.norm(expected, axis=1, keepdims=True))
    gram, reference = vectors @ vectors.T, expected @ expected.T
    np.testing.assert_allclose(gram / np.trace(gram), reference / np.trace(reference), atol=1e-5)
    assert abs(np.mean((vectors**2).sum(1)) - 1) < 1e-5


def test_rows_carry_the_inner_products_of_the_vectors() -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((50, 24)).astype(np.float32)
    vectors = rng.standard_normal((6, 4)).astype(np.float32)
    titles = np.array(list("abcdef"), object)
    codes = ItemCodes(
        np.arange(50, 56, dtype=np.int32)[:, None], tuple("abcdef"), np.arange(50, 56, dtype=np.int32), ((1, 2),) * 6, titles
    )
    difference = initial_rows(table, codes, vectors) - initial_rows(table, codes, None)
    norm = np.median(np.linalg.norm(table, axis=1))
    np.testing.assert_allclose(difference @ difference.T, norm**2 * vectors @ vectors.T, atol=1e-3)
