"""Choosers that give varied lists: sampling without replacement, and diverse beam groups.

Shapes: B users, W beams, K candidate slots of a beam, C codes of a level, G groups.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sftrec_jax.decode.choose import Candidates, top_places
from sftrec_jax.decode.levels import Leaf
from sftrec_jax.decode.normaliser import log_z


class Perturbed(NamedTuple):
    """Of each beam its log-probability under the sampled distribution, and that perturbed by Gumbel noise."""

    log_prob: Float[Array, "B W"]
    gumbel: Float[Array, "B W"]


@partial(jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=[])
@dataclass(frozen=True)
class Gumbel:
    """Items drawn one after the other without replacement, by Gumbel-top-k over the tree (Kool et al. 2019, "Stochastic Beams").

    The distribution is that of writing an item token by token, each drawn by the model's probabilities among those that may
    follow (and are not pruned). The beam gives exactly the first W draws, however narrow. Temperature is 1.
    """

    keys: Leaf
    """One random key for each user, [B]."""

    def beams(self, width: int, bound: int) -> int:
        """See Chooser."""
        return min(width, bound)

    def start(self, users: int) -> Perturbed:
        """See Chooser."""
        nothing = jnp.zeros((users, 1), jnp.float32)
        return Perturbed(nothing, nothing)

    def choose(self, candidates: Candidates, carried: Perturbed, width: int) -> tuple[Int[Array, "B new"], Perturbed]:
        """See Chooser."""
        scores, valid = candidates.scores, candidates.valid & (candidates.scores > -jnp.inf)
        b, w, k = scores.shape
        parent, above = (x[..., None] for x in carried)
        logits = jnp.where(valid, candidates.logits, -jnp.inf)
        log_prob = jnp.where(valid, parent + log_z(logits).log_prob(logits), -jnp.inf)
        # One number for each code, whatever the slot it stands in: all layouts draw the same items.
        keys = jax.vmap(lambda key: jax.random.fold_in(key, candidates.level))(self.keys)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (w, candidates.codes)))(keys)
        if candidates.code is not None:
            noise = jnp.take_along_axis(noise, candidates.code, axis=2)
        elif k > candidates.codes:
            noise = jnp.pad(noise, ((0, 0), (0, 0), (0, k - candidates.codes)))
        free = jnp.where(valid, log_prob + noise, -jnp.inf)
        largest = jnp.max(free, axis=-1, keepdims=True)
        # Given that the largest of the children's is the parent's (appendix B.3 there).
        gap = jnp.where(valid, free - largest, -1.0)
        v = above - free + jnp.log1p(-jnp.exp(gap))
        bound = above - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
        gumbel = jnp.where(valid, jnp.where(gap >= 0, above, bound), -jnp.inf)
        value, places = top_places(gumbel, width)
        return places, Perturbed(jnp.take_along_axis(log_prob.reshape(b, -1), places, axis=1), value)


@partial(jax.tree_util.register_dataclass, data_fields=["penalty"], meta_fields=["groups"])
@dataclass(frozen=True)
class Diverse:
    """Beams in groups, each of which avoids the tokens that earlier groups took at the same level.

    Diverse beam search (Vijayakumar et al. 2018) with Hamming diversity: a group ranks by score less `penalty` times the
    number of beams of earlier groups that took the same token. Codes that ended take none, and tokens from which on no code
    of the catalogue has a choice do not count. In the end a group cannot take an item that an earlier one took. The width is
    divided by the number of groups, rounded down. Items found stand in the order of their scores.
    """

    penalty: Leaf
    """float32 [], in units of log-probability."""
    groups: int

    def beams(self, width: int, bound: int) -> int:
        """See Chooser."""
        return self.groups * min(width // self.groups, bound)

    def start(self, users: int) -> Int[Array, "B 1"]:
        """The group of each beam; the first level's only parent belongs to all (-1)."""
        return jnp.full((users, 1), -1, jnp.int32)

    def choose(
        self, candidates: Candidates, carried: Int[Array, "B W"], width: int
    ) -> tuple[Int[Array, "B new"], Int[Array, "B new"]]:
        """See Chooser."""
        scores = candidates.scores
        b, _, k = scores.shape
        each, none = width // self.groups, max(k, candidates.codes)
        group = carried[..., None]
        slots = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), scores.shape)
        code = slots if candidates.code is None else candidates.code
        if candidates.ended is not None:
            code = jnp.where(candidates.ended[..., None], none, code)
        states = jnp.broadcast_to(candidates.state[..., None], scores.shape)
        taken, free, users = jnp.zeros((b, none + 1), jnp.float32), scores, jnp.arange(b)[:, None]
        out = []
        for number in range(self.groups):
            own = jnp.where((group == number) | (group < 0), free, -jnp.inf)
            value, places = top_places(own - self.penalty * taken[users[..., None], code], each)
            live = value != -jnp.inf  # NaN passes
            out.append(jnp.where(live, places, -1))

            def pick(values: Array, places: Array = places) -> Array:
                return jnp.take_along_axis(values.reshape(b, -1), places, axis=1)

            taken = taken.at[users, pick(code)].add(jnp.where(live, 1.0, 0.0)).at[:, none].set(0.0)
            if candidates.last:
                same = (states[..., None] == pick(states)[:, None, None]) & (slots[..., None] == pick(slots)[:, None, None])
                free = jnp.where((same & live[:, None, None]).any(-1), -jnp.inf, free)
        chosen = jnp.concatenate(out, axis=1)
        groups = jnp.broadcast_to(jnp.repeat(jnp.arange(self.groups, dtype=jnp.int32), each), chosen.shape)
        if candidates.last:
            value = jnp.take_along_axis(scores.reshape(b, -1), jnp.maximum(chosen, 0), axis=1)
            order = jnp.argsort(jnp.where(chosen < 0, jnp.inf, -value), axis=1, stable=True)
            chosen, groups = (jnp.take_along_axis(x, order, axis=1) for x in (chosen, groups))
        return chosen, groups
