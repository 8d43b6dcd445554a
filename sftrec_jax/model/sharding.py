"""The mesh, and one table from parameter path to PartitionSpec: first match wins, no match is an error."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sftrec_jax.config import MeshConfig
from sftrec_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Adapters are sharded like their base: A like the input axis, B like the output axis. Axis 0 of the stack is the layer.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"layers/(q|k|v|gate|up)_proj/kernel(_scale)?", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/(o|down)_proj/kernel(_scale)?", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers/(q|k|v|gate|up)_proj/(lora|pissa)_a", PartitionSpec(None, "fsdp", None)),
    (r"layers/(q|k|v|gate|up)_proj/(lora|pissa)_b", PartitionSpec(None, None, "tensor")),
    (r"layers/(o|down)_proj/(lora|pissa)_a", PartitionSpec(None, "tensor", None)),
    (r"layers/(o|down)_proj/(lora|pissa)_b", PartitionSpec(None, None, "fsdp")),
    (r"(embed_tokens|lm_head)/weight", PartitionSpec("tensor", "fsdp")),
    (r"(embed_tokens|lm_head)/rows", PartitionSpec(None, "fsdp")),
    (r"layers/\w+/lora_scale", PartitionSpec()),
    (r"layers/(q|k|v|gate|up)_proj/lora_magnitude", PartitionSpec(None, "tensor")),
    (r"layers/(o|down)_proj/lora_magnitude", PartitionSpec(None, "fsdp")),
    (r"layers/(q|k|v|gate|up)_proj/bias", PartitionSpec(None, "tensor")),
    (r"layers/(o|down)_proj/bias", PartitionSpec(None, "fsdp")),
    (r"(layers/\w+_norm|norm)/weight", PartitionSpec()),
)

BATCH = PartitionSpec(("data", "fsdp"))
"""Axis 0 of a batch is divided over both data axes."""


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """Builds the mesh over all devices (or those given); -1 in one size takes what the others leave."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    named = ", ".join(f"{a} {s}" for a, s in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        if len(devices) % known:
            raise UserError(f"mesh {named}: {len(devices)} devices cannot be divided by {known}; lower fsdp or tensor")
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f"mesh {named} needs {int(np.prod(sizes))} devices, {len(devices)} are there; set one size to -1")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def spec_for(path: str) -> PartitionSpec:
    """The PartitionSpec of a parameter path such as `layers/q_proj/kernel`."""
    for pattern, spec in RULES:
        if re.fullmatch(pattern, path):
            return spec
    raise KeyError(f"no sharding rule matches the parameter {path}")


def sharding_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of a parameter; raises UserError when an axis does not divide."""
    spec = spec_for(path)
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(f"mesh axis {axis} of size {mesh.shape[axis]} does not divide {size} of {path}; choose a divisor")
    return NamedSharding(mesh, spec)


def path_name(path: tuple[Any, ...]) -> str:
    """`('layers', 'q_proj', 'kernel')` as `layers/q_proj/kernel`."""
    return "/".join(str(p) for p in path)


def named_arrays(state: nnx.State) -> dict[str, jax.Array]:
    """The arrays of a state by path name; the inverse is `with_arrays`."""
    return {path_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def with_arrays(state: nnx.State, arrays: Mapping[str, jax.Array]) -> nnx.State:
    """A state of the same structure that holds `arrays`."""
    return nnx.from_flat_state([(path, leaf.replace(arrays[path_name(path)])) for path, leaf in nnx.to_flat_state(state)])
