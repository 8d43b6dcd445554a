"""Beam search as one jitted program: prompts run once per user, beams keep only their own few tokens.

Scores are float32 log-probabilities, normalised as `normaliser.py` says, -inf for beams that do not exist. Shapes: B users,
P prompt, S shared prompt, W beams, K candidate slots of a beam, L levels, C codes of a level, H pruned nodes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sftrec_jax.decode.choose import Best, Candidates, Chooser
from sftrec_jax.decode.index import CatalogueIndex
from sftrec_jax.decode.levels import Leaf, Offer
from sftrec_jax.decode.normaliser import LogZ, Normaliser, level_logits, log_z, prefix_log_z, rows_of
from sftrec_jax.decode.prefix import Prefix, Shared, extend, prefill, reorder
from sftrec_jax.decode.pruning import Pruned
from sftrec_jax.decode.tree import UNROLL_ALL, UNROLL_FIRST
from sftrec_jax.model.decoder import Decoder


class Found(NamedTuple):
    """Final states (see `CatalogueIndex`; `leaf_of` turns them into codes), best first."""

    states: Int[Array, "B K"]
    scores: Float[Array, "B K"]
    """-inf: none."""


class Beams(NamedTuple):
    """The beams of each user. `state` is the position in the search space, `token` the newest token."""

    score: Float[Array, "B W"]
    state: Int[Array, "B W"]
    token: Int[Array, "B W"]
    written: Int[Array, "B W L"] | None
    """All tokens, where the search space does not know them from the state."""


@partial(jax.tree_util.register_dataclass, data_fields=["tokens", "every"], meta_fields=["length", "terminator"])
@dataclass(frozen=True)
class AllTokens:
    """The search space without a catalogue: any token, up to L of them or the terminator. State 0 goes on, 1 has ended."""

    tokens: tuple[Leaf]
    """int32 [C]. All token ids, ascending."""
    every: Leaf
    """The same."""
    length: int
    """L."""
    terminator: int
    """Token that ends a sequence, -1 for none."""

    forced = 2**31 - 1
    ragged = True

    @property
    def fanout(self) -> tuple[int, ...]:
        """See CatalogueIndex."""
        return (self.tokens[0].shape[0],) * self.length

    @property
    def frontier(self) -> tuple[int, ...]:
        """See CatalogueIndex; unbounded here."""
        return (2**31 - 1,) * self.length

    def offer(self, span: int, state: Int[Array, "B W"]) -> tuple[*Offer, Bool[Array, "B W"]]:
        """See CatalogueIndex.offer."""
        ended, slots = state == 1, self.tokens[0].shape[0]
        return None, ~ended[..., None] | (jnp.arange(slots) == 0), ended

    def child(
        self, span: int, state: Int[Array, "B W"], slot: Int[Array, "B W"], ended: Bool[Array, "B W"] | None
    ) -> Int[Array, "B W"]:
        """See CatalogueIndex.child."""
        return ((state == 1) | (self.tokens[0][slot] == self.terminator)).astype(jnp.int32)

    def has_ended(self, span: int, state: Int[Array, "B W"]) -> Bool[Array, "B W"]:
        """See CatalogueIndex."""
        return state == 1


Space = CatalogueIndex | AllTokens


def candidates(
    space: Space,
    span: int,
    beams: Beams,
    logits: Float[Array, "B W C"],
    norm: LogZ | None,
    pruned: Pruned | None,
    level: int | Array,
    last: bool,
) -> Candidates:
    """All continuations of all beams, from the logits of the level's codes; `norm` None stands for `children`."""
    code, valid, ended = space.offer(span, beams.state)
    # A bitmap has slots beyond the last code.
    spare = valid.shape[-1] - logits.shape[-1] if code is None else 0
    wide = jnp.pad(logits, ((0, 0), (0, 0), (0, spare)), constant_values=-jnp.inf) if spare else logits
    chosen = wide if code is None else jnp.take_along_axis(logits, code, axis=2)
    norm = log_z(jnp.where(valid, chosen, -jnp.inf)) if norm is None else norm
    scores = beams.score[..., None] + norm.log_prob(chosen)
    if ended is not None:
        scores = jnp.where(ended[..., None], beams.score[..., None], scores)
        chosen = jnp.where(ended[..., None], 0.0, chosen)
    if pruned is not None and isinstance(space, CatalogueIndex):
        valid &= pruned.alive(*space.region(span), span, space.children(span, beams.state, ended))
    scores = jnp.where(valid, scores, -jnp.inf)
    return Candidates(scores, chosen, valid, code, ended, logits.shape[-1], beams.state, level, last)


