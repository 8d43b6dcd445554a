import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftrec_jax.evaluate.metrics import first_hit_ranks, ranking_metrics


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
