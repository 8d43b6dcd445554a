"""Rotary position embedding. Shapes: B batch, T tokens, N heads, H head-dim."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sftrec_jax.model.architecture import Architecture


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