def follow(
    space: Space, span: int, beams: Beams, found: Candidates, places: Int[Array, "B new"]
) -> tuple[Beams, Int[Array, "B new"]]:
    """The beams at the places that a chooser named, and the beam that each continues."""
    b, _, k = found.scores.shape
    none, places = places < 0, jnp.maximum(places, 0)
    parent, slot = places // k, places % k

    def pick(values: Array) -> Array:
        return jnp.take_along_axis(values.reshape(b, -1), places, axis=1)

    state = jnp.take_along_axis(beams.state, parent, axis=1)
    stays = None if found.ended is None else jnp.take_along_axis(found.ended, parent, axis=1)
    token = space.tokens[span][slot if found.code is None else pick(found.code)]
    written = beams.written
    if written is not None and stays is not None:
        written = jnp.take_along_axis(written, parent[..., None], axis=1)
        written = lax.dynamic_update_index_in_dim(written, jnp.where(stays, -1, token), found.level, 2)
    score = jnp.where(none, -jnp.inf, pick(found.scores))
    return Beams(score, space.child(span, state, slot, stays), token, written), parent


class Search(NamedTuple):
    """What stays the same through a search."""

    decoder: Decoder
    space: Space
    prefix: Prefix
    chooser: Chooser
    pruned: Pruned | None
    normaliser: Normaliser
    tables: tuple[Array, ...]
    """Head rows of each span's tokens."""

    def step(
        self, beams: Beams, carried: Any, hidden: Array, level: int | Array, width: int, last: bool
    ) -> tuple[Beams, Any, Int[Array, "B new"]]:
        """One level: the chosen continuations, what the chooser carries, and the beam that each continues."""
        space = self.space
        span = min(level, len(space.tokens) - 1) if isinstance(level, int) else len(space.tokens) - 1
        logits = level_logits(self.decoder.head, hidden, space.tokens[span], self.tables[span])
        norm = prefix_log_z(self.normaliser, self.decoder, hidden, logits, space.every)
        # What comes after differs by layout; fused with it, sums would be rounded differently.
        logits, norm = lax.optimization_barrier((logits, norm))
        found = candidates(space, span, beams, logits, norm, self.pruned, level, last)
        places, carried = self.chooser.choose(found, carried, width)
        beams, parent = follow(space, span, beams, found, places)
        return beams, carried, parent

    def finish_forced(self, beams: Beams, carried: Any, tail: Any, level: int, width: int) -> tuple[Beams, Any]:
        """The levels from `level` on, where no node has a choice, in one pass: the beams only gain scores."""
        space, state, codes, spans = self.space, beams.state, [], range(level, self.space.length)
        for span in spans:
            code, valid, _ = space.offer(span, state)
            slot = jnp.argmax(valid, axis=-1).astype(jnp.int32)
            codes.append(slot if code is None else jnp.take_along_axis(code, slot[..., None], axis=2)[..., 0])
            state = space.child(span, state, slot, None)
        score = beams.score
        if self.normaliser != "children":  # there a forced token has log-probability 0
            tokens = [beams.token, *(space.tokens[s][c] for s, c in zip(spans[:-1], codes[:-1], strict=True))]
            hidden, _ = extend(self.decoder, self.prefix, jnp.stack(tokens, axis=-1), tail)
            for at, (span, code) in enumerate(zip(spans, codes, strict=True)):
                here = hidden[:, :, at]
                logits = level_logits(self.decoder.head, here, space.tokens[span], self.tables[span])
                norm = prefix_log_z(self.normaliser, self.decoder, here, logits, space.every)
                assert norm is not None
                score = score + norm.log_prob(jnp.take_along_axis(logits, code[..., None], axis=2))[..., 0]
        return self.finish(Beams(score, state, beams.token, None), carried, level, width)

    def finish(self, beams: Beams, carried: Any, level: int | Array, width: int) -> tuple[Beams, Any]:
        """The best of beams that are complete."""
        x = beams.score[..., None]
        only = Candidates(x, jnp.zeros_like(x), x > -jnp.inf, None, None, 1, beams.state, level, True)
        places, carried = self.chooser.choose(only, carried, width)
        none, places = places < 0, jnp.maximum(places, 0)
        score, state, token = (jnp.take_along_axis(v, places, axis=1) for v in beams[:3])
        written = None if beams.written is None else jnp.take_along_axis(beams.written, places[..., None], axis=1)
        return Beams(jnp.where(none, -jnp.inf, score), state, token, written), carried


