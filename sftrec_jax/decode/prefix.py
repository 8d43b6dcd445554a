"""What the model computes during a search: the prompts once per user, then each beam's newest tokens.

Shapes: B users, P prompt, S tokens that all prompts begin with, W beams, T new tokens of a beam, L its tokens so far, D model;
layers stand first in caches, kv-heads and head-dim last.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sftrec_jax.model.attention import attend_beams, attend_causal, attend_to, first_seen
from sftrec_jax.model.decoder import Decoder

Shared = tuple[Float[Array, "layers S kv head"], Float[Array, "layers S kv head"]]
"""Keys and values of the tokens that all prompts begin with."""
Tail = tuple[Float[Array, "layers B _ _ kv head"], Float[Array, "layers B _ _ kv head"]]
"""Keys and values of the beams' own tokens."""


class Prefix(NamedTuple):
    """What the prompt leaves behind, shared by all beams of a user."""

    hidden: Float[Array, "B 1 D"]
    """Final hidden state of the prompt's last token."""
    key: Float[Array, "layers B P kv head"]
    value: Float[Array, "layers B P kv head"]
    lengths: Int[Array, "B"]
    """Tokens in `key`, without those of `shared`."""
    shared: Shared | None

    @property
    def positions(self) -> Int[Array, "B"]:
        """Position of the next token."""
        return self.lengths + (0 if self.shared is None else self.shared[0].shape[1])

    def empty_tail(self, width: int, length: int) -> Tail:
        """Room for `length` tokens of `width` beams."""
        layers, b, _, *heads = self.key.shape
        blank = jnp.zeros((layers, b, width, length, *heads), self.key.dtype)
        return blank, blank


def shared_prefix(decoder: Decoder, tokens: Int[Array, "S"]) -> Shared:
    """Keys and values of tokens that begin all prompts, computed once."""

    def attend(query: Array, key: Array, value: Array, cache: None, window: Array | None) -> Array:
        return attend_causal(query, key, value, None, window, decoder.arch.softcap)

    def last(query: Array, key: Array, value: Array, cache: None, window: Array | None) -> Array:
        return query  # nobody asks for the hidden state

    at = jnp.arange(len(tokens))[None]
    _, (key, value) = decoder.prefilled(tokens[None], at, at[:, -1], attend, last)
    return key[:, 0], value[:, 0]


def prefill(decoder: Decoder, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], shared: Shared | None) -> Prefix:
    """Runs the prompts, filled up at the right, after the tokens of `shared`."""
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    real = (positions < lengths[:, None])[:, None]
    offset = 0 if shared is None else shared[0].shape[1]

    softcap = decoder.arch.softcap

    def attend(query: Array, key: Array, value: Array, before: Any, window: Array | None) -> Array:
        # Padding stands to the right, so the causal mask already hides it from every real token.
        return attend_causal(query, key, value, before, window, softcap)

    def last(query: Array, key: Array, value: Array, before: Any, window: Array | None) -> Array:
        if window is None:
            return attend_to(query, [(key, value, real)], before, None, softcap)
        since = first_seen(lengths - 1 + offset, window)[:, None, None]
        seen = real & (jnp.arange(prompts.shape[1]) + offset >= since)
        return attend_to(query, [(key, value, seen)], before, jnp.arange(offset) >= since, softcap)

    hidden, (key, value) = decoder.prefilled(prompts, positions + offset, lengths - 1, attend, last, shared)
    return Prefix(hidden, key, value, lengths, shared)


def extend(
    decoder: Decoder, prefix: Prefix, tokens: Int[Array, "B W T"], tail: Tail, slot: Int[Array, ""] | None = None
) -> tuple[Float[Array, "B W T D"], Tail]:
    """Feeds each beam its newest tokens.

    Args:
        tail: grows by T entries; or, with `slot`, has room for all and the one token becomes entry `slot`.

    Returns: final hidden states of the new tokens, and the new tail.
    """
    b, w, t = tokens.shape
    old = tail[0].shape[3]
    begin = old if slot is None else slot
    new = begin + jnp.arange(t)
    tail_mask = jnp.arange(old + t if slot is None else old) <= new[:, None]
    prompt_at = jnp.arange(prefix.key.shape[2])
    prompt_mask = prompt_at < prefix.lengths[:, None]
    offset = 0 if prefix.shared is None else prefix.shared[0].shape[1]

    def masks(window: Array | None) -> tuple[Array, Array, Array | None]:
        """Of the tails, the prompts and the shared tokens."""
        if window is None:
            return tail_mask, prompt_mask, None
        own = jnp.arange(tail_mask.shape[1]) >= first_seen(new, window)[:, None]
        since = first_seen(prefix.positions[:, None] + new, window)[..., None]
        return tail_mask & own, prompt_mask[:, None] & (prompt_at + offset >= since), jnp.arange(offset) >= since

    def attend(query: Array, key: Array, value: Array, cache: Any, window: Array | None) -> tuple[Array, tuple[Array, Array]]:
        (prompt_key, prompt_value, *grown), before = cache
        for i, own in enumerate((key, value)):
            own = own.reshape(b, w, t, *own.shape[2:])
            if slot is None:
                grown[i] = jnp.concatenate([grown[i], own], axis=2)
            else:
                grown[i] = lax.dynamic_update_index_in_dim(grown[i], own[:, :, 0], slot, 2)
        query = query.reshape(b, w, t, *query.shape[2:])
        own, seen, before_mask = masks(window)
        prompt = prompt_key, prompt_value, seen
        mixed = attend_beams(query, prompt, grown[0], grown[1], own, before, before_mask, decoder.arch.softcap)
        return mixed.reshape(b, w * t, *mixed.shape[3:]), (grown[0], grown[1])

    positions = jnp.broadcast_to(prefix.positions[:, None, None] + new, tokens.shape).reshape(b, w * t)
    caches = (prefix.key, prefix.value, *tail), prefix.shared
    hidden, tail = decoder.hidden(tokens.reshape(b, w * t), positions, attend, caches, divided="users")
    return hidden.reshape(b, w, t, -1), tail


def reorder(tail: Tail, parent: Int[Array, "B W"]) -> Tail:
    """The tails of the beams that survived."""
    pick = jax.vmap(lambda t, p: jnp.take(t, p, axis=1, mode="clip"), in_axes=(1, 0), out_axes=1)
    return pick(tail[0], parent), pick(tail[1], parent)
