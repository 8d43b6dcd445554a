"""The prefix tree of a catalogue's item codes, in NumPy: what the device index, the filters and the item lists are made from.

Nodes of each depth are numbered in lexicographic order of their prefixes. A leaf is a distinct code; leaves are numbered in
lexicographic order, too. Shapes: n items, U leaves, L levels (tokens of the longest code), S_d nodes of depth d.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sftrec_jax.errors import UserError

UNROLL_ALL = 16
"""Up to this many levels each has its own arrays and is compiled with its own shapes."""
UNROLL_FIRST = 2
"""Of longer codes only the first levels have; all later ones share one set of arrays and run in a loop. Titles of MovieLens:
at most 1346 and 193 candidates at the first two levels, 26 at any later one."""

CHUNK = 1 << 15
"""Rows that are turned into columns at a time, few enough for the cache."""


class Span(NamedTuple):
    """Levels `first` to `end` - 1, which share one table of tokens."""

    first: int
    end: int


def spans_of(length: int) -> tuple[Span, ...]:
    """How the levels of codes of `length` tokens are divided."""
    if length <= UNROLL_ALL:
        return tuple(Span(level, level + 1) for level in range(length))
    return (*(Span(level, level + 1) for level in range(UNROLL_FIRST)), Span(UNROLL_FIRST, length))


def code_type(tokens: int) -> type[np.unsignedinteger]:
    """The smallest type that holds the codes of a level of so many tokens."""
    return np.uint8 if tokens <= 1 << 8 else np.uint16 if tokens <= 1 << 16 else np.uint32


@dataclass(frozen=True, eq=False)
class CodeTree:
    """The prefix tree of item codes. Items may share a code; no code begins another."""

    order: np.ndarray
    """int32 or int64 [n] items sorted by code; items of one code in catalogue order."""
    rank: np.ndarray
    """int32 [n] leaf of each entry of `order`."""
    lengths: np.ndarray | None
    """int32 [U] tokens of each leaf's code, None where all have L."""
    spans: tuple[Span, ...]
    tokens: tuple[np.ndarray, ...]
    """Of each span int32 [C]: the distinct tokens, ascending. A token's place in it is its `code` in the span."""
    code: tuple[np.ndarray, ...]
    """Of each depth 0 to L unsigned [S_d]: code of the token that leads to the node (depth 0: empty)."""
    first_leaf: tuple[np.ndarray, ...]
    """Of each depth 0 to L int32 [S_d]: the first leaf below the node (or the node itself)."""
    first_child: tuple[np.ndarray, ...]
    """Of each depth 0 to L int32 [S_d + 1]: the node of the next depth with which the children begin."""

    @classmethod
    def of(cls, codes: np.ndarray, length: int = 1) -> "CodeTree":
        """Builds the tree.

        Args:
            codes: integer [n, L] token ids, -1 after the end of a code.
            length: levels to have at least, though no code were so long.

        Raises: UserError for an empty catalogue, a code with a hole, or a code that begins another.
        """
        if codes.ndim != 2 or not codes.size:
            raise UserError(f"item codes have shape {list(codes.shape)}; a catalogue needs at least one item of one token")
        if codes.shape[1] < length:
            codes = np.pad(codes, ((0, 0), (0, length - codes.shape[1])), constant_values=-1)
        last = codes[:, -1]
        ragged = bool((last < 0).any()) or bool(codes.min() < 0)
        lengths = _checked_lengths(codes) if ragged else None
        length = codes.shape[1] if lengths is None else max(length, int(lengths.max()))
        if lengths is not None and (lengths == length).all():
            lengths = None
        spans = spans_of(length)
        tokens, columns = _coded(codes[:, :length], spans)
        sizes = [len(t) for t, s in zip(tokens, spans, strict=True) for _ in range(s.first, s.end)]
        order = _sorted_rows(columns, sizes, lengths, codes.shape[0])
        return cls._of_sorted(order, columns, tokens, spans, lengths)

    @classmethod
    def _of_sorted(
        cls,
        order: np.ndarray,
        columns: list[np.ndarray],
        tokens: tuple[np.ndarray, ...],
        spans: tuple[Span, ...],
        lengths: np.ndarray | None,
    ) -> "CodeTree":
        n = len(order)
        of_row = None if lengths is None else lengths[order]
        differs = np.zeros(n, bool)
        differs[0] = True
        numbers = np.arange(n + 1, dtype=np.int32)
        every = numbers[:-1]
        code, first = [columns[0][:0]], [every[:1]]
        for level, column in enumerate(columns):
            values = column[order]
            if of_row is not None:
                # Where two rows are equal so far, one that ends here and one that goes on differ as well.
                over = of_row <= level
                differs[1:] |= (values[1:] != values[:-1]) | (over[1:] != over[:-1])
                at = every[differs & ~over]
            elif len(first[-1]) == n:
                at = every
            else:
                differs[1:] |= values[1:] != values[:-1]
                at = every[differs]
            first.append(at)
            code.append(values if len(at) == n else values[at])
        if of_row is not None:
            _refuse_prefixes(order, of_row, [c[order] for c in columns])
        leaf = np.cumsum(differs, dtype=np.int32) - 1 if not differs.all() else every
        if leaf is not every:  # leaves instead of rows, where codes are shared
            first = [leaf[at] for at in first]
        total = int(leaf[-1]) + 1
        # Levels where every node has one child share one array.
        children = [
            numbers[: len(f) + 1] if lengths is None and len(f) == len(g) else _begin(f, g, total) for f, g in pairwise(first)
        ]
        children.append(np.zeros(len(first[-1]) + 1, np.int32))
        leaf_lengths = None if of_row is None else of_row[differs].astype(np.int32)
        return cls(order, leaf, leaf_lengths, spans, tokens, tuple(code), tuple(first), tuple(children))

    @property
    def n_items(self) -> int:
        """Number of items, n."""
        return len(self.order)

    @property
    def n_leaves(self) -> int:
        """Number of distinct codes, U."""
        return int(self.rank[-1]) + 1

    @property
    def length(self) -> int:
        """L."""
        return len(self.code) - 1

    @property
    def nodes(self) -> tuple[int, ...]:
        """S_0 to S_L, nodes of each depth."""
        return tuple(len(f) for f in self.first_leaf)

    @cached_property
    def fanout(self) -> tuple[int, ...]:
        """Most children of a node, per level."""
        return tuple(int(np.diff(c).max(initial=0)) for c in self.first_child[:-1])

    @property
    def frontier(self) -> tuple[int, ...]:
        """Per level: nodes one deeper, plus leaves that ended before; no search has more beams after the level."""
        if self.lengths is None:
            return self.nodes[1:]
        ended = np.bincount(self.lengths, minlength=self.length + 1).cumsum()
        return tuple(int(self.nodes[level + 1] + ended[level]) for level in range(self.length))

    @cached_property
    def rows(self) -> np.ndarray:
        """int32 [U, L] token ids of each leaf, -1 after the end."""
        out = np.full((self.n_leaves, self.length), -1, np.int32)
        for span, tokens in zip(self.spans, self.tokens, strict=True):
            for level in range(span.first, span.end):
                node = self.node_of(np.arange(self.n_leaves), level + 1)
                inside = node >= 0
                out[inside, level] = tokens[self.code[level + 1][node[inside]]]
        return out

    def node_of(self, leaves: np.ndarray, depth: int) -> np.ndarray:
        """int64, as `leaves`: their ancestors of a depth (or they themselves), -1 for leaves of lesser depth."""
        node = np.searchsorted(self.first_leaf[depth], leaves, side="right") - 1
        return node if self.lengths is None else np.where(self.lengths[leaves] >= depth, node, -1)

    def below(self, chosen: np.ndarray, depth: int) -> np.ndarray:
        """int64 [S_d] how many of the leaves that `chosen` (bool [U]) marks lie below each node (or are it)."""
        if self.lengths is not None:
            chosen = chosen & (self.lengths >= depth)
        total = np.zeros(len(chosen) + 1, np.int64)
        np.cumsum(chosen, out=total[1:])
        return np.diff(total[np.append(self.first_leaf[depth], len(chosen))])


