"""Cluster paths and orders of items: what every tree must be, planted groups, and proof that held-out items do not matter."""

import dataclasses
from collections import defaultdict

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from test_collaborative import held_out_variants, random_dataset

from sftrec_jax.items.embed.clusters import DEPTH, cluster_paths
from sftrec_jax.items.embed.collaborative import cooccurrence
from sftrec_jax.items.order import collaborative_order, random_order, sequential_order


def symmetric(counts: np.ndarray) -> sp.csr_matrix:
    return sp.csr_matrix(counts + counts.T)


def names(n: int) -> list[str]:
    return [f"item {i}" for i in range(n)]


def check_tree(paths: list[tuple[int, ...]], branches: int, leaf: int) -> None:
    """Walks the tree that the paths spell out."""
    assert len(set(paths)) == len(paths)
    inner: dict[tuple[int, ...], set[int]] = defaultdict(set)
    leaves: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for path in paths:
        leaves[path[:-1]].append(path[-1])
        for depth in range(len(path) - 1):
            inner[path[:depth]].add(path[depth])
    assert not inner.keys() & leaves.keys()  # after a prefix come clusters or numbers
    for prefix, children in inner.items():
        assert children == set(range(len(children))) and len(children) <= branches + (prefix == ())
    for numbers in leaves.values():
        assert sorted(numbers) == list(range(len(numbers))) and len(numbers) <= leaf


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(2, 5), st.integers(1, 9), st.sampled_from([0.0, 0.01, 0.05, 0.5]), st.integers(0, 5))
def test_any_graph_gives_a_tree(n: int, branches: int, leaf: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = symmetric(rng.random((n, n)) * (rng.random((n, n)) < density))
    paths = cluster_paths(counts, names(n), branches, leaf, seed)
    check_tree(paths, branches, leaf)
    # Items that were never taken with another keep to a branch of their own.
    connected = np.asarray(counts.sum(axis=1)).ravel() > 0
    if n > leaf and connected.any() and not connected.all():
        assert not {paths[i][0] for i in np.flatnonzero(connected)} & {paths[i][0] for i in np.flatnonzero(~connected)}


@pytest.mark.parametrize(
    "counts",
    [
        np.ones((40, 40)),  # nothing to tell items apart by
        np.kron(np.eye(20), np.ones((2, 2))),  # pairs that hang together with nobody else
        np.diag(np.ones(39), 1),  # a path
        np.outer(np.arange(40) == 0, np.ones(40)),  # a star
    ],
    ids=["equal", "pairs", "path", "star"],
)
def test_graphs_that_are_hard_to_divide(counts: np.ndarray) -> None:
    for leaf in (1, 3, 64):
        paths = cluster_paths(symmetric(counts), names(40), 3, leaf, 0)
        check_tree(paths, 3, leaf)
        assert max(map(len, paths)) <= DEPTH + 5


def planted(sizes: list[int], seed: int) -> tuple[sp.csr_matrix, np.ndarray]:
    """Groups whose items are taken together thirty times as often as items of different groups."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    same = group[:, None] == group
    return symmetric(np.triu(rng.random(same.shape) < np.where(same, 0.3, 0.01), 1).astype(float)), group


@pytest.mark.parametrize("sizes", [[60, 60, 60, 60], [300, 200, 150, 100]], ids=["dense", "iterative"])
def test_planted_groups_are_found(sizes: list[int]) -> None:
    counts, group = planted(sizes, 0)
    paths = cluster_paths(counts, names(len(group)), 4, max(sizes), 0)
    check_tree(paths, 4, max(sizes))
    assert adjusted_rand_score(group, [path[0] for path in paths]) > 0.95
    largest = [np.mean(np.asarray([p[0] for p in paths]) == c) for c in range(4)]
    assert largest == sorted(largest, reverse=True)


def test_pairs_stay_together_where_the_graph_falls_apart() -> None:
    paths = cluster_paths(symmetric(np.kron(np.eye(32), np.ones((2, 2)))), names(64), 4, 4, 0)
    assert sum(paths[i][:-1] == paths[i + 1][:-1] for i in range(0, 64, 2)) == 32


def test_paths_do_not_depend_on_the_order_of_the_catalogue() -> None:
    counts, group = planted([50, 70, 90], 1)
    ids, order = np.asarray(names(210)), np.random.default_rng(2).permutation(210)
    paths = cluster_paths(counts, ids, 3, 8, 0)
    moved = cluster_paths(counts[order][:, order], ids[order], 3, 8, 0)
    assert [paths[i] for i in order] == moved
    assert cluster_paths(counts, [f"other {i}" for i in range(210)], 3, 8, 0) != paths


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 items"):
        cluster_paths(sp.csr_matrix((4, 4)), names(3), 2, 2, 0)


def test_held_out_items_do_not_reach_clusters_or_the_sequential_order() -> None:
    dataset = random_dataset(3, users=40, n_items=30)
    paths = cluster_paths(cooccurrence(dataset, 5), dataset.item_ids, 3, 4, 0)
    numbers = sequential_order(dataset)
    for changed in held_out_variants(dataset):
        assert cluster_paths(cooccurrence(changed, 5), changed.item_ids, 3, 4, 0) == paths
        np.testing.assert_array_equal(sequential_order(changed), numbers)
    items = dataset.items.copy()
    items[0] = (items[0] + 5) % 30
    changed = dataclasses.replace(dataset, items=items)
    assert cluster_paths(cooccurrence(changed, 5), changed.item_ids, 3, 4, 0) != paths
    assert (sequential_order(changed) != numbers).any()


def test_sequential_order_equals_a_walk() -> None:
    for seed in range(5):
        dataset = random_dataset(seed, users=4, n_items=30)
        seen: list[int] = []
        for user in range(4):
            seen += [i for i in dataset.train_history(user).tolist() if i not in seen]
        numbers = sequential_order(dataset)
        assert numbers.dtype == np.int64 and sorted(numbers) == list(range(30))
        assert [int(numbers[i]) for i in seen] == list(range(len(seen)))
        # The order of the rest follows their ids, not their places.
        order = np.random.default_rng(seed).permutation(30)
        place = np.argsort(order).astype(np.int32)
        moved = dataclasses.replace(dataset, item_ids=dataset.item_ids[order], items=place[dataset.items])
        np.testing.assert_array_equal(sequential_order(moved), numbers[order])
        assert 0 < len(seen) < 29


def test_random_and_collaborative_orders_are_permutations() -> None:
    ids = np.asarray(names(50))
    numbers, order = random_order(ids, 1), np.random.default_rng(0).permutation(50)
    assert sorted(numbers) == list(range(50)) and (numbers != np.arange(50)).sum() > 30
    np.testing.assert_array_equal(random_order(ids[order], 1), numbers[order])
    assert (random_order(ids, 2) != numbers).sum() > 30
    paths = [(1, 0), (0, 2, 1), (0, 2, 0), (2, 0), (0, 10, 0), (1, 1)]
    assert collaborative_order(paths).tolist() == [3, 1, 0, 5, 2, 4]
