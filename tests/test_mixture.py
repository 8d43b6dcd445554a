"""Mixtures of tasks: what an epoch holds, and that packing changes nothing of an example."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import Parts, assert_close, loss_and_gradient, pack_rows, stories

from sftrec_jax.config import PromptConfig, TrainConfig
from sftrec_jax.data.mixture import Mixture, Pairs
from sftrec_jax.data.prompts import prompt_builder
from sftrec_jax.data.segments import Example, PackedBatch, Segments
from sftrec_jax.data.windows import Windows
from sftrec_jax.errors import UserError
from sftrec_jax.train.batches import BatchPlan

FIELDS = ("tokens", "positions", "segments", "branches", "forks", "target_positions", "labels", "weights")


def random_pairs(count: int, seed: int, most: int = 6, vocabulary: int = 400) -> tuple[Pairs, list[Example]]:
    """Pairs, and the same written out as examples one by one."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, vocabulary, rng.integers(1, most + 1)).astype(np.int32) for _ in range(count)]
    answers = [rng.integers(3, vocabulary, rng.integers(1, most + 1)).astype(np.int32) for _ in range(count)]
    examples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        fed = np.concatenate([prompt, answer[:-1]])
        at = np.arange(len(prompt) - 1, len(fed), dtype=np.int32)
        examples.append(Example(fed, at, answer, np.ones(len(answer), np.float32)))
    return Pairs.of(prompts, answers, "title_to_item"), examples


def assert_same(found: PackedBatch, expected: PackedBatch) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(count=st.integers(1, 9), seed=st.integers(0, 999))
def test_pairs_are_packed_as_written_out_one_by_one(count: int, seed: int) -> None:
    pairs, examples = random_pairs(count, seed)
    assert pairs.lengths.tolist() == [len(e.tokens) for e in examples]
    assert pairs.targets.tolist() == [len(e.labels) for e in examples] and pairs.longest == max(pairs.targets)
    order = np.random.default_rng(seed).permutation(count)
    rows = [order[: count // 2], order[count // 2 :], order[:0]]
    room = int(pairs.lengths.sum()) + 3, int(pairs.targets.sum()) + 2
    assert_same(pairs.pack(rows, *room), pack_rows(examples, rows, *room))


def branching(parts: Parts) -> Segments:
    """Segments of histories with prompts that are shared."""
    prompt = PromptConfig("instruct", history="tokens", prefix="Once", separator=",", suffix="then")
    builder = prompt_builder(prompt, parts.case.codes, parts.case.tokenizer, 64)
    begin = np.arange(0, 16, 4)
    items = np.random.default_rng(4).integers(0, 7, 16).astype(np.int32)
    return builder.segments(items, Windows(begin, begin, begin + 4))


def test_loss_and_gradients_of_a_mixture_are_those_of_its_parts() -> None:
    parts = stories()
    shared, (pairs, _) = branching(parts), random_pairs(5, 1)
    mixture = Mixture((shared, pairs), (1.0, 1.0))
    assert len(mixture) == len(shared) + 5
    both = mixture.pack([np.asarray([5, 0, 7, 2]), np.asarray([1, 3, 4, 6, 8])], 160, 64)
    assert both.branches.any() and (both.segments.max(axis=1) == [4, 5]).all()
    apart = [
        shared.pack([np.asarray([0, 2]), np.asarray([1, 3])], 160, 64),
        pairs.pack([np.arange(3), np.asarray([3, 4])], 160, 64),
    ]
    loss, gradient = loss_and_gradient(parts, both)
    found = [loss_and_gradient(parts, batch) for batch in apart]
    np.testing.assert_allclose(loss, sum(value for value, _ in found), rtol=1e-5)
    assert_close(gradient, {name: sum(g[name] for _, g in found) for name in gradient})  # type: ignore[misc]
    with pytest.raises(ValueError, match="more than its capacities"):
        mixture.pack([np.arange(len(mixture))], 72, 64)


def test_an_epoch_holds_what_the_weights_say() -> None:
    first, second, third = (random_pairs(n, n)[0] for n in (40, 30, 20))
    mixture = Mixture((first, second, third), (1.0, 0.5, 2.25))
    for epoch in range(3):
        chosen = mixture.chosen(7, epoch)
        counts = np.bincount(chosen, minlength=90)
        assert (counts[:40] == 1).all() and set(counts[40:70]) == {0, 1} and counts[40:70].sum() == 15
        assert set(counts[70:]) == {2, 3} and counts[70:].sum() == 45
        np.testing.assert_array_equal(chosen, mixture.chosen(7, epoch))
    assert not np.array_equal(mixture.chosen(7, 0), mixture.chosen(7, 1))
    seen = np.unique(np.concatenate([mixture.chosen(7, epoch) for epoch in range(20)]))
    assert len(seen) == 90  # a share is drawn anew, so that in the end every example has its turn
    without = Mixture((first, second), (0.0, 1.0))
    assert without.chosen(0, 0).tolist() == list(range(40, 70))


def test_rows_of_a_plan_hold_the_examples_of_the_epoch() -> None:
    first, second = random_pairs(30, 1)[0], random_pairs(50, 2)[0]
    mixture = Mixture((first, second), (1.0, 0.4))
    plan = BatchPlan(mixture, TrainConfig(row_length=32, batch_rows=2, epochs=3.0))
    for epoch in range(3):
        held = np.concatenate([plan.rows(epoch)[row] for row in range(len(plan.rows(epoch)))])
        np.testing.assert_array_equal(np.sort(held), np.sort(mixture.chosen(plan.config.seed, epoch)))
    assert 0 < plan.efficiency() <= 1
    batch = plan.batch(0)
    assert batch.weights.sum() == sum(plan.targets[np.concatenate([plan.rows(0)[0], plan.rows(0)[1]])])


def test_a_pair_that_no_row_holds_names_the_task() -> None:
    pairs = Pairs.of([np.arange(50, dtype=np.int32)], [np.arange(3, dtype=np.int32)], "text_to_item")
    with pytest.raises(UserError, match=r"tasks.text_to_item: an example takes 52 tokens, more than train.row_length 40; raise"):
        BatchPlan(Mixture((pairs,), (1.0,)), TrainConfig(row_length=40)).rows(0)


def test_weights_that_leave_an_epoch_empty_are_refused() -> None:
    pairs = random_pairs(30, 1)[0]
    with pytest.raises(UserError, match="tasks: an epoch takes none of 30 examples, so small are the weights; raise one"):
        BatchPlan(Mixture((pairs,), (1e-7,)), TrainConfig(row_length=32)).batch(0)
