"""Cross-entropy of target tokens only, whose gradient is computed beside it.

Axes: B rows, T tokens, K targets, D model, C logit columns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sftrec_jax.data.segments import PackedBatch
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.mesh import platform_of
from sftrec_jax.model.sharding import laid_out, ways
from sftrec_jax.model.token_table import TokenTable

CHUNK_LOGITS = {"cpu": 1 << 24}
"""Float32 logits held at once, by backend and device."""
ELSE_LOGITS = 1 << 27
"""On all others (0.5 GB)."""
Logits = Callable[[list[Array], Array], Array]
"""(parameters of the head, hidden states [..., D]) -> float32 [..., C]"""


def target_loss(decoder: Decoder, batch: PackedBatch, dropout_key: Array | None = None) -> Float[Array, ""]:
    """Sum over targets of weight times -log p(label | what precedes it in its segment), float32.

    Hidden states are gathered at `target_positions` before the head, so prompt tokens never meet the vocabulary.
    """
    return loss_and_finite(decoder, batch, dropout_key)[0]


def loss_and_finite(
    decoder: Decoder, batch: PackedBatch, dropout_key: Array | None = None
) -> tuple[Float[Array, ""], Bool[Array, " B"]]:
    """`target_loss`, and of each row whether the hidden states at its targets are finite."""
    hidden = decoder.packed_hidden(batch, dropout_key)
    at_targets = jnp.take_along_axis(hidden, batch.target_positions[:, :, None], axis=1)
    devices = 1 if decoder.mesh is None else ways(decoder.mesh, "batch")
    at_targets = laid_out(at_targets, decoder.mesh, "batch", None, None)
    logits = CHUNK_LOGITS.get(platform_of(decoder.mesh), ELSE_LOGITS) * devices
    weights = jnp.asarray(batch.weights)
    if decoder.levels:
        loss = level_cross_entropy(decoder.head, decoder.levels, at_targets, jnp.asarray(batch.labels), weights, logits)
    else:
        loss = weighted_cross_entropy(decoder, at_targets, jnp.asarray(batch.labels), weights, logits)
    finite = jnp.all(jnp.isfinite(jnp.sum(at_targets.astype(jnp.float32), axis=-1)) | (weights == 0), axis=-1)
    return loss, finite


def weighted_cross_entropy(
    decoder: Decoder, hidden: Float[Array, "B K D"], labels: Int[Array, "B K"], weights: Float[Array, "B K"], chunk_logits: int
) -> Float[Array, ""]:
    """Sum of weights times cross-entropy, some targets of each row at a time, so that no more than `chunk_logits` logits exist.

    Gradients are computed with the logits, as Liger Kernel does (Hsu et al. 2024, arXiv:2410.10989), so that nothing as wide
    as the vocabulary is kept or computed again. A chunk without a weighted target is passed over.
    """
    head = decoder.head
    graphdef, table = nnx.split(head)
    leaves, structure = jax.tree.flatten(table)

    def logits(leaves: list[Array], hidden: Array) -> Array:
        return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves)).logits(hidden)

    width = head.vocab_size + len(head.row_ids)
    return _in_chunks(logits, leaves, hidden, head.column_of()[labels], weights, width, chunk_logits)


def level_cross_entropy(
    head: TokenTable,
    levels: tuple[tuple[int, int], ...],
    hidden: Float[Array, "B K D"],
    labels: Int[Array, "B K"],
    weights: Float[Array, "B K"],
    chunk_logits: int,
) -> Float[Array, ""]:
    """The same, each target's probability taken over the rows of its own place (see `Build.levels`) alone.

    The targets of a row are whole items, so each place has as many of them: they are brought together by place, and every
    place needs its own columns of the head only.
    """
    row_of = head.column_of()[labels] - head.vocab_size
    place = jnp.searchsorted(jnp.asarray([end for _, end in levels]), row_of, side="right", method="compare_all")
    place = jnp.where(weights > 0, place, len(levels))
    order = jnp.argsort(place, axis=1, stable=True)
    most = labels.shape[1] // len(levels)
    total = jnp.zeros((), jnp.float32)
    for number, (begin, end) in enumerate(levels):
        count = jnp.sum(place == number, axis=1, keepdims=True)
        first = jnp.sum(place < number, axis=1, keepdims=True)
        at = jnp.arange(most)[None]
        chosen = jnp.take_along_axis(order, jnp.minimum(first + at, labels.shape[1] - 1), axis=1)
        own = jnp.take_along_axis(weights, chosen, axis=1) * (at < count)
        columns = jnp.clip(jnp.take_along_axis(row_of, chosen, axis=1) - begin, 0, end - begin - 1)
        states = jnp.take_along_axis(hidden, chosen[..., None], axis=1)

        def logits(leaves: list[Array], hidden: Array) -> Array:
            table = leaves[0].astype(hidden.dtype)
            return head.capped(jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32))

        total += _in_chunks(logits, [head.rows[...][begin:end]], states, columns, own, end - begin, chunk_logits)
    return total


def _in_chunks(
    logits: Logits, leaves: list[Array], hidden: Array, columns: Array, weights: Array, width: int, chunk_logits: int
) -> Float[Array, ""]:
    """Targets [B, K] whose head has `width` columns, some of each row at a time."""
    rows, targets = columns.shape
    count = -(-targets * rows * width // chunk_logits)
    size = -(-targets // min(count, targets))
    count = -(-targets // size)

    def chunks(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, count * size - targets), *([(0, 0)] * (x.ndim - 2))))
        return jnp.moveaxis(padded.reshape(rows, count, size, *x.shape[2:]), 1, 0)

    loss: Array = _chunked(logits, leaves, chunks(hidden), chunks(columns), chunks(weights))
    return loss


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(logits: Logits, leaves: list[Array], hidden: Array, columns: Array, weights: Array) -> Array:
    """Sum over chunks, the leading axis of the arrays; logits of a chunk are `logits(leaves, hidden)`."""
    return _with_gradients(logits, leaves, [False] * len(leaves), hidden, columns, weights)[0]


def _with_gradients(
    logits: Logits, leaves: list[Array], moving: list[bool], hidden: Array, columns: Array, weights: Array
) -> tuple[Array, list[Array], Array]:
    """The loss, its gradients by those leaves that are `moving`, and by the hidden states."""
    wanted = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]

    def scores_of(wanted: list[Array], hidden: Array) -> Array:
        ours = iter(wanted)
        return logits([next(ours) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)], hidden)

    def work(hidden: Array, columns: Array, weights: Array) -> tuple[Array, list[Array], Array]:
        scores, pull = jax.vjp(scores_of, wanted, hidden)
        own = jnp.take_along_axis(scores, columns[..., None], axis=-1)
        total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        loss = jnp.sum(jnp.where(weights > 0, (total - own)[..., 0] * weights, 0.0))
        hit = jnp.arange(scores.shape[-1]) == columns[..., None]
        return loss, *pull((jnp.exp(scores - total) - hit) * weights[..., None])

    def skip(hidden: Array, *_: Array) -> tuple[Array, list[Array], Array]:
        return jnp.zeros((), jnp.float32), [jnp.zeros_like(leaf) for leaf in wanted], jnp.zeros_like(hidden)

    def add(carry: tuple[Array, list[Array]], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, list[Array]], Array]:
        *sums, of_hidden = jax.lax.cond(jnp.any(chunk[2] > 0), work, skip, *chunk)
        loss, gradients = jax.tree.map(jnp.add, carry, tuple(sums))
        return (loss, gradients), of_hidden

    start = jnp.zeros((), jnp.float32), [jnp.zeros_like(leaf) for leaf in wanted]
    (loss, gradients), of_hidden = jax.lax.scan(add, start, (hidden, columns, weights))
    return loss, gradients, of_hidden


def _forward(logits: Logits, leaves: Any, hidden: Any, columns: Any, weights: Any) -> tuple[Array, tuple[Any, ...]]:
    """Arguments say whether they are differentiated."""
    moving = [leaf.perturbed for leaf in leaves]
    values = [leaf.value for leaf in leaves]
    loss, gradients, of_hidden = _with_gradients(logits, values, moving, hidden.value, columns.value, weights.value)
    ours = iter(gradients)
    return loss, ([next(ours) if moves else None for moves in moving], of_hidden)


def _backward(logits: Logits, saved: tuple[Any, ...], of_loss: Any) -> tuple[Any, ...]:
    of_leaves, of_hidden = jax.tree.map(lambda x: (x * of_loss).astype(x.dtype), saved)
    return of_leaves, of_hidden, None, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)
