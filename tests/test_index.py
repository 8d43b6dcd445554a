"""The catalogue index in all layouts, and the prefix tree that it is made from, against Python dictionaries."""

from itertools import pairwise

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftrec_jax.decode import index as index_module
from sftrec_jax.decode import levels as levels_module
from sftrec_jax.decode.index import CatalogueIndex, Room, build_index, leaf_of
from sftrec_jax.decode.tree import UNROLL_ALL, CodeTree
from sftrec_jax.errors import UserError

Code = tuple[int, ...]
LAYOUTS = ("dense", "csr", "bitmap", "compact")


def code_array(codes: list[Code]) -> np.ndarray:
    out = np.full((len(codes), max(map(len, codes))), -1, np.int32)
    for row, code in enumerate(codes):
        out[row, : len(code)] = code
    return out


@st.composite
def catalogues(draw: st.DrawFn, tokens: int = 6, longest: int = 4, items: int = 12) -> list[Code]:
    """Prefix-free codes in random order, some of several items, of one length or of several; now and then long ones."""
    length = draw(st.integers(1, longest))
    shortest = draw(st.sampled_from([length, 1]))
    code = st.lists(st.integers(0, tokens - 1), min_size=shortest, max_size=length).map(tuple)
    drawn = sorted(draw(st.lists(code, min_size=1, max_size=items, unique=True)))
    kept = [a for a, b in pairwise(drawn) if b[: len(a)] != a] + drawn[-1:]
    if draw(st.booleans()) and draw(st.booleans()):
        kept = [(*code, *range(UNROLL_ALL)) for code in kept]  # levels that share one set of arrays
    kept += draw(st.lists(st.sampled_from(kept), max_size=4))
    # Codes above 255 need more than a byte.
    scale = draw(st.sampled_from([1, 1000]))
    return [tuple(t * scale for t in code) for code in draw(st.permutations(kept))]


def walk(index: CatalogueIndex) -> dict[Code, int]:
    """All codes that the index spells, in the order in which it offers them, with their states."""
    paths: dict[Code, int] = {(): 0}
    for level in range(index.length):
        span = min(level, len(index.levels) - 1)
        state = np.asarray([list(paths.values())], np.int32)
        code, valid, ended = index.offer(span, state)
        children = np.asarray(index.children(span, state, ended))
        step: dict[Code, int] = {}
        for w, path in enumerate(paths):
            slots = np.flatnonzero(valid[0, w])
            assert len(slots), "a state without candidates"
            for slot in slots:
                stays = ended is not None and bool(ended[0, w])
                one = None if ended is None else ended[:, w : w + 1]
                child = int(index.child(span, state[:, w : w + 1], np.asarray([[slot]], np.int32), one)[0, 0])
                assert child == int(children[0, w, slot])
                if stays:
                    assert slot == 0 and child == state[0, w]
                    step[path] = child
                else:
                    token = int(index.tokens[span][slot if code is None else code[0, w, slot]])
                    step[(*path, token)] = child
        paths = step
    return paths


def in_numpy(index: CatalogueIndex, patch: pytest.MonkeyPatch) -> CatalogueIndex:
    """NumPy in the place of jax.numpy: no compilation for every new shape, and an index out of range is an error."""
    patch.setattr(index_module, "jnp", np)
    patch.setattr(levels_module, "jnp", np)
    patch.setattr(levels_module.jax.lax, "population_count", np.bitwise_count)
    return jax.tree.map(np.asarray, index)


@settings(max_examples=60, deadline=None)
@given(codes=catalogues())
def test_layouts_spell_the_catalogue(codes: list[Code]) -> None:
    array = code_array(codes)
    trie = {code[:n] for code in codes for n in range(len(code) + 1)}
    tree = CodeTree.of(array)
    assert tree.nodes == tuple(sum(len(p) == n for p in trie) for n in range(array.shape[1] + 1))
    for layout in LAYOUTS:
        for room in (None, Room.for_items(tree, len(codes) + 5)):
            built = build_index(tree, layout, room)
            assert layout == "compact" or set(built.kinds[1:]) <= {layout}
            with pytest.MonkeyPatch.context() as patch:
                index = in_numpy(built, patch)
                leaves = walk(index)
            assert list(leaves) == sorted(set(codes))
            ranks = leaf_of(tree, index, np.asarray(list(leaves.values())))
            assert ranks.tolist() == list(range(len(leaves)))
    for rank, code in enumerate(sorted(set(codes))):
        items = tree.order[tree.rank == rank].tolist()
        assert items == [i for i, c in enumerate(codes) if c == code]
        assert tuple(t for t in tree.rows[rank].tolist() if t >= 0) == code


