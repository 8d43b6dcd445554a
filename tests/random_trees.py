"""Rows of random trees, as packed rows have them, and attention in them by the whole mask."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from sftrec_jax.model.attention import attend, packed_mask

Marks = tuple[jax.Array, ...]
"""Positions, segments, branches, forks, int32 [B, T]."""


def random_trees(rng: np.random.Generator, tokens: int, padding: int, longest: int = 40) -> np.ndarray:
    """Positions, segments, branches, forks [4, tokens] of a row of trees; the last may be cut off."""
    marks: list[tuple[int, int, int, int]] = []
    segment = 0
    while len(marks) < tokens - padding:
        segment += 1
        trunk = int(rng.integers(1, longest))
        marks += [(p, segment, 0, p + 1) for p in range(trunk)]
        for branch in range(1, int(rng.integers(1, 6))):
            fork = int(rng.integers(0, trunk + 1))
            marks += [(fork + p, segment, branch, fork) for p in range(int(rng.integers(1, 9)))]
    return np.array(marks[: tokens - padding] + [(0, 0, 0, 1)] * padding, np.int32).T


def random_rows(seed: int, tokens: int, paddings: tuple[int, ...] = (0, 7)) -> Marks:
    rng = np.random.default_rng(seed)
    return tuple(map(jnp.asarray, np.stack([random_trees(rng, tokens, padding) for padding in paddings], axis=1)))


def random_arrays(seed: int, b: int, t: int, n: int, k: int, h: int, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Query, key, value, and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(b, t, heads, h)), dtype) for heads in (n, k, k, n)]


def with_gradients(function: Callable[..., jax.Array], arrays: list[jax.Array], marks: Marks) -> list[jax.Array]:
    """Output without that of padding, and the gradients of query, key and value where padding's output is not used."""
    *operands, cotangent = arrays
    used = (marks[1] > 0)[..., None, None]
    out, pull = jax.vjp(lambda *x: function(*x, *marks), *operands)
    return [jnp.where(used, out, out * 0), *pull(jnp.where(used, cotangent, 0))]


@jax.jit
def by_mask(arrays: list[jax.Array], marks: Marks) -> list[jax.Array]:
    return with_gradients(lambda q, k, v, *m: attend(q, k, v, packed_mask(*m)), arrays, marks)


def errors(found: list[jax.Array], expected: list[jax.Array]) -> list[float]:
    """Largest difference over the largest value, of the output and each gradient; not a number where one is none."""
    pairs = [(np.asarray(f, np.float32), np.asarray(e, np.float32)) for f, e in zip(found, expected, strict=True)]
    return [float(np.abs(f - e).max() / np.abs(e).max()) for f, e in pairs]


def all_shapes(value: Any) -> Iterator[tuple[int, ...]]:
    """Of every variable of a jaxpr and of those within it: loops, branches, kernels."""
    if isinstance(value, jax.extend.core.ClosedJaxpr):
        value = value.jaxpr
    if isinstance(value, jax.extend.core.Jaxpr):
        for equation in value.eqns:
            for variable in (*equation.invars, *equation.outvars):
                yield tuple(getattr(variable.aval, "shape", ()))
            for parameter in equation.params.values():
                yield from all_shapes(parameter)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from all_shapes(part)


def long_axes(function: Callable[..., Any], *operands: Any) -> int:
    """The most axes of 2048 or more that one array has."""
    return max(sum(axis >= 2048 for axis in shape) for shape in all_shapes(jax.make_jaxpr(function)(*operands)))
