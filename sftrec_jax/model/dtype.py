"""The numeric type that a run computes in, and why."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftrec_jax.config import ModelConfig

WIDTH = 1024
"""Width of the square products that are timed on a CPU,"""
REPEATS = 15
"""and how often, in turns."""
FASTER = 2.0
"""So many times as fast bfloat16 must be: what a machine with matrix units far exceeds, and others do not come near."""


def compute_dtype(config: ModelConfig, platform: str | None = None) -> tuple[Any, str]:
    """The type of activations and frozen weights, and the reason for it. `platform`: None for the default one.

    `auto` on a CPU: bfloat16 where a product takes at most 1 / `FASTER` of the time of one in float32, as with AMX. AVX-512
    BF16 alone does not reach that: there float32 trained 1.5 times as fast (docs/log.md).
    """
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype), "as configured"
    backend = platform or jax.default_backend()
    if backend != "cpu":
        return jnp.dtype(jnp.bfloat16), f"{backend}: half the memory traffic"
    speed = bfloat16_speed()
    name = "bfloat16" if speed >= FASTER else "float32"
    return jnp.dtype(name), f"CPU: a bfloat16 product runs at {speed:.1f} times the speed of one in float32"


@functools.cache
def bfloat16_speed() -> float:
    """How many times as fast a square product is in bfloat16 as in float32, on the default device.

    Other work on the machine slows single products, and for seconds at a time: so the types take turns, and of the ratio of their
    least times and the median of the ratios of neighbours the one nearer to 1 counts.
    """
    product = jax.jit(jnp.matmul)
    values = [jnp.ones((WIDTH, WIDTH), dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    for value in values:
        jax.block_until_ready(product(value, value))
    times = np.empty((REPEATS, 2))
    for turn in range(REPEATS):
        for which, value in enumerate(values):
            begin = time.perf_counter()
            jax.block_until_ready(product(value, value))
            times[turn, which] = time.perf_counter() - begin
    least = times.min(axis=0)
    return min(least[0] / least[1], float(np.median(times[:, 0] / times[:, 1])), key=lambda ratio: abs(np.log(ratio)))
