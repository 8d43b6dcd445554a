from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftrec_jax.evaluate.baselines import Markov, Popularity

N_ITEMS = 7
USERS = st.lists(st.lists(st.integers(0, N_ITEMS - 1), max_size=6), min_size=1, max_size=8)


def arrays(histories: list[list[int]], held_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = np.asarray([len(h) for h in histories], np.int64)
    items = np.asarray([i for h in histories for i in h], np.int32)
    return np.concatenate([[0], np.cumsum(lengths)]), items, np.maximum(lengths - held_out, 0)


@given(USERS, st.integers(0, 2), st.integers(1, 9), st.booleans())
def test_both_rank_by_their_counts(histories: list[list[int]], held_out: int, k: int, mask_seen: bool) -> None:
    fitted = arrays(histories, held_out)
    train = [h[: max(len(h) - held_out, 0)] for h in histories]
    popular = Counter(i for h in train for i in h)
    followed = Counter(pair for h in train for pair in zip(h, h[1:], strict=False))
    prompts = [np.asarray(h, np.int32) for h in histories] + [np.zeros(0, np.int32)]
    ranked = {
        "popularity": Popularity.fit(*fitted, N_ITEMS).rank(prompts, k, mask_seen),
        "markov": Markov.fit(*fitted, N_ITEMS).rank(prompts, k, mask_seen),
    }
    for name, lists in ranked.items():
        assert lists.dtype == np.int32 and lists.shape == (len(prompts), k)
        for history, row in zip(prompts, lists.tolist(), strict=True):

            def score(item: int, history=history, name=name) -> tuple[int, int]:
                return followed[int(history[-1]), item] if name == "markov" and len(history) else 0, popular[item]

            allowed = set(range(N_ITEMS)) - (set(history.tolist()) if mask_seen else set())
            listed = row[: min(k, len(allowed))]
            assert row[len(listed) :] == [-1] * (k - len(listed))
            assert len(set(listed)) == len(listed) and set(listed) <= allowed
            assert [score(i) for i in listed] == sorted(map(score, allowed), reverse=True)[: len(listed)]


@pytest.mark.parametrize("kind", [Popularity, Markov])
def test_equal_scores_follow_the_seed_and_not_the_index(kind) -> None:
    offsets, items, train_end = np.asarray([0, 2]), np.asarray([0, 1], np.int32), np.asarray([2])
    nobody = [np.zeros(0, np.int32)]
    orders = [kind.fit(offsets, items, train_end, 200, seed).rank(nobody, 200, False)[0, 2:] for seed in (0, 0, 1)]
    assert (orders[0] == orders[1]).all() and (orders[0] != orders[2]).any()
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(198))[0, 1]) < 0.25


def test_held_out_items_are_not_counted() -> None:
    offsets, items, train_end = np.asarray([0, 4, 8]), np.asarray([0, 1, 5, 5, 0, 1, 5, 5], np.int32), np.asarray([2, 2])
    ranked = Markov.fit(offsets, items, train_end, 6).rank([np.asarray([1]), np.asarray([0])], 2, False)
    assert set(ranked[0].tolist()) == {0, 1} and ranked[1].tolist()[0] == 1
