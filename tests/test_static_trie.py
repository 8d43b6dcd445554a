"""The comparison of `benchmarks/constraint_step.py`, checked against dictionaries of prefixes."""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftrec_jax.decode.index import build_index
from sftrec_jax.decode.tree import CodeTree


def load(name: str) -> ModuleType:
    """A module of the folder of benchmarks, which is no package."""
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load("command")
static_trie = load("static_trie")
constraint_step = load("constraint_step")

Prefix = tuple[int, ...]


def catalogue(n: int, levels: int, tokens: int, seed: int) -> np.ndarray:
    """Random rows in lexicographic order, few of them equal."""
    rows = np.random.default_rng(seed).integers(0, tokens, (n, levels))
    return rows[np.lexsort(rows.T[::-1])]


def children(rows: np.ndarray) -> dict[Prefix, list[int]]:
    """Every prefix with the tokens that may follow it, ascending."""
    found: dict[Prefix, set[int]] = {}
    for row in rows.tolist():
        for i in range(len(row)):
            found.setdefault(tuple(row[:i]), set()).add(row[i])
    return {prefix: sorted(tokens) for prefix, tokens in found.items()}


def walk(trie: object, prefix: Prefix) -> int:
    """The state of a prefix, read from the tables and the pairs only."""
    pointers, pairs = np.asarray(trie.pointers), np.asarray(trie.pairs)  # pyright: ignore[reportAttributeAccessIssue]
    state = prefix[0] + 1
    for token in prefix[1:]:
        row = pairs[pointers[state] : pointers[state + 1]].tolist()
        (state,) = [after for t, after in row if t == token]
    return state


@pytest.mark.parametrize(("n", "levels", "tokens"), [(1, 3, 4), (40, 2, 6), (300, 3, 8), (500, 4, 16), (60, 5, 300)])
def test_arrays_hold_every_prefix_and_nothing_else(n: int, levels: int, tokens: int) -> None:
    rows = catalogue(n, levels, tokens, 0)
    trie = static_trie.build(rows, tokens)
    follows = children(rows)
    assert np.flatnonzero(trie.start_mask).tolist() == follows[()]
    pointers, pairs = np.asarray(trie.pointers), np.asarray(trie.pairs)
    states = {}
    for prefix, expected in follows.items():
        if prefix:
            state = walk(trie, prefix)
            states[state] = prefix
            assert pairs[pointers[state] : pointers[state + 1], 0].tolist() == expected
        if len(prefix) == 1:
            assert np.flatnonzero(trie.dense_mask[prefix[0]]).tolist() == expected
            for token in expected:
                assert trie.dense_next[prefix[0], token] == walk(trie, (*prefix, token))
    assert len(states) == len(follows) - 1, "two prefixes share a state"
    assert int(np.asarray(trie.dense_mask).sum()) == sum(len(t) for p, t in follows.items() if len(p) == 1)
    by_level = [[len(t) for p, t in follows.items() if len(p) == level] for level in range(levels)]
    assert trie.branch == tuple(max(counts) for counts in by_level)
    # The published arrays to the byte: pairs (one for each prefix of two tokens or more), pointers, tables of V x V and V.
    nodes = [1, *(sum(counts) for counts in by_level)]
    size = 8 * (sum(nodes[2:]) + tokens) + 4 * (tokens + sum(nodes[2:levels]) + 3) + 5 * tokens**2 + tokens
    assert trie.nbytes == size


@pytest.mark.parametrize("form", ["published", "compact"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_step_is_the_best_of_all_continuations(form: str, level: int) -> None:
    rng = np.random.default_rng(level)
    tokens, users, beams = 16, 2, 9
    rows = catalogue(700, 4, tokens, 1)
    trie = static_trie.build(rows, tokens)
    follows = children(rows)
    prefixes = sorted(p for p in follows if len(p) == level)
    at = rng.integers(0, len(prefixes), (users, beams))
    # Whole numbers, so that many scores are equal.
    logits = rng.integers(-3, 4, (users, beams, tokens)).astype(np.float32)
    score = rng.integers(-2, 1, (users, beams)).astype(np.float32)
    top, rest = rng.integers(0, 3, (2, users, beams, 1)).astype(np.float32)
    state = np.asarray([[walk(trie, prefixes[i]) for i in user] for user in at], np.int32)
    step = jax.jit(getattr(trie, form), static_argnums=(0, 5))
    arrays = (jnp.asarray(logits), (jnp.asarray(top), jnp.asarray(rest)), jnp.asarray(score), jnp.asarray(state))
    chosen = jax.tree.map(np.asarray, step(level, *arrays, beams))
    for user in range(users):
        options = [
            (-(score[user, m] + logits[user, m, token] - top[user, m, 0] - rest[user, m, 0]), m, token)
            for m in range(beams)
            for token in follows[prefixes[at[user, m]]]
        ]
        best = sorted(options)[:beams]
        assert chosen.score[user].tolist() == [-s for s, _, _ in best]
        assert chosen.parent[user].tolist() == [m for _, m, _ in best]
        assert chosen.token[user].tolist() == [token for _, _, token in best]
        if level < 3:
            expected = [walk(trie, (*prefixes[at[user, m]], token)) for _, m, token in best]
            assert chosen.state[user].tolist() == expected


@pytest.mark.parametrize(("levels", "codes", "n"), [(4, 16, 3000), (8, 512, 2000)])
def test_random_catalogues_are_distinct_and_sorted(levels: int, codes: int, n: int) -> None:
    rows = constraint_step.catalogue(n, levels, codes, 0)
    assert rows.shape == (n, levels)
    listed = [tuple(row) for row in rows.tolist()]
    assert listed == sorted(set(listed))
    # Every level is spread over all codes: the mean of n uniform draws is within five standard errors.
    assert (abs(rows.mean(0) - (codes - 1) / 2) < 5 * codes / np.sqrt(12 * n)).all()


def test_steps_of_all_layouts_and_static_agree() -> None:
    rows = constraint_step.catalogue(400, 3, 16, 0)
    tree = CodeTree.of(rows)
    indexes = {layout: build_index(tree, layout) for layout in constraint_step.LAYOUTS}
    static = static_trie.build(rows, 16)
    for level in (1, 2):
        calls, *_ = constraint_step.steps(tree, 16, indexes, static, level, (2, 8))
        constraint_step.check(tree, 16, level, calls, indexes["auto"].starts[level + 1])
        best = calls["csr"]()
        wrong = best._replace(parent=(best.parent + 1) % 8)
        calls["static"] = partial(tuple.__getitem__, (wrong,), 0)
        with pytest.raises(AssertionError, match="parent of static differs"):
            constraint_step.check(tree, 16, level, calls, indexes["auto"].starts[level + 1])
