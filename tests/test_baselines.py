from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftrec_jax.config import DataConfig
from sftrec_jax.data.known import data_root
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.evaluate.baselines import Markov, Popularity
from sftrec_jax.evaluate.item_item import ItemItem
from sftrec_jax.evaluate.metrics import ranking_metrics

N_ITEMS = 7
USERS = st.lists(st.lists(st.integers(0, N_ITEMS - 1), max_size=6), min_size=1, max_size=8)


def arrays(histories: list[list[int]], held_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = np.asarray([len(h) for h in histories], np.int64)
    items = np.asarray([i for h in histories for i in h], np.int32)
    trains = [at < len(h) - held_out for h in histories for at in range(len(h))]
    return np.concatenate([[0], np.cumsum(lengths)]), items, np.asarray(trains, bool)


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


def counter_scores(train: list[list[int]], history: list[int]) -> dict[int, float]:
    """The counter by its definition, with dictionaries."""
    after: dict[int, dict[int, float]] = {}
    for h in train:
        for i, x in enumerate(h):
            for d in range(1, 6):
                if i + d < len(h):
                    row = after.setdefault(x, {})
                    row[h[i + d]] = row.get(h[i + d], 0) + 1 / d
    scores: dict[int, float] = {}
    for j, x in enumerate(history[::-1][:20]):
        row = after.get(x, {})
        for y, count in row.items():
            scores[y] = scores.get(y, 0) + 0.8**j * count / (1 + sum(row.values()))
    return scores


LONG_USERS = st.lists(st.lists(st.integers(0, N_ITEMS - 1), max_size=30), min_size=1, max_size=8)


@given(LONG_USERS, st.integers(0, 2), st.integers(1, 9), st.booleans())
def test_item_item_ranks_by_its_definition(histories: list[list[int]], held_out: int, k: int, mask_seen: bool) -> None:
    train = [h[: max(len(h) - held_out, 0)] for h in histories]
    popular = Counter(i for h in train for i in h)
    prompts = [np.asarray(h, np.int32) for h in histories] + [np.zeros(0, np.int32)]
    lists = ItemItem.fit(*arrays(histories, held_out), N_ITEMS).rank(prompts, k, mask_seen)
    assert lists.dtype == np.int32 and lists.shape == (len(prompts), k)
    for history, row in zip(prompts, lists.tolist(), strict=True):
        scores = counter_scores(train, history.tolist())
        allowed = set(range(N_ITEMS)) - (set(history.tolist()) if mask_seen else set())
        listed = row[: min(k, len(allowed))]
        assert row[len(listed) :] == [-1] * (k - len(listed)) and len(set(listed)) == len(listed) and set(listed) <= allowed
        found = [(round(scores.get(i, 0.0), 9), popular[i] if i not in scores else 0) for i in listed]
        best = sorted(((round(scores.get(i, 0.0), 9), popular[i] if i not in scores else 0) for i in allowed), reverse=True)
        assert found == best[: len(listed)]


@given(USERS, st.integers(0, 2), st.booleans(), st.integers(0, 99))
def test_recent_popularity_counts_the_newest(histories: list[list[int]], held_out: int, timed: bool, seed: int) -> None:
    offsets, items, trains = arrays(histories, held_out)
    train = [h[: max(len(h) - held_out, 0)] for h in histories]
    times = np.random.default_rng(seed).integers(0, 5, len(items))
    times = np.concatenate([np.zeros(0, np.int64), *(np.sort(t) for t in np.split(times, offsets[1:-1]))])
    if timed:
        stamped = sorted((int(times[offsets[u] + i]), x) for u, h in enumerate(train) for i, x in enumerate(h))
        since = stamped[int(0.9 * len(stamped))][0] if stamped else 0
        newest = Counter(x for t, x in stamped if t >= since)
    else:
        newest = Counter(h[-1] for h in train if h)
    popular = Counter(i for h in train for i in h)
    fitted = Popularity.fit_recent(offsets, items, trains, N_ITEMS, times if timed else None)
    counts = [(newest[i], popular[i]) for i in fitted.order.tolist()]
    assert sorted(fitted.order.tolist()) == list(range(N_ITEMS)) and counts == sorted(counts, reverse=True)


def test_counter_reaches_its_published_figures_on_beauty() -> None:
    """R@10 .0770 N@10 .0482, within 1 %; the file's order is the data set's."""
    path = data_root() / "amazon-beauty" / "sequences.txt.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    catalogue = path.with_name("items.jsonl.gz")
    config = DataConfig(
        source=str(path), catalogue=str(catalogue), user_column="user_id", item_column="item_id", time_column=None,
        rating_column=None, catalogue_item_column="item_id", title_column="title", user_core=3,
    )  # fmt: skip
    dataset = prepare_dataset(config)
    asked = [dataset.history(u)[: dataset.test_position[u]] for u in range(len(dataset.user_ids))]
    targets = np.asarray([dataset.history(u)[dataset.test_position[u]] for u in range(len(dataset.user_ids))])
    fitted = ItemItem.fit(dataset.offsets, dataset.items, dataset.trains, len(dataset.item_ids))
    found = ranking_metrics(fitted.rank(asked, 10, True), targets, (5, 10))
    for name, published in {"recall@5": 0.0561, "ndcg@5": 0.0414, "recall@10": 0.0770, "ndcg@10": 0.0482}.items():
        assert found[name] == pytest.approx(published, rel=0.01), found


@pytest.mark.parametrize("kind", [Popularity, Markov, ItemItem])
def test_equal_scores_follow_the_seed_and_not_the_index(kind) -> None:
    offsets, items, trains = np.asarray([0, 2]), np.asarray([0, 1], np.int32), np.ones(2, bool)
    nobody = [np.zeros(0, np.int32)]
    orders = [kind.fit(offsets, items, trains, 200, seed).rank(nobody, 200, False)[0, 2:] for seed in (0, 0, 1)]
    assert (orders[0] == orders[1]).all() and (orders[0] != orders[2]).any()
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(198))[0, 1]) < 0.25


def test_held_out_items_are_not_counted() -> None:
    offsets, items = np.asarray([0, 4, 8]), np.asarray([0, 1, 5, 5, 0, 1, 5, 5], np.int32)
    trains = np.asarray([True, True, False, False] * 2)
    ranked = Markov.fit(offsets, items, trains, 6).rank([np.asarray([1]), np.asarray([0])], 2, False)
    assert set(ranked[0].tolist()) == {0, 1} and ranked[1].tolist()[0] == 1
