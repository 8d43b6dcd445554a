"""The membership test sees vectors and codes that were fitted on held-out interactions, and clears those that were not."""

import dataclasses
import random

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from sftrec_jax.data.dataset import Dataset
from sftrec_jax.evaluate import membership
from sftrec_jax.evaluate.membership import Pairs, fresh_pairs, of_codes, of_vectors
from sftrec_jax.items.embed.collaborative import ppmi_vectors
from sftrec_jax.items.embed.text import TfidfSpace
from sftrec_jax.items.quantise.kmeans import fit_residual_kmeans

N_ITEMS, TASTES = 600, 10


def world(seed: int, users: int = 700) -> tuple[Dataset, list[str]]:
    """Users of ten tastes who take five items, few of other tastes. Titles have a word of the taste among others."""
    draw = random.Random(seed)
    words = [f"word{i}" for i in range(60)]
    texts = [f"{words[i % TASTES]} {words[TASTES + i % 7]} {draw.choice(words)} n{i}" for i in range(N_ITEMS)]
    histories = []
    for _ in range(users):
        taste, items = draw.randrange(TASTES), []
        while len(items) < 5:
            item = draw.randrange(N_ITEMS)
            if item not in items and (item % TASTES == taste or draw.random() < 0.05):
                items.append(item)
        histories.append(items)
    offsets = 5 * np.arange(users + 1)
    ids = np.asarray([str(i) for i in range(N_ITEMS)], object)
    names = np.asarray([f"u{u:04d}" for u in range(users)], object)
    stamps = np.tile(np.arange(5), users)
    ends = np.full(users, 3)
    return Dataset(names, ids, ids, offsets, np.concatenate(histories).astype(np.int32), stamps, ends, ends, ends + 1, {}), texts


def leaky(dataset: Dataset) -> Dataset:
    """The same interactions, all of them training."""
    return dataclasses.replace(dataset, train_end=np.diff(dataset.offsets))


@pytest.fixture(scope="module")
def case() -> tuple[Dataset, list[str]]:
    return world(0)


def test_pairs_are_held_out_and_new(case: tuple[Dataset, list[str]]) -> None:
    dataset, _ = case
    together = set()
    for user in range(len(dataset.user_ids)):
        history = dataset.train_history(user).tolist()
        together |= {frozenset((a, b)) for a in history for b in history}
    expected = []
    for user in range(len(dataset.user_ids)):
        history = dataset.history(user).tolist()
        expected += [(a, b) for a, b in (history[2:4], history[3:5]) if frozenset((a, b)) not in together]
    pairs = fresh_pairs(dataset)
    assert list(zip(pairs.before.tolist(), pairs.target.tolist(), strict=True)) == expected and 500 < len(expected) < 1400


