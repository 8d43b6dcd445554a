"""The catalogue index: which tokens may follow which, as arrays on the device.

The state of a beam is a node of the prefix tree (see `CodeTree`), numbered through all depths: node i of depth d is
`starts[d] + i`. A code that ended keeps its node. Shapes: B users, W beams, K slots of a beam, L levels (tokens of the longest
code), S_d nodes of depth d, C codes (distinct tokens) of a level.

Bytes on the device (c = 1, 2 or 4 a code, by C): dense 4 S_l C, CSR 4 (S_l + 1) + c S_{l+1}, bitmap (C / 8 + 4) S_l, tail c S_l
for level l, nothing for level 0. Titles: CSR of all nodes beyond depth 2, (4 + c) bytes each.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from sftrec_jax.decode.levels import Leaf, Level, Offer, Root, Tail, Values, bitmap, csr, dense
from sftrec_jax.decode.tree import UNROLL_ALL, CodeTree, code_type
from sftrec_jax.errors import UserError

DENSE_LIMIT = 64 * 1000 * 1000
"""Bytes up to which `auto` takes the dense tables."""

Layout = Literal["auto", "dense", "compact", "csr", "bitmap"]


@dataclass(frozen=True)
class Room:
    """Sizes of the arrays, equal to those of the catalogue or larger. Catalogues in equal room share compiled programs."""

    nodes: tuple[int, ...]
    """Of each span, and of depth L where the last span is one level."""
    codes: tuple[int, ...]
    """Of each span."""
    fanout: tuple[int, ...]
    """Of each span."""
    every: int
    """Distinct tokens of all levels."""
    length: int
    """Tokens of the longest code."""
    ragged: bool
    """Whether codes may differ in length."""

    @classmethod
    def of(cls, tree: CodeTree) -> "Room":
        """No more than the catalogue takes."""
        fanout = tuple(max(tree.fanout[s.first : s.end]) for s in tree.spans)
        every = len(np.unique(np.concatenate(tree.tokens)))
        return cls(_regions(tree), tuple(map(len, tree.tokens)), fanout, every, tree.length, tree.lengths is not None)

    @classmethod
    def for_items(cls, tree: CodeTree, capacity: int) -> "Room":
        """Room for any catalogue of at most `capacity` items whose tokens and branching do not grow beyond powers of two.

        Its codes may be shorter where those of `tree` differ in length, but not longer.
        Of codes of more than 16 tokens, room for a catalogue with a quarter more prefixes an item.
        """
        exact = cls.of(tree)
        codes = tuple(_power(c) for c in exact.codes)
        nodes = [1]
        for count in codes:
            nodes.append(min(capacity, nodes[-1] * count))
        if _loops(tree.length):
            nodes[len(codes) - 1 :] = [capacity + exact.nodes[-1] * 5 * capacity // (4 * tree.n_items)]
        fanout = tuple(min(c, _power(2 * f)) for c, f in zip(codes, exact.fanout, strict=True))
        return cls(tuple(nodes), codes, fanout, sum(codes), tree.length, exact.ragged)

    def check(self, tree: CodeTree) -> None:
        """Raises UserError where a catalogue does not fit."""
        if tree.length > self.length or (tree.lengths is not None and not self.ragged):
            kind = f"codes of {'up to' if self.ragged else 'exactly'} {self.length} tokens"
            raise UserError(f"the new catalogue has others than {kind}, for which there is room; make a new Recommender")
        need = Room.of(tree)
        for name, wanted, given in (
            ("prefixes", need.nodes, self.nodes),
            ("tokens", need.codes, self.codes),
            ("continuations of a prefix", need.fanout, self.fanout),
        ):
            for level, (a, b) in enumerate(zip(wanted, given, strict=True)):
                if a > b:
                    raise UserError(
                        f"the new catalogue has {a:,} {name} at level {level}, there is room for {b:,}; "
                        "make a new Recommender with a larger capacity"
                    )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["levels", "tokens", "every"],
    meta_fields=["length", "starts", "sizes", "fanout", "frontier", "ragged", "forced"],
)
@dataclass(frozen=True)
class CatalogueIndex:
    """The prefix tree of item codes on the device; a pytree, so that it is an argument of jitted functions."""

    levels: tuple[Any, ...]
    """A `Level` of each span (see `CodeTree`): one each, or for codes of more than 16 tokens two and one for all the rest."""
    tokens: tuple[Leaf, ...]
    """Of each span int32 [C] ascending: the token of each code, -1 beyond the last."""
    every: Leaf
    """int32: the tokens of all levels, ascending, -1 beyond the last."""
    length: int
    """L."""
    starts: tuple[int, ...]
    """First node of each span, and of depth L where the last span is one level."""
    sizes: tuple[int, ...]
    """Nodes (with those that are only room) in the place of each of `starts`."""
    fanout: tuple[int, ...]
    """At most so many children of a node, per level."""
    frontier: tuple[int, ...]
    """At most so many beams after each level."""
    ragged: bool
    """Whether codes differ in length."""
    forced: int
    """From this level on no node has a choice; L where the last level still offers one."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Layout of each span."""
        return tuple(level.kind for level in self.levels)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def offer(self, span: int, state: Int[Values, "B W"]) -> tuple[*Offer, Bool[Values, "B W"] | None]:
        """What may follow.

        Args:
            span: 0 to len(levels) - 1.
            state: nodes of the level's depth, or leaves of any lesser depth.

        Returns: code of each slot (None: its number), whether it holds a candidate [B, W, K], and whether the code has ended
            [B, W] (None where all have L tokens). The one candidate of an ended code is to stay, in slot 0.
        """
        local = state - self.starts[span]
        if not self.ragged:
            return *self.levels[span].offer(local), None
        earlier, local = local < 0, jnp.maximum(local, 0)
        code, valid = self.levels[span].offer(local)
        ended = earlier | self.levels[span].is_leaf(local)
        return code, jnp.where(ended[..., None], jnp.arange(valid.shape[-1]) == 0, valid), ended

    def child(
        self, span: int, state: Int[Values, "B W"], slot: Int[Values, "B W"], ended: Bool[Values, "B W"] | None
    ) -> Int[Values, "B W"]:
        """The state that a valid slot leads to; of an ended code the same."""
        child = self.starts[self._place(span)] + self.levels[span].child(jnp.maximum(state - self.starts[span], 0), slot)
        return child if ended is None else jnp.where(ended, state, child)

    def children(self, span: int, state: Int[Values, "B W"], ended: Bool[Values, "B W"] | None) -> Int[Values, "B W K"]:
        """`child` of all slots."""
        child = self.starts[self._place(span)] + self.levels[span].children(jnp.maximum(state - self.starts[span], 0))
        return child if ended is None else jnp.where(ended[..., None], state[..., None], child)

    def region(self, span: int) -> tuple[int, int]:
        """First of the states that `child` gives, and how many there may be. Ended codes are outside."""
        place = self._place(span)
        return self.starts[place], self.sizes[place]

    def has_ended(self, span: int, state: Int[Values, "B W"]) -> Bool[Values, "B W"]:
        """Whether codes have ended before the span's level."""
        if not self.ragged:
            return jnp.zeros(state.shape, bool)
        local = state - self.starts[span]
        return (local < 0) | self.levels[span].is_leaf(jnp.maximum(local, 0))

    def _place(self, span: int) -> int:
        return span if _loops(self.length) and span == len(self.levels) - 1 else span + 1


