"""The catalogue index: which tokens may follow which, as arrays on the device.

Item codes form a prefix tree. Its nodes are numbered breadth-first, each level in lexicographic order of the codes, the
root being 0; a node number is the state of a beam. Candidates of a state come in ascending token order in every layout,
so a search breaks ties alike in all of them. Shapes: B users, W beams, K candidate slots of a beam, L levels (tokens of
the longest code), S_l nodes of depth l, C_l distinct tokens of level l.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sftrec_jax.errors import UserError

DENSE_LIMIT = 64 * 1000 * 1000
"""Bytes up to which `auto` takes the dense tables."""

Leaf = Any
"""An array of the index; inside transformations jax puts tracers, shapes and shardings in its place."""
Values = Array | np.ndarray
"""The index may hold NumPy arrays, too."""
Candidates = tuple[Int[Values, "B W K"], Int[Values, "B W K"], Bool[Values, "B W K"]]


def _at(values: tuple[int, ...], level: int | Values) -> Any:
    return values[level] if isinstance(level, int) else jnp.asarray(values, jnp.int32)[level]


def _slots(sizes: tuple[int, ...], level: int | Values, since: int) -> int:
    return sizes[level] if isinstance(level, int) else max(sizes[since:])


@partial(jax.tree_util.register_dataclass, data_fields=["table", "tokens"], meta_fields=["starts", "rows", "tokens_at", "sizes"])
@dataclass(frozen=True)
class DenseTransitions:
    """Per level a table [S_l, C_l] of the next node over the level's distinct tokens, -1 where there is none."""

    table: Leaf
    """int32 [cells]. All tables, row by row, one level after the other."""
    tokens: Leaf
    """int32 [sum of C_l]. The distinct tokens of each level, ascending, one level after the other."""
    starts: tuple[int, ...]
    """First node of each level."""
    rows: tuple[int, ...]
    """Where in `table` each level begins."""
    tokens_at: tuple[int, ...]
    """Where in `tokens` each level begins."""
    sizes: tuple[int, ...]
    """C_l of each level."""

    def children(self, level: int | Values, state: Int[Values, "B W"], since: int) -> Candidates:
        """See CatalogueIndex.candidates."""
        slot = jnp.arange(_slots(self.sizes, level, since), dtype=jnp.int32)
        size, first = _at(self.sizes, level), _at(self.rows, level)
        # States of other levels (beams that ended early or are dead) must not read outside the level's table.
        row = jnp.maximum(state - _at(self.starts, level), 0)[..., None]
        cell = jnp.minimum(first + row * size + slot, self.table.shape[0] - 1)
        inside = (state >= _at(self.starts, level))[..., None] & (slot < size)
        child = jnp.where(inside, self.table[cell], -1)
        token = self.tokens[jnp.minimum(_at(self.tokens_at, level) + slot, self.tokens.shape[0] - 1)]
        return jnp.broadcast_to(token, child.shape), jnp.maximum(child, 0), child >= 0


@partial(jax.tree_util.register_dataclass, data_fields=["first_child", "token"], meta_fields=["sizes"])
@dataclass(frozen=True)
class CsrTransitions:
    """Children of node s are the nodes first_child[s] to first_child[s + 1] - 1: the number of an edge is its node."""

    first_child: Leaf
    """int32 [nodes + 1]"""
    token: Leaf
    """int32 [nodes]. Token that leads to a node (0 for the root)."""
    sizes: tuple[int, ...]
    """Most children of a node, per level."""

    def children(self, level: int | Values, state: Int[Values, "B W"], since: int) -> Candidates:
        """See CatalogueIndex.candidates."""
        slot = jnp.arange(_slots(self.sizes, level, since), dtype=jnp.int32)
        first = self.first_child[state]
        count = self.first_child[state + 1] - first
        child = jnp.minimum(first[..., None] + slot, self.token.shape[0] - 1)
        return self.token[child], child, slot < count[..., None]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["transitions", "item", "leaf"],
    meta_fields=["n_items", "length", "nodes", "fanout", "frontier"],
)
@dataclass(frozen=True)
class CatalogueIndex:
    """The prefix tree of item codes on the device; a pytree, so that it is an argument of jitted functions."""

    transitions: DenseTransitions | CsrTransitions
    item: Leaf
    """int32 [nodes]. The item of a node below which (itself included) one item lies, -1 where there are several."""
    leaf: Leaf
    """bool [nodes]. Whether an item ends at the node; None where all codes have the same length."""
    n_items: int
    length: int
    """L, tokens of the longest code."""
    nodes: tuple[int, ...]
    """S_0 .. S_L, nodes of each depth."""
    fanout: tuple[int, ...]
    """Most children of a node, per level."""
    frontier: tuple[int, ...]
    """Per level: nodes one deeper, plus items that ended before; no search has more beams after the level."""

    every_column = False
    """Candidates are tokens of the catalogue, not all logit columns in order."""

    @property
    def layout(self) -> Literal["dense", "csr"]:
        """Which transition table this is."""
        return "dense" if isinstance(self.transitions, DenseTransitions) else "csr"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def candidates(self, level: int | Values, state: Int[Values, "B W"], since: int = 1) -> Candidates:
        """Tokens that may follow, the states they lead to, and which slots hold a candidate at all.

        Args:
            level: tokens already chosen; a Python int, or (inside a loop) a traced int32 not below `since`.
            state: [B, W] nodes of depth `level`, or leaves of any lesser depth.
            since: with a traced `level`, the lowest level it takes; sets K.

        Returns: token, child, valid [B, W, K]. The one candidate of an item that ended is itself (child == state), in
            slot 0; to stay there has log-probability 0. Tokens and children of invalid slots are in range but mean nothing.
        """
        token, child, valid = self.transitions.children(level, state, since)
        if self.leaf is not None:
            ended = self.leaf[state][..., None]
            stay = ended & (jnp.arange(token.shape[-1]) == 0)
            child = jnp.where(stay, state[..., None], child)
            valid = jnp.where(ended, stay, valid)
        return token, child, valid

    def ended(self, state: Int[Values, "B W"]) -> Bool[Values, "B W"]:
        """True for states where an item ended before the last level."""
        return jnp.zeros(state.shape, bool) if self.leaf is None else self.leaf[state]