def test_a_draw_of_pairs(case: tuple[Dataset, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, _ = case
    every = fresh_pairs(dataset)
    monkeypatch.setattr(membership, "PAIRS", 300)
    drawn, again, other = fresh_pairs(dataset), fresh_pairs(dataset), fresh_pairs(dataset, 1)
    assert (
        len(drawn.before) == 300 and np.array_equal(drawn.target, again.target) and not np.array_equal(drawn.target, other.target)
    )
    whole = set(zip(every.before.tolist(), every.target.tolist(), strict=True))
    assert set(zip(drawn.before.tolist(), drawn.target.tolist(), strict=True)) <= whole


@pytest.fixture(scope="module")
def fitted(case: tuple[Dataset, list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of training and of everything."""
    return ppmi_vectors(case[0], 48, 5, 0), ppmi_vectors(leaky(case[0]), 48, 5, 0)


def test_vectors(case: tuple[Dataset, list[str]], fitted: tuple[np.ndarray, np.ndarray]) -> None:
    dataset, texts = case
    words = TfidfSpace.fit(texts, 64, 0).transform(texts)
    train, everything = fitted
    for honest in (words, train, np.hstack([words, train]), np.random.default_rng(0).standard_normal((N_ITEMS, 16))):
        assert not of_vectors(honest, dataset, texts).suspect
    for vectors in (everything, np.hstack([words, 2 * everything])):
        result = of_vectors(vectors, dataset, texts)
        assert result.suspect and result.ratio >= membership.VECTOR_RATIO


def test_codes(case: tuple[Dataset, list[str]], fitted: tuple[np.ndarray, np.ndarray]) -> None:
    dataset, texts = case

    honest, leaking = (fit_residual_kmeans(vectors, 2, 24, False, 0)[1] for vectors in fitted)
    drawn = np.random.default_rng(0).integers(0, 16, (N_ITEMS, 3))
    for codes in (honest, drawn):
        assert not of_codes(codes, dataset, texts).suspect
    assert of_codes(leaking, dataset, texts).suspect


def test_hits_of_vectors_are_those_of_sklearn(case: tuple[Dataset, list[str]]) -> None:
    dataset, texts = case
    vectors = np.random.default_rng(1).standard_normal((N_ITEMS, 8))
    vectors[::9] = 0  # items without a vector
    pairs = fresh_pairs(dataset)
    known = np.flatnonzero(vectors.any(axis=1))
    neighbours = NearestNeighbors(n_neighbors=membership.NEIGHBOURS + 1, metric="cosine", algorithm="brute").fit(vectors[known])
    near = {
        int(i): set(known[row].tolist()) - {int(i)}
        for i, row in zip(known, neighbours.kneighbors(vectors[known])[1], strict=True)
    }
    asked = [(a, b) for a, b in zip(pairs.before.tolist(), pairs.target.tolist(), strict=True) if a in near and b in near]
    result = of_vectors(vectors, dataset, texts)
    assert result.pairs == len(asked) and result.hits == sum(b in near[a] for a, b in asked) > 20


@pytest.mark.parametrize("misled", [False, True])
def test_hits_and_benchmark_of_codes_are_those_of_loops(case: tuple[Dataset, list[str]], misled: bool) -> None:
    dataset, texts = case
    if misled:  # training takes other items together than held-out users do: words alone know more
        items = dataset.items.copy()
        items[dataset.trains] = np.random.default_rng(4).permutation(N_ITEMS)[items[dataset.trains]]
        dataset = dataclasses.replace(dataset, items=items)
    levels = np.random.default_rng(2).integers(0, 3 if misled else 6, (N_ITEMS, 3))
    levels[::4, 2] = -1
    pairs = fresh_pairs(dataset)
    words, taken = np.asarray(membership._words(texts).todense()), reference_ppmi(dataset)
    hits = by_words = by_both = 0
    for a, b in zip(pairs.before.tolist(), pairs.target.tolist(), strict=True):
        groups = (np.flatnonzero((levels[:, :length] == levels[a, :length]).all(axis=1)) for length in (3, 2, 1))
        group = next(set(g.tolist()) - {a} for g in groups if len(g) - 1 >= membership.GROUP)
        hits += b in group
        alike = words @ words[a]
        by_words += place(alike, a, b) < len(group)
        by_both += place(alike + taken @ taken[a], a, b) < len(group)
    result = of_codes(levels, dataset, texts)
    assert (result.pairs, result.hits) == (len(pairs.before), hits)
    assert abs(by_words - by_both) > 5 and (by_words > by_both) == misled
    assert abs(result.benchmark - max(by_words, by_both)) <= 1  # sums in another order can break a tie


def place(scores: np.ndarray, a: int, b: int) -> int:
    """How many items but a score higher than b; of those that score the same, half."""
    others = np.delete(scores, a)
    return int((others > scores[b] + 1e-9).sum() + ((np.abs(others - scores[b]) <= 1e-9).sum() - 1) // 2)


def reference_ppmi(dataset: Dataset) -> np.ndarray:
    """Positive PMI of pairs within five steps, weighted 1 / d, rows of length 1."""
    counts = np.zeros((N_ITEMS, N_ITEMS))
    for user in range(len(dataset.user_ids)):
        history = dataset.train_history(user).tolist()
        for i, a in enumerate(history):
            for j, b in enumerate(history):
                if i != j:
                    counts[a, b] += 1 / abs(i - j)
    sums = counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.where(counts > 0, np.log(counts * counts.sum() / np.outer(sums, sums)), 0)
    information = np.maximum(information, 0)
    lengths = np.linalg.norm(information, axis=1, keepdims=True)
    return information / np.where(lengths > 0, lengths, 1)


def test_places_of_equal_scores() -> None:
    draw = np.random.default_rng(3)
    for _ in range(200):
        scores = draw.integers(0, 4, (5, 9)).astype(float)
        before, target = np.arange(5), (np.arange(5) + draw.integers(1, 8)) % 9
        expected = []
        for row, a, b in zip(scores, before, target, strict=True):
            others = [row[i] for i in range(9) if i not in (a, b)]
            expected.append(sum(o > row[b] for o in others) + sum(o == row[b] for o in others) // 2)
        assert membership._places(scores, before, target).tolist() == expected


def test_a_few_pairs_prove_nothing() -> None:
    dataset, texts = world(1, 3)
    result = of_vectors(ppmi_vectors(leaky(dataset), 8, 5, 0), dataset, texts)
    assert result.hits > 3 and result.ratio > membership.VECTOR_RATIO and not result.suspect


def test_nothing_to_ask() -> None:
    dataset, texts = world(1, 30)
    none = dataclasses.replace(dataset, valid_position=np.full(30, -1), test_position=np.full(30, -1))
    assert of_vectors(np.eye(N_ITEMS), none, texts).pairs == 0 and not of_codes(np.eye(N_ITEMS, dtype=int), none, texts).suspect
    blocks = list(Pairs(np.arange(7), np.arange(7)).blocks(10**9))
    assert [b.tolist() for b, _ in blocks] == [[i] for i in range(7)]
