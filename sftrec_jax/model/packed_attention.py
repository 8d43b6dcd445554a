"""Attention in packed rows by whatever the device does best: the whole mask, blocks in plain XLA, or kernels."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from sftrec_jax.model.attention import attend, packed_mask
from sftrec_jax.model.blockwise import Marks, block_attention
from sftrec_jax.model.sharding import BATCH
from sftrec_jax.model.tree_attention import tree_attention

WHOLE = 64
"""Rows of up to so many tokens have one block anyway; their mask is applied whole. Longer ones cost less in blocks: on two CPU
cores a layer took 16 ms, forward and backward, for 1,024 tokens in segments of 128 against 490 (docs/log.md)."""
KERNELS = 128
"""Rows from so many tokens on run in kernels on TPU and GPU, whose blocks have 128 tokens."""
LONGEST_KERNEL = 6_144
"""Tokens of a row that the kernels take for any head-dim up to 128 and type; longer ones run in blocks."""


def packed_attention(marks: Marks, mesh: Mesh | None, kv_heads: int) -> Callable[[Array, Array, Array], Array]:
    """What maps query [B, T, N, H], key and value [B, T, K, H] of packed rows to outputs [B, T, N, H].

    Args:
        marks: positions, segments, branches, forks, int32 [B, T] each (see `packed_mask`).
        mesh: the devices over whose data and fsdp axes rows are divided, and over whose tensor axis heads are; None: one device.
        kv_heads: K; heads are divided where the tensor axis divides it.
    """
    length = marks[0].shape[1]
    backend = jax.default_backend()
    if length <= WHOLE or (backend != "cpu" and length < KERNELS):
        mask = packed_mask(*marks)
        return lambda query, key, value: attend(query, key, value, mask)

    def local(query: Array, key: Array, value: Array, *marks: Int[Array, "B T"]) -> Array:
        if backend != "cpu" and length <= LONGEST_KERNEL:
            return tree_attention(query, key, value, *marks)
        return block_attention(query, key, value, marks)  # type: ignore[arg-type]

    if mesh is None or mesh.size == 1:
        return lambda query, key, value: local(query, key, value, *marks)
    heads = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
    states, rows = PartitionSpec(*BATCH, None, heads, None), PartitionSpec(*BATCH)
    divided = jax.shard_map(local, mesh=mesh, in_specs=(states,) * 3 + (rows,) * 4, out_specs=states, check_vma=False)
    return lambda query, key, value: divided(query, key, value, *marks)
