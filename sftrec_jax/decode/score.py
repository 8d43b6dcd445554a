"""Log-probabilities of given items, without a search."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sftrec_jax.decode.normaliser import full_log_z
from sftrec_jax.decode.prefix import Shared, extend, prefill


@partial(jax.jit, static_argnames="graphdef")
def log_probabilities(
    graphdef: Any,
    state: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    shared: Shared | None,
    codes: Int[Array, "B K L"],
) -> Float[Array, "B K"]:
    """log p(tokens | prompt) over all logit columns, for K sequences of tokens (-1 after the end) of each prompt.

    See `recommend` for the prompts. A sequence without tokens has -inf.
    """
    decoder = nnx.merge(graphdef, state)
    prefix = prefill(decoder, prompts, lengths, shared)
    b, k, length = codes.shape
    hidden = jnp.broadcast_to(prefix.hidden[:, :, None], (b, k, 1, prefix.hidden.shape[-1]))
    if length > 1:
        later, _ = extend(decoder, prefix, jnp.maximum(codes[..., :-1], 0), prefix.empty_tail(k, 0))
        hidden = jnp.concatenate([hidden, later], axis=2)
    norm = full_log_z(decoder, hidden.reshape(b, k * length, -1))
    rows = decoder.head.embed(jnp.maximum(codes, 0), hidden.dtype)
    logits = decoder.head.capped(jnp.einsum("bktd,bktd->bkt", hidden, rows, preferred_element_type=jnp.float32))
    each = norm.log_prob(logits.reshape(b, k * length, 1)).reshape(codes.shape)
    total = jnp.sum(jnp.where(codes >= 0, each, 0.0), axis=-1)
    return jnp.where(codes[..., 0] >= 0, total, -jnp.inf)
