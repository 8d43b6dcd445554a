"""Parts of the decoder. Parameters of the layer stack carry a leading layer axis; `__call__` sees one layer's slice.

Kernels are stored [in, out] (Hugging Face stores [out, in]). Shapes: B batch, T tokens, D model, V vocabulary, R rank.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sftrec_jax.model.architecture import Architecture


class LoRAParam(nnx.Variable):
    """An adapter matrix: trained, saved in every checkpoint."""


class TokenRows(nnx.Variable):
    """Trainable rows of the token table, addressed by token id."""


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


@jax.custom_vjp
def lora_linear(
    x: Float[Array, "B T I"],
    z: Float[Array, "B T I"],
    kernel: Float[Array, "I O"],
    a: Float[Array, "I R"],
    b: Float[Array, "R O"],
) -> Float[Array, "B T O"]:
    """x W + z A B for a frozen W: its cotangent is not computed. z is x after dropout; the scale is part of B.

    The backward pass is written out because XLA on CPU otherwise lays the adapters' gradients out transposed and computes the
    activation's derivative again for each of them: 136 against 183 tokens/s for SmolLM2-135M (docs/log.md).
    """
    return x @ kernel + (z @ a) @ b


def _lora_linear_forward(x: Array, z: Array, kernel: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    inner = z @ a
    return x @ kernel + inner @ b, (z, inner, kernel, a, b)


def _lora_linear_backward(saved: tuple[Array, ...], grad: Array) -> tuple[Array | None, ...]:
    z, inner, kernel, a, b = saved
    flat = grad.reshape(-1, grad.shape[-1])  # two-dimensional products take the fast path on CPU
    grad_inner = flat @ b.T
    grad_a = jnp.einsum("mi,mr->ir", z.reshape(-1, z.shape[-1]), grad_inner)
    grad_b = jnp.einsum("mr,mo->ro", inner.reshape(-1, inner.shape[-1]), flat)
    grad_x, grad_z = flat @ kernel.T, grad_inner @ a.T
    return grad_x.reshape(z.shape), grad_z.reshape(z.shape), None, grad_a, grad_b


lora_linear.defvjp(_lora_linear_forward, _lora_linear_backward)


class Linear(nnx.Module):
    """y = x W, plus the LoRA update where this projection is a target. No bias (Llama family)."""

    def __init__(self, name: str, layers: int, inputs: int, outputs: int, adapters: AdapterSpec | None, key: Array):
        kernel_key, a_key = jax.random.split(key)
        self.kernel = nnx.Param(jax.random.normal(kernel_key, (layers, inputs, outputs), jnp.float32) * 0.02)
        self.scale = adapters.scale if adapters and name in adapters.targets else 0.0
        self.dropout = adapters.dropout if adapters else 0.0
        if adapters and name in adapters.targets:
            # PEFT draws A by kaiming_uniform(a=sqrt(5)), that is U(-1/sqrt(in), 1/sqrt(in)), and B is 0.
            bound = inputs**-0.5
            self.lora_a = LoRAParam(jax.random.uniform(a_key, (layers, inputs, adapters.r), jnp.float32, -bound, bound))
            self.lora_b = LoRAParam(jnp.zeros((layers, adapters.r, outputs), jnp.float32))

    def __call__(self, x: Float[Array, "B T I"], dropout_key: Array | None = None) -> Float[Array, "B T O"]:
        kernel = self.kernel[...].astype(x.dtype)
        if not self.scale:
            return x @ kernel
        z = x
        if dropout_key is not None and self.dropout:
            keep = jax.random.bernoulli(dropout_key, 1.0 - self.dropout, x.shape)
            z = jnp.where(keep, x / (1.0 - self.dropout), 0).astype(x.dtype)
        a, b = self.lora_a[...].astype(x.dtype), (self.lora_b[...] * self.scale).astype(x.dtype)
        return lora_linear(x, z, jax.lax.stop_gradient(kernel), a, b)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, shape: tuple[int, ...], eps: float):
        self.weight = nnx.Param(jnp.ones(shape, jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class TokenTable(nnx.Module):
    """Token embedding [V, D] whose rows `row_ids` are replaced by trainable ones; used as input table and as head.

    Logit columns: the V rows of the table first, then the trainable rows in the order of `row_ids`. A table row that a
    trainable row replaces has the logit -inf. `column_of` maps a token id to its column.
    """

    def __init__(self, vocab_size: int, hidden_size: int, row_ids: tuple[int, ...], key: Array):
        self.weight = nnx.Param(jax.random.normal(key, (vocab_size, hidden_size), jnp.float32) * 0.02)
        self.row_ids = row_ids
        self.vocab_size = vocab_size
        if row_ids:
            self.rows = TokenRows(jnp.zeros((len(row_ids), hidden_size), jnp.float32))

    def column_of(self) -> Int[Array, "ids"]:
        """Column of each token id; ids run to the largest one that exists, gaps map to column 0."""
        size = max(self.vocab_size, max(self.row_ids, default=-1) + 1)
        columns = jnp.where(jnp.arange(size) < self.vocab_size, jnp.arange(size), 0)
        return columns.at[jnp.asarray(self.row_ids, jnp.int32)].set(self.vocab_size + jnp.arange(len(self.row_ids)))

    def embed(self, tokens: Int[Array, "..."], dtype: jnp.dtype) -> Float[Array, "... D"]:
        """Input embedding of token ids."""
        if not self.row_ids:
            return self.weight[...][tokens].astype(dtype)
        column = self.column_of()[tokens]
        new = column >= self.vocab_size
        base = self.weight[...][jnp.where(new, 0, column)].astype(dtype)
        own = self.rows[...][jnp.where(new, column - self.vocab_size, 0)].astype(dtype)
        return jnp.where(new[..., None], own, base)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... C"]:
        """Float32 logits in column order."""
        table = self.weight[...].astype(hidden.dtype)
        base = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        if not self.row_ids:
            return base
        replaced = [i for i in self.row_ids if i < self.vocab_size]
        if replaced:
            base = base.at[..., jnp.asarray(replaced, jnp.int32)].set(-jnp.inf)
        rows = self.rows[...].astype(hidden.dtype)
        return jnp.concatenate([base, jnp.einsum("...d,vd->...v", hidden, rows, preferred_element_type=jnp.float32)], -1)


def rope_tables(arch: Architecture, positions: Int[Array, "..."]) -> tuple[Float[Array, "... H"], Float[Array, "... H"]]:
    """Cosines and sines of rotary embedding (Su et al. 2021) in the rotate-half layout, float32."""
    half = arch.head_dim // 2
    frequency = arch.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = arch.rope_scaling
    if scaling and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling and scaling.kind == "llama3":
        # Wavelengths above context/low are divided by the factor, below context/high kept, between them blended.
        turns = scaling.original_context * frequency / (2 * jnp.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        frequency = (1 - blend) * frequency / scaling.factor + blend * frequency
    angle = positions[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], -1)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Float[Array, "B T N H"], cos: Float[Array, "B T H"], sin: Float[Array, "B T H"]) -> Float[Array, "B T N H"]:
    """Rotates queries or keys; float32 inside, result in x's type."""
    half = x.shape[-1] // 2
    wide = x.astype(jnp.float32)
    rotated = jnp.concatenate([-wide[..., half:], wide[..., :half]], -1)
    return (wide * cos[:, :, None] + rotated * sin[:, :, None]).astype(x.dtype)