def _begin(above: np.ndarray, below: np.ndarray, total: int) -> np.ndarray:
    """int32 [S_d + 1]: how many nodes of the next depth begin before each node."""
    begins = np.zeros(total + 1, np.int32)
    begins[below + 1] = 1
    np.cumsum(begins, out=begins)
    return begins[np.append(above, np.int32(total))]


def _checked_lengths(codes: np.ndarray) -> np.ndarray:
    """int32 [n] tokens of each row; raises UserError for one that is not tokens followed by -1 only."""
    present = codes >= 0
    broken = ~present[:, 0] | (present[:, 1:] > present[:, :-1]).any(1) | (codes < -1).any(1)
    if broken.any():
        row = int(np.argmax(broken))
        raise UserError(
            f"item codes, row {row}: {codes[row].tolist()} is not token ids followed by -1 only; run `sftrec prepare` again"
        )
    return present.sum(1, dtype=np.int32)


def _coded(codes: np.ndarray, spans: tuple[Span, ...]) -> tuple[tuple[np.ndarray, ...], list[np.ndarray]]:
    """The distinct tokens of each span, and all columns as places in them (anything beyond the end of a code)."""
    n, length = codes.shape
    span_of = [i for i, span in enumerate(spans) for _ in range(span.first, span.end)]
    top = codes.max(0)
    occurs = [np.zeros(int(top[s.first : s.end].max()) + 2, bool) for s in spans]  # -1 lands on the last entry
    for start in range(0, n, CHUNK):
        for column, i in zip(np.ascontiguousarray(codes[start : start + CHUNK].T), span_of, strict=True):
            occurs[i][column] = True
    tokens = tuple(np.flatnonzero(seen[:-1]).astype(np.int32) for seen in occurs)
    places = [np.zeros(len(seen), code_type(len(t))) for seen, t in zip(occurs, tokens, strict=True)]
    for place, t in zip(places, tokens, strict=True):
        place[t] = np.arange(len(t))
    columns = [np.empty(n, places[i].dtype) for i in span_of]
    for start in range(0, n, CHUNK):
        block = np.ascontiguousarray(codes[start : start + CHUNK].T)
        for level, i in enumerate(span_of):
            columns[level][start : start + CHUNK] = places[i][block[level]]
    return tokens, columns


