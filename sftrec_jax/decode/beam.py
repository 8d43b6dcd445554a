"""Beam search as one jitted program: prompts run once per user, beams keep only their own few tokens.

Scores are exact log-probabilities of the model (softmax over all logit columns), float32, -inf for beams that do not
exist. Shapes: B users, P prompt, W beams, K candidate slots of a beam, L levels, C logit columns, D model; layers stand
first in caches, kv-heads and head-dim last.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sftrec_jax.decode.index import CatalogueIndex, Leaf
from sftrec_jax.model.attention import attend, attend_beams
from sftrec_jax.model.decoder import Decoder

UNROLL_ALL = 16
"""Up to this many levels each is compiled with its own shapes."""
UNROLL_FIRST = 2
"""Of longer codes only the first levels are; the rest is one loop of fixed shapes. Titles of MovieLens: at most 1346 and 193
candidates at the first two levels, 26 at any later one."""


class Found(NamedTuple):
    """Items [B, K] int32 (-1: none) in falling order of scores [B, K] float32 (-inf: none)."""

    items: Int[Array, "B K"]
    scores: Float[Array, "B K"]


class Prefix(NamedTuple):
    """What the prompt leaves behind, shared by all beams of a user."""

    hidden: Float[Array, "B 1 D"]
    key: Float[Array, "layers B P kv head"]
    value: Float[Array, "layers B P kv head"]
    lengths: Int[Array, "B"]


class Beams(NamedTuple):
    """The beams of each user. `state` is the position in the search space, `token` the newest token."""

    score: Float[Array, "B W"]
    state: Int[Array, "B W"]
    token: Int[Array, "B W"]
    written: Int[Array, "B W L"]


@partial(jax.tree_util.register_dataclass, data_fields=["tokens"], meta_fields=["length", "terminator"])
@dataclass(frozen=True)
class AllTokens:
    """The search space without a catalogue: any logit column, up to L tokens or the terminator.

    A growing beam's state is its number of tokens; L + 1 marks one that has ended.
    """

    tokens: Leaf
    """int32 [C]. Token id of each logit column."""
    length: int
    """L."""
    terminator: int
    """Token that ends a sequence, -1 for none."""

    every_column = True

    @property
    def fanout(self) -> tuple[int, ...]:
        """See CatalogueIndex."""
        return (self.tokens.shape[0],) * self.length

    @property
    def frontier(self) -> tuple[int, ...]:
        """See CatalogueIndex; unbounded here."""
        return (2**31 - 1,) * self.length

    def candidates(
        self, level: int | Array, state: Int[Array, "B W"], since: int = 1
    ) -> tuple[Int[Array, "B W C"], Int[Array, "B W C"], Bool[Array, "B W C"]]:
        """See CatalogueIndex.candidates."""
        ended = (state == self.length + 1)[..., None]
        shape = (*state.shape, self.tokens.shape[0])
        child = jnp.where(ended | (self.tokens == self.terminator), self.length + 1, level + 1)
        valid = ~ended | (jnp.arange(self.tokens.shape[0]) == 0)
        return jnp.broadcast_to(self.tokens, shape), child, valid

    def ended(self, state: Int[Array, "B W"]) -> Bool[Array, "B W"]:
        """See CatalogueIndex."""
        return state == self.length + 1


Space = CatalogueIndex | AllTokens


def _prefill(decoder: Decoder, prompts: Int[Array, "B P"], lengths: Int[Array, "B"]) -> Prefix:
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    # Padding stands to the right, so the causal mask already hides it from every real token.
    causal = positions[:, :, None] >= positions[:, None, :]

    def keep(query: Array, key: Array, value: Array, cache: None) -> tuple[Array, tuple[Array, Array]]:
        return attend(query, key, value, causal), (key, value)

    hidden, (key, value) = decoder.hidden(prompts, positions, keep)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return Prefix(last, key, value, lengths)


def _extend(
    decoder: Decoder, prefix: Prefix, token: Int[Array, "B W"], slot: int | Array, tail: tuple[Array, Array]
) -> tuple[Float[Array, "B W D"], tuple[Array, Array]]:
    """Feeds each beam its newest token, which becomes entry `slot` of its tail."""
    prompt_mask = jnp.arange(prefix.key.shape[2]) < prefix.lengths[:, None]
    tail_mask = jnp.arange(tail[0].shape[3]) <= slot

    def shared(query: Array, key: Array, value: Array, cache: Any) -> tuple[Array, tuple[Array, Array]]:
        prompt_key, prompt_value, tail_key, tail_value = cache
        tail_key = lax.dynamic_update_index_in_dim(tail_key, key, slot, 2)
        tail_value = lax.dynamic_update_index_in_dim(tail_value, value, slot, 2)
        mixed = attend_beams(query, prompt_key, prompt_value, prompt_mask, tail_key, tail_value, tail_mask)
        return mixed, (tail_key, tail_value)

    positions = jnp.broadcast_to((prefix.lengths + slot)[:, None], token.shape)
    return decoder.hidden(token, positions, shared, (prefix.key, prefix.value, *tail))


def _select(
    space: Space,
    columns: Int[Array, "ids"],
    logits: Float[Array, "B W C"],
    beams: Beams,
    level: int | Array,
    width: int,
    since: int,
    blocked: Bool[Array, "B slots"] | None,
) -> tuple[Beams, Int[Array, "B new"]]:
    """The best `width` continuations of all beams, and the beam that each continues."""
    b = beams.score.shape[0]
    token, child, valid = space.candidates(level, beams.state, since)
    top = jnp.max(logits, -1, keepdims=True)
    log_z = jnp.log(jnp.sum(jnp.exp(logits - top), -1, keepdims=True))
    chosen = logits if space.every_column else jnp.take_along_axis(logits, columns[token], axis=2)
    stays = child == beams.state[..., None]
    x = beams.score[..., None] + jnp.where(stays, 0.0, (chosen - top) - log_z)
    if blocked is not None and isinstance(space, CatalogueIndex):
        # A node above a single item is that item, so an excluded one holds no beam longer than needed.
        item = space.item[child].reshape(b, -1)
        hit = jnp.take_along_axis(blocked, jnp.where(item < 0, space.n_items, item), axis=1)
        valid &= ~hit.reshape(valid.shape)
    score, index = lax.top_k(jnp.where(valid, x, -jnp.inf).reshape(b, -1), width)
    parent = index // token.shape[2]

    def pick(values: Any) -> Array:
        return jnp.take_along_axis(values.reshape(b, -1), index, axis=1)

    token, stays = pick(token), pick(stays)
    written = jnp.take_along_axis(beams.written, parent[..., None], axis=1)
    written = lax.dynamic_update_index_in_dim(written, jnp.where(stays, -1, token), level, 2)
    return Beams(score, pick(child), token, written), parent


def _reorder(tail: tuple[Array, Array], parent: Int[Array, "B W"]) -> tuple[Array, Array]:
    key, value = (jnp.take_along_axis(t, parent[None, :, :, None, None, None], axis=2) for t in tail)
    return key, value


def _widen(values: Array, width: int, fill: int | float) -> Array:
    """Pads axis 1 to `width`."""
    missing = width - values.shape[1]
    return jnp.pad(values, [(0, 0), (0, missing)] + [(0, 0)] * (values.ndim - 2), constant_values=fill)


def _search(decoder: Decoder, space: Space, prefix: Prefix, width: int, last_width: int, blocked: Array | None) -> Beams:
    """The best `last_width` complete beams, fewer where fewer can exist, in falling order of score.

    `width` beams are kept between levels, and after the last one where levels run in a loop.
    """
    b, levels = prefix.hidden.shape[0], space.length
    columns = decoder.head.column_of()
    unrolled = levels if levels <= UNROLL_ALL else UNROLL_FIRST
    root = jnp.zeros((b, 1), jnp.int32)
    beams = Beams(jnp.zeros((b, 1), jnp.float32), root, root, jnp.full((b, 1, levels), -1, jnp.int32))
    layers, _, _, *heads = prefix.key.shape
    hidden = prefix.hidden
    blank = jnp.zeros((layers, b, 1, levels - 1, *heads), prefix.key.dtype)
    tail = (blank, blank)
    for level in range(unrolled):
        if level:
            hidden, tail = _extend(decoder, prefix, beams.token, level - 1, tail)
        wanted = last_width if level == levels - 1 else width
        # Never more beams than nodes: no duplicates and no filler, and top_k always finds enough entries.
        size = min(wanted, space.frontier[level], beams.score.shape[1] * space.fanout[level])
        beams, parent = _select(space, columns, decoder.logits(hidden), beams, level, size, level, blocked)
        tail = _reorder(tail, parent)
    if unrolled == levels:
        return beams

    width = min(width, space.frontier[-1])
    beams = Beams(*(_widen(v, width, -jnp.inf if v is beams.score else 0) for v in beams))
    tail = (jax.vmap(lambda t: _widen(t, width, 0))(tail[0]), jax.vmap(lambda t: _widen(t, width, 0))(tail[1]))

    def going(carry: tuple[Array, Beams, Any]) -> Array:
        level, beams, _ = carry
        return (level < levels) & jnp.any(~space.ended(beams.state) & (beams.score > -jnp.inf))

    def step(carry: tuple[Array, Beams, Any]) -> tuple[Array, Beams, Any]:
        level, beams, tail = carry
        hidden, tail = _extend(decoder, prefix, beams.token, level - 1, tail)
        beams, parent = _select(space, columns, decoder.logits(hidden), beams, level, width, unrolled, blocked)
        return level + 1, beams, _reorder(tail, parent)

    beams = lax.while_loop(going, step, (jnp.int32(unrolled), beams, tail))[1]
    return beams


def _fill(values: Array, k: int, live: Array, nothing: int | float) -> Array:
    """Values of the first k live beams, then `nothing`."""
    return _widen(jnp.where(live, values, nothing)[:, :k], k, nothing)


@partial(jax.jit, static_argnames=("graphdef", "k", "beam", "both"))
def recommend(
    graphdef: Any,
    state: Any,
    index: CatalogueIndex,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    exclude: Int[Array, "B E"] | None,
    *,
    k: int,
    beam: int,
    both: bool = False,
) -> tuple[Found | None, Found | None]:
    """Ranks items after each prompt.

    Args:
        graphdef, state: `nnx.split` of a Decoder.
        prompts: token ids, filled up at the right with any token; `lengths` (at least 1) says how many are real.
        exclude: item indices never to be returned, -1 for none; None leaves the first result out. Exact for codes of one
            token; of longer codes those among the beams are dropped, so a list may be short.
        k: items returned, at most `beam` unless codes have one token.
        beam: W, beams kept between levels.
        both: also rank without `exclude`, from the same pass over the prompts.

    Returns: (ranking with `exclude` or None, ranking without it or None).
    """
    decoder = nnx.merge(graphdef, state)
    prefix = _prefill(decoder, prompts, lengths)

    def rank(blocked: Array | None) -> Found:
        beams = _search(decoder, index, prefix, beam, k, blocked)
        # NaN passes on purpose: the caller shall see that the weights are broken.
        live = beams.score != -jnp.inf
        return Found(_fill(index.item[beams.state], k, live, -1), _fill(beams.score, k, live, -jnp.inf))

    masked = None
    if exclude is not None:
        users = jnp.arange(prompts.shape[0])[:, None]
        blocked = jnp.zeros((prompts.shape[0], index.n_items + 1), bool)
        blocked = blocked.at[users, jnp.where(exclude < 0, index.n_items, exclude)].set(True)
        masked = rank(blocked.at[:, index.n_items].set(False))
    return masked, rank(None) if both or exclude is None else None


@partial(jax.jit, static_argnames=("graphdef", "k", "beam"))
def free_search(
    graphdef: Any, state: Any, space: AllTokens, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], *, k: int, beam: int
) -> tuple[Int[Array, "B K L"], Float[Array, "B K"]]:
    """The same beam search with no catalogue: what the model writes by itself.

    Returns: token ids [B, K, L] (-1 after the end, and throughout where no sequence is), log-probabilities [B, K].
    """
    decoder = nnx.merge(graphdef, state)
    beams = _search(decoder, space, _prefill(decoder, prompts, lengths), beam, k, None)
    live = beams.score != -jnp.inf
    return _fill(beams.written, k, live[..., None], -1), _fill(beams.score, k, live, -jnp.inf)
