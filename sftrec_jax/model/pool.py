"""Text vectors from the language model itself: the mean of its last hidden states."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from sftrec_jax.distributed import place, to_host
from sftrec_jax.model.attention import attend, first_seen
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.sharding import BATCH

FEW_BATCHES = 3
"""A width with fewer batches joins the next wider one: padding them costs less than compiling for them."""

Progress = Callable[[int], None]
"""Called with the number of texts just finished."""


def mean_pooled(
    decoder: Decoder,
    texts: Sequence[np.ndarray],
    mesh: Mesh,
    tokens_per_batch: int = 4096,
    progress: Progress | None = None,
) -> np.ndarray:
    """Mean over the tokens of each text of the hidden states after the final norm, under causal attention.

    Args:
        decoder: its parameters stay where they are, on `mesh`.
        texts: n arrays int32 of token ids. Longer ones than the model's context are cut there.
        mesh: rows of a batch are divided over its axes data and fsdp.
        tokens_per_batch: tokens in one forward pass, padding counted; at least one row a device whatever this says.

    Returns: float32 [n, D], not scaled; zeros for texts without tokens.
    """
    lengths = np.minimum([len(text) for text in texts], decoder.arch.context).astype(np.int64)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    over_rows = NamedSharding(mesh, BATCH)
    graphdef, state = nnx.split(decoder)
    out = np.zeros((len(texts), decoder.arch.hidden_size), np.float32)

    def finish(rows: np.ndarray, pooled: jax.Array) -> None:
        out[rows] = to_host(pooled)[: len(rows)]
        if progress is not None:
            progress(len(rows))

    # The next batch is launched before the results of the last are waited for.
    waiting: tuple[np.ndarray, jax.Array] | None = None
    for rows, size, width in _batches(lengths, tokens_per_batch, devices):
        tokens, counts = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        for at, row in enumerate(rows):
            counts[at] = lengths[row]
            tokens[at, : counts[at]] = texts[row][: counts[at]]
        launched = rows, _pool(graphdef, state, *place((tokens, counts), over_rows))
        if waiting is not None:
            finish(*waiting)
        waiting = launched
    if waiting is not None:
        finish(*waiting)
    return out


@partial(jax.jit, static_argnames="graphdef")
def _pool(graphdef: Any, state: Any, tokens: Int[Array, "B T"], counts: Int[Array, "B"]) -> Float[Array, "B D"]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # Padding stands to the right, so the causal mask already hides it from every real token.
    causal = positions[:, :, None] >= positions[:, None, :]

    decoder: Decoder = nnx.merge(graphdef, state)

    def masked(query: Array, key: Array, value: Array, cache: None, window: Array | None) -> tuple[Array, None]:
        seen = causal
        if window is not None:
            seen &= positions[:, None, :] >= first_seen(positions, window)[:, :, None]
        return attend(query, key, value, seen, decoder.arch.softcap), None

    hidden, _ = decoder.hidden(tokens, positions, masked)
    real = positions < counts[:, None]
    total = jnp.sum(jnp.where(real[..., None], hidden.astype(jnp.float32), 0.0), axis=1)
    return total / jnp.maximum(counts, 1)[:, None]


def _batches(lengths: np.ndarray, tokens_per_batch: int, multiple: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Texts with tokens, widest first, as (rows int64 [at most size], size, width); `multiple` divides each size.

    Widths are 16, 24, 32, 48, 64, 96, ... or the longest text; every width has one size, since each pair is compiled.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    if not len(order):
        return
    longest = int(lengths.max())
    steps = [16 * 2**i for i in range(longest.bit_length())]
    ladder = np.asarray(sorted([*steps, *(step * 3 // 2 for step in steps)]))
    wanted = np.minimum(ladder[np.searchsorted(ladder, lengths[order])], longest)
    most = -(-len(order) // multiple) * multiple

    def size(width: int) -> int:
        return min(most, max(multiple, tokens_per_batch // width // multiple * multiple))

    width, used, begin = int(wanted[0]), 0, 0
    while begin < len(order):
        narrower = int(wanted[begin])
        many = (wanted == narrower).sum() >= FEW_BATCHES * size(narrower)
        if narrower < width and used >= FEW_BATCHES and many:
            width, used = narrower, 0
        yield order[begin : begin + size(width)], size(width), width
        begin, used = begin + size(width), used + 1
