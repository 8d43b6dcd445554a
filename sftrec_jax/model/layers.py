"""The decoder layer. Parameters of the stack carry a leading layer axis; `__call__` sees one layer's slice.

Shapes: B batch, T tokens, D model.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.lora import AdapterSpec, Linear
from sftrec_jax.model.rope import apply_rope

# (query, key, value, one layer's cache) -> (attention output, the layer's new cache or output)
Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, shape: tuple[int, ...], eps: float):
        self.weight = nnx.Param(jnp.ones(shape, jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class Layers(nnx.Module):
    """All decoder layers, their parameters stacked on a leading layer axis; `__call__` is one layer on a slice."""

    def __init__(self, arch: Architecture, adapters: AdapterSpec | None, key: Array):
        keys = iter(jax.random.split(key, len(PROJECTIONS)))
        n, d, f = arch.layers, arch.hidden_size, arch.ffw_size
        wide, narrow = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        self.arch = arch
        self.input_norm = RMSNorm((n, d), arch.rms_eps)
        self.q_proj = Linear("q_proj", n, d, wide, adapters, next(keys))
        self.k_proj = Linear("k_proj", n, d, narrow, adapters, next(keys))
        self.v_proj = Linear("v_proj", n, d, narrow, adapters, next(keys))
        self.o_proj = Linear("o_proj", n, wide, d, adapters, next(keys))
        self.post_norm = RMSNorm((n, d), arch.rms_eps)
        self.gate_proj = Linear("gate_proj", n, d, f, adapters, next(keys))
        self.up_proj = Linear("up_proj", n, d, f, adapters, next(keys))
        self.down_proj = Linear("down_proj", n, f, d, adapters, next(keys))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        attend: Attend,
        cache: Any,
        dropout_key: Array | None,
        only: Int[Array, "B R"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Any]:
        """One layer. With `only`, keys and values of all tokens but outputs of those alone."""
        b, t, _ = x.shape
        keys = [None] * 7 if dropout_key is None else list(jax.random.split(dropout_key, 7))
        h = self.input_norm(x)
        key = self.k_proj(h, keys[1]).reshape(b, t, self.arch.kv_heads, self.arch.head_dim)
        value = self.v_proj(h, keys[2]).reshape(b, t, self.arch.kv_heads, self.arch.head_dim)
        key = apply_rope(key, *rope)
        if only is not None:
            x, h, cos, sin = (jnp.take_along_axis(a, only[..., None], axis=1) for a in (x, h, *rope))
            t, rope = only.shape[1], (cos, sin)
        query = self.q_proj(h, keys[0]).reshape(b, t, self.arch.heads, self.arch.head_dim)
        mixed, cache = attend(apply_rope(query, *rope), key, value, cache)
        x = x + self.o_proj(mixed.reshape(b, t, -1), keys[3])
        h = self.post_norm(x)
        x = x + self.down_proj(jax.nn.silu(self.gate_proj(h, keys[4])) * self.up_proj(h, keys[5]), keys[6])
        return x, cache
