"""First values of adapters that depend on the base or on an earlier adapter: DoRA's lengths, PiSSA's parts, given weights."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sftrec_jax.distributed import to_host
from sftrec_jax.model.adapters import AdapterSpec
from sftrec_jax.model.quantised import Quantisation, as_qarray, dense


def begin_adapters(
    spec: AdapterSpec, arrays: Mapping[str, jax.Array], given: Mapping[str, np.ndarray], quantise: Quantisation | None
) -> dict[str, jax.Array | np.ndarray]:
    """What takes the place of some of `arrays` (all parameters by path) before training.

    `given`: an earlier adapter; NaN in its token rows leaves what is there.
    """
    begun: dict[str, jax.Array | np.ndarray] = {}
    for target in spec.targets:
        at = f"layers/{target}"
        kernel = arrays[f"{at}/kernel"]
        if spec.pissa:
            layers = kernel.shape[0]
            scales = jnp.asarray([spec.scale(target, i) for i in range(layers)], jnp.float32)
            ranks = jnp.asarray(spec.layer_ranks(target, layers))
            a, b, rest = _principal(kernel, ranks, scales, spec.rank(target))
            begun |= {f"{at}/{name}_a": a for name in ("lora", "pissa")} | {f"{at}/{name}_b": b for name in ("lora", "pissa")}
            begun[f"{at}/kernel"] = rest
        if spec.dora and f"{at}/lora_magnitude" not in given:
            # Of the kernel as it was: with PiSSA, A and B add up to it again.
            begun[f"{at}/lora_magnitude"] = _lengths(kernel, arrays.get(f"{at}/kernel_scale"), quantise)
    for name, value in given.items():
        if not name.endswith("/rows"):
            begun[name] = value
        elif name in arrays:
            begun[name] = np.where(np.isnan(value), to_host(arrays[name]), value)
    return begun


@partial(jax.jit, static_argnames="quantise")
def _lengths(kernel: Array, scales: Array | None, quantise: Quantisation | None) -> Float[Array, "L O"]:
    def one(kernel: Array, scales: Array | None) -> Array:
        whole = kernel if scales is None or quantise is None else as_qarray(kernel, scales, quantise)
        return jnp.linalg.norm(dense(whole, jnp.float32), axis=0)

    return jax.lax.map(lambda layer: one(*layer), (kernel, scales))


@partial(jax.jit, static_argnames="width")
def _principal(kernel: Array, ranks: Array, scales: Array, width: int) -> tuple[Array, Array, Array]:
    """A [L, I, R], B [L, R, O] with s A B the best approximation of each kernel [L, I, O] of its rank, and what that leaves."""

    def one(layer: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        kernel, rank, scale = layer
        left, values, right = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
        short = width - len(values)
        values = jnp.pad(values, (0, max(short, 0)))[:width]
        left = jnp.pad(left, ((0, 0), (0, max(short, 0))))[:, :width]
        right = jnp.pad(right, ((0, max(short, 0)), (0, 0)))[:width]
        root = jnp.where(jnp.arange(width) < rank, jnp.sqrt(values / jnp.where(scale > 0, scale, 1.0)), 0.0)
        a, b = left * root, root[:, None] * right
        with jax.default_matmul_precision("highest"):
            rest = kernel.astype(jnp.float32) - scale * (a @ b)
        return a, b, rest.astype(kernel.dtype)

    return jax.lax.map(one, (kernel, ranks, scales))