@settings(max_examples=60, deadline=None)
@given(codes=catalogues(), data=st.data())
def test_bounds_and_what_lies_below(codes: list[Code], data: st.DataObject) -> None:
    tree = CodeTree.of(code_array(codes))
    leaves = sorted(set(codes))
    prefixes = sorted({code[:n] for code in codes for n in range(len(code) + 1)}, key=lambda p: (len(p), p))
    chosen = data.draw(st.lists(st.booleans(), min_size=len(leaves), max_size=len(leaves)))
    for depth in range(tree.length + 1):
        here = [p for p in prefixes if len(p) == depth]
        below = [sum(c for leaf, c in zip(leaves, chosen, strict=True) if leaf[:depth] == p) for p in here]
        assert tree.below(np.asarray(chosen), depth).tolist() == below
        ancestors = [here.index(leaf[:depth]) if len(leaf) >= depth else -1 for leaf in leaves]
        assert tree.node_of(np.arange(len(leaves)), depth).tolist() == ancestors
        if depth:
            children = [sum(q[:-1] == p for q in prefixes if q) for p in prefixes if len(p) == depth - 1]
            assert tree.fanout[depth - 1] == max(children)
            assert tree.frontier[depth - 1] == len({leaf[:depth] for leaf in leaves})


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 8), st.sampled_from([2, 7, 300, 70_000]), st.integers(0, 2**32 - 1))
def test_rows_are_sorted_as_numpy_sorts_them(n: int, length: int, tokens: int, seed: int) -> None:
    """Also where a row does not fit into the 64 bits that are sorted first."""
    codes = np.random.default_rng(seed).integers(0, tokens, (n, length)).astype(np.int32)
    tree = CodeTree.of(codes)
    rows, inverse = np.unique(codes, axis=0, return_inverse=True)
    np.testing.assert_array_equal(tree.rows, rows)
    rank = np.empty(n, int)
    rank[tree.order] = tree.rank
    np.testing.assert_array_equal(rank, inverse.reshape(-1))
    for a, b in pairwise(range(n)):
        if tree.rank[a] == tree.rank[b]:
            assert tree.order[a] < tree.order[b]


def test_layout_of_each_level() -> None:
    rng = np.random.default_rng(0)
    # All of 16 x 16 prefixes, then few continuations, then chains.
    first = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), -1).reshape(-1, 2)
    codes = np.concatenate([np.repeat(first, 2, 0), rng.integers(0, 40, (512, 1)), rng.integers(0, 40, (512, 2))], 1)
    codes = np.unique(codes[np.unique(codes[:, :3], axis=0, return_index=True)[1]], axis=0).astype(np.int32)
    index = build_index(codes, "compact")
    assert index.kinds == ("root", "bitmap", "csr", "tail", "tail") and index.forced == 3
    nodes, sizes = CodeTree.of(codes).nodes, [len(t) for t in index.tokens]
    tokens = 4 * sum(sizes) + index.every.nbytes
    bitmap = nodes[1] * 4 * -(-sizes[1] // 32) + 4 * nodes[1]
    assert index.nbytes == 4 + tokens + bitmap + 4 * (nodes[2] + 1) + nodes[3] + 2 * nodes[3]
    assert build_index(codes, "csr").forced == 3


def test_auto_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.stack([np.arange(50), np.arange(50)], 1).astype(np.int32)
    assert build_index(codes).kinds == ("root", "dense")
    cells = 1 * 50 + 50 * 50
    monkeypatch.setattr(index_module, "DENSE_LIMIT", 4 * cells)
    assert build_index(codes).kinds == ("root", "dense")
    monkeypatch.setattr(index_module, "DENSE_LIMIT", 4 * cells - 1)
    assert build_index(codes).kinds == ("root", "tail")


def test_index_is_a_pytree_with_static_shape() -> None:
    index = build_index(np.asarray([[1, 2], [1, 3], [4, -1]], np.int32), "csr")
    leaves, structure = jax.tree.flatten(index)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves) and sum(leaf.nbytes for leaf in leaves) == index.nbytes
    assert jax.tree.unflatten(structure, leaves).starts == (0, 1, 3)
    hash(structure)


def test_catalogues_in_one_room_have_one_structure() -> None:
    rng = np.random.default_rng(1)
    one, other, large = (rng.integers(0, 16, (n, 3)).astype(np.int32) for n in (90, 100, 130))
    room = Room.for_items(CodeTree.of(one), 100)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), build_index(codes, "compact", room)) for codes in (one, other)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1]) and shapes[0] == shapes[1]
    with pytest.raises(UserError, match=r"\d+ prefixes at level 3, there is room for 100; make a new Recommender"):
        build_index(large, "compact", room)
    with pytest.raises(UserError, match="20 prefixes at level 1, there is room for 16"):
        build_index(np.arange(60, dtype=np.int32).reshape(20, 3), "compact", room)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ([[3, 4], [1, -1], [1, 2]], "items 1 and 2 have codes of which the first begins the second"),
        ([[1, 0], [1, -1], [2, 2]], "items 1 and 0 have codes of which the first begins the second"),
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
    index = build_index(np.asarray([[1, 2, -1, -1], [1, 3, -1, -1]], np.int32))
    assert index.length == 2 and not index.ragged
