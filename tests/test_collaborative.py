"""Co-occurrence vectors against plain loops, and proof that held-out interactions do not reach them."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from sftrec_jax.data.dataset import Dataset
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.embed.collaborative import collaborative_vectors, cooccurrence, ppmi_vectors
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


def held_out_variants(dataset: Dataset) -> list[Dataset]:
    """The data set with its validation and test items changed, dropped, and exchanged between users."""
    lengths = np.diff(dataset.offsets)
    positions = np.arange(len(dataset.items)) - np.repeat(dataset.offsets[:-1], lengths)
    held_out = positions >= np.repeat(dataset.train_end, lengths)
    assert held_out.sum() == 2 * len(lengths)
    changed, exchanged = dataset.items.copy(), dataset.items.copy()
    changed[held_out] = (changed[held_out] + 5) % len(dataset.item_ids)
    exchanged[held_out] = np.roll(exchanged[held_out], 7)
    none = np.full(len(lengths), -1)
    return [
        dataclasses.replace(dataset, items=changed),
        dataclasses.replace(dataset, items=exchanged),
        dataclasses.replace(
            dataset,
            items=dataset.items[~held_out],
            timestamps=dataset.timestamps[~held_out],
            offsets=np.concatenate([[0], np.cumsum(dataset.train_end)]),
            valid_position=none,
            test_position=none,
        ),
    ]


def test_held_out_items_change_nothing() -> None:
    dataset = random_dataset(0)
    items = dataset.items.copy()
    items[0] = (items[0] + 5) % 12  # a training interaction does reach them
    in_training = dataclasses.replace(dataset, items=items)
    for vectors in (collaborative_vectors, ppmi_vectors):
        found = vectors(dataset, 4, 3, 0)
        for changed in held_out_variants(dataset):
            np.testing.assert_array_equal(vectors(changed, 4, 3, 0), found)
        assert np.abs(vectors(in_training, 4, 3, 0) - found).max() > 1e-3
    for changed in held_out_variants(dataset):
        assert (cooccurrence(changed, 3) != cooccurrence(dataset, 3)).nnz == 0
    assert (cooccurrence(in_training, 3) != cooccurrence(dataset, 3)).nnz > 0


def test_ppmi_vectors_are_those_of_the_singular_vectors() -> None:
    dataset = random_dataset(2)
    counts, total = np.zeros((12, 12)), 0.0
    for user in range(30):
        history = dataset.train_history(user)
        for i, first in enumerate(history):
            for j, second in enumerate(history):
                if 0 < abs(i - j) <= 3:
                    counts[first, second] += 1 / abs(i - j)
                    total += 1 / abs(i - j)
    information = np.zeros((12, 12))
    for i in range(12):
        for j in range(12):
            if counts[i, j] > 0:
                information[i, j] = max(0.0, np.log(counts[i, j] / total / (counts[i].sum() / total * counts[j].sum() / total)))
    left, singular, _ = np.linalg.svd(information)
    expected = left[:, :5] * np.sqrt(singular[:5])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = ppmi_vectors(dataset, 5, 3, 0)
    assert vectors.dtype == np.float32 and (information == 0).mean() > 0.2
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-5)


def test_ppmi_vectors_of_items_without_company_are_zeros() -> None:
    dataset = random_dataset(4, n_items=40, users=6)
    vectors = ppmi_vectors(dataset, 60, 3, 0)
    together = np.zeros(40, bool)
    for user in range(6):
        history = dataset.train_history(user)
        together[history] |= len(history) > 1
    assert vectors.shape == (40, 60) and 0 < together.sum() < 40
    assert not vectors[~together].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[together], axis=1), 1, atol=1e-6)
    alone = dataclasses.replace(dataset, train_end=np.ones(6, np.int64))
    assert not ppmi_vectors(alone, 4, 3, 0).any() and not collaborative_vectors(alone, 4, 3, 0).any()


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
    held = jnp.asarray(table)
    difference = initial_rows(held, codes, vectors) - initial_rows(held, codes, None)
    norm = np.median(np.linalg.norm(table, axis=1))
    np.testing.assert_allclose(difference @ difference.T, norm**2 * vectors @ vectors.T, atol=1e-3)
