"""Parts of the users and what lists show, against plain Python."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftrec_jax.evaluate.breakdown import code_metrics, exposure, recall_by_history, recall_by_target

N = 12
LISTS = st.lists(st.permutations(range(N)).map(lambda p: p[:5]), min_size=1, max_size=9)
COUNTS = st.lists(st.integers(0, 4), min_size=N, max_size=N)


@given(LISTS, COUNTS, st.data())
def test_targets_are_divided_by_their_interactions(lists: list[list[int]], counts: list[int], data: st.DataObject) -> None:
    targets = data.draw(st.lists(st.integers(0, N - 1), min_size=len(lists), max_size=len(lists)))
    hits = [float(t in row) for t, row in zip(targets, lists, strict=True)]
    found = recall_by_target({"recall@5": np.asarray(hits)}, np.asarray(targets), np.asarray(counts))
    least = sorted(counts, reverse=True)[1]  # a fifth of 12 items is two

    def part(item: int) -> str:
        return "cold" if counts[item] == 0 else "head" if counts[item] >= least else "tail"

    for name in ("head", "tail", "cold"):
        mine = [h for h, t in zip(hits, targets, strict=True) if part(t) == name]
        assert found[name]["users"] == len(mine)
        assert ("recall@5" in found[name]) == bool(mine)
        if mine:
            assert found[name]["recall@5"] == pytest.approx(sum(mine) / len(mine))


def test_histories_are_divided_by_their_length() -> None:
    lengths = np.asarray([0, 4, 5, 9, 10, 19, 20, 49, 50, 400])
    found = recall_by_history({"recall@10": np.arange(10.0)}, lengths)
    assert {n: (p["users"], p["recall@10"]) for n, p in found.items()} == {
        "0 to 4": (2, 0.5),
        "5 to 9": (2, 2.5),
        "10 to 19": (2, 4.5),
        "20 to 49": (2, 6.5),
        "50 or more": (2, 8.5),
    }


@given(LISTS, COUNTS, st.integers(1, 5), st.integers(0, 4))
@settings(max_examples=60)
def test_exposure(lists: list[list[int]], counts: list[int], k: int, short: int) -> None:
    rows = [row[: 5 - short] + [-1] * short for row in lists]
    found = exposure(np.asarray(rows), k, np.asarray(counts))
    shown = [i for row in rows for i in row[:k] if i >= 0]
    times = Counter(shown)
    assert found[f"coverage@{k}"] == pytest.approx(len(times) / N)
    differences = sum(abs(times[a] - times[b]) for a in range(N) for b in range(N))  # Gini's mean difference
    assert found[f"gini@{k}"] == pytest.approx(differences / (2 * N * len(shown)))
    bits = [-math.log2((counts[i] + 1) / (sum(counts) + N)) for i in shown]
    assert found[f"novelty@{k}"] == pytest.approx(sum(bits) / len(bits))


def test_exposure_of_equal_and_of_one() -> None:
    counts = np.ones(N, np.int64)
    assert exposure(np.arange(N)[:, None], 1, counts) == {"coverage@1": 1, "gini@1": 0, "novelty@1": pytest.approx(math.log2(N))}
    assert exposure(np.zeros((7, 1), np.int64), 1, counts)["gini@1"] == pytest.approx((N - 1) / N)
    assert exposure(np.full((3, 2), -1), 2, counts) == {"coverage@2": 0, "gini@2": 0, "novelty@2": 0}


@given(st.data())
@settings(max_examples=60)
def test_codes_are_counted_once(data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(-1, 0)), min_size=N, max_size=N))
    lists = data.draw(LISTS)
    targets = data.draw(st.lists(st.integers(0, N - 1), min_size=len(lists), max_size=len(lists)))
    k = data.draw(st.integers(1, 4))
    found = code_metrics(np.asarray(lists), np.asarray(targets), np.asarray(codes), k)
    hits, levels = 0, [0, 0, 0]
    for row, target in zip(lists, targets, strict=True):
        distinct: list[tuple[int, ...]] = []
        for item in row:
            if codes[item] not in distinct:
                distinct.append(codes[item])
        hits += codes[target] in distinct[:k]
        for level in range(3):
            levels[level] += codes[row[0]][: level + 1] == codes[target][: level + 1]
    assert found[f"code_recall@{k}"] == pytest.approx(hits / len(lists))
    assert found["level_accuracy"] == pytest.approx([n / len(lists) for n in levels])


def test_no_first_item_is_not_right() -> None:
    found = code_metrics(np.asarray([[-1], [0]]), np.asarray([0, 0]), np.asarray([[7, 3], [7, 4]]), 1)
    assert found == {"code_recall@1": 0.5, "level_accuracy": [0.5, 0.5]}