def _sorted_rows(columns: list[np.ndarray], sizes: list[int], lengths: np.ndarray | None, n: int) -> np.ndarray:
    """Rows in lexicographic order, an ended code before those that go on, equal ones in the order given.

    As many columns as fit are packed above the row number into 64 bits, which sort several times faster than rows; only rows
    that are equal in those are sorted by the others.
    """
    bits = max(1, (n - 1).bit_length())
    key, used, left = np.zeros(n, np.uint64), bits, 0
    for column, size in zip(columns, sizes, strict=True):
        width = size.bit_length()  # codes are shifted by one, 0 is the end
        if used + width > 64:
            break
        key = (key << np.uint64(width)) | _shifted(column, lengths, left)
        used, left = used + width, left + 1
    key = (key << np.uint64(bits)) | np.arange(n, dtype=np.uint64)
    key.sort()
    order = (key & np.uint64((1 << bits) - 1)).astype(np.int32 if n < 2**31 else np.int64)
    if left == len(columns):
        return order
    key >>= np.uint64(bits)
    same = np.zeros(n + 1, bool)
    same[1:-1] = key[1:] == key[:-1]
    tied = np.flatnonzero(same[1:] | same[:-1])
    rows, run = order[tied], np.cumsum(~same[tied])
    rest = [_shifted(columns[i][rows], None if lengths is None else lengths[rows], i) for i in range(left, len(columns))]
    order[tied] = rows[np.lexsort((*rest[::-1], run))]
    return order


def _shifted(column: np.ndarray, lengths: np.ndarray | None, level: int) -> np.ndarray:
    wide = column.astype(np.uint64) + np.uint64(1)
    return wide if lengths is None else np.where(lengths > level, wide, np.uint64(0))


def _refuse_prefixes(order: np.ndarray, lengths: np.ndarray, columns: list[np.ndarray]) -> None:
    """Raises UserError where a code begins the next one in lexicographic order."""
    begins = lengths[:-1] < lengths[1:]
    for level, column in enumerate(columns):
        begins &= (column[:-1] == column[1:]) | (lengths[:-1] <= level)
    if begins.any():
        at = int(np.argmax(begins))
        raise UserError(
            f"item codes: items {order[at]} and {order[at + 1]} have codes of which the first begins the second; "
            "end all codes with one token that stands nowhere else in them"
        )
