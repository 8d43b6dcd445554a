"""Attention in packed rows by whatever the device does best: the whole mask, blocks in plain XLA, or kernels."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from sftrec_jax.model.attention import attend, first_seen, packed_mask
from sftrec_jax.model.blockwise import Marks, block_attention
from sftrec_jax.model.mesh import platform_of
from sftrec_jax.model.sharding import spec_of
from sftrec_jax.model.tree_attention import longest_row, tree_attention

WHOLE = 64
"""Rows of up to so many tokens have one block anyway; their mask is applied whole. Longer ones cost less in blocks: on two CPU
cores a layer took 16 ms, forward and backward, for 1,024 tokens in segments of 128 against 490 (docs/log.md)."""
KERNELS = 128
"""Rows from so many tokens on run in kernels on TPU and GPU, whose blocks have 128 tokens."""
Path = Literal["whole", "kernels", "blocks"]


def attention_path(length: int, head_dim: int, dtype: Any, backend: str) -> tuple[Path, str]:
    """How rows of so many tokens are attended to on `cpu`, `gpu` or `tpu`, and why.

    Neither JAX's splash attention nor cuDNN's takes the mask of branches but as a T x T array, the square of the row.
    """
    least = WHOLE if backend == "cpu" else KERNELS - 1
    if length <= least:
        return "whole", f"the mask whole: rows of up to {least} tokens are a block or less"
    if backend == "cpu":
        return "blocks", "in blocks in plain XLA, the fastest on a CPU"
    longest = longest_row(head_dim, dtype)
    if length <= longest:
        return "kernels", f"in Pallas kernels for the mask of branches, on {backend}"
    return "blocks", f"in blocks in plain XLA: kernels have room for rows of {longest} tokens of head-dim {head_dim}"


def packed_attention(
    marks: Marks, mesh: Mesh | None, softcap: float | None = None
) -> Callable[[Array, Array, Array, Array | None], Array]:
    """What maps query [B, T, N, H], key and value [B, T, K, H] of packed rows to outputs [B, T, N, H]; the fourth argument is the
    layer's window, int32 scalar, or None where it hides nothing.

    Args:
        marks: positions, segments, branches, forks, int32 [B, T] each (see `packed_mask`).
        mesh: the devices over whose data and fsdp axes rows are divided; None: one device. Over its tensor and context axes heads
            are: where rows are divided over context, each device gets whole rows of its heads by all-to-all, and gives them back
            (Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509). Both kinds of heads must divide (`check_mesh`).
        softcap: see `soft_capped`.
    """
    length, platform = marks[0].shape[1], platform_of(mesh)
    if attention_path(length, 1, jnp.float32, platform)[0] == "whole":
        mask = packed_mask(*marks)

        def whole(query: Array, key: Array, value: Array, window: Array | None = None) -> Array:
            seen = mask if window is None else packed_mask(*_within(marks, window))
            return attend(query, key, value, seen, softcap)

        return whole

    def local(query: Array, key: Array, value: Array, *marks: Int[Array, "B T"]) -> Array:
        if attention_path(length, query.shape[-1], query.dtype, platform)[0] == "kernels":
            return tree_attention(query, key, value, *marks, softcap=softcap)
        return block_attention(query, key, value, marks, softcap=softcap)

    if mesh is None or mesh.size == 1:
        return lambda query, key, value, window=None: local(query, key, value, *_within(marks, window))
    states, rows = spec_of("batch", None, "heads_of_rows", None), spec_of("batch")

    def over_devices(query: Array, key: Array, value: Array, window: Array | None = None) -> Array:
        all_marks = _within(marks, window)
        specs = (states,) * 3 + (rows,) * len(all_marks)
        divided = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=states, check_vma=False)
        return divided(query, key, value, *all_marks)

    return over_devices


def _within(marks: Marks, window: Array | None) -> Marks:
    return marks if window is None else (*marks[:4], first_seen(marks[0], window))
