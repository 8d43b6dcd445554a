"""Rotary position embedding (Su et al. 2021) in the rotate-half layout. Shapes: B batch, T tokens, N heads, H head-dim."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sftrec_jax.model.architecture import Architecture, RopeScaling

Tables = tuple[Float[Array, "... H"], Float[Array, "... H"]]
"""Cosines and sines, float32."""


def rope_tables(arch: Architecture, positions: Int[Array, "..."]) -> Tables:
    """Of layers that see everything."""
    return _tables(arch.head_dim, arch.rope_theta, arch.rope_scaling, positions)


def all_tables(arch: Architecture, positions: Int[Array, "..."]) -> tuple[list[Tables], np.ndarray | None]:
    """The tables of every kind of layer, and int32 [layers] which kind a layer is; None where all are the first."""
    kinds, which = [rope_tables(arch, positions)], np.zeros(arch.layers, np.int32)
    if arch.local_rope_theta is not None and any(arch.sliding):
        kinds.append(_tables(arch.head_dim, arch.local_rope_theta, None, positions))
        which[list(arch.sliding)] = 1
    if any(arch.unrotated):
        which[list(arch.unrotated)] = len(kinds)
        kinds.append((jnp.ones_like(kinds[0][0]), jnp.zeros_like(kinds[0][1])))
    return kinds, which if which.any() else None


def _tables(head_dim: int, theta: float, scaling: RopeScaling | None, positions: Int[Array, "..."]) -> Tables:
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling and scaling.kind == "llama3":
        # Wavelengths above context/low are divided by the factor, below context/high kept, between them blended.
        turns = scaling.original_context * frequency / (2 * jnp.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        frequency = (1 - blend) * frequency / scaling.factor + blend * frequency
    elif scaling:
        kept = _yarn_kept(half, theta, scaling)
        frequency = (1 - kept) * frequency / scaling.factor + kept * frequency
    angle = positions[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], -1)
    by = scaling.attention_factor if scaling else 1.0
    return jnp.cos(angle) * by, jnp.sin(angle) * by


def _yarn_kept(half: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Share of each frequency that is not slowed: a ramp between those that turn `beta_fast` and `beta_slow` times."""

    def place(turns: float) -> float:
        return half * math.log(scaling.original_context / (turns * 2 * math.pi)) / math.log(theta)

    low, high = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = (np.arange(half, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    return 1 - np.clip(ramp, 0.0, 1.0)


def apply_rope(x: Float[Array, "B T N H"], cos: Float[Array, "B T H"], sin: Float[Array, "B T H"]) -> Float[Array, "B T N H"]:
    """Rotates queries or keys; float32 inside, result in x's type."""
    half = x.shape[-1] // 2
    wide = x.astype(jnp.float32)
    rotated = jnp.concatenate([-wide[..., half:], wide[..., :half]], -1)
    return (wide * cos[:, :, None] + rotated * sin[:, :, None]).astype(x.dtype)
