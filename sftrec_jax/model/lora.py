"""Projections of the decoder and their adapters: LoRA with PEFT's semantics.

Parameters carry a leading layer axis; `__call__` sees one layer's slice. Kernels are stored [in, out] (Hugging Face stores
[out, in]). Shapes: B batch, T tokens, I inputs, O outputs, R rank.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sftrec_jax.model.kernel import lora_linear


class LoRAParam(nnx.Variable):
    """An adapter matrix: trained, saved in every checkpoint."""


@dataclass(frozen=True)
class AdapterSpec:
    """LoRA (Hu et al. 2021) as PEFT defines it: W x + (alpha / r) B A dropout(x), on the named projections."""

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.r


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
    ):
        kernel_key, a_key = jax.random.split(key)
        self.kernel = nnx.Param(jax.random.normal(kernel_key, (layers, inputs, outputs), jnp.float32) * 0.02)
        if bias:
            self.bias = nnx.Param(jnp.zeros((layers, outputs), jnp.float32))
        self.scale = adapters.scale if adapters and name in adapters.targets else 0.0
        self.dropout = adapters.dropout if adapters else 0.0
        if adapters and name in adapters.targets:
            # PEFT draws A by kaiming_uniform(a=sqrt(5)), that is U(-1/sqrt(in), 1/sqrt(in)), and B is 0.
            bound = inputs**-0.5
            self.lora_a = LoRAParam(jax.random.uniform(a_key, (layers, inputs, adapters.r), jnp.float32, -bound, bound))
            self.lora_b = LoRAParam(jnp.zeros((layers, adapters.r, outputs), jnp.float32))

    def __call__(self, x: Float[Array, "B T I"], dropout_key: Array | None = None) -> Float[Array, "B T O"]:
        y = self._product(x, dropout_key)
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y

    def _product(self, x: Array, dropout_key: Array | None) -> Array:
        kernel = self.kernel[...].astype(x.dtype)
        if not self.scale:
            return x @ kernel
        z = x
        if dropout_key is not None and self.dropout:
            keep = jax.random.bernoulli(dropout_key, 1.0 - self.dropout, x.shape)
            z = jnp.where(keep, x / (1.0 - self.dropout), 0).astype(x.dtype)
        a, b = self.lora_a[...].astype(x.dtype), (self.lora_b[...] * self.scale).astype(x.dtype)
        return lora_linear(x, z, jax.lax.stop_gradient(kernel), a, b)