def build_index(codes: np.ndarray | CodeTree, layout: Layout = "auto", room: Room | None = None) -> CatalogueIndex:
    """Builds the index in NumPy and puts it on the default device.

    Args:
        codes: int32 [n_items, L] token ids, -1 after the end of a code; or their tree.
        layout: `dense`, `csr` or `bitmap` for all levels; `compact`: the best per level (a tail where no node has a choice, a
            bitmap where one has more than a third of all codes, else CSR); `auto`: dense while 4 * sum(S_l * C_l) over all
            levels is at most 64 MB, else compact.
        room: sizes of the arrays; None: those of the catalogue.

    Raises: UserError for codes that `CodeTree` refuses, dense tables of 8 GB or more, or want of room.
    """
    tree = codes if isinstance(codes, CodeTree) else CodeTree.of(codes)
    exact = room is None
    if room is None:
        room = Room.of(tree)
    else:
        room.check(tree)
    length, loops = tree.length, _loops(tree.length)
    rows = room.nodes[: len(tree.spans)]
    cells = sum(r * c for r, c in zip(rows[1:], room.codes[1:], strict=True))
    if layout == "auto":
        layout = "dense" if 4 * (cells + room.codes[0]) <= DENSE_LIMIT else "compact"
    if layout == "dense" and cells >= 2**31:
        raise UserError(f"decode.layout: dense would need {4 * cells / 1e9:.0f} GB for this catalogue; use auto")
    fanout, ragged = tree.fanout, room.ragged
    # From here on every node has one child. Only where sizes are exact: a later catalogue may have more.
    forced = length
    while exact and not ragged and not loops and forced > 1 and fanout[forced - 1] == 1:
        forced -= 1
    levels: list[Level] = [Root(jnp.int32(len(tree.tokens[0])), room.codes[0])]
    for i, span in enumerate(tree.spans[1:], start=1):
        first, code = _edges(tree, span.first) if span.end - span.first > 1 else (tree.first_child[i], tree.code[i + 1])
        size = room.nodes[i] if span.end - span.first > 1 else min(room.nodes[i + 1], rows[i] * room.codes[i])
        size = len(code) if exact else size
        code = code.astype(code_type(room.codes[i]), copy=False)
        kind = layout
        if kind == "compact":
            small = (room.codes[i] / 8 + 4) * rows[i] <= 2 * (4 * rows[i] + code.itemsize * size)
            kind = "tail" if span.first >= forced else "bitmap" if 3 * room.fanout[i] > room.codes[i] and small else "csr"
        if kind == "tail":
            levels.append(Tail(jnp.asarray(code)))
        elif kind == "csr":
            levels.append(csr(first, code, rows[i], size, room.fanout[i]))
        else:
            make = dense if kind == "dense" else bitmap
            levels.append(make(first, code, rows[i], room.codes[i]))
    tokens = tuple(_tokens(t, c) for t, c in zip(tree.tokens, room.codes, strict=True))
    every = _tokens(np.unique(np.concatenate(tree.tokens)), room.every)
    if not exact:
        fanout = tuple(room.fanout[min(level, len(rows) - 1)] for level in range(length))
    bounds = [sum(room.nodes[1 : level + 2]) if ragged else room.nodes[level + 1] for level in range(len(room.nodes) - 1)]
    frontier = tree.frontier if exact else tuple(bounds[min(level, len(bounds) - 1)] for level in range(length))
    starts = tuple(int(s) for s in np.concatenate([[0], np.cumsum(room.nodes)[:-1]]))
    return CatalogueIndex(tuple(levels), tokens, every, length, starts, room.nodes, fanout, frontier, ragged, forced)


