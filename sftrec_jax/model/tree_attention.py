"""Attention within the trees of packed rows, in Pallas kernels that never hold a row's T x T scores.

The softmax over blocks of keys is that of FlashAttention (Dao et al. 2022, arXiv:2205.14135; backward pass as in Dao 2023,
arXiv:2307.08691). Axes: B batch, T tokens, N heads, K kv-heads, G = N / K heads to a kv-head, H head-dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from sftrec_jax.model.attention import soft_capped

Flavour = Literal["tpu", "gpu"]
"""`tpu`: Mosaic, steps of the grid run one after the other. `gpu`: Triton, they run at once."""

LANES = 128
FAST_BYTES = 14 * 2**20
"""Of the 16 MiB of fast memory that a kernel may use on TPU v4 and v5e; the rest is for what `_check` does not count."""
HIDDEN = -1e30
LOWEST = HIDDEN / 2
"""Where a running maximum starts: above HIDDEN, so that exp(HIDDEN - maximum) is 0 even where a block hides every key."""


def tree_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    branches: Int[Array, "B T"],
    forks: Int[Array, "B T"],
    since: Int[Array, "B T"] | None = None,
    *,
    softcap: float | None = None,
    block: int = 128,
    interpret: bool | Flavour = False,
) -> Float[Array, "B T N H"]:
    """`attend(query, key, value, packed_mask(positions, segments, branches, forks, since), softcap)`, for TPU and GPU, with
    gradients.

    A segment's tokens must stand together in the row, and none before a token that it sees; padding (segment 0) comes last.
    Outputs of padding are finite but need not be those of `attend`, as padding may see only a part of the padding. Blocks of
    keys after a block of queries or before its first segment are skipped. Gradients need the output and a float32 [B, N, T]
    kept. Devices do not divide a kernel's work by themselves: with a sharded batch, call it in `shard_map(check_vma=False)`.
    The kernels compile for TPU v4, v5e and v6e and lower for CUDA, but have run in the interpreter alone: no speed is known.

    Args:
        query: float32 or bfloat16 [B, T, N, H], N a multiple of K.
        key: of the same type; softmax and sums are float32 whatever the type.
        value: of the same type.
        positions, segments, branches, forks, since: int32, see `packed_mask`.
        softcap: see `soft_capped`.
        block: tokens to a block of queries and of keys: a power of two, on a TPU 128 or more. GPUs take at most 64.
        interpret: run the kernels in Pallas' interpreter, on any platform; "gpu" takes those of the GPU, True those of the TPU.

    Raises: ValueError for operands that the kernels do not take; JAX's NotImplementedError on a CPU without `interpret`.
    """
    given = (positions, segments, branches, forks) + (() if since is None else (since,))
    _check(query, key, value, given, block, bool(interpret))
    t, h = query.shape[1], query.shape[3]
    after = -t % block
    wider = (0, 0), (0, 0), (0, after), (0, _width(h) - h)
    query, key, value = (jnp.pad(x.transpose(0, 2, 1, 3), wider) for x in (query, key, value))
    # Added tokens are a segment of their own: no token of the row sees them.
    marks = Marks(
        *(
            jnp.pad(x.astype(jnp.int32), ((0, 0), (0, after)), constant_values=fill)
            for x, fill in zip(given, (0, -1, 0, 1, 0), strict=False)
        )
    )
    out = _attention(query, key, value, marks, Plan(block, h**-0.5, interpret, softcap))
    return out[:, :, :t, :h].transpose(0, 2, 1, 3)


class Marks(NamedTuple):
    """What `packed_mask` reads: int32 [B, T] each."""

    positions: Array
    segments: Array
    branches: Array
    forks: Array
    since: Array | None = None


class Plan(NamedTuple):
    block: int
    scale: float
    interpret: bool | Flavour
    softcap: float | None


def _check(query: Array, key: Array, value: Array, marks: tuple[Array, ...], block: int, interpret: bool) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            f"query {query.shape}, key {key.shape} and value {value.shape} must be [B, T, N, H] and twice [B, T, K, H]"
        )
    b, t, n, h = query.shape
    if key.shape[:2] != (b, t) or key.shape[3] != h or n % key.shape[2]:
        raise ValueError(f"query is {query.shape} and key {key.shape}; B, T and H must agree, and N be a multiple of K")
    if query.dtype not in (jnp.float32, jnp.bfloat16) or not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key, value are {query.dtype}, {key.dtype}, {value.dtype}; use float32 or bfloat16 for all")
    for name, array in zip(Marks._fields, marks, strict=False):
        if array.shape != (b, t) or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} is {array.dtype} {array.shape}; use integers {(b, t)}")
    least = 8 if interpret else LANES
    if block < least or block & (block - 1):
        raise ValueError(f"block is {block}; use a power of two from {least} on")
    if h > 256:
        raise ValueError(f"head-dim is {h}; the kernels take 256 or less")
    longest = longest_row(h, query.dtype, block)
    if t > longest:
        room = f"with block {block} there is room for {longest}"
        raise ValueError(
            f"{t} tokens of head-dim {h} exceed the fast memory of a TPU; {room}; use shorter rows or smaller blocks"
        )


def longest_row(head_dim: int, dtype: Any, block: int = 128) -> int:
    """Tokens of a row that the kernels have room for; 0 where they do not take the head-dim."""
    # A row's keys and values lie in fast memory twice, one copy being fetched while the other is used, marks and sums too; what
    # is spilled of a block's scores and weights came to 16 bytes an entry with blocks of 512.
    token = 4 * max(_width(head_dim), LANES) * jnp.dtype(dtype).itemsize + 128
    return max(0, (FAST_BYTES - 20 * block**2) // token // block * block) if head_dim <= 256 else 0


def _width(h: int) -> int:
    return max(16, 1 << (h - 1).bit_length())  # Triton takes powers of two alone; TPUs fill up to 128 lanes anyway


def _attention_alone(query: Array, key: Array, value: Array, marks: Marks, plan: Plan) -> Array:
    return _attention_forward(query, key, value, marks, plan)[0]


def _attention_forward(query: Array, key: Array, value: Array, marks: Marks, plan: Plan) -> tuple[Array, Any]:
    out, sums = _on_platform(_forward, plan, marks, query, key, value)
    return out, (query, key, value, marks, out, sums)


def _attention_backward(plan: Plan, saved: Any, cotangent: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, marks, out, sums = saved
    # What a query's weights lose because they sum to 1: the mean of its weights' cotangents.
    means = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    return *_on_platform(_backward, plan, marks, query, key, value, cotangent, sums, means), None


_attention = jax.custom_vjp(_attention_alone, nondiff_argnums=(4,))
_attention.defvjp(_attention_forward, _attention_backward)


def _on_platform(function: Callable[..., Any], plan: Plan, *operands: Any) -> Any:
    def of(flavour: Flavour) -> Callable[..., Any]:
        return partial(function, flavour, plan)

    if plan.interpret:
        return of("gpu" if plan.interpret == "gpu" else "tpu")(*operands)
    return lax.platform_dependent(*operands, tpu=of("tpu"), cuda=of("gpu"), rocm=of("gpu"))


def _forward(flavour: Flavour, plan: Plan, marks: Marks, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """Output [B, N, T, H] and log of the sum of exponentials, float32 [B, N, T].

    That sum's rounding is the relative error of the weights in the backward pass: 4e-6 where scores reach 100.
    """
    (b, n, t, h), group = query.shape, np.int32(query.shape[1] // key.shape[1])
    block = _block(flavour, plan, query)
    columns, rows, first, _ = _laid_out(marks, block)
    out, sums = _call(
        flavour,
        plan,
        partial(_forward_kernel, block=block, scale=plan.scale, softcap=plan.softcap),
        grid=(b, n, t // block),
        in_specs=[
            _scalars(flavour),
            pl.BlockSpec((None, block, columns.shape[-1]), lambda b, n, i: (b, i, 0)),
            pl.BlockSpec((None, t // block, columns.shape[-1], block), lambda b, n, i: (b, 0, 0, 0)),
            pl.BlockSpec((None, None, block, h), lambda b, n, i: (b, n, i, 0)),
            pl.BlockSpec((None, None, t, h), lambda b, n, i: (b, lax.div(n, group), 0, 0)),
            pl.BlockSpec((None, None, t, h), lambda b, n, i: (b, lax.div(n, group), 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, block, h), lambda b, n, i: (b, n, i, 0)),
            pl.BlockSpec((None, None, None, 1, block), lambda b, n, i: (b, n, i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((b, n, t // block, 1, block), jnp.float32),
        ],
    )(first, columns, rows, query, key, value)
    return out, sums.reshape(b, n, t)


def _backward(
    flavour: Flavour,
    plan: Plan,
    marks: Marks,
    query: Array,
    key: Array,
    value: Array,
    cotangent: Array,
    sums: Array,
    means: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value, of their shapes and types."""
    (b, n, t, h), k = query.shape, key.shape[1]
    group, block = n // k, _block(flavour, plan, query)
    columns, rows, first, last = _laid_out(marks, block)
    sums, means = (x.reshape(b, n, t // block, 1, block) for x in (sums, means))
    own = pl.BlockSpec((None, None, block, h), lambda b, n, i: (b, n, i, 0))
    whole = pl.BlockSpec((None, None, t, h), lambda b, n, i: (b, lax.div(n, np.int32(group)), 0, 0))
    own_row = pl.BlockSpec((None, None, None, 1, block), lambda b, n, i: (b, n, i, 0, 0))
    grad_query = _call(
        flavour,
        plan,
        partial(_query_kernel, block=block, scale=plan.scale, softcap=plan.softcap),
        grid=(b, n, t // block),
        in_specs=[
            _scalars(flavour),
            pl.BlockSpec((None, block, columns.shape[-1]), lambda b, n, i: (b, i, 0)),
            pl.BlockSpec((None, t // block, columns.shape[-1], block), lambda b, n, i: (b, 0, 0, 0)),
            *(own, whole, whole, own, own_row, own_row),
        ],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    )(first, columns, rows, query, key, value, cotangent, sums, means)

    # The heads of a group share keys. A TPU adds them up in the output's block, head after head; a GPU has them in one step.
    heads = 1 if flavour == "tpu" else group
    own = pl.BlockSpec((None, None, block, h), lambda b, k, j, g: (b, k, j, 0))
    whole = pl.BlockSpec((None, None, heads, t, h), lambda b, k, j, g: (b, k, g, 0, 0))
    whole_rows = pl.BlockSpec((None, None, heads, t // block, 1, block), lambda b, k, j, g: (b, k, g, 0, 0, 0))
    grad_type = key.dtype if heads == group else jnp.float32
    query, cotangent, sums, means = (x.reshape(b, k, group, *x.shape[2:]) for x in (query, cotangent, sums, means))
    grad_key, grad_value = _call(
        flavour,
        plan,
        partial(_key_kernel, block=block, scale=plan.scale, softcap=plan.softcap, steps=group // heads),
        grid=(b, k, t // block, group // heads),
        in_specs=[
            _scalars(flavour),
            pl.BlockSpec((None, block, columns.shape[-1]), lambda b, k, j, g: (b, j, 0)),
            pl.BlockSpec((None, t // block, columns.shape[-1], block), lambda b, k, j, g: (b, 0, 0, 0)),
            *(whole, own, own, whole, whole_rows, whole_rows),
        ],
        out_specs=[own, own],
        out_shape=[jax.ShapeDtypeStruct(key.shape, grad_type)] * 2,
    )(last, columns, rows, query, key, value, cotangent, sums, means)
    return grad_query, grad_key.astype(key.dtype), grad_value.astype(value.dtype)


def _block(flavour: Flavour, plan: Plan, query: Array) -> int:
    # Four tiles of [block, H], some of them twice, share the fast memory of a GPU's processor, 64 KiB and more.
    return plan.block if flavour == "tpu" else min(plan.block, 64 if query.shape[3] * query.dtype.itemsize <= 128 else 32)


def _scalars(flavour: Flavour) -> pl.BlockSpec:
    return pl.BlockSpec(memory_space=pltpu.SMEM) if flavour == "tpu" else pl.BlockSpec()


def _call(flavour: Flavour, plan: Plan, kernel: "partial[None]", *, grid: tuple[int, ...], **specs: Any) -> Callable[..., Any]:
    if plan.interpret:
        params = None
    elif flavour == "tpu":
        # Only the fourth axis, the heads of a group, adds to what the step before wrote.
        params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")[: len(grid)])
    else:
        params = plgpu.CompilerParams(num_warps=4, num_stages=2)
    name = f"tree_attention{kernel.func.__name__}"
    return pl.pallas_call(kernel, grid=grid, compiler_params=params, interpret=bool(plan.interpret), name=name, **specs)


POSITION, SEGMENT, BRANCH, FORK, TRUNK, SINCE = range(6)


def _laid_out(marks: Marks, block: int) -> tuple[Array, Array, Array, Array]:
    """The marks of tokens as columns [B, T, M] and, block by block, as rows [B, T / block, M, block]; and for each block
    [B, T / block] the first block that holds keys of its queries, and the last that holds queries of its keys.
    """
    positions, segments, branches, forks, since = marks
    b, t = positions.shape
    # A key off the trunk stands there behind any fork.
    trunk = jnp.where(branches == 0, positions, np.iinfo(np.int32).max)
    rows = jnp.stack([positions, segments, branches, forks, trunk, *([] if since is None else [since])], axis=1)
    at = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    differ = segments[:, 1:] != segments[:, :-1]
    edge = jnp.ones((b, 1), bool)
    starts = lax.cummax(jnp.where(jnp.concatenate([edge, differ], axis=1), at, 0), axis=1)
    ends = lax.cummin(jnp.where(jnp.concatenate([differ, edge], axis=1), at, t - 1), axis=1, reverse=True)
    return (
        rows.transpose(0, 2, 1),
        rows.reshape(b, -1, t // block, block).transpose(0, 2, 1, 3),
        starts[:, ::block] // block,
        ends[:, block - 1 :: block] // block,
    )


def _as_columns(columns: Any) -> list[Array]:
    return [columns[:, i : i + 1] for i in range(columns.shape[-1])]


def _as_rows(rows: Any, at: Any) -> list[Array]:
    return [rows[at, i : i + 1, :] for i in range(rows.shape[-2])]


def _visible(query: list[Array], key: list[Array]) -> Array:
    """`packed_mask` of a block: marks of queries [block, 1] and of keys [1, block], or the other way round."""
    trunk = key[TRUNK] < query[FORK]
    own_branch = (query[BRANCH] == key[BRANCH]) & (key[POSITION] <= query[POSITION])
    seen = (query[SEGMENT] == key[SEGMENT]) & (trunk | own_branch)
    return seen & (key[POSITION] >= query[SINCE]) if len(query) > SINCE else seen


def _scores(left: Array, right: Array, visible: Array, scale: float, softcap: float | None) -> tuple[Array, Array | float]:
    """Scores, HIDDEN where not visible, and their derivative by the products times `scale`."""
    scores, slope = _dot_transposed(left, right) * scale, 1.0
    if softcap is not None:
        scores = soft_capped(scores, softcap)
        slope = 1 - (scores / softcap) ** 2
    return jnp.where(visible, scores, HIDDEN), slope


def _dot_transposed(left: Array, right: Array) -> Array:
    """float32 [A, C] of [A, H] and [C, H]."""
    return lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _dot(left: Array, right: Array) -> Array:
    return jnp.dot(left.astype(right.dtype), right, preferred_element_type=jnp.float32)


def _tokens(at: Any, block: int) -> Any:
    return pl.ds(pl.multiple_of(at * block, block), block)


def _forward_kernel(
    first: Any,
    columns: Any,
    rows: Any,
    query: Any,
    keys: Any,
    values: Any,
    out: Any,
    sums: Any,
    *,
    block: int,
    scale: float,
    softcap: float | None,
) -> None:
    i = pl.program_id(2)
    q, marks = query[...], _as_columns(columns)

    def step(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, mixed = carry
        k, v = keys[_tokens(j, block), :], values[_tokens(j, block), :]
        scores, _ = _scores(q, k, _visible(marks, _as_rows(rows, j)), scale, softcap)
        above = jnp.maximum(top, scores.max(axis=1, keepdims=True))
        weights, less = jnp.exp(scores - above), jnp.exp(top - above)
        return above, total * less + weights.sum(axis=1, keepdims=True), mixed * less + _dot(weights, v)

    start = jnp.full((block, 1), LOWEST, jnp.float32), jnp.zeros((block, 1), jnp.float32), jnp.zeros(q.shape, jnp.float32)
    top, total, mixed = lax.fori_loop(first[pl.program_id(0), i], i + 1, step, start)
    out[...] = (mixed / total).astype(out.dtype)
    sums[...] = (top + jnp.log(total)).T


def _query_kernel(
    first: Any,
    columns: Any,
    rows: Any,
    query: Any,
    keys: Any,
    values: Any,
    cotangent: Any,
    sums: Any,
    means: Any,
    grad_query: Any,
    *,
    block: int,
    scale: float,
    softcap: float | None,
) -> None:
    i = pl.program_id(2)
    q, do, marks = query[...], cotangent[...], _as_columns(columns)
    total, mean = sums[...].T, means[...].T

    def step(j: Any, grad: Array) -> Array:
        k, v = keys[_tokens(j, block), :], values[_tokens(j, block), :]
        scores, slope = _scores(q, k, _visible(marks, _as_rows(rows, j)), scale, softcap)
        return grad + _dot(jnp.exp(scores - total) * (_dot_transposed(do, v) - mean) * slope, k)

    grad = lax.fori_loop(first[pl.program_id(0), i], i + 1, step, jnp.zeros(q.shape, jnp.float32))
    grad_query[...] = (grad * scale).astype(grad_query.dtype)


def _key_kernel(
    last: Any,
    columns: Any,
    rows: Any,
    queries: Any,
    key: Any,
    value: Any,
    cotangents: Any,
    sums: Any,
    means: Any,
    grad_key: Any,
    grad_value: Any,
    *,
    block: int,
    scale: float,
    softcap: float | None,
    steps: int,
) -> None:
    """Scores stand transposed here, keys down and queries across, so that both gradients are plain products."""
    j = pl.program_id(2)
    k, v, marks = key[...], value[...], _as_columns(columns)
    until = last[pl.program_id(0), j] + 1
    grads = jnp.zeros(k.shape, jnp.float32), jnp.zeros(k.shape, jnp.float32)
    for g in range(queries.shape[0]):

        def step(i: Any, carry: tuple[Array, Array], g: int = g) -> tuple[Array, Array]:
            q, do = queries[g, _tokens(i, block), :], cotangents[g, _tokens(i, block), :]
            scores, slope = _scores(k, q, _visible(_as_rows(rows, i), marks), scale, softcap)
            weights = jnp.exp(scores - sums[g, i])
            inner = weights * (_dot_transposed(v, do) - means[g, i]) * slope
            return carry[0] + _dot(inner, q), carry[1] + _dot(weights, do)

        grads = lax.fori_loop(j, until, step, grads)
    grads = grads[0] * scale, grads[1]
    if steps == 1:
        grad_key[...], grad_value[...] = grads[0].astype(grad_key.dtype), grads[1].astype(grad_value.dtype)
        return

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        grad_key[...], grad_value[...] = grads

    @pl.when(pl.program_id(3) > 0)
    def _() -> None:
        grad_key[...] += grads[0]
        grad_value[...] += grads[1]
