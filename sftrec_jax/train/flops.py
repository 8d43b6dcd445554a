"""Useful floating-point work of a training step and the peak it is held against: model FLOPs utilisation (MFU)."""

import time
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sftrec_jax.model.adapters import AdapterSpec
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.chips import CHIPS

MEASURE_S = 0.5
"""Seconds of products when the peak is measured,"""
CPU_SIZE, DEVICE_SIZE = 2048, 8192
"""and the width of their matrices on a CPU and elsewhere: on an H100 a product of 2048 would be shorter than its launch."""


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of a step by what they are for; a multiply-add is two."""

    layers: float
    """Products with the kernels of the decoder layers."""
    adapters: float
    """Products with LoRA matrices."""
    attention: float
    """Queries with keys, and weights with values."""
    head: float
    """Logits, and what their gradient takes."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.layers + self.adapters + self.attention + self.head


def step_flops(
    arch: Architecture,
    adapters: AdapterSpec | None,
    method: Literal["rows", "embeddings", "lora", "full"],
    tokens: int | float,
    targets: int | float,
    pairs: int | float,
    new_rows: int,
) -> StepFlops:
    """What the matrix products of a forward and a backward pass need, nothing computed twice (Chowdhery et al. 2022, PaLM,
    appendix B; there for full training).

    Every layer counts at every token and the head at targets only, as the decoder computes them. Products whose result no
    trained array needs do not count: gradients of frozen kernels, and in the first layer, where no input row is trained,
    gradients of what stands before the first adapter. Norms, softmax, rotary embedding and the optimizer do not count.

    Args:
        adapters: None without LoRA. With method `rows` they take part, but frozen.
        method: what is trained beside the new rows: nothing, the adapters, or everything.
        tokens: without padding.
        targets: predicted tokens.
        pairs: (query, key) pairs of one layer, the sum of how many tokens each token sees, itself included.
        new_rows: trained token rows, in the input table and in the head.

    Raises: ValueError where nothing is trained, or where adapters and method do not fit.
    """
    if (method == "lora" and adapters is None) or (method == "full" and adapters is not None):
        raise ValueError(f"method {method} with adapters {adapters}")
    if method == "rows" and not new_rows:
        raise ValueError("method rows trains new rows, and there are none")
    flows = method in ("embeddings", "full") or new_rows > 0
    layers, lora, attention = 0.0, 0.0, 0.0
    for _ in range(arch.layers):
        kernel, adapter, mixing, flows = _layer(arch, adapters, method, flows)
        layers += kernel * tokens
        lora += adapter * tokens
        attention += mixing * pairs
    base = 3 if method in ("embeddings", "full") else 2
    head = 2.0 * arch.hidden_size * targets * (base * arch.vocab_size + 3 * new_rows)
    return StepFlops(layers, lora, attention, head)


def forward_flops(arch: Architecture, adapters: AdapterSpec | None, tokens: int | float, pairs: int | float) -> float:
    """What the layers' matrix products of a forward pass need: what a step computes again where layers are not kept."""
    d, wide, narrow = arch.hidden_size, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    sizes = {"q_proj": (d, wide), "k_proj": (d, narrow), "v_proj": (d, narrow), "o_proj": (wide, d)}
    sizes |= {"gate_proj": (d, arch.ffw_size), "up_proj": (d, arch.ffw_size), "down_proj": (arch.ffw_size, d)}
    products = sum(2 * i * o for i, o in sizes.values())
    if adapters is not None:
        products += sum(2 * adapters.mean_rank(name) * sum(sizes[name]) for name in adapters.targets)
    return float(arch.layers * (products * tokens + 4 * wide * pairs))


def _layer(arch: Architecture, adapters: AdapterSpec | None, method: str, flows: bool) -> tuple[float, float, int, bool]:
    """FLOPs of one layer for kernels and adapters a token, for attention a pair; whether its output has a gradient.

    `flows`: whether its input has one.
    """
    d, f = arch.hidden_size, arch.ffw_size
    wide, narrow = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    kernel, adapter = 0.0, 0.0

    def linear(name: str, inputs: int, outputs: int, flows: bool) -> bool:
        nonlocal kernel, adapter
        kernel += 2 * inputs * outputs * (1 + flows + (method == "full"))
        if adapters is None or name not in adapters.targets:
            return flows or method == "full"
        # The gradient after A serves both A's gradient and the input's.
        trained = method == "lora"
        adapter += 2 * adapters.mean_rank(name) * (inputs * (1 + trained + flows) + outputs * (1 + trained + (trained or flows)))
        return flows or trained

    query = linear("q_proj", d, wide, flows)
    key = linear("k_proj", d, narrow, flows)
    value = linear("v_proj", d, narrow, flows)
    # Two products forward; backward one each for queries, keys and values, and one for the weights before queries and keys.
    attention = 2 * wide * (2 + query + key + value + (query or key))
    flows = linear("o_proj", wide, d, query or key or value) or flows
    gate = linear("gate_proj", d, f, flows)
    up = linear("up_proj", d, f, flows)
    flows = linear("down_proj", f, d, gate or up) or flows
    return kernel, adapter, attention, flows


def peak_flops(dtype: Any) -> tuple[float, str]:
    """FLOP/s of the default device at its best, and how it was got: "data sheet" or "measured matmul".

    bfloat16 on a device in `CHIPS`: the vendor's number. Otherwise the fastest of the square products of `dtype`, at JAX's
    default precision, that fit into half a second (at least three).
    """
    device = jax.devices()[0]
    if jnp.dtype(dtype) == jnp.bfloat16 and device.device_kind in CHIPS:
        return CHIPS[device.device_kind].flops, "data sheet"
    size = CPU_SIZE if device.platform == "cpu" else DEVICE_SIZE
    values = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(values, values))
    times: list[float] = []
    while len(times) < 3 or sum(times) < MEASURE_S:
        begin = time.perf_counter()
        jax.block_until_ready(product(values, values))
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times), "measured matmul"