def build_index(codes: np.ndarray, layout: Literal["auto", "dense", "csr"] = "auto") -> CatalogueIndex:
    """Builds the index in NumPy and puts it on the default device.

    Args:
        codes: int32 [n_items, L] token ids, -1 after the end of a code.
        layout: `auto` is dense while 4 * sum(S_l * C_l) is at most 64 MB.

    Raises: UserError for an empty catalogue, a code with a hole, equal codes, or a code that begins another.
    """
    if codes.ndim != 2 or not codes.size:
        raise UserError(f"item codes have shape {list(codes.shape)}; a catalogue needs at least one item of one token")
    order = _checked_order(codes)
    rows = codes[order, : int((codes >= 0).sum(1).max())]
    n, length = rows.shape
    present = rows >= 0
    new = np.ones((n, length), bool)
    new[1:] = np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1)
    new &= present
    nodes = (1, *(int(s) for s in new.sum(0)))
    starts = tuple(int(s) for s in np.concatenate([[0], np.cumsum(nodes)]))
    total = starts[-1]
    token, parent = np.zeros(total, np.int32), np.zeros(total, np.int64)
    item, leaf = np.full(total, -1, np.int32), np.zeros(total, bool)
    if n == 1:
        item[0] = order[0]
    above = np.zeros(n, np.int64)  # node of each row's prefix
    for level in range(length):
        here = starts[level + 1] + np.cumsum(new[:, level]) - 1
        first = np.flatnonzero(new[:, level])
        ids = here[first]
        token[ids], parent[ids] = rows[first, level], above[first]
        members = present[:, level]
        count = np.bincount(here[members] - starts[level + 1], minlength=len(first))
        item[ids[count == 1]] = order[first[count == 1]]
        ends = members if level == length - 1 else members & ~present[:, level + 1]
        leaf[here[ends]] = True
        above = np.where(members, here, above)
    # Parents rise with their children's numbers, so children of a node stand together.
    first_child = 1 + np.searchsorted(parent[1:], np.arange(total + 1), side="left")
    children = np.diff(first_child)
    fanout = tuple(int(children[starts[i] : starts[i + 1]].max()) for i in range(length))
    frontier = tuple(int(s) for s in np.asarray(nodes[1:]) + (~present).sum(0))
    distinct = [np.unique(token[starts[i + 1] : starts[i + 2]]) for i in range(length)]
    cells = sum(nodes[i] * len(distinct[i]) for i in range(length))
    if layout == "auto":
        layout = "dense" if 4 * cells <= DENSE_LIMIT else "csr"
    if layout == "dense":
        if cells >= 2**31:
            raise UserError(f"decode.layout: dense would need {4 * cells / 1e9:.0f} GB for this catalogue; use auto")
        transitions = _dense(token, parent, nodes, starts, distinct)
    else:
        transitions = CsrTransitions(jnp.asarray(first_child, jnp.int32), jnp.asarray(token), fanout)
    device_leaf = None if present.all() else jnp.asarray(leaf)
    return CatalogueIndex(transitions, jnp.asarray(item), device_leaf, n, length, nodes, fanout, frontier)


def _dense(
    token: np.ndarray, parent: np.ndarray, nodes: tuple[int, ...], starts: tuple[int, ...], distinct: list[np.ndarray]
) -> DenseTransitions:
    sizes = [len(d) for d in distinct]
    offsets = np.concatenate([[0], np.cumsum([nodes[i] * c for i, c in enumerate(sizes)])])
    table = np.full(int(offsets[-1]), -1, np.int32)
    for i, columns in enumerate(distinct):
        ids = np.arange(starts[i + 1], starts[i + 2])
        cell = (parent[ids] - starts[i]) * sizes[i] + np.searchsorted(columns, token[ids])
        table[offsets[i] + cell] = ids
    return DenseTransitions(
        jnp.asarray(table),
        jnp.asarray(np.concatenate(distinct)),
        starts[: len(sizes)],
        tuple(int(o) for o in offsets[:-1]),
        tuple(int(o) for o in np.cumsum([0, *sizes])[:-1]),
        tuple(sizes),
    )


def _checked_order(codes: np.ndarray) -> np.ndarray:
    """The lexicographic order of the rows (-1 lowest), after the checks of `build_index`."""
    present = codes >= 0
    broken = ~present[:, 0] | (present[:, 1:] > present[:, :-1]).any(1) | (codes < -1).any(1)
    if broken.any():
        row = int(np.argmax(broken))
        raise UserError(
            f"item codes, row {row}: {codes[row].tolist()} is not token ids followed by -1 only; run `sftrec prepare` again"
        )
    order = np.lexsort(codes.T[::-1])
    first, second = codes[order[:-1]], codes[order[1:]]
    clash = ((first == second) | (first < 0)).all(1)
    if clash.any():
        at = int(np.argmax(clash))
        one, other = int(order[at]), int(order[at + 1])
        what = "have the same code" if (first[at] == second[at]).all() else "have codes of which the first begins the second"
        raise UserError(f"item codes: items {one} and {other} {what}; give each item its own code and end codes alike")
    return order
