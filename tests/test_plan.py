"""Rows of an epoch, against first fit decreasing by brute force, bounds, and real lengths of histories."""

import gzip
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sftrec_jax.config import DataConfig
from sftrec_jax.data import plan as plan_module
from sftrec_jax.data.known import data_root
from sftrec_jax.data.plan import Plan, plan_epoch
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.errors import UserError

SIZES = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 8)), max_size=40)


def split(sizes: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.asarray(sizes, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def rows_of(plan: Plan) -> list[list[int]]:
    return [plan[i].tolist() for i in range(len(plan))]


def check(plan: Plan, lengths: np.ndarray, targets: np.ndarray, row_length: int, capacity: int) -> None:
    """Every example once, no row empty or too full: example by example."""
    seen = [0] * len(lengths)
    for row in rows_of(plan):
        assert row
        assert sum(int(lengths[i]) for i in row) <= row_length and sum(int(targets[i]) for i in row) <= capacity
        for i in row:
            seen[i] += 1
    assert seen == [1] * len(lengths)


def first_fit_decreasing(lengths: np.ndarray, targets: np.ndarray, row_length: int, capacity: int) -> int:
    rows: list[list[int]] = []
    sizes = zip(lengths.tolist(), targets.tolist(), strict=True)
    for length, target in sorted(sizes, key=lambda s: -s[0] / row_length - s[1] / capacity):
        for row in rows:
            if row[0] >= length and row[1] >= target:
                row[0], row[1] = row[0] - length, row[1] - target
                break
        else:
            rows.append([row_length - length, capacity - target])
    return len(rows)


def random_best_fit(lengths: np.ndarray, targets: np.ndarray, row_length: int, capacity: int) -> int:
    """In the order given, into the row with the fewest tokens left of those that hold the example."""
    left, free = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    rows = 0
    for length, target in zip(lengths.tolist(), targets.tolist(), strict=True):
        fitting = np.flatnonzero((left[:rows] >= length) & (free[:rows] >= target))
        if len(fitting):
            row = fitting[left[fitting].argmin()]
        else:
            row, rows = rows, rows + 1
            left[row], free[row] = row_length, capacity
        left[row] -= length
        free[row] -= target
    return rows


def back_to_back(histories: np.ndarray, most: int) -> np.ndarray:
    """Items in each window where histories are cut into windows of `most`."""
    return np.asarray([min(most, n - i) for n in histories.tolist() for i in range(0, n, most)])


def used(lengths: np.ndarray, row_length: int, targets: np.ndarray | None = None) -> float:
    plan = plan_epoch(lengths, lengths if targets is None else targets, row_length, row_length, 0, 0)
    return lengths.sum() / (len(plan) * row_length)


@given(SIZES, st.integers(20, 50), st.integers(8, 25), st.integers(0, 3), st.integers(0, 3))
def test_every_example_is_in_one_row_that_holds_it(sizes, row_length, capacity, seed, epoch) -> None:
    lengths, targets = split(sizes)
    plan = plan_epoch(lengths, targets, row_length, capacity, seed, epoch)
    check(plan, lengths, targets, row_length, capacity)
    assert plan.starts.dtype == np.int64 and plan.starts[0] == 0 and plan.starts[-1] == len(sizes)
    again = plan_epoch(lengths.astype(np.int32), targets.astype(np.uint16), row_length, capacity, seed, epoch)
    assert rows_of(again) == rows_of(plan)


@pytest.mark.parametrize("each", [1, 7])
@given(SIZES.filter(bool), st.integers(20, 50), st.integers(8, 25))
@example([(1 + i % 20, i % 9) for i in range(40)], 40, 20)
def test_each_rule_keeps_every_example(each, sizes, row_length, capacity) -> None:
    """Also rules that a plan has no need of: patterns hold as many examples of every size as there are, in rows not too full."""
    lengths, targets = split([s for s in sizes for _ in range(each)])
    made, _ = plan_module._sizes(lengths, targets, row_length, capacity)
    need = made.length / row_length + made.target / capacity
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "PIECES", 50)
        source = np.random.Philox(np.random.SeedSequence([1, 2]))
        fillings = [plan_module._fill(made, need, row_length, capacity, balanced) for balanced in (False, True)]
        fillings.append(plan_module._best_fit(made, row_length, capacity, source))
    for filling in fillings:
        total: Counter[int] = Counter()
        tokens, labels = [0] * len(filling.times), [0] * len(filling.times)
        for p, member, copies in zip(filling.pattern.tolist(), filling.member.tolist(), filling.copies.tolist(), strict=True):
            total[member] += copies * int(filling.times[p])
            tokens[p] += copies * int(made.length[member])
            labels[p] += copies * int(made.target[member])
        assert [total[i] for i in range(len(made.count))] == made.count.tolist()
        assert max(tokens) <= row_length and max(labels) <= capacity
        assert filling.times.min() >= 1 and (np.diff(filling.pattern) >= 0).all()


@pytest.mark.parametrize("capacity", [16, 24, 40, 100])
def test_no_more_rows_than_first_fit_decreasing(capacity) -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        lengths = generator.integers(1, 60, 300)
        for targets in (generator.integers(1, 12, 300), np.clip((60 - lengths) // 5 + generator.integers(0, 3, 300), 0, 16)):
            plan = plan_epoch(lengths, targets, 100, capacity, 0, 0)
            check(plan, lengths, targets, 100, capacity)
            assert len(plan) <= first_fit_decreasing(lengths, targets, 100, capacity) * 1.01 + 1


def test_the_plain_rule_is_first_fit_decreasing() -> None:
    generator = np.random.default_rng(1)
    for row_length, capacity in ((100, 40), (200, 25), (64, 64)):
        lengths, targets = generator.integers(1, 61, 400), generator.integers(0, 12, 400)
        sizes, _ = plan_module._sizes(lengths, targets, row_length, capacity)
        # Sizes of the same need stand in another order in the two, which may shift a row.
        need = sizes.length / row_length + sizes.target / capacity
        filled = plan_module._fill(sizes, need, row_length, capacity, balanced=False)
        assert abs(filled.rows - first_fit_decreasing(lengths, targets, row_length, capacity)) <= 1


@pytest.mark.parametrize("capacity", [16, 24, 40])
@pytest.mark.parametrize("copies", [1, 40])
def test_short_examples_with_the_most_targets(capacity, copies) -> None:
    """First fit decreasing takes up to 1.09 times the rows of best fit in random order here, balanced filling 0.97 to 1.02."""
    generator = np.random.default_rng(2)
    lengths = generator.integers(1, 60, 3000)
    targets = np.clip((60 - lengths) // 5 + generator.integers(0, 3, 3000), 0, 16)
    best = random_best_fit(lengths, targets, 100, capacity) * copies
    lengths, targets = np.tile(lengths, copies), np.tile(targets, copies)
    assert len(plan_epoch(lengths, targets, 100, capacity, 0, 0)) <= best * 1.01 + 1


@pytest.mark.parametrize("row_length", [100, 128, 256, 512])
def test_random_lengths_fill_rows(row_length) -> None:
    generator = np.random.default_rng(3)
    for n in (2_000, 50_000):
        lengths = generator.integers(1, 61, n)
        assert used(lengths, row_length) >= 0.99
        assert used(lengths, row_length, generator.integers(1, 12, n)) >= 0.97


@pytest.mark.parametrize("capacity", [50, 100, 200])
def test_titles_fill_rows(capacity) -> None:
    generator = np.random.default_rng(4)
    items = np.minimum(generator.geometric(1 / 12, 20_000) + 1, 50)
    lengths = np.clip(np.round(items * generator.normal(15, 2, len(items))), 1, 1000).astype(np.int64)
    plan = plan_epoch(lengths, items, 1024, capacity, 0, 0)
    bound = max(lengths.sum() / 1024, items.sum() / capacity)  # targets bind at 50, tokens at 100 and 200
    assert len(plan) <= bound / 0.97


@pytest.mark.parametrize("row_length", [64, 256])
def test_movielens_fills_rows(row_length) -> None:
    dataset = prepare_dataset(DataConfig(source="movielens-latest-small"))
    assert used(back_to_back(dataset.train_end, 64), row_length) >= 0.97


@pytest.mark.parametrize(("tokens", "row_length"), [(1, 96), (4, 96), (4, 128)])
def test_beauty_fills_rows(tokens, row_length) -> None:
    path = data_root() / "amazon-beauty/sequences.txt.gz"
    if not path.is_file():
        pytest.skip("amazon-beauty/sequences.txt.gz is not below $SFTREC_DATA")
    with gzip.open(path, "rt") as file:
        histories = np.asarray([len(line.split()) - 3 for line in file])  # without the user, validation and test
    assert used(back_to_back(histories, 20) * tokens, row_length) >= 0.97


def test_epochs_and_seeds_differ() -> None:
    generator = np.random.default_rng(0)
    sizes = {"few sizes": generator.integers(5, 50, 500), "each another size": generator.permutation(500) + 20}
    for name, lengths in sizes.items():
        plans = [plan_epoch(lengths, lengths, 1024, 1024, *which) for which in ((0, 0), (0, 1), (1, 0))]
        rows = [{frozenset(r) for r in rows_of(plan)} for plan in plans]
        assert all(len(rows[a] & rows[b]) < len(rows[a]) / 4 for a, b in ((0, 1), (0, 2), (1, 2))), name


def test_rows_are_not_sorted_by_size() -> None:
    lengths = np.random.default_rng(0).integers(5, 50, 20_000)
    plan = plan_epoch(lengths, lengths, 100, 100, 0, 0)
    for measure in ([lengths[r].mean() for r in rows_of(plan)], np.diff(plan.starts)):
        assert abs(np.corrcoef(measure, np.arange(len(plan)))[0, 1]) < 0.05  # more than 4 deviations of chance
    # Nor do examples of one size come in the order of the data.
    same = plan.order[lengths[plan.order] == 20]
    assert abs(np.corrcoef(same, np.arange(len(same)))[0, 1]) < 0.2


def test_equal_examples_meet_by_chance() -> None:
    """Two a row: over epochs an example's neighbours spread evenly, and so do its places in the epoch."""
    lengths, n, epochs = np.full(20, 5), 20, 1900
    together, places = np.zeros((n, n)), np.zeros(n // 2)
    for epoch in range(epochs):
        for place, (a, b) in enumerate(rows_of(plan_epoch(lengths, lengths, 10, 10, 7, epoch))):
            together[a, b] += 1
            together[b, a] += 1
            places[place] += 0 in (a, b)
    expected = epochs / (n - 1)
    pairs = together[np.triu_indices(n, 1)]
    assert ((pairs - expected) ** 2 / expected).sum() < 260  # about chi-square with 170 degrees of freedom: 260 is 5 deviations
    assert ((places - epochs / 10) ** 2 / (epochs / 10)).sum() < 35  # 9 degrees of freedom: 35 has p = 6e-5


def test_sizes_are_rounded_up_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(5)
    lengths, targets = generator.integers(1, 3000, 4000), generator.integers(0, 400, 4000)
    for limit in (1000, 100):
        monkeypatch.setattr(plan_module, "CLASSES", limit)
        sizes, size_of = plan_module._sizes(lengths, targets, 4096, 512)
        assert len(sizes.count) <= limit and sizes.count.sum() == 4000
        assert (sizes.length[size_of] >= lengths).all() and (sizes.target[size_of] >= targets).all()
        assert sizes.length.max() <= 4096 and sizes.target.max() <= 512
        plan = plan_epoch(lengths, targets, 4096, 512, 0, 0)
        check(plan, lengths, targets, 4096, 512)
        if limit == 1000:
            assert len(plan) <= first_fit_decreasing(lengths, targets, 4096, 512) * 1.05


def test_plan_is_fixed_across_releases() -> None:
    # A resumed run relies on it. Change only together with a note in the changelog that old runs cannot be resumed.
    plan = plan_epoch(np.asarray([9, 4, 5, 3, 7, 2]), np.asarray([1, 1, 1, 1, 1, 1]), 10, 4, 3, 1)
    assert rows_of(plan) == [[0], [4, 3], [5], [2, 1]]
    bits = np.random.Philox(5).random_raw(2000)
    lengths, targets = (bits % np.uint64(59)).astype(np.int64) + 1, (bits >> np.uint64(32)).astype(np.int64) % 16
    short = np.clip((60 - lengths) // 5 + targets % 3, 0, 16)
    # One for each rule: first fit decreasing, balanced filling, best fit, the plain order.
    for wanted, capacity, rows, total in (
        (targets, 200, 588, 1_996_733_319),
        (short, 16, 907, 1_994_696_968),
        (short, 40, 595, 2_014_693_301),
        (targets, 40, 589, 2_014_751_321),
    ):
        plan = plan_epoch(lengths, wanted, 100, capacity, 3, 1)
        assert (len(plan), int((plan.order * np.arange(2000)).sum())) == (rows, total)


def test_a_plan_gives_views_of_its_rows() -> None:
    plan = plan_epoch(np.asarray([6, 6, 4]), np.asarray([1, 1, 1]), 10, 4, 0, 0)
    assert len(plan) == 2 and sorted(len(row) for row in plan) == [1, 2]
    assert all(np.shares_memory(row, plan.order) for row in plan)
    for row in (2, -1):
        with pytest.raises(IndexError, match="of a plan of 2 rows"):
            plan[row]


def test_bad_sizes() -> None:
    with pytest.raises(UserError, match="has 11 tokens but a row has 10; raise train.row_length to 11"):
        plan_epoch(np.asarray([3, 11]), np.asarray([1, 1]), 10, 5, 0, 0)
    with pytest.raises(UserError, match="has 6 targets but a row has room for 5"):
        plan_epoch(np.asarray([7]), np.asarray([6]), 10, 5, 0, 0)
    for lengths, targets in (([0, 1], [1, 1]), ([1, 1], [-1, 0]), ([1, 1], [1]), ([[1]], [[1]])):
        with pytest.raises(ValueError, match="an example has|must be two arrays"):
            plan_epoch(np.asarray(lengths), np.asarray(targets), 10, 5, 0, 0)
    empty = plan_epoch(np.zeros(0, np.int64), np.zeros(0, np.int64), 10, 5, 0, 0)
    assert len(empty) == 0 and rows_of(empty) == []
    none = plan_epoch(np.asarray([3, 8]), np.zeros(2, np.int64), 10, 0, 0, 0)
    assert sorted(rows_of(none)) == [[0], [1]]
