"""The mesh of devices: made as configured, checked against the model and the batch, or chosen."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from sftrec_jax.config import MeshConfig, TrainConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.sharding import AXES

Sizes = Mapping[str, int]
"""Of the four axes."""


def named(sizes: Sizes) -> str:
    """`data 2, fsdp 4, context 1, tensor 1`."""
    return ", ".join(f"{axis} {sizes[axis]}" for axis in AXES)


def platform_of(mesh: Mesh | None) -> str:
    """`cpu`, `gpu` or `tpu`: what programs for this mesh run on."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """Builds the mesh over all devices (or those given); -1 in one size takes what the others leave.

    On TPU neighbours in the torus become neighbours in the mesh where the axes allow it.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    known = int(np.prod([s for s in sizes if s != -1]))
    said = ", ".join(f"{a} {s}" for a, s in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        if len(devices) % known:
            raise UserError(
                f"mesh {said}: {len(devices)} devices cannot be divided by {known}; lower fsdp, context or tensor, or use "
                "--mesh auto"
            )
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"mesh {said} needs {int(np.prod(sizes))} devices, {len(devices)} are there; set one size to -1, or use --mesh auto"
        )
    return Mesh(_placed(devices, sizes), AXES)


def _placed(devices: list[Any], sizes: list[int]) -> np.ndarray:
    plain = np.asarray(devices).reshape(sizes)
    if getattr(devices[0], "platform", "cpu") != "tpu":
        return plain
    try:
        return mesh_utils.create_device_mesh(sizes, devices=devices)
    except (NotImplementedError, ValueError):  # axes that no torus axes make up
        return plain


def obstacle(sizes: Sizes, arch: Architecture, train: TrainConfig | None = None) -> str | None:
    """Why a mesh cannot hold the model, or with `train` its batches; None where it can."""
    rows, heads = sizes["data"] * sizes["fsdp"], sizes["tensor"] * sizes["context"]
    if train is not None and train.batch_rows % rows:
        said = f"train.batch_rows is {train.batch_rows}, which data x fsdp = {rows} devices cannot divide"
        return f"{said}; use {_up(train.batch_rows, rows)}"
    if train is not None and train.row_length % sizes["context"]:
        return (
            f"train.row_length is {train.row_length}, which context = {sizes['context']} devices cannot divide; "
            f"use {_up(train.row_length, sizes['context'])}"
        )
    for count, what in ((arch.heads, "heads"), (arch.kv_heads, "kv-heads")):
        if count % heads:
            return f"the model has {count} {what}, which tensor x context = {heads} devices cannot divide"
    for axis, size, what in (
        ("fsdp", arch.hidden_size, "hidden units"),
        ("tensor", arch.ffw_size, "units in its feed-forward layers"),
        ("tensor", arch.vocab_size, "tokens in its vocabulary"),
    ):
        if size % sizes[axis]:
            return f"the model has {size} {what}, which {axis} = {sizes[axis]} devices cannot divide"
    return None


def check_mesh(mesh: Mesh, arch: Architecture, train: TrainConfig | None = None) -> None:
    """Raises UserError, with the nearest mesh of as many devices that works, for one that `obstacle` finds fault with."""
    sizes = mesh.shape
    wrong = obstacle(sizes, arch, train)
    if wrong is None:
        return
    others = [s for s in all_sizes(mesh.size) if obstacle(s, arch, train) is None]
    if not others:
        raise UserError(f"mesh {named(sizes)}: {wrong} (no other mesh of {mesh.size} devices works)")
    near = min(others, key=lambda s: (sum(abs(np.log2(s[a] / sizes[a])) for a in AXES), s["context"], s["tensor"]))
    way = "or" if "; use" in wrong else "; use"
    raise UserError(f"mesh {named(sizes)}: {wrong}{' ' if way == 'or' else ''}{way} the nearest mesh that works: {named(near)}")


def all_sizes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to divide so many devices among the axes."""
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    for tensor in divisors:
        for context in (d for d in divisors if devices % (tensor * d) == 0):
            left = devices // (tensor * context)
            for fsdp in (d for d in divisors if left % d == 0):
                yield dict(zip(AXES, (left // fsdp, fsdp, context, tensor), strict=True))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