def leaf_of(tree: CodeTree, index: CatalogueIndex, state: np.ndarray) -> np.ndarray:
    """int64, as `state`: the leaf that each final state is; meaningless for states of dead beams, but in range."""
    starts = depth_starts(tree, index)
    if not index.ragged:
        return np.clip(state.astype(np.int64) - starts[-1], 0, tree.n_leaves - 1)
    depth = np.searchsorted(starts, state, side="right") - 1
    out = np.zeros(state.shape, np.int64)
    for d in np.unique(depth):
        here = depth == d
        out[here] = tree.first_leaf[d][np.minimum(state[here] - starts[d], len(tree.first_leaf[d]) - 1)]
    return out


def depth_starts(tree: CodeTree, index: CatalogueIndex) -> np.ndarray:
    """int64 [L + 1] state of the first node of each depth."""
    starts = list(index.starts)
    for depth in range(len(starts), tree.length + 1):
        starts.append(starts[-1] + tree.nodes[depth - 1])
    return np.asarray(starts, np.int64)


def _loops(length: int) -> bool:
    return length > UNROLL_ALL


def _regions(tree: CodeTree) -> tuple[int, ...]:
    """Nodes of each span, and of depth L where the last span is one level."""
    if not _loops(tree.length):
        return tree.nodes
    last = tree.spans[-1].first
    return (*tree.nodes[:last], sum(tree.nodes[last:]))


def _edges(tree: CodeTree, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(first child [S + 1], code [S]) of all nodes from a depth on in one numbering."""
    starts = np.cumsum([0, *tree.nodes[depth:]])
    begin = [starts[i + 1] + c[:-1] for i, c in enumerate(tree.first_child[depth:])]
    return np.concatenate([*begin, starts[-1:]]).astype(np.int32), np.concatenate(tree.code[depth:])


def _tokens(tokens: np.ndarray, size: int) -> Any:
    return jnp.asarray(np.pad(tokens, (0, size - len(tokens)), constant_values=-1), jnp.int32)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
