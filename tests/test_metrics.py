import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftrec_jax.evaluate.metrics import first_hit_ranks, ranking_metrics
from sftrec_jax.run.evaluation import list_metrics


def reference(ranked: list[list[int]], targets: list[int], k: int) -> tuple[float, float, float]:
    recall = ndcg = mrr = 0.0
    for row, target in zip(ranked, targets, strict=True):
        for rank, item in enumerate(row[:k], start=1):
            if item != -1 and item == target:
                recall, ndcg, mrr = recall + 1, ndcg + 1 / math.log2(rank + 1), mrr + 1 / rank
                break
    return recall / len(targets), ndcg / len(targets), mrr / len(targets)


@given(st.data())
def test_metrics_equal_a_plain_loop(data) -> None:
    width = data.draw(st.integers(1, 12))
    row = st.permutations(range(12)).map(lambda p: [v if v < 9 else -1 for v in p[:width]])
    ranked = data.draw(st.lists(row, min_size=1, max_size=8))
    targets = data.draw(st.lists(st.integers(0, 9), min_size=len(ranked), max_size=len(ranked)))
    ks = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=4))
    found = ranking_metrics(np.asarray(ranked, np.int32), np.asarray(targets, np.int32), ks)
    for k in ks:
        got = (found[f"recall@{k}"], found[f"ndcg@{k}"], found[f"mrr@{k}"])
        assert got == pytest.approx(reference(ranked, targets, k), abs=1e-12)
    assert found["mrr"] == found[f"mrr@{max(ks)}"]
    assert all(type(v) is float for v in found.values()) and len(found) == 3 * len(set(ks)) + 1


def test_first_hit_ranks() -> None:
    ranked = np.asarray([[4, 2, -1], [1, 2, 3], [-1, -1, -1]], np.int32)
    assert first_hit_ranks(ranked, np.asarray([2, 7, 0], np.int32)).tolist() == [2, 0, 0]


def test_lists_shorter_than_the_cut_off_are_refused() -> None:
    ranked = np.zeros((2, 5), np.int32)
    with pytest.raises(ValueError, match="length of the lists, 5"):
        ranking_metrics(ranked, np.zeros(2, np.int32), (1, 10))
    with pytest.raises(ValueError, match="no users"):
        ranking_metrics(ranked[:0], np.zeros(0, np.int32), (1,))
    with pytest.raises(ValueError, match="must be items"):
        ranking_metrics(ranked, np.asarray([0, -1]), (1,))
    with pytest.raises(ValueError, match="must be .U, K"):
        first_hit_ranks(ranked, np.zeros(3, np.int32))


def drawn(data, users: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    width = data.draw(st.integers(1, 12))
    row = st.permutations(range(12)).map(lambda p: [v if v < 9 else -1 for v in p[:width]])
    ranked = data.draw(st.lists(row, min_size=users, max_size=users))
    targets = data.draw(st.lists(st.integers(0, 9), min_size=users, max_size=users))
    ks = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=4))
    return np.asarray(ranked, np.int32), np.asarray(targets, np.int32), ks


@given(st.data())
def test_without_ties_nothing_changes_in_any_bit(data) -> None:
    """The formula for ranks that are known, and ties of one item each."""
    ranked, targets, ks = drawn(data, data.draw(st.integers(1, 20)))
    ranks = first_hit_ranks(ranked, targets)
    place, expected = np.maximum(ranks, 1), {}
    for k in ks:
        hit = (ranks > 0) & (ranks <= k)
        expected |= {f"recall@{k}": hit.mean(), f"ndcg@{k}": (hit / np.log2(place + 1)).mean(), f"mrr@{k}": (hit / place).mean()}
    expected["mrr"] = expected[f"mrr@{max(ks)}"]
    assert ranking_metrics(ranked, targets, ks) == expected
    assert ranking_metrics(ranked, targets, ks, (ranks, np.ones_like(ranks))) == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ties_are_the_mean_over_all_orders(data) -> None:
    """Every order of the tied items that can stand in a list, cut at its length, by the plain loop."""
    width, users = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    ks = data.draw(st.sets(st.integers(1, width), min_size=1, max_size=3))
    ranked, first, tied, expected = [], [], [], {k: np.zeros(3) for k in ks}
    for _ in range(users):  # the target is item 0, its group items 0 to m - 1
        m, before, after = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
        absent = data.draw(st.booleans())
        group = [] if absent else list(range(m))
        around = [list(range(10, 10 + before)), list(range(30, 30 + after))]
        lists = [(around[0] + list(order) + around[1] + [-1] * width)[:width] for order in itertools.permutations(group)]
        ranked.append(data.draw(st.sampled_from(lists)))
        first.append(before + 1 if not absent and before < width else 0)
        tied.append(m)
        for k in ks:
            expected[k] += np.mean([reference([row], [0], k) for row in lists], axis=0) / users
    ties = (np.asarray(first), np.asarray(tied))
    found = ranking_metrics(np.asarray(ranked, np.int32), np.zeros(users, np.int32), sorted(ks), ties)
    for k in ks:
        assert (found[f"recall@{k}"], found[f"ndcg@{k}"], found[f"mrr@{k}"]) == pytest.approx(tuple(expected[k]), abs=1e-12)


def test_ties_that_cannot_be_are_refused() -> None:
    ranked, targets = np.zeros((2, 5), np.int32), np.zeros(2, np.int32)
    for first, tied in [([1], [1]), ([1, 1], [1, 0]), ([-1, 1], [1, 1]), ([1, 1], [1])]:
        with pytest.raises(ValueError, match="a place, 0 or more, and a number of items, 1 or more"):
            ranking_metrics(ranked, targets, (1,), (np.asarray(first), np.asarray(tied)))


def test_cut_offs_beyond_the_lists_are_left_out() -> None:
    """A list of 5 says nothing about recall at 10, unless the catalogue has no more than 5 items."""
    lists, targets = np.asarray([[3, 1, 4, 0, 2]], np.int32), np.asarray([4], np.int32)
    short = list_metrics(lists, targets, n_items=50)
    assert set(short) == {f"{name}@{k}" for name in ("recall", "ndcg", "mrr") for k in (1, 5)}
    assert short["recall@5"] == 1 and short["ndcg@5"] == pytest.approx(0.5)
    assert list_metrics(lists, targets, n_items=5)["recall@20"] == 1
