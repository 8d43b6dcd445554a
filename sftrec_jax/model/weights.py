"""Tensors of a checkpoint as parameters of the decoder, each device's part straight into its place.

Missing, unexpected, duplicate and mis-shaped tensors are four distinct errors, found before anything is read.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from sftrec_jax.errors import UserError
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.families import HEAD, Tensor, tensor_names, weight_map
from sftrec_jax.model.quantised import STORED, Quantisation, block_size, quantised
from sftrec_jax.model.tensor_files import TensorSource


def check_tensors(source: TensorSource, arch: Architecture, label: str) -> None:
    """Raises UserError for a tensor that is missing, unexpected or of another shape than config.json implies."""
    expected = set(tensor_names(arch))
    missing = [name for name in tensor_names(arch) if name not in source.where]
    if missing:
        raise UserError(f"{label}: {len(missing)} tensors are missing, first {missing[0]}; the files and config.json differ")
    # Old checkpoints carry rotary buffers and, when tied, a copy of the head; both follow from what is loaded.
    known = {*expected, HEAD} if arch.tied else expected
    extra = [name for name in source.where if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise UserError(f"{label}: {len(extra)} unexpected tensors, first {extra[0]}; the files and config.json differ")
    for tensor in weight_map(arch).values():
        for name in tensor.names(arch.layers):
            if source.shapes[name] != tensor.shape:
                raise UserError(
                    f"{label}: tensor {name} has shape {source.shapes[name]}, config.json implies {tensor.shape}; "
                    "the files differ"
                )


def base_arrays(
    source: TensorSource,
    arch: Architecture,
    label: str,
    shardings: Mapping[str, NamedSharding],
    dtype: Any,
    quantise: Quantisation | None = None,
    wide: Collection[str] = (),
) -> Iterator[tuple[str, Array]]:
    """Yields (path, array in its sharding) for every base parameter, converted to `dtype`.

    Of a parameter that is stacked over layers one layer's part is on the host at a time, of others a device's part: beside the
    arrays themselves no more than one tensor of the checkpoint. A part that several devices hold is read once. With `quantise`
    kernels are quantised layer by layer from float32, their scales beside them (`kernel_scale`). Paths in `wide` stay float32.

    Raises: UserError for what `check_tensors` finds and for values that are not finite.
    """
    check_tensors(source, arch, label)
    narrow = dtype
    for path, tensor in weight_map(arch).items():
        dtype = jnp.dtype(jnp.float32) if path in wide else narrow
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        sharding = shardings[path]
        if not tensor.stacked:
            yield path, _placed(source, tensor, tensor.name, shape, sharding, dtype, label)
            continue
        one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        if quantise and path.endswith("/kernel"):
            scales = shardings[f"{path}_scale"]
            blocks = shape[0] // block_size(shape[0])
            stack = jnp.zeros((arch.layers, *shape), STORED[quantise], device=sharding)
            beside = jnp.zeros((arch.layers, blocks, shape[1]), jnp.float32, device=scales)
            for layer, name in enumerate(tensor.names(arch.layers)):
                whole = _placed(source, tensor, name, shape, one, jnp.dtype(jnp.float32), label)
                values, by = quantised(whole, quantise)
                stack, beside = _put(stack, values, layer), _put(beside, by, layer)
                stack.block_until_ready()
            yield path, jax.device_put(stack, sharding)
            yield f"{path}_scale", jax.device_put(beside, scales)
            continue
        stack = jnp.zeros((arch.layers, *shape), dtype, device=sharding)
        for layer, name in enumerate(tensor.names(arch.layers)):
            stack = _put(stack, _placed(source, tensor, name, shape, one, dtype, label), layer)
            stack.block_until_ready()  # else parts of later layers would wait on the host
        assert stack.sharding.is_equivalent_to(sharding, stack.ndim)
        yield path, stack


@partial(jax.jit, donate_argnums=0)
def _put(stack: Array, part: Array, layer: Any) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0)


def _placed(
    source: TensorSource, tensor: Tensor, name: str, shape: tuple[int, ...], sharding: NamedSharding, dtype: Any, label: str
) -> Array:
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        if bounds not in parts:
            parts.clear()  # devices with the same part come one after the other, or read it again
            out = np.empty([end - begin for begin, end in bounds], dtype)
            stored = tuple(slice(*b) for b in (bounds[::-1] if tensor.transposed else bounds))
            source.fill(out, name, stored, tensor.transposed, label)
            parts[bounds] = out
        return parts[bounds]

    return jax.make_array_from_callback(shape, sharding, part)
