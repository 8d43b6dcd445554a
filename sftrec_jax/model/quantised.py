"""Frozen kernels in 8 or 4 bits with a scale for every block of inputs, by qwix (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

`int8`, `int4`: whole numbers, a block's largest value at the end of the range; `nf4`: 16 quantiles of a normal distribution.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sftrec_jax.errors import UserError

if TYPE_CHECKING:
    from qwix import QArray

Quantisation = Literal["int8", "int4", "nf4"]
STORED: dict[Quantisation, Any] = {"int8": jnp.int8, "int4": jnp.int4, "nf4": jnp.uint4}
"""Types that arrays have in memory; four bits lie two to a byte."""
BLOCK = 64
"""Inputs to a scale, as in QLoRA; fewer where that does not divide them."""


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise UserError('model.quantise needs the package qwix; install it with pip install "sftrec-jax[quant]"') from None
    return qwix


def block_size(inputs: int) -> int:
    """The largest number up to BLOCK that divides the inputs."""
    return next(size for size in range(BLOCK, 0, -1) if inputs % size == 0)


@partial(jax.jit, static_argnames="kind")
def quantised(kernel: Float[Array, "I O"], kind: Quantisation) -> tuple[Array, Float[Array, "I/block O"]]:
    """Values [I, O] of a type in STORED, and float32 scales [I / block, O]."""
    found = _qwix().quantize(kernel.astype(jnp.float32), kind, channelwise_axes=(1,), tiled_axes={0: block_size(kernel.shape[0])})
    return found.qvalue.astype(STORED[kind]), found.scale


def as_qarray(values: Array, scales: Array, kind: Quantisation) -> "QArray":
    """What `lora_linear` takes for a kernel."""
    return _qwix().QArray(values, scales, qtype=kind if kind == "nf4" else STORED[kind])


def dense(kernel: "Array | QArray", dtype: Any) -> Array:
    """A kernel as an array of a type."""
    if isinstance(kernel, jax.Array):
        return kernel.astype(dtype)
    return _qwix().dequantize(kernel).astype(dtype)
