"""Which examples every step sees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import ExampleList

from sftrec_jax.config import TrainConfig
from sftrec_jax.data.segments import Example, PackedBatch
from sftrec_jax.errors import UserError
from sftrec_jax.train.batches import BatchPlan

ROW = 16


def example(index: int, length: int, targets: int) -> Example:
    """Every token and label is the example's index + 1, so that a row tells what it holds."""
    positions = np.arange(length - targets, length, dtype=np.int32)
    fill = np.full(length, index + 1, np.int32)
    return Example(fill, positions, fill[:targets], np.ones(targets, np.float32))


SIZES = st.lists(st.integers(1, ROW).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=25)


def seen_in(batch: PackedBatch) -> list[int]:
    """Examples in row order; checks that each one stands there whole, with all of its targets."""
    found = []
    for tokens, segments, positions, targets, labels, weights in zip(
        *(x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.segments, batch.positions)),
        *(x.reshape(-1, x.shape[-1]) for x in (batch.target_positions, batch.labels, batch.weights)),
        strict=True,
    ):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            (token,) = set(tokens[inside].tolist())
            assert positions[inside].tolist() == list(range(inside.sum()))
            mine = (weights > 0) & inside[targets]
            assert set(labels[mine].tolist()) == {token}
            found.append((token - 1, int(inside.sum()), int(mine.sum())))
    return found


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, rows=st.integers(1, 3), accumulate=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_example_once_an_epoch(sizes: list[tuple[int, int]], rows: int, accumulate: int, seed: int) -> None:
    """Steps cross the edges of epochs; the examples in order are one permutation after the other."""
    made = [example(i, *size) for i, size in enumerate(sizes)]
    config = TrainConfig(row_length=ROW, batch_rows=rows, accumulate=accumulate, seed=seed, epochs=3)
    plan = BatchPlan(ExampleList(made), config)
    expected = [(i, *size) for i, size in enumerate(sizes)]
    seen: list = []
    step = 0
    while len(seen) < 3 * len(made):
        batch = plan.batch(step)
        assert batch.tokens.shape == (accumulate, rows, ROW) and batch.labels.shape[:2] == (accumulate, rows)
        seen += seen_in(batch)
        step += 1
    for epoch in range(3):
        assert sorted(seen[epoch * len(made) : (epoch + 1) * len(made)]) == expected
    if len(made) > 10:
        assert seen[: len(made)] != seen[len(made) : 2 * len(made)]


def equal(left: PackedBatch, right: PackedBatch) -> bool:
    return all(np.array_equal(value, getattr(right, name)) for name, value in vars(left).items())


def plan_of(count: int, **changes: object) -> BatchPlan:
    config = TrainConfig(**{"row_length": ROW, "batch_rows": 2, "accumulate": 2, "epochs": 3.0, **changes})  # type: ignore[arg-type]
    sizes = [1 + i % 13 for i in range(count)]
    return BatchPlan(ExampleList([example(i, n, max(1, n // 3)) for i, n in enumerate(sizes)]), config)


def test_a_batch_depends_on_nothing_but_the_step() -> None:
    first, second = plan_of(60), plan_of(60)
    order = np.random.default_rng(0).permutation(first.steps)
    late_to_early = {int(step): second.batch(int(step)) for step in order}
    assert all(equal(first.batch(step), late_to_early[step]) for step in range(first.steps))
    assert not equal(first.batch(0), first.batch(1))
    assert not equal(first.batch(0), plan_of(60, seed=1).batch(0))


@pytest.mark.parametrize("begin", [0, 7])
def test_iterating_from_any_step_gives_its_batches(begin: int) -> None:
    plan = plan_of(60)
    made = list(plan.iterate(begin))
    assert len(made) == plan.steps - begin > 3
    assert all(equal(batch, plan.batch(begin + i)) for i, batch in enumerate(made))


def test_steps_follow_epochs_and_max_steps() -> None:
    rows = len(plan_of(60).rows(0))
    assert plan_of(60, epochs=0.5).steps == round(0.5 * rows / 4)
    assert plan_of(60, epochs=1e-6).steps == 1
    assert plan_of(60, max_steps=2).steps == 2
    assert plan_of(60, epochs=1.0, max_steps=10_000).steps == round(rows / 4)


def test_efficiency_is_the_share_of_filled_positions() -> None:
    plan = plan_of(60, epochs=1.0, batch_rows=1, accumulate=1)
    filled = sum((plan.batch(step).segments > 0).sum() for step in range(plan.steps))
    assert plan.efficiency() == pytest.approx(filled / (plan.steps * ROW))


@pytest.mark.parametrize(
    ("sizes", "room", "rows"),
    [
        # Full rows with a target each; the others have targets alone, of which K = 8 would hold one example and 16 two.
        ([(64, 1)] * 100 + [(8, 8)] * 32, 16, 116),
        # An average row of 32 has 4 targets; half as many again, in eights.
        ([(32, 2)] * 64, 8, 32),
    ],
)
def test_rows_have_room_for_more_targets_where_that_saves_rows(sizes: list[tuple[int, int]], room: int, rows: int) -> None:
    plan = BatchPlan(ExampleList([example(i, *size) for i, size in enumerate(sizes)]), TrainConfig(row_length=64))
    assert plan.targets_per_row == room and len(plan.rows(0)) == rows
    assert plan.batch(0).labels.shape[-1] == room


def test_no_examples_is_the_users_problem() -> None:
    with pytest.raises(UserError, match="no training example.*data.user_core"):
        BatchPlan(ExampleList([]), TrainConfig())


def test_an_example_longer_than_a_row_is_the_users_problem() -> None:
    with pytest.raises(UserError, match="train.row_length"):
        BatchPlan(ExampleList([example(0, ROW + 1, 1)]), TrainConfig(row_length=ROW)).batch(0)
