"""Codes of colliding and of new items against a search through all codes, whatever the order of the catalogue."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sftrec_jax.errors import UserError
from sftrec_jax.items.quantise import collisions
from sftrec_jax.items.quantise.collisions import (
    collision_groups,
    collision_rate,
    extend_codes,
    group_index,
    resolve_extra,
    resolve_nearest,
)
from sftrec_jax.items.quantise.quantiser import Quantiser

Code = tuple[int, ...]


def small_quantiser(kind: str, seed: int, sizes: Code) -> Quantiser:
    rng = np.random.default_rng(seed)
    width = 3 if kind == "residual" else 2
    books = tuple(rng.standard_normal((size, width)).astype(np.float32) for size in sizes)
    return Quantiser(kind, books)  # pyright: ignore[reportArgumentType]


def exact_costs(quantiser: Quantiser, vector: np.ndarray, code: Code) -> tuple[float, ...]:
    """The squared distance that each level of the code adds to the choice, in float64."""
    rest, out = vector.astype(np.float64), []
    for level, (book, choice) in enumerate(zip(quantiser.books, code, strict=True)):
        begin = 0 if quantiser.kind == "residual" else level * book.shape[1]
        out.append(float(np.square(rest[begin : begin + book.shape[1]] - book[choice]).sum()))
        if quantiser.kind == "residual":
            rest = rest - book[choice]
    return tuple(out)


def exact_distance(quantiser: Quantiser, vector: np.ndarray, code: Code) -> float:
    costs = exact_costs(quantiser, vector, code)
    return costs[-1] if quantiser.kind == "residual" else sum(costs)


def shared_prefix(a: Code, b: Code) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def best_free(quantiser: Quantiser, vector: np.ndarray, code: Code, used: set[Code]) -> Code:
    """Among all codes the free one with the longest common beginning, then the cheapest level by level."""
    free = set(itertools.product(*map(range, quantiser.sizes))) - used
    ranked = sorted(free, key=lambda other: (-shared_prefix(code, other), exact_costs(quantiser, vector, other)))
    for other in ranked[1:]:
        if shared_prefix(code, other) == shared_prefix(code, ranked[0]):
            level = shared_prefix(ranked[0], other)
            assume_apart([exact_costs(quantiser, vector, c)[level] for c in (ranked[0], other)])
    return ranked[0]


def assume_apart(values: list[float]) -> None:
    """Leaves out cases that float32 may order in another way than float64."""
    values = sorted(values)
    assume(all(b - a > 1e-5 for a, b in itertools.pairwise(values)))


def case(data, new: int = 0):
    kind = data.draw(st.sampled_from(["residual", "product"]))
    sizes = tuple(data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=3)))
    quantiser = small_quantiser(kind, data.draw(st.integers(0, 99)), sizes)
    n = data.draw(st.integers(1, max(1, math.prod(sizes) - new)))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    width = 3 if kind == "residual" else 2 * len(sizes)
    # Close together: most codes collide, whole prefixes fill up.
    vectors = (data.draw(st.sampled_from([0.1, 1.0])) * rng.standard_normal((n + new, width))).astype(np.float32)
    ids = [f"item {i}" for i in rng.permutation(n + new)]
    return quantiser, vectors, ids, rng


def tuples(levels: np.ndarray) -> list[Code]:
    return [tuple(map(int, row)) for row in levels]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=20))
def test_groups_and_rate_equal_a_counter(codes: list[Code]) -> None:
    levels = np.asarray(codes, np.int32)
    counts = Counter(codes)
    assert collision_rate(levels) == pytest.approx(1 - len(counts) / len(codes))
    assert group_index(levels).tolist() == [sorted(counts).index(code) for code in codes]
    expected = [[i for i, c in enumerate(codes) if c == code] for code in sorted(counts) if counts[code] > 1]
    assert [group.tolist() for group in collision_groups(levels)] == expected


@given(st.data())
def test_the_extra_level_counts_each_group(data) -> None:
    codes = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=20))
    ids = [f"id{i}" for i in range(len(codes))]
    levels = np.asarray(codes, np.int32)
    out = resolve_extra(levels, ids)
    assert out.dtype == np.int32 and tuples(out[:, :2]) == codes
    for code, count in Counter(codes).items():
        assert sorted(row[2] for row in tuples(out) if row[:2] == code) == list(range(count))
    order = np.asarray(data.draw(st.permutations(range(len(codes)))))
    np.testing.assert_array_equal(resolve_extra(levels[order], [ids[i] for i in order]), out[order])


def test_extra_numbers_do_not_follow_the_ids() -> None:
    ids = [f"{i:04}" for i in range(1000)]
    numbers = resolve_extra(np.zeros((1000, 1), np.int32), ids)[:, 1]
    assert abs(np.corrcoef(np.arange(1000), numbers)[0, 1]) < 0.15
    assert (resolve_extra(np.zeros((1000, 1), np.int32), ids, seed=1)[:, 1] != numbers).mean() > 0.9


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_nearest_free_codes_equal_a_search_through_all(data) -> None:
    quantiser, vectors, ids, rng = case(data)
    levels = quantiser.encode(vectors)
    if data.draw(st.booleans()):  # as an even assignment may: codes that are not the cheapest
        levels = rng.integers(0, quantiser.sizes, levels.shape).astype(np.int32)
    every = list(itertools.product(*map(range, quantiser.sizes)))
    n_taken = data.draw(st.integers(0, len(every) - len(ids)))
    taken = [every[i] for i in rng.permutation(len(every))[:n_taken]]
    given_taken = np.asarray(taken, np.int32).reshape(-1, levels.shape[1]) if n_taken else None
    out, moved = resolve_nearest(levels, quantiser, vectors, ids, given_taken)
    codes, got = tuples(levels), tuples(out)
    assert out.dtype == np.int32 and len(set(got) | set(taken)) == len(got) + n_taken
    # The nearest of each group stays, the others queue by distance.
    queue = []
    for code in set(codes):
        group = sorted(
            (i for i in range(len(ids)) if codes[i] == code), key=lambda i: exact_distance(quantiser, vectors[i], code)
        )
        queue += group if code in taken else group[1:]
    assert moved == len(queue)
    assume_apart([exact_distance(quantiser, vectors[i], codes[i]) for i in range(len(ids))])
    queue.sort(key=lambda i: exact_distance(quantiser, vectors[i], codes[i]))
    used, expected = set(codes) | set(taken), list(codes)
    for i in queue:
        expected[i] = best_free(quantiser, vectors[i], codes[i], used)
        used.add(expected[i])
    assert got == expected
    order = np.asarray(data.draw(st.permutations(range(len(ids)))))
    again, _ = resolve_nearest(levels[order], quantiser, vectors[order], [ids[i] for i in order], given_taken)
    np.testing.assert_array_equal(again, out[order])


@pytest.mark.parametrize("same", [5, 60, 64])
def test_equal_vectors_whatever_the_order_of_the_catalogue(same: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collisions, "_COSTS", 28)  # batches of 7
    quantiser = small_quantiser("residual", 0, (4, 4, 4))
    vectors = np.repeat(np.random.default_rng(1).standard_normal((1, 3)).astype(np.float32), same, axis=0)
    ids, levels = [f"{i}" for i in range(same)], quantiser.encode(vectors)
    out, moved = resolve_nearest(levels, quantiser, vectors, ids)
    assert moved == same - 1 and len(set(tuples(out))) == same
    order = np.random.default_rng(2).permutation(same)
    np.testing.assert_array_equal(
        resolve_nearest(levels[order], quantiser, vectors[order], [ids[i] for i in order])[0], out[order]
    )


def test_codes_that_nobody_shares_stay() -> None:
    quantiser = small_quantiser("residual", 3, (6, 6))
    vectors = np.random.default_rng(4).standard_normal((20, 3)).astype(np.float32)
    levels = quantiser.encode(vectors)
    counts = Counter(tuples(levels))
    out, _ = resolve_nearest(levels, quantiser, vectors, [str(i) for i in range(20)])
    alone = [i for i, code in enumerate(tuples(levels)) if counts[code] == 1]
    assert 0 < len(alone) < 20
    np.testing.assert_array_equal(out[alone], levels[alone])


def test_more_levels_than_fit_in_an_integer() -> None:
    rng = np.random.default_rng(5)
    quantiser = Quantiser("product", tuple(rng.standard_normal((256, 1)).astype(np.float32) for _ in range(12)))
    vectors = np.repeat(rng.standard_normal((30, 12)).astype(np.float32), 2, axis=0)
    levels = quantiser.encode(vectors)
    out, moved = resolve_nearest(levels, quantiser, vectors, [str(i) for i in range(60)])
    assert moved == 30 and collision_rate(levels) == 0.5 and collision_rate(out) == 0
    np.testing.assert_array_equal(out[:, :-1], levels[:, :-1])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_new_items_with_an_extra_level(data) -> None:
    quantiser, vectors, ids, _ = case(data, new := 2)
    n = len(ids) - new
    old = resolve_extra(quantiser.encode(vectors[:n]), ids[:n])
    least = max(int(old[:, -1].max()) + 1, -(-len(ids) // math.prod(quantiser.sizes)))
    extra_size = least + data.draw(st.integers(0, 1))
    out = extend_codes(old, "extra", quantiser, vectors[n:], ids[n:], extra_size)
    flipped = extend_codes(old, "extra", quantiser, vectors[n:][::-1], ids[n:][::-1], extra_size)
    np.testing.assert_array_equal(flipped[::-1], out)
    encoded = tuples(quantiser.encode(vectors[n:]))
    # Either of the two may have come first.
    expected = []
    for order in ([0, 1], [1, 0]):
        used, answer = set(tuples(old)), {}
        for i in order:
            full = {
                code
                for code in itertools.product(*map(range, quantiser.sizes))
                if all((*code, k) in used for k in range(extra_size))
            }
            code = encoded[i] if encoded[i] not in full else best_free(quantiser, vectors[n + i], encoded[i], full)
            answer[i] = (*code, min(k for k in range(extra_size) if (*code, k) not in used))
            used.add(answer[i])
        expected.append([answer[0], answer[1]])
    assert tuples(out) in expected


def test_new_items_take_free_codes_or_share() -> None:
    quantiser = small_quantiser("residual", 6, (3, 3))
    vectors = 0.2 * np.random.default_rng(7).standard_normal((9, 3)).astype(np.float32)
    ids = [str(i) for i in range(9)]
    old, _ = resolve_nearest(quantiser.encode(vectors[:5]), quantiser, vectors[:5], ids[:5])
    new = extend_codes(old, "nearest", quantiser, vectors[5:], ids[5:], 0)
    assert set(tuples(old)) | set(tuples(new)) == set(itertools.product(range(3), range(3)))
    shared = extend_codes(old, "lists", quantiser, vectors[5:], ids[5:], 0)
    np.testing.assert_array_equal(shared, quantiser.encode(vectors[5:]))


def test_impossible_requests_say_so() -> None:
    quantiser = small_quantiser("residual", 8, (2, 2))
    vectors = np.random.default_rng(9).standard_normal((6, 3)).astype(np.float32)
    ids = [str(i) for i in range(6)]
    levels = quantiser.encode(vectors)
    with pytest.raises(
        UserError, match="5 items need a code of their own, 0 codes are taken, but 2 x 2 make 4; raise semantic.codes"
    ):
        resolve_nearest(levels[:5], quantiser, vectors[:5], ids[:5])
    old, _ = resolve_nearest(levels[:4], quantiser, vectors[:4], ids[:4])
    with pytest.raises(UserError, match="2 items need a code of their own, 4 codes are taken, but 2 x 2 make 4"):
        extend_codes(old, "nearest", quantiser, vectors[4:], ids[4:], 0)
    full = np.append(old, np.zeros((4, 1), np.int32), axis=1)
    with pytest.raises(UserError, match="2 items need a code of their own, 4 codes are taken, but 2 x 2 x 1 make 4"):
        extend_codes(full, "extra", quantiser, vectors[4:], ids[4:], 1)
    with pytest.raises(ValueError, match="existing codes have 2 levels, not 3"):
        extend_codes(old, "extra", quantiser, vectors[4:], ids[4:], 2)
