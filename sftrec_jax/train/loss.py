"""Cross-entropy of target tokens only. Axes: B rows, T tokens, K targets, D model, C logit columns."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sftrec_jax.data.segments import PackedBatch
from sftrec_jax.model.decoder import Decoder

CHUNK_LOGITS = 1 << 27
"""Float32 logits held at once (0.5 GB); more targets than that are taken in chunks whose logits are recomputed."""


def target_loss(decoder: Decoder, batch: PackedBatch, dropout_key: Array | None = None) -> Float[Array, ""]:
    """Sum over targets of weight times -log p(label | what precedes it in its segment), float32.

    Hidden states are gathered at `target_positions` before the head, so prompt tokens never meet the vocabulary.
    """
    hidden = decoder.packed_hidden(batch, dropout_key)
    at_targets = jnp.take_along_axis(hidden, batch.target_positions[:, :, None], axis=1)
    flat = at_targets.reshape(-1, hidden.shape[-1])
    labels = decoder.head.column_of()[batch.labels.reshape(-1)]
    return weighted_cross_entropy(decoder, flat, labels, jnp.asarray(batch.weights).reshape(-1))


def weighted_cross_entropy(
    decoder: Decoder, hidden: Float[Array, "M D"], columns: Array, weights: Float[Array, "M"], chunk_logits: int = CHUNK_LOGITS
) -> Float[Array, ""]:
    """Sum of weights times cross-entropy; in chunks of targets where M times C exceeds `chunk_logits`."""

    def part(hidden: Array, columns: Array, weights: Array) -> Array:
        logits = decoder.logits(hidden)
        label_logits = jnp.take_along_axis(logits, columns[:, None], axis=1)[:, 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - label_logits
        return jnp.sum(jnp.where(weights > 0, losses * weights, 0.0))

    width = decoder.head.vocab_size + len(decoder.head.row_ids)
    size = max(1, chunk_logits // width)
    count = hidden.shape[0]
    if count <= size:
        return part(hidden, columns, weights)
    pad = -count % size
    parts = (
        jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[1]),
        jnp.pad(columns, (0, pad)).reshape(-1, size),
        jnp.pad(weights, (0, pad)).reshape(-1, size),
    )
    body = jax.checkpoint(lambda total, chunk: (total + part(*chunk), None))
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), parts)[0]
