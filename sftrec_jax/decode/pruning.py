"""Requests that leave out parts of the catalogue: as data, so that nothing is compiled again.

A node is alive for a user when some item below it is neither left out for all (live bits) nor for this user (a list). The
search then gives exactly what it would with a catalogue that lacks the other items, and so K items while there are K. (Scores
by a normaliser other than `full` still are over the tokens of the whole catalogue.)
Shapes: n items, U leaves, B users, W beams, K slots, M masks, H listed nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sftrec_jax.decode.batches import ladder
from sftrec_jax.decode.groups import CodeGroups
from sftrec_jax.decode.index import CatalogueIndex, depth_starts
from sftrec_jax.decode.levels import Leaf
from sftrec_jax.decode.tree import CodeTree
from sftrec_jax.errors import UserError

SCATTER_BYTES = 32 * 2**20
"""A table [B, nodes] of dead nodes may take so much; beyond it each candidate is looked for in the user's list."""
NOWHERE = 2**31 - 1


@partial(jax.tree_util.register_dataclass, data_fields=["live", "mask", "dead"], meta_fields=[])
@dataclass(frozen=True)
class Pruned:
    """What is left out. Each part may be None."""

    live: tuple[Leaf, ...] | None
    """Of the nodes below each span uint32 [M, nodes / 32]: bit i of word j is node 32 j + i."""
    mask: Leaf
    """int32 [B] which of the M masks holds for each user."""
    dead: Leaf
    """int32 [B, H] states, ascending, filled up with the largest int32."""

    def alive(self, first: int, count: int, span: int, child: Int[Array, "B W K"]) -> Bool[Array, "B W K"]:
        """Whether a search may go on to these states, `count` of which stand from `first` on."""
        alive = jnp.ones(child.shape, bool)
        inside = (child >= first) & (child < first + count)  # codes that ended earlier passed before
        local = jnp.where(inside, child - first, 0)
        if self.live is not None:
            word = self.live[span][self.mask[:, None, None], local >> 5]
            alive &= ~inside | ((word >> (local & 31).astype(jnp.uint32)) & 1).astype(bool)
        if self.dead is not None:
            users = jnp.arange(child.shape[0])[:, None]
            if child.shape[0] * (count + 1) <= SCATTER_BYTES:
                at = self.dead - first
                at = jnp.where((at >= 0) & (at < count), at, count)
                table = jnp.zeros((child.shape[0], count + 1), bool).at[users, at].set(True)
                hit = table[users[..., None], local]
            else:
                found = jax.vmap(jnp.searchsorted)(self.dead, child)
                hit = jnp.take_along_axis(self.dead, jnp.minimum(found, self.dead.shape[1] - 1).reshape(len(users), -1), 1)
                hit = hit.reshape(child.shape) == child
            alive &= ~(inside & hit)
        return alive