def search(
    decoder: Decoder,
    space: Space,
    prefix: Prefix,
    width: int,
    last_width: int,
    pruned: Pruned | None = None,
    normaliser: Normaliser = "full",
    chooser: Chooser | None = None,
) -> tuple[Beams, Any]:
    """The best `last_width` complete beams, fewer where fewer can exist, in falling order; and what the chooser carries.

    `width` beams are kept between levels.
    """
    b, levels = prefix.hidden.shape[0], space.length
    chooser = Best() if chooser is None else chooser
    tables = tuple(rows_of(decoder.head, prefix.hidden, tokens) for tokens in space.tokens)
    this = Search(decoder, space, prefix, chooser, pruned, normaliser, tables)
    unrolled = levels if levels <= UNROLL_ALL else UNROLL_FIRST
    root = jnp.zeros((b, 1), jnp.int32)
    written = jnp.full((b, 1, levels), -1, jnp.int32) if isinstance(space, AllTokens) else None
    beams, carried = Beams(jnp.zeros((b, 1), jnp.float32), root, root, written), chooser.start(b)
    hidden, tail = prefix.hidden, prefix.empty_tail(1, 0)
    for level in range(unrolled):
        if level and level >= space.forced:
            size = chooser.beams(last_width, beams.score.shape[1])
            return this.finish_forced(beams, carried, tail, level, size)
        if level:
            hidden, tail = extend(decoder, prefix, beams.token[..., None], tail)
            hidden = hidden[:, :, 0]
        last = level == levels - 1
        # Never more beams than nodes: no duplicates and no filler, and top_k always finds enough entries.
        most = min(space.frontier[level], beams.score.shape[1] * space.fanout[level])
        size = chooser.beams(last_width if last else width, most)
        beams, carried, parent = this.step(beams, carried, hidden, level, size, last)
        tail = reorder(tail, parent)
    if unrolled == levels:
        return beams, carried

    width = chooser.beams(width, space.frontier[-1])
    score = _widen(beams.score, width, -jnp.inf)
    written = None if beams.written is None else _widen(beams.written, width, -1)
    beams = Beams(score, _widen(beams.state, width, 0), _widen(beams.token, width, 0), written)
    carried = jax.tree.map(lambda x: _widen(x, width, 0) if x.ndim > 1 else x, carried)
    rest = prefix.empty_tail(width, levels - unrolled)
    tail = tuple(
        jnp.concatenate([jax.vmap(lambda t: _widen(t, width, 0))(old), new], axis=3) for old, new in zip(tail, rest, strict=True)
    )

    def going(carry: tuple[Array, Beams, Any, Any]) -> Array:
        level, beams, *_ = carry
        return (level < levels) & jnp.any(~space.has_ended(len(space.tokens) - 1, beams.state) & (beams.score > -jnp.inf))

    def step(carry: tuple[Array, Beams, Any, Any]) -> tuple[Array, Beams, Any, Any]:
        level, beams, carried, tail = carry
        hidden, tail = extend(decoder, prefix, beams.token[..., None], tail, level - 1)
        beams, carried, parent = this.step(beams, carried, hidden[:, :, 0], level, width, False)
        return level + 1, beams, carried, reorder(tail, parent)

    level, beams, carried, _ = lax.while_loop(going, step, (jnp.int32(unrolled), beams, carried, tail))
    return this.finish(beams, carried, level, chooser.beams(last_width, width))


