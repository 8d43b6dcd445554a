"""The numeric type that a run computes in, and why."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from sftrec_jax.config import ModelConfig

WIDTH = 1024
"""Width of the square products that are timed on a CPU,"""
REPEATS = 7
"""and how often; the fastest counts."""
FASTER = 1.5
"""So many times as fast bfloat16 must be: about what a machine with matrix units far exceeds, and noise does not reach."""


def compute_dtype(config: ModelConfig) -> tuple[Any, str]:
    """The type of activations and frozen weights, and the reason for it.

    `auto` on a CPU: bfloat16 where a product takes at most 1 / `FASTER` of the time of one in float32, as with AMX. AVX-512
    BF16 alone does not reach that: there float32 trained 1.5 times as fast (docs/log.md).
    """
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype), "as configured"
    backend = jax.default_backend()
    if backend != "cpu":
        return jnp.dtype(jnp.bfloat16), f"{backend}: half the memory traffic"
    speed = bfloat16_speed()
    name = "bfloat16" if speed >= FASTER else "float32"
    return jnp.dtype(name), f"CPU: a bfloat16 product runs at {speed:.1f} times the speed of one in float32"


@functools.cache
def bfloat16_speed() -> float:
    """How many times as fast a square product is in bfloat16 as in float32, on the default device."""
    product = jax.jit(jnp.matmul)

    def seconds(dtype: Any) -> float:
        values = jnp.ones((WIDTH, WIDTH), dtype)
        jax.block_until_ready(product(values, values))
        times = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            jax.block_until_ready(product(values, values))
            times.append(time.perf_counter() - begin)
        return min(times)

    return seconds(jnp.float32) / seconds(jnp.bfloat16)
