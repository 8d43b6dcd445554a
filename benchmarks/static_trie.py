"""STATIC's constraint, written from its paper (Su et al. 2026, arXiv 2602.22647): what `constraint_step.py` compares with.

The first two levels have dense tables over V x V tokens. Beyond them the prefix tree is a sparse matrix of transitions: row
pointers by state, and (token, next state) pairs. A step reads as many pairs of each beam's row as the widest row of the level
has. `published` is algorithms 1 and 2 of the paper: the pairs are projected to a mask over all V tokens, and the best beams are
chosen among all M V masked scores. `compact` is how the authors' released code does levels beyond the second: it chooses
among the pairs themselves. Where paper and code leave a choice, the faster one on a CPU stands here: one flat top-k, next
states of the winners only, indices not checked. Shapes: B users, M beams, V tokens of a level, K pairs that are read of a row,
L levels.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = Any


def _at(values: Array, index: Any) -> Array:
    """Entries at indices that are known to be in range: not checked, which on a CPU takes a fifth of a small step."""
    return values.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _along(values: Array, index: Array, axis: int) -> Array:
    return jnp.take_along_axis(values, index, axis, mode="promise_in_bounds")


class Chosen(NamedTuple):
    """The best continuations: each [B, W], in falling order of score, ties in the order of beams and tokens."""

    score: Array
    """float32"""
    parent: Array
    """int32, the beam that is continued."""
    token: Array
    """int32"""
    state: Array
    """int32, where the beam is now."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["start_mask", "dense_mask", "dense_next", "pointers", "pairs"],
    meta_fields=["branch"],
)
@dataclass(frozen=True)
class StaticTrie:
    """States: 0 is none, t + 1 the prefix of one token t, then all longer prefixes by depth, last one for every whole code."""

    start_mask: Array
    """bool [V] tokens that begin a code."""
    dense_mask: Array
    """bool [V, V] the first two tokens of codes."""
    dense_next: Array
    """int32 [V, V] the state after them."""
    pointers: Array
    """int32 [states + 1] where each state's pairs begin."""
    pairs: Array
    """int32 [pairs + V, 2] token and next state; V unused ones at the end, so that no read of K pairs leaves the array."""
    branch: tuple[int, ...]
    """Most continuations of a state, per level."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def published(self, level: int, logits: Array, log_z: tuple[Array, Array], score: Array, state: Array, width: int) -> Chosen:
        """A step after the first as in the paper.

        Args:
            level: 1 to L - 1.
            logits: float32 [B, M, V].
            log_z: two float32 [B, M, 1] that are subtracted from the logits one after the other.
            score, state: float32 and int32 [B, M].
            width: W.
        """
        b, m, v = logits.shape
        row = None if level == 1 else self._row(level, state)
        if row is None:
            mask = _at(self.dense_mask, state - 1)
        else:
            token, _, valid = row
            # Unused slots are out of range and dropped, each at another place, so that no index is there twice.
            at = jnp.where(valid, token, v + jnp.arange(token.shape[2])).reshape(b * m, -1)
            mask = jnp.zeros((b * m, v), bool).at[jnp.arange(b * m)[:, None], at].set(True, mode="drop", unique_indices=True)
            mask = mask.reshape(b, m, v)
        scores = jnp.where(mask, score[..., None] + ((logits - log_z[0]) - log_z[1]), -jnp.inf)
        best, index = lax.top_k(scores.reshape(b, -1), width)
        parent, chosen = index // v, index % v
        if row is None:
            return Chosen(best, parent, chosen, _at(self.dense_next, (_along(state, parent, 1) - 1, chosen)))
        # Which pair of the parent's row has the token: K comparisons a winner, cheaper than states scattered to all V tokens.
        token, after, valid = (_along(a, parent[..., None], 1) for a in row)
        hit = valid & (token == chosen[..., None])
        return Chosen(best, parent, chosen, jnp.max(jnp.where(hit, after, 0), -1))

    def compact(self, level: int, logits: Array, log_z: tuple[Array, Array], score: Array, state: Array, width: int) -> Chosen:
        """A step as in the released code, see `published`. `width` is at most M K."""
        if level == 1:
            return self.published(level, logits, log_z, score, state, width)
        token, after, valid = self._row(level, state)
        own = (_along(logits, token, 2) - log_z[0]) - log_z[1]
        flat = jnp.where(valid, score[..., None] + own, -jnp.inf).reshape(len(score), -1)
        best, index = lax.top_k(flat, width)
        chosen, following = (_along(a.reshape(flat.shape), index, 1) for a in (token, after))
        return Chosen(best, index // token.shape[2], chosen, following)

    def _row(self, level: int, state: Array) -> tuple[Array, Array, Array]:
        """Token, next state and whether there is one: K slots of each beam, tokens of no pair in range."""
        first = _at(self.pointers, state)
        slot = jnp.arange(self.branch[level], dtype=jnp.int32)
        pair = _at(self.pairs, first[..., None] + slot)  # in range thanks to the unused pairs at the end
        return pair[..., 0], pair[..., 1], slot < (_at(self.pointers, state + 1) - first)[..., None]


def build(rows: np.ndarray, tokens: int) -> StaticTrie:
    """The arrays, made in NumPy and put on the default device.

    Args:
        rows: integer [n, L], at least two levels, in lexicographic order; equal ones may repeat.
        tokens: V, more than any of them.
    """
    n, length = rows.shape
    differs = np.zeros(n, bool)
    differs[0] = True
    above, above_token = np.zeros(0, np.int64), rows[:0, 0]
    start_mask, dense_mask = np.zeros(tokens, bool), np.zeros((tokens, tokens), bool)
    dense_next = np.zeros((tokens, tokens), np.int32)
    begins, columns, following, branch = [np.zeros(1, np.int32)], [], [], []
    states, edges = tokens + 1, 0
    for level in range(length):
        column = rows[:, level]
        if len(above) < n:
            differs[1:] |= column[1:] != column[:-1]
        at = np.flatnonzero(differs)
        token = column if len(at) == n else column[at]
        if level == 0:
            start_mask[token] = True
            branch.append(len(at))
        else:
            rank = np.arange(n, dtype=np.int32) if len(at) == n else np.cumsum(differs, dtype=np.int32) - 1
            count = np.diff(rank[above], append=len(at))
            branch.append(int(count.max()))
            if level == length - 1:
                after = np.full(len(at), states, np.int32)
            else:
                after = np.arange(states, states + len(at), dtype=np.int32)
                states += len(at)
            if level == 1:
                before = np.repeat(above_token, count)
                dense_mask[before, token], dense_next[before, token] = True, after
                count = np.bincount(before, minlength=tokens)
            begins.append((edges + np.cumsum(count) - count).astype(np.int32))
            columns.append(token)
            following.append(after)
            edges += len(at)
        above, above_token = at, token
    begins.append(np.full(2, edges, np.int32))
    pairs = np.zeros((edges + tokens, 2), np.int32)
    np.concatenate(columns, out=pairs[:edges, 0], casting="unsafe")
    np.concatenate(following, out=pairs[:edges, 1])
    arrays = (start_mask, dense_mask, dense_next, np.concatenate(begins), pairs)
    return StaticTrie(*(jnp.asarray(a) for a in arrays), branch=tuple(branch))
