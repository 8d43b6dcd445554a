"""Filters, order, splits and the saved form, against plain Python."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftrec_jax.config import DataConfig
from sftrec_jax.data import parts, textfile
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.histories import pair_hash, text_hashes
from sftrec_jax.data.log import Log, k_core
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.data.splits import leave_one_out, temporal
from sftrec_jax.errors import UserError
from sftrec_jax.run.summary import data_table

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60)


def ordered(dataset: Dataset) -> dict[str, list[str]]:
    return {u: dataset.item_ids[dataset.history(i)].tolist() for i, u in enumerate(dataset.user_ids)}


def prepare_rows(folder: Path, rows: list[tuple], **values: object) -> Dataset:
    path = folder / "log.parquet"
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "rating"], orient="row").write_parquet(path)
    return prepare_dataset(DataConfig(**({"source": str(path), "rating_column": "rating", "user_core": 0} | values)))  # pyright: ignore


def tied_rows(users: int = 6, items: int = 30) -> list[tuple]:
    """Every user takes every item; times tie in groups of ten."""
    return [(f"u{u}", f"i{i:02d}", i // 10, 1.0) for u in range(users) for i in range(items)]


@given(PAIRS, st.integers(0, 4), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_k_core_is_the_largest_stable_part(pairs: list[tuple[int, int]], user_core: int, item_core: int) -> None:
    users, items = (np.array([pair[side] for pair in sorted(pairs)], np.int32) for side in (0, 1))
    counts = np.bincount(users, minlength=max((u for u, _ in pairs), default=-1) + 1)
    nothing = np.zeros(len(items), np.int64)
    log = Log([str(n) for n in range(len(counts))], counts, items, nothing, nothing, None, None, {})
    expected = sorted(pairs)
    changed = True
    while changed:
        by_user, by_item = Counter(u for u, _ in expected), Counter(i for _, i in expected)
        kept = [(u, i) for u, i in expected if by_user[u] >= user_core and by_item[i] >= item_core]
        changed, expected = len(kept) < len(expected), kept
    k_core(log, user_core, item_core)
    assert list(zip(np.repeat(np.arange(len(log.counts)), log.counts).tolist(), log.items.tolist(), strict=True)) == expected


EVENTS = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 5), st.integers(0, 4)), min_size=2, max_size=120)


@given(EVENTS, st.integers(20, 300))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_and_divisions_are_sorted_as_a_whole(tmp_path: Path, events: list[tuple[int, int, int]], block: int) -> None:
    events = [*events, (0, 0, 9), (1, 0, 9)]
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"u{u},i{i},{t}\n" for u, i, t in events))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfile.text_blocks, "__defaults__", (None, block))
        patch.setattr(parts, "SIZE", block)
        dataset = prepare_dataset(DataConfig(source=str(path), user_core=0))
        dataset.save(tmp_path / "saved")
        assert ordered(Dataset.load(tmp_path / "saved")) == ordered(dataset)

    def place(event: tuple[int, int, int]) -> tuple[int, int]:
        user, item = text_hashes([f"u{event[0]}"], 0, "user"), text_hashes([f"i{event[1]}"], 0, "item")
        return event[2], int(pair_hash(user, item)[0])

    expected: dict[str, list[str]] = {}
    for event in sorted(set(events), key=place):
        expected.setdefault(f"u{event[0]}", []).append(f"i{event[1]}")
    assert ordered(dataset) == expected
    assert dataset.report["duplicates_dropped"] == len(events) - len(set(events))


def test_parts_are_whole_histories(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.array([0, 3, 0, 12, 1, 1, 0, 2, 0])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for size in (1, 2, 4, 100):
        monkeypatch.setattr(parts, "SIZE", size)
        made = list(parts.parts(offsets))
        assert np.array_equal(np.concatenate([part.owner for part in made]), owner)
        position = np.concatenate([part.position for part in made])
        assert np.array_equal(position, np.concatenate([np.arange(n) for n in lengths]))
        assert [(p.first, p.last) for p in made] == list(itertools.pairwise([made[0].first, *(p.last for p in made)]))
        assert made[0].first == 0 and made[-1].last == len(lengths)
        assert all(len(p.owner) <= size or p.last == p.first + 1 for p in made)
        values = np.array([5, 0, 5, 2] * 5, np.int32)
        assert parts.occurrences(values, 7).tolist() == np.bincount(values, minlength=7).tolist()


def test_file_order_changes_nothing(tmp_path: Path) -> None:
    rows = tied_rows()
    first = prepare_rows(tmp_path, rows)
    for seed in range(3):
        np.random.default_rng(seed).shuffle(rows)
        again = prepare_rows(tmp_path, rows)
        assert ordered(again) == ordered(first)
        assert again.item_ids.tolist() == first.item_ids.tolist()
        about_the_file = {"tied_in_file_order_share": None}
        assert again.report | about_the_file == first.report | about_the_file
    assert first.report["tied_timestamp_share"] == 1


@pytest.mark.parametrize("name", [lambda i: f"i{i:02d}", lambda i: f"film {2 * i + 100}", lambda i: f"i{99 - i}"])
def test_ties_follow_neither_id_nor_file(tmp_path: Path, name) -> None:
    rows = [(u, name(int(i[1:])), t, r) for u, i, t, r in tied_rows(users=40)]
    dataset = prepare_rows(tmp_path, rows)
    same = np.flatnonzero((np.diff(dataset.timestamps) == 0) & (np.diff(np.repeat(np.arange(40), 30)) == 0))
    rising = np.mean(dataset.items[same + 1] > dataset.items[same])
    assert rising == pytest.approx(0.5, abs=0.06)
    in_file_order = dataset.report["tied_in_file_order_share"]
    assert in_file_order == pytest.approx(0.5, abs=0.06) and dataset.report["tied_pairs"] == len(same)
    orders = {tuple(dataset.history(user)[:10]) for user in range(40)}
    assert len(orders) == 40  # every user has an order of their own


def test_tie_seed_changes_tied_orders_only(tmp_path: Path) -> None:
    rows = tied_rows() + [("v", f"i{i:02d}", 100 - i, 1.0) for i in range(30)]
    first, second = prepare_rows(tmp_path, rows), prepare_rows(tmp_path, rows, tie_seed=1)
    one, two = ordered(first), ordered(second)
    assert one["v"] == two["v"]
    assert all(one[f"u{u}"] != two[f"u{u}"] for u in range(6))
    assert all(set(one[f"u{u}"][k : k + 10]) == set(two[f"u{u}"][k : k + 10]) for u in range(6) for k in (0, 10, 20))
    assert first.timestamps.tolist() == second.timestamps.tolist()


def test_pair_hash_is_the_published_mixer() -> None:
    """SplitMix64 from state 0 gives these first values (reference implementation by S. Vigna)."""
    zero = np.zeros(1, np.uint64)
    assert pair_hash(zero, zero)[0] == _splitmix(_splitmix(0))
    assert _splitmix(0) == 0xE220A8397B1DCDAF
    assert text_hashes(["a", "ä"], 0, "user").tolist() != text_hashes(["a", "ä"], 1, "user").tolist()
    assert text_hashes(["a"], 0, "user") != text_hashes(["a"], 0, "item")


def _splitmix(state: int) -> int:
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def shown(dataset: Dataset, **settings: object) -> list[list[str]]:
    """The lines of the table that `prepare` ends with, without empty cells."""
    table = data_table(dataset.report, DataConfig(**settings))  # pyright: ignore
    return [[cell for cell in row if cell] for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_filters_are_counted(tmp_path: Path) -> None:
    rows = [("a", "x", 1, 5.0), ("a", "x", 1, 4.0), ("a", "y", 2, 5.0), ("a", "x", 3, 5.0), ("a", "z", 4, 1.0)]
    rows += [("b", "x", 1, 5.0), ("b", "y", 2, 5.0), ("b", "w", 3, 5.0), ("c", "x", 1, 5.0)]
    catalogue = tmp_path / "items.csv"
    catalogue.write_text("item_id,title\n" + "".join(f"{i},{i}{i}\n" for i in "vwxyz"))
    dataset = prepare_rows(tmp_path, rows, min_rating=2.0, user_core=2, item_core=2, catalogue=str(catalogue))
    assert ordered(dataset) == {"a": ["x", "y", "x"], "b": ["x", "y"]}
    assert dataset.titles.tolist() == ["xx", "yy"]
    wanted = {"interactions_read": 9, "below_min_rating": 1, "duplicates_dropped": 1, "core_dropped_interactions": 2}
    wanted |= {"users_dropped": 1, "users": 2, "items": 2, "interactions": 5, "catalogue_items_read": 5}
    assert {key: dataset.report[key] for key in wanted} == wanted
    assert shown(dataset, min_rating=2.0, user_core=2, item_core=2, catalogue="c", rating_column="r") == [
        ["came in", "9", "3", "5"],
        ["- rated below 2", "-1"],
        ["- user, item and time of another row", "-1"],
        ["- users with < 2 or items with < 2", "-2", "-1", "-3"],
        ["kept", "5", "2", "2"],
        ["to train", "3"],
        ["to validate", "1"],
        ["to test", "1"],
    ]
    kept = prepare_rows(tmp_path, rows, min_rating=2.0, user_core=2, catalogue=str(catalogue))
    assert kept.item_ids.tolist() == list("vwxyz")


def test_ratings_may_have_gaps_where_none_is_asked_for(tmp_path: Path) -> None:
    log = tmp_path / "gaps.csv"
    rows = [f"{user},{item},{n},{n if n % 3 else ''}" for user in "abc" for n, item in enumerate("xyzxyz")]
    log.write_text("user_id,item_id,timestamp,stars\n" + "\n".join(rows) + "\n")
    dataset = prepare_dataset(DataConfig(source=str(log), rating_column="stars"))
    np.testing.assert_array_equal(dataset.ratings, np.tile([np.nan, 1, 2, np.nan, 4, 5], 3).astype(np.float32))
    assert dataset.report["missing_ratings"] == 6
    with pytest.raises(UserError, match="gaps.csv: row 2 has no rating, but data.min_rating is 2; give one"):
        prepare_dataset(DataConfig(source=str(log), rating_column="stars", min_rating=2.0))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_leave_one_out(lengths: list[int]) -> None:
    split = leave_one_out(np.array(lengths))
    for n, end, valid, test in zip(lengths, split.train_end, split.valid_position, split.test_position, strict=True):
        assert (end, valid, test) == ((n - 2, n - 2, n - 1) if n >= 3 else (n, -1, -1))


@given(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=12), min_size=1, max_size=8), st.data())
@settings(max_examples=80, deadline=None)
def test_temporal_split_is_two_global_times(histories: list[list[int]], data: st.DataObject) -> None:
    valid, test = data.draw(st.sampled_from([(0.1, 0.1), (0.3, 0.2), (0.05, 0.6)]))
    histories = [sorted(h) for h in histories]
    offsets = np.concatenate([[0], np.cumsum([len(h) for h in histories])]).astype(np.int64)
    every = np.concatenate([np.array(h) for h in histories])
    try:
        split, t1, t2 = temporal(offsets, every, valid, test)
    except UserError:
        ranks = np.sort(every)
        low, high = (ranks[int(np.floor(q * len(every)))] for q in (1 - valid - test, 1 - test))
        assert low == high or low == ranks[0]
        return
    assert np.sum(every < t1) <= (1 - valid - test) * len(every) <= np.sum(every <= t1)
    assert np.sum(every < t2) <= (1 - test) * len(every) <= np.sum(every <= t2)
    for u, history in enumerate(histories):
        assert split.train_end[u] == sum(t < t1 for t in history)
        assert split.valid_position[u] == next((p for p, t in enumerate(history) if t1 <= t < t2), -1)
        assert split.test_position[u] == next((p for p, t in enumerate(history) if t >= t2), -1)


def test_short_and_cold_users_are_counted(tmp_path: Path) -> None:
    rows = [("a", i, t, 1.0) for t, i in enumerate("pqrst")] + [("b", "p", 0, 1.0), ("c", "q", 9, 1.0)]
    dataset = prepare_rows(tmp_path, rows)
    assert dataset.report["users_too_short_to_split"] == 2
    assert dataset.test_position.tolist() == [4, -1, -1]
    assert dataset.train_history(0).tolist() == dataset.history(0)[:3].tolist()
    split = prepare_rows(tmp_path, rows, split="temporal", valid_fraction=0.2, test_fraction=0.2)
    assert split.report["test_targets_without_history"] == 1
    assert (split.train_end[2], split.test_position[2]) == (0, 0)


def test_save_and_load(tmp_path: Path) -> None:
    dataset = prepare_rows(tmp_path, tied_rows())
    dataset.save(tmp_path / "out")
    dataset.save(tmp_path / "out")
    loaded = Dataset.load(tmp_path / "out")
    for field in (
        "user_ids",
        "item_ids",
        "titles",
        "offsets",
        "items",
        "timestamps",
        "train_end",
        "valid_position",
        "test_position",
    ):
        before, after = getattr(dataset, field), getattr(loaded, field)
        assert before.dtype == after.dtype, field
        assert np.array_equal(before, after), field
    assert loaded.report == dataset.report
    names = {"interactions.parquet", "users.parquet", "catalogue.parquet", "dataset.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    stored = pl.read_parquet(tmp_path / "out" / "interactions.parquet")
    assert stored.columns == ["user", "item", "timestamp", "position", "rating"]
    assert stored["position"].to_list() == list(range(30)) * 6


def test_load_refuses_what_save_did_not_write(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(UserError, match="prepare the data first"):
        Dataset.load(folder)
    prepare_rows(tmp_path, tied_rows()).save(folder)
    summary = folder / "dataset.json"
    text = summary.read_text()
    summary.write_text(json.dumps(json.loads(text) | {"format_version": 99}))
    with pytest.raises(UserError, match="version 99"):
        Dataset.load(folder)
    summary.write_text(text[:20])
    with pytest.raises(UserError, match="dataset.json"):
        Dataset.load(folder)
    summary.write_text(text)
    (folder / "users.parquet").write_bytes(b"other")
    with pytest.raises(UserError, match="users.parquet"):
        Dataset.load(folder)
