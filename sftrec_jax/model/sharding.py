"""Where arrays lie: a table from parameter path to logical axes, and one from logical axis to mesh axes."""

import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sftrec_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
"""The mesh's."""

Axes = str | tuple[str, ...] | None

LOGICAL: dict[str, Axes] = {
    "batch": ("data", "fsdp"),
    "users": ("data", "fsdp", "context"),  # a search has no long rows to divide, so that axis takes users
    "length": "context",
    "heads_of_rows": ("tensor", "context"),  # in attention a device has whole rows of some heads
    "layer": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffw": "tensor",
    "vocab": "tensor",
    "rank": None,
    "new_rows": None,
    "norm": None,
}
"""Mesh axes over which a logical axis is divided."""

# First match wins. Adapters are sharded like their base: A like the input axis, B like the output axis.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"layers/q_proj/kernel(_scale)?", ("layer", "embed", "heads")),
    (r"layers/(k|v)_proj/kernel(_scale)?", ("layer", "embed", "kv_heads")),
    (r"layers/(gate|up)_proj/kernel(_scale)?", ("layer", "embed", "ffw")),
    (r"layers/o_proj/kernel(_scale)?", ("layer", "heads", "embed")),
    (r"layers/down_proj/kernel(_scale)?", ("layer", "ffw", "embed")),
    (r"layers/(q|k|v|gate|up)_proj/(lora|pissa)_a", ("layer", "embed", "rank")),
    (r"layers/q_proj/(lora|pissa)_b", ("layer", "rank", "heads")),
    (r"layers/(k|v)_proj/(lora|pissa)_b", ("layer", "rank", "kv_heads")),
    (r"layers/(gate|up)_proj/(lora|pissa)_b", ("layer", "rank", "ffw")),
    (r"layers/o_proj/(lora|pissa)_a", ("layer", "heads", "rank")),
    (r"layers/down_proj/(lora|pissa)_a", ("layer", "ffw", "rank")),
    (r"layers/(o|down)_proj/(lora|pissa)_b", ("layer", "rank", "embed")),
    (r"layers/q_proj/(bias|lora_magnitude)", ("layer", "heads")),
    (r"layers/(k|v)_proj/(bias|lora_magnitude)", ("layer", "kv_heads")),
    (r"layers/(gate|up)_proj/(bias|lora_magnitude)", ("layer", "ffw")),
    (r"layers/(o|down)_proj/(bias|lora_magnitude)", ("layer", "embed")),
    (r"layers/\w+/lora_scale", ()),
    (r"(layers/\w+_norm|norm)/weight", ()),
    (r"(embed_tokens|lm_head)/weight", ("vocab", "embed")),
    (r"(embed_tokens|lm_head)/rows", ("new_rows", "embed")),
)


def spec_of(*logical: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes, None for one that is not divided.

    Raises: KeyError for an axis that the table lacks, ValueError where two share a mesh axis.
    """
    axes = [None if name is None else LOGICAL[name] for name in logical]
    used = [a for axis in axes for a in ((axis,) if isinstance(axis, str) else axis or ())]
    if len(used) != len(set(used)):
        raise ValueError(f"the logical axes {logical} collide: {axes}")
    return PartitionSpec(*axes)


BATCH = spec_of("batch")
"""Axis 0 of a batch is divided over both data axes."""
ROWS = spec_of("batch", "length")
"""Rows of tokens."""


def spec_for(path: str) -> PartitionSpec:
    """The PartitionSpec of a parameter path such as `layers/q_proj/kernel`."""
    for pattern, logical in RULES:
        if re.fullmatch(pattern, path):
            return spec_of(*logical)
    raise KeyError(f"no sharding rule matches the parameter {path}")


def sharding_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of a parameter; raises UserError when an axis does not divide."""
    spec = spec_for(path)
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(f"mesh axis {axis} of size {mesh.shape[axis]} does not divide {size} of {path}; choose a divisor")
    return NamedSharding(mesh, spec)


def ways(mesh: Mesh, logical: str) -> int:
    """Into how many parts a mesh divides a logical axis."""
    axes = LOGICAL[logical]
    size = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        size *= mesh.shape[axis]
    return size


def laid_out(x: jax.Array, mesh: Mesh | None, *logical: str | None) -> jax.Array:
    """`x` with its axes divided as the table says; as it is without a mesh of several devices."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_of(*logical)))


def path_name(path: tuple[Any, ...]) -> str:
    """`('layers', 'q_proj', 'kernel')` as `layers/q_proj/kernel`."""
    return "/".join(str(p) for p in path)


def named_arrays(state: nnx.State) -> dict[str, jax.Array]:
    """The arrays of a state by path name; the inverse is `with_arrays`."""
    return {path_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def with_arrays(state: nnx.State, arrays: Mapping[str, jax.Array]) -> nnx.State:
    """A state of the same structure that holds `arrays`."""
    return nnx.from_flat_state([(path, leaf.replace(arrays[path_name(path)])) for path, leaf in nnx.to_flat_state(state)])
