"""Attention in packed rows block by block, in plain XLA: cost by what is visible, memory by the row and not its square.

Online softmax and a backward pass that computes the weights again (Dao et al. 2022, arXiv:2205.14135). Blocks of keys that no
query of a block can see are not visited, so a row of many short segments costs little more than the segments by themselves.
Axes: B batch, T tokens, N heads, K kv-heads, H head-dim; G = N / K, and C tokens a block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sftrec_jax.model.attention import soft_capped, visible

Marks = tuple[Int[Array, "B T"], ...]
"""Positions, segments, branches, forks, as in `PackedBatch`, and in a sliding layer the first position that a token sees."""
HIDDEN = -1e30
"""Score of what is not visible. Finite: exp(-inf - -inf) is no number."""
LOWEST = HIDDEN / 2
"""Where a running maximum starts: so that weights are 0 in a block that hides every key."""


def block_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    marks: Marks,
    block: int = 64,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """`attend` with `packed_mask`, for rows in which a segment's tokens and a branch's stand together, none before one it sees,
    and each segment begins with its trunk, without a gap in its positions.

    Padding comes last; what it gives is finite, but may differ. Softmax and sums are float32. Rows are taken one by one: with a
    batch divided over devices, call it in `jax.shard_map`.
    """
    b, t, n, h = query.shape
    k = key.shape[2]
    short = -t % block
    pad = ((0, 0), (0, short), (0, 0), (0, 0))
    query, key, value = jnp.pad(query, pad), jnp.pad(key, pad), jnp.pad(value, pad)
    # Segment -1 is seen by itself alone.
    fills = (0, -1, 0, 1, 0)
    marks = tuple(jnp.pad(x, ((0, 0), (0, short)), constant_values=fill) for x, fill in zip(marks, fills, strict=False))
    grouped = query.reshape(b, t + short, k, n // k, h).transpose(0, 2, 3, 1, 4)
    out: Array = _attend(grouped, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), marks, block, softcap)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t + short, n, h)[:, :t]


def visible_blocks(marks: Marks, block: int) -> Bool[Array, "B Q C"]:
    """Which blocks of keys a block of queries may see something of; too few for padding alone, whose blocks see themselves."""
    positions, segments, branches, forks, *since = marks
    count = segments.shape[1] // block
    begins = jnp.diff(segments, axis=1, prepend=-2) != 0
    # Where what a token sees of the trunk ends: so many places after the segment's first token.
    start = jax.lax.cummax(jnp.where(begins, jnp.arange(segments.shape[1]), 0), axis=1)
    reach = (start + forks - jnp.take_along_axis(positions, start, axis=1)).reshape(-1, count, block).max(-1)
    # Trunks and branches numbered along the row, and of each token the number of its segment's first.
    number = jnp.cumsum(begins | (jnp.diff(branches, axis=1, prepend=-1) != 0), axis=1)
    first = jax.lax.cummax(jnp.where(begins, number, 0), axis=1)
    number, first, trunk, real = (
        x.reshape(-1, count, block) for x in (number, first, jnp.where(branches == 0, number, 0), segments > 0)
    )
    low, high = number[..., 0], number[..., -1]
    overlap = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    at = jnp.arange(count)
    seen = overlap | ((trunk.max(-1)[:, None] >= first[:, :, :1]) & (at * block < reach[:, :, None]))
    seen &= (at[:, None] >= at) & (real[:, :, :1] | (at[:, None] == at))
    if since:
        first_seen, newest = (x.reshape(-1, count, block) for x in (since[0], positions))
        seen &= newest.max(-1)[:, None] >= first_seen.min(-1)[:, :, None]
    return seen


def _visits(marks: Marks, block: int) -> tuple[Int[Array, "BQ"], Int[Array, "BQ C"]]:
    """How many blocks of keys each block of queries visits, and which: the leading ones of a row of numbers."""
    seen = visible_blocks(marks, block)
    rows, count, _ = seen.shape
    return seen.sum(-1).reshape(-1), jnp.where(seen, jnp.arange(count), count).sort(axis=-1).reshape(rows * count, count)


def _mask(marks: Marks, row: Any, at: Any, to: Any, block: int) -> Bool[Array, "C C"]:
    def part(at: Any) -> list[Array]:
        return [jax.lax.dynamic_slice(x, (row, at * block), (1, block))[0] for x in marks]

    return visible([x[:, None] for x in part(at)], [x[None] for x in part(to)])


def _slice(x: Array, row: Any, at: Any, block: int) -> Array:
    """One block of tokens of one row, without the axis of rows; tokens are the last axis but one."""
    start = (row, *([0] * (x.ndim - 3)), at * block, 0)
    return jax.lax.dynamic_slice(x, start, (1, *x.shape[1:-2], block, x.shape[-1]))[0]


def _put(x: Array, part: Array, row: Any, at: Any, block: int) -> Array:
    return jax.lax.dynamic_update_slice(x, part[None], (row, *([0] * (x.ndim - 3)), at * block, 0))


def _flat(x: Float[Array, "K G C H"]) -> Float[Array, "K GC H"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _product(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    """float32 [K, ...]: one product a kv-head."""
    return jax.lax.dot_general(left, right, (((contract[0],), (contract[1],)), ((0,), (0,))), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query: Array, key: Array, value: Array, marks: Marks, block: int, softcap: float | None) -> Array:
    return _forward(query, key, value, marks, block, softcap)[0]


def _forward(query: Array, key: Array, value: Array, marks: Marks, block: int, softcap: float | None) -> tuple[Array, Any]:
    b, k, g, t, h = query.shape
    blocks = t // block
    counts, order = _visits(marks, block)
    scale = h**-0.5

    def rows(index: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        row, at = index // blocks, index % blocks
        q = _flat(_slice(query, row, at, block))

        def see(step: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, mixed = state
            to = order[index, step]
            mask = _mask(marks, row, at, to, block)
            scores = soft_capped(_product(q, _slice(key, row, to, block), (2, 2)) * scale, softcap)
            scores = jnp.where(jnp.tile(mask, (g, 1)), scores, HIDDEN)
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, old = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            total = total * old + weights.sum(-1, keepdims=True)
            mixed = mixed * old + _product(weights.astype(value.dtype), _slice(value, row, to, block), (2, 1))
            return new_top, total, mixed

        start = (jnp.full((k, g * block, 1), LOWEST), jnp.zeros((k, g * block, 1)), jnp.zeros((k, g * block, h)))
        top, total, mixed = jax.lax.fori_loop(0, counts[index], see, start)
        out = (mixed / total).astype(query.dtype).reshape(k, g, block, h)
        log = (top + jnp.log(total)).reshape(k, g, block, 1)
        return _put(carry[0], out, row, at, block), _put(carry[1], log, row, at, block)

    start = (jnp.zeros(query.shape, query.dtype), jnp.zeros((b, k, g, t, 1)))
    out, logs = jax.lax.fori_loop(0, b * blocks, rows, start)
    return out, (query, key, value, marks, out, logs)


def _backward(block: int, softcap: float | None, saved: Any, grad: Array) -> tuple[Any, ...]:
    query, key, value, marks, out, logs = saved
    b, k, g, t, h = query.shape
    blocks = t // block
    counts, order = _visits(marks, block)
    scale = h**-0.5
    delta = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)

    def rows(index: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        row, at = index // blocks, index % blocks
        q, d = (_flat(_slice(x, row, at, block)) for x in (query, grad))
        log, shift = (_flat(_slice(x, row, at, block)) for x in (logs, delta))

        def see(step: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dkey, dvalue = state
            to = order[index, step]
            ks, vs = _slice(key, row, to, block), _slice(value, row, to, block)
            mask = jnp.tile(_mask(marks, row, at, to, block), (g, 1))
            scores = soft_capped(_product(q, ks, (2, 2)) * scale, softcap)
            weights = jnp.where(mask, jnp.exp(scores - log), 0.0)
            ds = weights * (_product(d, vs, (2, 2)) - shift) * scale
            if softcap is not None:
                ds *= 1 - (scores / softcap) ** 2  # the derivative of tanh
            ds = ds.astype(query.dtype)
            dv = _product(weights.astype(value.dtype), d, (1, 1))
            dk = _product(ds, q, (1, 1))
            return (
                dq + _product(ds, ks, (2, 1)),
                _put(dkey, _slice(dkey, row, to, block) + dk, row, to, block),
                _put(dvalue, _slice(dvalue, row, to, block) + dv, row, to, block),
            )

        dq, dkey, dvalue = jax.lax.fori_loop(0, counts[index], see, (jnp.zeros(q.shape), *carry[1:]))
        return _put(carry[0], dq.astype(query.dtype).reshape(k, g, block, h), row, at, block), dkey, dvalue

    start = (jnp.zeros(query.shape, query.dtype), jnp.zeros(key.shape), jnp.zeros(value.shape))
    dq, dkey, dvalue = jax.lax.fori_loop(0, b * blocks, rows, start)
    return dq, dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_attend.defvjp(_forward, _backward)
