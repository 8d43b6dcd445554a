"""Products with the frozen kernels of the decoder. Shapes: B batch, T tokens, I inputs, O outputs, R rank.

A kernel is an array [I, O] of the type of x, or quantised: then it is made dense where it is used, and again in the backward
pass, so that no more than one layer's kernels are ever dense.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sftrec_jax.model.quantised import dense


@jax.custom_vjp
def frozen_linear(x: Float[Array, "B T I"], kernel: Any) -> Float[Array, "B T O"]:
    """x W for a frozen quantised W."""
    return x @ dense(kernel, x.dtype)


def _frozen_forward(x: Array, kernel: Any) -> tuple[Array, Any]:
    return frozen_linear(x, kernel), kernel


def _frozen_backward(kernel: Any, grad: Array) -> tuple[Array, None]:
    return grad @ dense(kernel, grad.dtype).T, None


frozen_linear.defvjp(_frozen_forward, _frozen_backward)


@jax.custom_vjp
def lora_linear(
    x: Float[Array, "B T I"], z: Float[Array, "B T I"], kernel: Any, a: Float[Array, "I R"], b: Float[Array, "R O"]
) -> Float[Array, "B T O"]:
    """x W + z A B for a frozen W: its cotangent is not computed. z is x after dropout; the scale is part of B.

    The backward pass is written out because XLA on CPU otherwise lays the adapters' gradients out transposed and computes the
    activation's derivative again for each of them: 136 against 183 tokens/s for SmolLM2-135M (docs/log.md).
    """
    return x @ dense(kernel, x.dtype) + (z @ a) @ b


def _lora_linear_forward(x: Array, z: Array, kernel: Any, a: Array, b: Array) -> tuple[Array, tuple[Any, ...]]:
    inner = z @ a
    return x @ dense(kernel, x.dtype) + inner @ b, (z, inner, kernel, a, b)


def _lora_linear_backward(saved: tuple[Any, ...], grad: Array) -> tuple[Array | None, ...]:
    z, inner, kernel, a, b = saved
    flat = grad.reshape(-1, grad.shape[-1])  # two-dimensional products take the fast path on CPU
    grad_inner = flat @ b.T
    grad_a = jnp.einsum("mi,mr->ir", z.reshape(-1, z.shape[-1]), grad_inner)
    grad_b = jnp.einsum("mr,mo->ro", inner.reshape(-1, inner.shape[-1]), flat)
    grad_x, grad_z = flat @ dense(kernel, grad.dtype).T, grad_inner @ a.T
    return grad_x.reshape(z.shape), grad_z.reshape(z.shape), None, grad_a, grad_b


lora_linear.defvjp(_lora_linear_forward, _lora_linear_backward)
