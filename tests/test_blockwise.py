"""Attention block by block against `attend` with the whole mask: values, gradients, and which blocks are visited."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_trees import Marks, by_mask, errors, long_axes, random_arrays, random_rows, random_trees, with_gradients

from sftrec_jax.model import blockwise as module
from sftrec_jax.model.attention import packed_mask
from sftrec_jax.model.blockwise import block_attention, visible_blocks


@partial(jax.jit, static_argnames="block")
def by_blocks(arrays: list[jax.Array], marks: Marks, block: int) -> list[jax.Array]:
    return with_gradients(lambda q, k, v, *m: block_attention(q, k, v, m, block), arrays, marks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("t", "n", "k", "h", "block"), [(96, 3, 1, 16, 16), (75, 4, 2, 20, 16), (130, 2, 2, 64, 64), (50, 2, 1, 8, 64)]
)
def test_values_and_gradients_are_those_of_the_whole_mask(t: int, n: int, k: int, h: int, block: int) -> None:
    for seed in range(4):
        marks, arrays = random_rows(seed, t), random_arrays(seed, 2, t, n, k, h)
        found = by_blocks(arrays, marks, block)
        assert all(error < 1e-5 for error in errors(found, by_mask(arrays, marks)))
        padding = np.asarray(marks[1]) == 0
        assert padding.any() and not any(np.asarray(x)[padding].any() for x in found)


@pytest.mark.parametrize("longest", [3, 12, 200])
def test_long_and_short_trees(longest: int) -> None:
    """From many trees to a block up to many blocks to a tree, and a row of padding alone."""
    rng = np.random.default_rng(longest)
    for paddings in ((0, 20), (70, 96)):
        marks = tuple(map(jnp.asarray, np.stack([random_trees(rng, 96, padding, longest) for padding in paddings], axis=1)))
        arrays = random_arrays(longest, 2, 96, 3, 1, 16)
        assert all(error < 1e-5 for error in errors(by_blocks(arrays, marks, 16), by_mask(arrays, marks)))


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(sign: int) -> None:
    """Exponentials without a running maximum would overflow or vanish. Whole numbers, so that the scores are exact."""
    marks = random_rows(3, 96)
    query, key, value, cotangent = random_arrays(3, 2, 96, 3, 1, 16)
    arrays = [jnp.round(jnp.abs(query) * 100) * sign, jnp.round(jnp.abs(key) * 30), value, cotangent]
    forward, *backward = errors(by_blocks(arrays, marks, 16), by_mask(arrays, marks))
    # The backward pass has the logarithms of sums, near the largest score of each query, as they were rounded.
    assert forward < 1e-5 and all(error < np.spacing(np.float32(2**14)) for error in backward)


def test_bfloat16() -> None:
    """Weights and gradients of scores are rounded once to 2^-9 before the products whose sums are float32."""
    marks, arrays = random_rows(0, 96), random_arrays(0, 2, 96, 3, 1, 16, jnp.bfloat16)
    exact = by_mask([x.astype(jnp.float32) for x in arrays], marks)
    found = by_blocks(arrays, marks, 16)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    assert all(error < 4 * 2**-8 for error in errors(found, exact))


def test_blocks_without_a_visible_key_are_passed_over() -> None:
    """Every block with something to see is visited, and of others none that has only other segments or other branches."""
    for seed in range(20):
        marks = random_rows(seed, 128, (0, 13, 128))
        mask = np.array(packed_mask(*marks)) & (np.arange(128)[:, None] >= np.arange(128))
        mask &= np.asarray(marks[1] > 0)[:, :, None]  # what padding sees does not matter
        needed = mask.reshape(3, 8, 16, 8, 16).any(axis=(2, 4))
        visited = np.asarray(visible_blocks(marks, 16))  # type: ignore[arg-type]
        assert not (needed & ~visited).any()
        same = (marks[1][:, :, None] == marks[1][:, None]).reshape(3, 8, 16, 8, 16).any(axis=(2, 4))
        assert not (visited & ~np.asarray(same)).any()
        assert visited[2].tolist() == np.eye(8, dtype=bool).tolist()  # padding costs no more than itself
    # A trunk of 32 tokens and five branches of 16: each visits the trunk and itself.
    trunk = [(p, 1, 0, p + 1) for p in range(32)]
    tree = np.asarray(trunk + [(32 + p, 1, b, 32) for b in range(1, 6) for p in range(16)], np.int32).T
    visited = np.asarray(visible_blocks(tuple(jnp.asarray(x)[None] for x in tree), 16))[0]  # type: ignore[arg-type]
    assert visited.sum(axis=1).tolist() == [1, 2, 3, 3, 3, 3, 3]
    # The same with forks at 16, 16, 17, 0 and 0: of the trunk what lies before them.
    tree[0, 32:] -= np.repeat([16, 16, 15, 32, 32], 16)
    tree[3, 32:] = np.repeat([16, 16, 17, 0, 0], 16)
    visited = np.asarray(visible_blocks(tuple(jnp.asarray(x)[None] for x in tree), 16))[0]  # type: ignore[arg-type]
    assert visited.sum(axis=1).tolist() == [1, 2, 2, 2, 3, 1, 1]


def test_no_array_grows_with_the_square_of_the_row() -> None:
    marks, arrays = random_rows(0, 2048, (5,)), random_arrays(0, 1, 2048, 2, 1, 8)
    assert long_axes(by_mask, arrays, marks) == 2
    assert long_axes(partial(by_blocks, block=64), arrays, marks) == 1


WRONG: dict[str, Callable[[Sequence[jax.Array], Sequence[jax.Array]], jax.Array]] = {
    "other segments": lambda q, k: ((k[2] == 0) & (k[0] < q[3])) | ((q[2] == k[2]) & (k[0] <= q[0])),
    "the fork, one too far": lambda q, k: (q[1] == k[1]) & (((k[2] == 0) & (k[0] <= q[3])) | ((q[2] == k[2]) & (k[0] <= q[0]))),
    "the trunk to its end": lambda q, k: (q[1] == k[1]) & (((k[2] == 0) & (q[2] > 0)) | ((q[2] == k[2]) & (k[0] <= q[0]))),
    "other branches": lambda q, k: (q[1] == k[1]) & ((k[0] < q[3]) | (k[0] <= q[0])),
    "the own branch ahead": lambda q, k: (q[1] == k[1]) & (((k[2] == 0) & (k[0] < q[3])) | ((q[2] == k[2]) & (q[2] > 0))),
    "not the own branch": lambda q, k: (q[1] == k[1]) & (((k[2] == 0) & (k[0] < q[3])) | ((q[2] == k[2]) & (k[0] == q[0]))),
}


@pytest.mark.parametrize("rule", WRONG)
def test_a_broken_rule_shows(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    marks, arrays = random_rows(1, 96), random_arrays(1, 2, 96, 3, 1, 16)
    monkeypatch.setattr(module, "visible", WRONG[rule])
    broken = with_gradients(lambda q, k, v, *m: block_attention(q, k, v, m, 16), arrays, marks)  # type: ignore[arg-type]
    assert max(errors(broken, by_mask(arrays, marks))) > 1e-3
