"""Projections of the decoder and their adapters: LoRA with PEFT's semantics.

Parameters carry a leading layer axis; `__call__` sees one layer's slice. Kernels are stored [in, out] (Hugging Face stores
[out, in]). Shapes: B batch, T tokens, I inputs, O outputs, R rank.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sftrec_jax.model.adapters import AdapterSpec
from sftrec_jax.model.kernel import frozen_linear, lora_linear
from sftrec_jax.model.quantised import STORED, Quantisation, as_qarray, block_size, dense


class LoRAParam(nnx.Variable):
    """An adapter matrix: trained, saved in every checkpoint."""


class AdapterConstant(nnx.Variable):
    """What follows from the adapters' sizes: neither trained nor read."""


class Linear(nnx.Module):
    """y = x W, plus a bias where the family has one, plus the LoRA update where this projection is a target."""

    def __init__(
        self,
        name: str,
        layers: int,
        inputs: int,
        outputs: int,
        adapters: AdapterSpec | None,
        key: Array,
        bias: bool = False,
        quantise: Quantisation | None = None,
    ):
        kernel_key, a_key = jax.random.split(key)
        self.quantise: Quantisation | None = quantise
        if quantise is None:
            self.kernel = nnx.Param(jax.random.normal(kernel_key, (layers, inputs, outputs), jnp.float32) * 0.02)
        else:
            self.kernel = nnx.Param(jnp.zeros((layers, inputs, outputs), STORED[quantise]))
            self.kernel_scale = nnx.Param(jnp.zeros((layers, inputs // block_size(inputs), outputs), jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros((layers, outputs), jnp.float32))
        rank = adapters.rank(name) if adapters else 0
        self.scale, self.dropout, self.dora = 0.0, 0.0, False
        if adapters is None or not rank:
            return
        self.scale, self.dropout, self.dora = adapters.scale(name, 0), adapters.dropout, adapters.dora
        # PEFT draws A by kaiming_uniform(a=sqrt(5)), that is U(-1/sqrt(in), 1/sqrt(in)), and B is 0.
        bound = inputs**-0.5
        self.lora_a = LoRAParam(jax.random.uniform(a_key, (layers, inputs, rank), jnp.float32, -bound, bound))
        self.lora_b = LoRAParam(jnp.zeros((layers, rank, outputs), jnp.float32))
        if adapters.ranks:
            self.lora_scale = AdapterConstant(column_scales(adapters, name, layers))
            self.scale = 1.0
        if adapters.pissa:
            self.pissa_a, self.pissa_b = (AdapterConstant(jnp.zeros_like(x[...])) for x in (self.lora_a, self.lora_b))
        if adapters.dora:
            self.lora_magnitude = LoRAParam(jnp.ones((layers, outputs), jnp.float32))  # set from the kernel once that is read

    def __call__(self, x: Float[Array, "B T I"], dropout_key: Array | None = None) -> Float[Array, "B T O"]:
        y = self._product(x, dropout_key)
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y

    def _product(self, x: Array, dropout_key: Array | None) -> Array:
        kernel: Any
        if self.quantise is None:
            kernel = self.kernel[...].astype(x.dtype)
        else:
            kernel = as_qarray(self.kernel[...], self.kernel_scale[...], self.quantise)
        if not self.scale:
            return x @ kernel if self.quantise is None else frozen_linear(x, kernel)
        z = x
        if dropout_key is not None and self.dropout:
            keep = jax.random.bernoulli(dropout_key, 1.0 - self.dropout, x.shape)
            z = jnp.where(keep, x / (1.0 - self.dropout), 0).astype(x.dtype)
        wide = self.lora_b[...] * (self.lora_scale[...][:, None] if hasattr(self, "lora_scale") else self.scale)
        a, b = self.lora_a[...].astype(x.dtype), wide.astype(x.dtype)
        frozen = jax.lax.stop_gradient(kernel) if self.quantise is None else kernel
        if not self.dora:
            return lora_linear(x, z, frozen, a, b)
        whole = self.kernel[...] if self.quantise is None else dense(kernel, jnp.float32)
        lengths = column_lengths(*jax.lax.stop_gradient((whole, self.lora_a[...], wide)))
        by = self.lora_magnitude[...] / lengths
        if hasattr(self, "lora_scale"):
            by = jnp.where(self.lora_scale[...].any(), by, 1.0)  # a layer without an adapter
        y = by.astype(x.dtype) * lora_linear(z, z, frozen, a, b)
        return y if z is x else y + frozen_linear(x - z, frozen)


def column_scales(adapters: AdapterSpec, name: str, layers: int) -> Float[Array, "layers R"]:
    """What each column of A counts for, by layer: alpha / r of that layer, 0 beyond its rank."""
    ranks = jnp.asarray(adapters.layer_ranks(name, layers))
    scales = jnp.asarray([adapters.scale(name, i) for i in range(layers)], jnp.float32)
    return jnp.where(jnp.arange(adapters.rank(name)) < ranks[:, None], scales[:, None], 0.0)


def column_lengths(kernel: Float[Array, "I O"], a: Float[Array, "I R"], b: Float[Array, "R O"]) -> Float[Array, "O"]:
    """Euclidean lengths of the columns of W + A B, float32, without A B: |w|^2 + 2 w A b + b A' A b. `b` is scaled."""
    wide = kernel.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        cross, inner = a.T @ wide, a.T @ a
        squares = jnp.sum(wide * wide, axis=0) + jnp.sum(b * (2 * cross + inner @ b), axis=0)
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))