def live_bits(tree: CodeTree, index: CatalogueIndex, leaves: np.ndarray) -> tuple[np.ndarray, ...]:
    """The bits of `Pruned.live` for one mask: bool [U] of leaves to keep -> of each span uint32 [nodes / 32]."""
    out = []
    for span in range(len(index.levels)):
        first, count = index.region(span)
        depths = [span + 1] if index.starts[span + 1 : span + 2] else range(span, tree.length + 1)
        starts = depth_starts(tree, index)
        bits = np.zeros(-(-count // 32) * 32, bool)
        for depth in depths:
            kept = tree.below(leaves, depth) > 0
            bits[starts[depth] - first : starts[depth] - first + len(kept)] = kept
        out.append(np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32))
    return tuple(out)


def dead_nodes(
    tree: CodeTree, index: CatalogueIndex, excluded: Sequence[np.ndarray], kept: np.ndarray | None
) -> list[np.ndarray]:
    """The states that each user's excluded leaves kill.

    Args:
        excluded: of each user distinct leaves.
        kept: bool [U] leaves that are in the catalogue for all at all; None: every one.

    Returns: of each user int32 [h] ascending: nodes all of whose kept leaves are excluded.
    """
    if not excluded:
        return []
    starts = depth_starts(tree, index)
    users = np.repeat(np.arange(len(excluded)), [len(e) for e in excluded])
    leaves = np.concatenate([np.zeros(0, np.int64), *excluded]).astype(np.int64)
    everyone = np.ones(tree.n_leaves, bool) if kept is None else kept
    users, leaves = users[everyone[leaves]], leaves[everyone[leaves]]
    of_user, states = [], []
    for depth in range(1, tree.length + 1):
        node = tree.node_of(leaves, depth)
        inside = node >= 0
        pairs, counts = np.unique(users[inside] * np.int64(tree.nodes[depth]) + node[inside], return_counts=True)
        user, node = np.divmod(pairs, tree.nodes[depth])
        whole = counts == _below(tree, everyone if kept is not None else None, depth)[node]
        of_user.append(user[whole])
        states.append(node[whole] + starts[depth])
    user, state = np.concatenate(of_user), np.concatenate(states)
    order = np.lexsort((state, user))
    cuts = np.searchsorted(user[order], np.arange(1, len(excluded)))
    return [part.astype(np.int32) for part in np.split(state[order], cuts)]


def _below(tree: CodeTree, kept: np.ndarray | None, depth: int) -> np.ndarray:
    if kept is not None or tree.lengths is not None:
        return tree.below(np.ones(tree.n_leaves, bool) if kept is None else kept, depth)
    return np.diff(tree.first_leaf[depth], append=tree.n_leaves)


Allowed = np.ndarray | tuple[np.ndarray, np.ndarray]
"""Items that may be returned: bool [n_items] for all users, or bool [M, n_items] masks and int [U] the mask of each user."""


class Pruner:
    """Turns what a request leaves out into arrays for the batches of its users.

    Args:
        exclude: of each user indices of items, or None.
        allowed: see Allowed, or None.

    Raises: UserError for a mask without items or of the wrong shape.
    """

    def __init__(
        self,
        tree: CodeTree,
        index: CatalogueIndex,
        groups: CodeGroups,
        users: int,
        exclude: Sequence[np.ndarray] | None,
        allowed: Allowed | None,
    ):
        self.exclude = exclude
        self.masks: np.ndarray | None = None
        self.which: np.ndarray | None = None
        if allowed is not None:
            self.masks, self.which = _checked(allowed, tree.n_items, users)
        self.live: tuple[np.ndarray, ...] | None = None
        self.dead: list[np.ndarray] | None = None
        if self.masks is not None:
            # A power of two of them, so that few numbers of masks are compiled for.
            some = [live_bits(tree, index, groups.leaves(mask)) for mask in self.masks]
            some += [some[0]] * ((1 << (len(some) - 1).bit_length()) - len(some))
            self.live = tuple(np.stack(bits) for bits in zip(*some, strict=True))
        if exclude is not None:
            every = np.concatenate([np.zeros(0, np.int64), *exclude])
            if len(every) and not 0 <= every.min() <= every.max() < tree.n_items:
                raise ValueError(f"items to exclude run from {every.min()} to {every.max()}, items from 0 to {tree.n_items - 1}")
            self.dead = [np.zeros(0, np.int32)] * users
            for number, mask in enumerate([None] if self.masks is None else self.masks):
                rows = (np.arange(users) if self.which is None else np.flatnonzero(self.which == number)).tolist()
                excluded = [groups.excluded(exclude[row], mask) for row in rows]
                kept = None if mask is None else groups.leaves(mask)
                for row, nodes in zip(rows, dead_nodes(tree, index, excluded, kept), strict=True):
                    self.dead[row] = nodes
            # One width for the whole call, so that it adds no compilation.
            self.width = ladder(max(map(len, self.dead), default=0))

    def batch(self, rows: np.ndarray, size: int) -> Pruned | None:
        """For a batch of `size` of which the first are these users; NumPy arrays. None where nothing is left out."""
        if self.live is None and self.dead is None:
            return None
        mask = dead = None
        if self.which is not None:
            mask = np.zeros(size, np.int32)
            mask[: len(rows)] = self.which[rows]
        if self.dead is not None:
            dead = np.full((size, self.width), NOWHERE, np.int32)
            for at, row in enumerate(rows):
                dead[at, : len(self.dead[row])] = self.dead[row]
        return Pruned(self.live, mask, dead)

    def allowed(self, row: int) -> np.ndarray | None:
        """bool [n_items] for a user, or None."""
        return None if self.masks is None or self.which is None else self.masks[self.which.tolist()[row]]


def _checked(allowed: Allowed, n_items: int, users: int) -> tuple[np.ndarray, np.ndarray]:
    masks, which = allowed if isinstance(allowed, tuple) else (allowed[None], np.zeros(users, np.int64))
    fits = masks.ndim == 2 and masks.shape[1] == n_items and masks.dtype == bool and which.shape == (users,)
    if not fits or not ((which >= 0) & (which < len(masks))).all():
        raise ValueError(
            f"allowed needs masks bool[M, {n_items}] and for {users} users one of the M each, int[{users}]; "
            f"they are {masks.dtype}{list(masks.shape)} and {which.dtype}{list(which.shape)}"
            + (f" from {which.min()} to {which.max()}" if which.size else "")
        )
    empty = np.flatnonzero(~masks.any(axis=1))
    if len(empty):
        raise UserError(f"allow-list {empty[0]} holds no item of the catalogue; name at least one")
    return masks, which
