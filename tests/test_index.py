"""The catalogue index against a prefix tree of Python dictionaries."""

from itertools import pairwise

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftrec_jax.decode import index as index_module
from sftrec_jax.decode.index import CatalogueIndex, build_index
from sftrec_jax.errors import UserError


def code_array(codes: list[tuple[int, ...]]) -> np.ndarray:
    out = np.full((len(codes), max(map(len, codes))), -1, np.int32)
    for row, code in enumerate(codes):
        out[row, : len(code)] = code
    return out


@st.composite
def catalogues(draw: st.DrawFn, tokens: int = 6, longest: int = 4, items: int = 12) -> list[tuple[int, ...]]:
    """Prefix-free distinct codes in random order, of one length or of several."""
    length = draw(st.integers(1, longest))
    shortest = draw(st.sampled_from([length, 1]))
    code = st.lists(st.integers(0, tokens - 1), min_size=shortest, max_size=length).map(tuple)
    drawn = sorted(draw(st.lists(code, min_size=1, max_size=items, unique=True)))
    kept = [a for a, b in pairwise(drawn) if b[: len(a)] != a] + drawn[-1:]
    return draw(st.permutations(kept))


def walk(index: CatalogueIndex, traced: bool) -> dict[tuple[int, ...], int]:
    """All codes that the index spells, in the order in which it offers them, with their items."""
    paths: dict[tuple[int, ...], int] = {(): 0}
    for level in range(index.length):
        state = np.asarray([list(paths.values())], np.int32)
        token, child, valid = map(np.asarray, index.candidates(np.asarray(level, np.int32) if traced else level, state, since=0))
        step: dict[tuple[int, ...], int] = {}
        for w, path in enumerate(paths):
            offered = [(int(token[0, w, j]), int(child[0, w, j])) for j in np.flatnonzero(valid[0, w])]
            assert offered, "a state without candidates"
            for t, c in offered:
                step[path if c == state[0, w] else (*path, t)] = c
        paths = step
    return paths


@settings(max_examples=100, deadline=None)
@given(codes=catalogues())
def test_layouts_spell_the_catalogue(codes: list[tuple[int, ...]]) -> None:
    array = code_array(codes)
    trie = {code[:n] for code in codes for n in range(len(code) + 1)}
    for layout in ("dense", "csr"):
        index = build_index(array, layout)
        assert index.layout == layout and index.n_items == len(codes)
        assert index.nodes == tuple(sum(len(p) == n for p in trie) for n in range(array.shape[1] + 1))
        index = jax.tree.map(np.asarray, index)
        # NumPy in the place of jax.numpy: no compilation for every new shape, and an index out of range is an error.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index_module, "jnp", np)
            spelt = [walk(index, traced) for traced in (False, True)]
        for leaves in spelt:
            assert list(leaves) == sorted(codes)
            assert [int(index.item[leaf]) for leaf in leaves.values()] == [codes.index(code) for code in leaves]


@settings(max_examples=15, deadline=None)
@given(codes=catalogues())
def test_bounds_and_single_items(codes: list[tuple[int, ...]]) -> None:
    index = build_index(code_array(codes), "csr")
    trie = sorted({code[:n] for code in codes for n in range(len(code) + 1)}, key=lambda p: (len(p), p))
    below = {p: [i for i, code in enumerate(codes) if code[: len(p)] == p] for p in trie}
    assert np.asarray(index.item).tolist() == [below[p][0] if len(below[p]) == 1 else -1 for p in trie]
    if index.leaf is None:
        assert len(set(map(len, codes))) == 1
    else:
        assert np.asarray(index.leaf).tolist() == [p in codes for p in trie]
    for level in range(index.length):
        assert index.frontier[level] == len({code[: level + 1] for code in codes})
        children = [sum(q[:-1] == p for q in trie if q) for p in trie if len(p) == level]
        assert index.fanout[level] == max(children)


def test_auto_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.stack([np.arange(50), np.arange(50)], 1).astype(np.int32)
    assert build_index(codes).layout == "dense"
    cells = 1 * 50 + 50 * 50
    monkeypatch.setattr(index_module, "DENSE_LIMIT", 4 * cells)
    assert build_index(codes).layout == "dense"
    monkeypatch.setattr(index_module, "DENSE_LIMIT", 4 * cells - 1)
    assert build_index(codes).layout == "csr"


def test_index_is_a_pytree_with_static_shape() -> None:
    index = build_index(np.asarray([[1, 2], [1, 3], [4, -1]], np.int32), "csr")
    leaves, structure = jax.tree.flatten(index)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves) and sum(leaf.nbytes for leaf in leaves) == index.nbytes
    assert jax.tree.unflatten(structure, leaves).nodes == (1, 2, 2)
    hash(structure)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ([[1, 2], [3, 4], [1, 2]], "items 0 and 2 have the same code"),
        ([[3, 4], [1, -1], [1, 2]], "items 1 and 2 have codes of which the first begins the second"),
        ([[3, 4], [-1, 2]], "row 1"),
        ([[3, -1, 4], [5, 6, 7]], "row 0"),
        ([[3, -2]], "row 0"),
        ([[-1, -1]], "row 0"),
    ],
)
def test_impossible_codes_are_refused(codes: list[list[int]], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        build_index(np.asarray(codes, np.int32))
    assert "\n" not in str(caught.value)


def test_empty_catalogue_is_refused() -> None:
    with pytest.raises(UserError, match="at least one item"):
        build_index(np.zeros((0, 3), np.int32))


def test_surplus_columns_do_not_make_the_catalogue_longer() -> None:
    assert build_index(np.asarray([[1, 2, -1, -1], [1, 3, -1, -1]], np.int32)).length == 2
