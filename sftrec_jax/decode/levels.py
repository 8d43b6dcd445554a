"""One level of the prefix tree on the device, in five layouts behind one interface.

A node is its number among the nodes of its depth (or, where several depths share a level object, of all of them). All layouts
offer the children of a node in ascending order of their codes, so that a search breaks ties alike in all. Shapes: S nodes,
S' nodes one deeper, C codes of the level, K slots (most children of a node, or C), B users, W beams.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

Leaf = Any
"""An array of the index; inside transformations jax puts tracers, shapes and shardings in its place."""
if TYPE_CHECKING:
    Values = Array
else:  # tests put NumPy in the place of jax.numpy
    Values = Array | np.ndarray
Offer = tuple[Int[Values, "B W K"] | None, Bool[Values, "B W K"]]


@runtime_checkable
class Level(Protocol):
    """Which codes may follow a node. `width` is K."""

    @property
    def kind(self) -> str:
        """Name of the layout."""
        ...

    @property
    def width(self) -> int:
        """K, candidate slots of a node."""
        ...

    def offer(self, node: Int[Values, "B W"]) -> Offer:
        """The code of each slot (None where slot and code are the same number) and whether the slot holds a child at all.

        Codes of invalid slots are in range but mean nothing.
        """
        ...

    def child(self, node: Int[Values, "B W"], slot: Int[Values, "B W"]) -> Int[Values, "B W"]:
        """The node that a valid slot leads to."""
        ...

    def children(self, node: Int[Values, "B W"]) -> Int[Values, "B W K"]:
        """The nodes that all slots lead to, in range but meaningless for invalid ones."""
        ...

    def is_leaf(self, node: Int[Values, "B W"]) -> Bool[Values, "B W"]:
        """True for nodes without children."""
        ...


@partial(jax.tree_util.register_dataclass, data_fields=["count"], meta_fields=["width"])
@dataclass(frozen=True)
class Root:
    """The first level: one node, whose children are all codes."""

    count: Leaf
    """int32 []: codes of the level; slots beyond are room to grow."""
    width: int
    kind = "root"

    def offer(self, node: Int[Values, "B W"]) -> Offer:
        """See Level."""
        return None, jnp.broadcast_to(jnp.arange(self.width) < self.count, (*node.shape, self.width))

    def child(self, node: Int[Values, "B W"], slot: Int[Values, "B W"]) -> Int[Values, "B W"]:
        """See Level."""
        return slot

    def children(self, node: Int[Values, "B W"]) -> Int[Values, "B W K"]:
        """See Level."""
        return jnp.broadcast_to(jnp.arange(self.width, dtype=jnp.int32), (*node.shape, self.width))

    def is_leaf(self, node: Int[Values, "B W"]) -> Bool[Values, "B W"]:
        """See Level."""
        return jnp.zeros(node.shape, bool)


@partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=[])
@dataclass(frozen=True)
class Dense:
    """The valid-next-token table: the next node for every node and code. 4 S C bytes."""

    table: Leaf
    """int32 [S, C]; -1 where there is none, -2 in the first column of a leaf."""
    kind = "dense"

    @property
    def width(self) -> int:
        """C."""
        return self.table.shape[1]

    def offer(self, node: Int[Values, "B W"]) -> Offer:
        """See Level."""
        return None, self.table[node] >= 0

    def child(self, node: Int[Values, "B W"], slot: Int[Values, "B W"]) -> Int[Values, "B W"]:
        """See Level."""
        return jnp.maximum(self.table[node, slot], 0)

    def children(self, node: Int[Values, "B W"]) -> Int[Values, "B W K"]:
        """See Level."""
        return jnp.maximum(self.table[node], 0)

    def is_leaf(self, node: Int[Values, "B W"]) -> Bool[Values, "B W"]:
        """See Level."""
        return self.table[node, 0] == -2


@partial(jax.tree_util.register_dataclass, data_fields=["first", "code"], meta_fields=["width"])
@dataclass(frozen=True)
class Csr:
    """Children of node s are the nodes first[s] to first[s + 1] - 1: an edge's number is its node. 4 (S + 1) + c S' bytes."""

    first: Leaf
    """int32 [S + 1]"""
    code: Leaf
    """unsigned [S'], c bytes each. Code that leads to a node."""
    width: int
    kind = "csr"

    def offer(self, node: Int[Values, "B W"]) -> Offer:
        """See Level."""
        first = self.first[node]
        slot = jnp.arange(self.width, dtype=jnp.int32)
        at = jnp.minimum(first[..., None] + slot, self.code.shape[0] - 1)
        return self.code[at].astype(jnp.int32), slot < (self.first[node + 1] - first)[..., None]

    def child(self, node: Int[Values, "B W"], slot: Int[Values, "B W"]) -> Int[Values, "B W"]:
        """See Level."""
        return self.first[node] + slot

    def children(self, node: Int[Values, "B W"]) -> Int[Values, "B W K"]:
        """See Level."""
        at = self.first[node][..., None] + jnp.arange(self.width, dtype=jnp.int32)
        return jnp.minimum(at, self.code.shape[0] - 1)

    def is_leaf(self, node: Int[Values, "B W"]) -> Bool[Values, "B W"]:
        """See Level."""
        return self.first[node] == self.first[node + 1]


@partial(jax.tree_util.register_dataclass, data_fields=["words", "base"], meta_fields=[])
@dataclass(frozen=True)
class Bitmap:
    """A bit for every node and code; the child's number is the node's base plus the bits set before. (C / 8 + 4) S bytes."""

    words: Leaf
    """uint32 [S, C / 32]"""
    base: Leaf
    """int32 [S]; -1 for a leaf."""
    kind = "bitmap"

    @property
    def width(self) -> int:
        """C, rounded up to a multiple of 32."""
        return 32 * self.words.shape[1]

    def offer(self, node: Int[Values, "B W"]) -> Offer:
        """See Level."""
        bits = self.words[node][..., None] >> jnp.arange(32, dtype=jnp.uint32)
        return None, (bits & 1).reshape(*node.shape, self.width).astype(bool)

    def child(self, node: Int[Values, "B W"], slot: Int[Values, "B W"]) -> Int[Values, "B W"]:
        """See Level."""
        words, word = self.words[node], jnp.arange(self.words.shape[1])
        within = (jnp.uint32(1) << (slot & 31).astype(jnp.uint32)) - 1
        at = (slot >> 5)[..., None]
        before = jnp.where(word < at, words, jnp.where(word == at, words & within[..., None], 0))
        return self.base[node] + jnp.sum(jax.lax.population_count(before), -1).astype(jnp.int32)

    def children(self, node: Int[Values, "B W"]) -> Int[Values, "B W K"]:
        """See Level."""
        rank = jnp.cumsum(self.offer(node)[1].astype(jnp.int32), axis=-1) - 1
        return jnp.maximum(self.base[node][..., None] + rank, 0)

    def is_leaf(self, node: Int[Values, "B W"]) -> Bool[Values, "B W"]:
        """See Level."""
        return self.base[node] < 0


@partial(jax.tree_util.register_dataclass, data_fields=["code"], meta_fields=[])
@dataclass(frozen=True)
class Tail:
    """Every node has exactly one child, which has the same number. c S bytes."""

    code: Leaf
    """unsigned [S], c bytes each."""
    kind = "tail"
    width = 1

    def offer(self, node: Int[Values, "B W"]) -> Offer:
        """See Level."""
        return self.code[node].astype(jnp.int32)[..., None], jnp.ones((*node.shape, 1), bool)

    def child(self, node: Int[Values, "B W"], slot: Int[Values, "B W"]) -> Int[Values, "B W"]:
        """See Level."""
        return node

    def children(self, node: Int[Values, "B W"]) -> Int[Values, "B W K"]:
        """See Level."""
        return node[..., None]

    def is_leaf(self, node: Int[Values, "B W"]) -> Bool[Values, "B W"]:
        """See Level."""
        return jnp.zeros(node.shape, bool)


def dense(first: np.ndarray, code: np.ndarray, rows: int, columns: int) -> Dense:
    """The table of nodes whose children are `first` [S + 1] and `code` [S'], padded to `rows` and `columns`."""
    table = np.full((rows, columns), -1, np.int32)
    children = np.arange(first[0], first[-1], dtype=np.int32)
    table[np.repeat(np.arange(len(first) - 1), np.diff(first)), code[first[0] : first[-1]]] = children
    table[np.flatnonzero(first[1:] == first[:-1]), 0] = -2
    return Dense(jnp.asarray(table))


def bitmap(first: np.ndarray, code: np.ndarray, rows: int, columns: int) -> Bitmap:
    """See `dense`."""
    words = np.zeros((rows, -(-columns // 32)), np.uint32)
    base = np.full(rows, -1, np.int32)
    count = np.diff(first)
    base[: len(count)] = np.where(count > 0, first[:-1], -1)
    of_child = code[first[0] : first[-1]]
    # Bits of one word stand together and are distinct, so their sum is their union.
    cell = np.repeat(np.arange(len(count), dtype=np.int64), count) * words.shape[1] + (of_child >> 5)
    if len(cell):
        starts = np.flatnonzero(np.r_[True, cell[1:] != cell[:-1]])
        bits = np.uint32(1) << (of_child & 31).astype(np.uint32)
        words.reshape(-1)[cell[starts]] = np.bitwise_or.reduceat(bits, starts)
    return Bitmap(jnp.asarray(words), jnp.asarray(base))


def csr(first: np.ndarray, code: np.ndarray, rows: int, size: int, width: int) -> Csr:
    """See `dense`; `size` is the number of nodes one deeper, `width` the number of slots."""
    return Csr(_padded(first, rows + 1, int(first[-1])), _padded(code, size, 0), width)


def _padded(values: np.ndarray, size: int, fill: int) -> Array:
    if len(values) == size:
        return jnp.asarray(values)
    out = np.full(size, fill, values.dtype)
    out[: len(values)] = values
    return jnp.asarray(out)
