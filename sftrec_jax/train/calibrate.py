"""A first value for what all new token rows have in common: as much probability for items as for text."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sftrec_jax.data.segments import PackedBatch
from sftrec_jax.model.decoder import Decoder


@partial(jax.jit, static_argnames=("graphdef", "new"))
def row_shift(graphdef: nnx.GraphDef, state: nnx.State, batch: PackedBatch, new: int | None = None) -> Float[Array, "D"]:
    """A vector that, added to every new row of the head, raises item logits until items and text share the probability.

    A pretrained model expects text, so new tokens start some 20 to 50 nats behind, and dozens of steps would only move
    mass from text to items. The shift lies along the mean hidden state at target positions, like the bias by which a
    classifier starts at the class prior (Lin et al. 2017), and changes no difference between two items there.
    """
    decoder: Decoder = nnx.merge(graphdef, state)
    hidden = jnp.take_along_axis(decoder.packed_hidden(batch), batch.target_positions[:, :, None], axis=1)
    weight = (batch.weights > 0).reshape(-1, 1).astype(jnp.float32)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    logits = decoder.logits(hidden)
    split = decoder.head.vocab_size
    end = logits.shape[-1] if new is None else split + new
    text = jax.nn.logsumexp(logits[:, :split], -1)
    if end < logits.shape[-1]:
        text = jnp.logaddexp(text, jax.nn.logsumexp(logits[:, end:], -1))
    behind = text - jax.nn.logsumexp(logits[:, split:end], -1)
    total = jnp.maximum(weight.sum(), 1.0)
    mean = (hidden.astype(jnp.float32) * weight).sum(0) / total
    return mean * ((behind[:, None] * weight).sum() / total / (mean @ mean))


def calibrate(decoder: Decoder, batch: PackedBatch, new: int | None = None) -> float:
    """Adds `row_shift` to the rows of the head in place, or to the first `new` (those of items; then come tokens of the base);
    returns its length relative to their mean length.
    """
    rows = decoder.head.rows
    new = rows[...].shape[0] if new is None else new
    shift = row_shift(*nnx.split(decoder), batch, new)
    length = jnp.linalg.norm(rows[:new], axis=1).mean()
    rows.set_value(jax.jit(lambda rows, shift: rows.at[:new].add(shift), out_shardings=rows[...].sharding)(rows[...], shift))
    return float(jnp.linalg.norm(shift) / length)