def _widen(values: Array, width: int, fill: int | float) -> Array:
    """Pads axis 1 to `width`."""
    missing = width - values.shape[1]
    return jnp.pad(values, [(0, 0), (0, missing)] + [(0, 0)] * (values.ndim - 2), constant_values=fill)


def first_live(values: Array, k: int, live: Array, nothing: int | float) -> Array:
    """Values of the first k live beams, then `nothing`."""
    return _widen(jnp.where(live, values, nothing)[:, :k], k, nothing)


@partial(jax.jit, static_argnames=("graphdef", "k", "beam", "both", "normaliser"))
def recommend(
    graphdef: Any,
    state: Any,
    index: CatalogueIndex,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    shared: Shared | None,
    pruned: Pruned | None,
    chooser: Chooser | None = None,
    *,
    k: int,
    beam: int,
    both: bool = False,
    normaliser: Normaliser = "full",
) -> tuple[Found | None, Found | None, Any]:
    """Ranks items after each prompt.

    Args:
        graphdef, state: `nnx.split` of a Decoder.
        prompts: token ids after those of `shared`, filled up at the right with any token; `lengths` (at least 1) says how
            many are real.
        pruned: parts of the catalogue that the first result leaves out, as if it lacked them; None leaves that result out.
        k: items returned, at most `beam` unless codes have one token.
        beam: W, beams kept between levels.
        both: also rank without `pruned`, from the same pass over the prompts.

    Returns: ranking with `pruned` or None, ranking without it or None, what the chooser of the last search carries.
    """
    decoder = nnx.merge(graphdef, state)
    prefix = prefill(decoder, prompts, lengths, shared)

    def rank(pruned: Pruned | None) -> tuple[Found, Any]:
        beams, carried = search(decoder, index, prefix, beam, k, pruned, normaliser, chooser)
        # NaN passes on purpose: the caller shall see that the weights are broken.
        live = beams.score != -jnp.inf
        return Found(first_live(beams.state, k, live, 0), first_live(beams.score, k, live, -jnp.inf)), carried

    masked, carried = (None, None) if pruned is None else rank(pruned)
    if pruned is not None and not both:
        return masked, None, carried
    return masked, *rank(None)


@partial(jax.jit, static_argnames=("graphdef", "k", "beam"))
def free_search(
    graphdef: Any,
    state: Any,
    space: AllTokens,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    shared: Shared | None,
    *,
    k: int,
    beam: int,
) -> tuple[Int[Array, "B K L"], Float[Array, "B K"]]:
    """The same beam search with no catalogue: what the model writes by itself.

    Returns: token ids [B, K, L] (-1 after the end, and throughout where no sequence is), log-probabilities [B, K].
    """
    decoder = nnx.merge(graphdef, state)
    beams, _ = search(decoder, space, prefill(decoder, prompts, lengths, shared), beam, k)
    live = beams.score != -jnp.inf
    assert beams.written is not None
    return first_live(beams.written, k, live[..., None], -1), first_live(beams.score, k, live, -jnp.inf)
