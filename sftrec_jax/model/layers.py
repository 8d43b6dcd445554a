"""The decoder layer. Parameters of the stack carry a leading layer axis; `__call__` sees one layer's slice.

Shapes: B batch, T tokens, D model.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sftrec_jax.model.adapters import PROJECTIONS, AdapterSpec
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.lora import Linear
from sftrec_jax.model.quantised import Quantisation
from sftrec_jax.model.rope import apply_rope

Attend = Callable[[Array, Array, Array, Any, Array | None], tuple[Array, Any]]
"""(query, key, value, one layer's cache, its window) -> (attention output, the layer's new cache or output). The window: int32
scalar, positions that a token sees, itself included; huge in a layer that sees all; None where no layer of the model slides."""


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), computed in float32; with `unit` the weight is added to 1 (Gemma)."""

    def __init__(self, shape: tuple[int, ...], eps: float, unit: bool = False):
        self.weight = nnx.Param(jnp.zeros(shape, jnp.float32) if unit else jnp.ones(shape, jnp.float32))
        self.eps, self.unit = eps, unit

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32)
        return (normed * (1.0 + weight if self.unit else weight)).astype(x.dtype)


class Layers(nnx.Module):
    """All decoder layers, their parameters stacked on a leading layer axis; `__call__` is one layer on a slice."""

    def __init__(
        self,
        arch: Architecture,
        adapters: AdapterSpec | None,
        key: Array,
        quantise: Quantisation | None = None,
        dropout: float = 0.0,
    ):
        self.dropout = dropout
        keys = iter(jax.random.split(key, len(PROJECTIONS)))
        n, d, f = arch.layers, arch.hidden_size, arch.ffw_size
        wide, narrow = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        self.arch = arch

        def norm(size: int) -> RMSNorm:
            return RMSNorm((n, size), arch.rms_eps, arch.unit_norms)

        def linear(name: str, inputs: int, outputs: int) -> Linear:
            return Linear(name, n, inputs, outputs, adapters, next(keys), name in arch.biases, quantise)

        self.input_norm = norm(d)
        self.q_proj = linear("q_proj", d, wide)
        self.k_proj = linear("k_proj", d, narrow)
        self.v_proj = linear("v_proj", d, narrow)
        self.o_proj = linear("o_proj", wide, d)
        self.post_norm = norm(d)
        self.gate_proj = linear("gate_proj", d, f)
        self.up_proj = linear("up_proj", d, f)
        self.down_proj = linear("down_proj", f, d)
        if arch.qk_norm:
            self.q_norm, self.k_norm = norm(arch.head_dim), norm(arch.head_dim)
        if arch.norms_after:
            self.attention_out_norm, self.ffw_out_norm = norm(d), norm(d)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        attend: Attend,
        cache: Any,
        dropout_key: Array | None,
        only: Int[Array, "B R"] | None = None,
        window: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], Any]:
        """One layer. With `only`, keys and values of all tokens but outputs of those alone. `window`: see `Attend`."""
        arch = self.arch
        b, t, _ = x.shape
        keys = [None] * 7 if dropout_key is None else list(jax.random.split(dropout_key, 7))
        mixing, feeding = (None if dropout_key is None else jax.random.fold_in(dropout_key, i) for i in (7, 8))
        h = self.input_norm(x)
        key = self.k_proj(h, keys[1]).reshape(b, t, arch.kv_heads, arch.head_dim)
        value = self.v_proj(h, keys[2]).reshape(b, t, arch.kv_heads, arch.head_dim)
        key = apply_rope(self.k_norm(key) if arch.qk_norm else key, *rope)
        if only is not None:
            x, h, cos, sin = (jnp.take_along_axis(a, only[..., None], axis=1) for a in (x, h, *rope))
            t, rope = only.shape[1], (cos, sin)
        query = self.q_proj(h, keys[0]).reshape(b, t, arch.heads, arch.head_dim)
        query = apply_rope(self.q_norm(query) if arch.qk_norm else query, *rope)
        if arch.query_scale is not None and arch.query_scale != arch.head_dim**-0.5:
            query = query * jnp.asarray(arch.query_scale * arch.head_dim**0.5, query.dtype)  # attention divides by the root
        mixed, cache = attend(query, key, value, cache, window)
        out = self.o_proj(mixed.reshape(b, t, -1), keys[3])
        x = x + dropped(self.attention_out_norm(out) if arch.norms_after else out, self.dropout, mixing)
        h = self.post_norm(x)
        gate = self.gate_proj(h, keys[4])
        gate = jax.nn.silu(gate) if arch.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        out = self.down_proj(gate * self.up_proj(h, keys[5]), keys[6])
        return x + dropped(self.ffw_out_norm(out) if arch.norms_after else out, self.dropout, feeding), cache


def dropped(x: Float[Array, "B T D"], share: float, key: Array | None) -> Float[Array, "B T D"]:
    """`x` with a share of its values set to 0 and the rest scaled up; as it is without a key, or for a share of 0."""
    if key is None or not share:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - share, x.shape), x / (1.0 - share), 0).astype(x.dtype)
