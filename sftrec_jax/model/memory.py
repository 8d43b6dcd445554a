"""What a training step keeps on each device, counted beforehand, and the mesh that such a count chooses."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from sftrec_jax.config import MeshConfig, RunConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model.adapters import TABLES
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.dtype import compute_dtype
from sftrec_jax.model.load import Build, trainable_filter
from sftrec_jax.model.mesh import Sizes, all_sizes, named, obstacle
from sftrec_jax.model.peft_read import configured_spec
from sftrec_jax.model.remat import choose_remat, device_bytes, kept_bytes
from sftrec_jax.model.sharding import AXES, path_name, spec_for

SHARE = 0.85
"""Of a device's memory a step may take by this count; the rest is for what it does not know."""
LOGITS = 2.5e9
"""Bytes of logits, their exponentials and gradients (`train/loss.py` holds 0.5 GB of each at once)."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device."""

    weights: float
    """Frozen parameters."""
    trained: float
    """Trained ones, their gradients and AdamW's moments, float32 each."""
    activations: float
    """Kept for the backward pass, and of the layer at work."""
    gathered: float
    """Whole kernels of two layers, and the head, where fsdp divides them."""
    logits: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.trained + self.activations + self.gathered + self.logits


class Parameter(NamedTuple):
    """One array of the decoder, whatever the mesh."""

    spec: PartitionSpec
    entries: int
    """Entries."""
    bytes: float
    """Of each, with its gradient and moments where it is trained."""
    trained: bool


def parameters(build: Build, method: str) -> list[Parameter]:
    """All arrays of a decoder, from shapes alone."""
    trainable = nnx.filterlib.to_predicate(trainable_filter(method, build.whole))
    found = []
    for path, leaf in nnx.to_flat_state(nnx.split(nnx.eval_shape(lambda: build.decoder(jax.random.key(0))))[1]):
        value, trained = leaf.get_value(), trainable(path, leaf)
        stored = build.param_dtype if value.dtype == jnp.float32 and "scale" not in str(path[-1]) else value.dtype
        size = 16.0 if trained else float(jnp.dtype(stored).itemsize)
        found.append(Parameter(spec_for(path_name(path)), math.prod(value.shape), size, trained))
    return found


def step_memory(build: Build, arrays: list[Parameter], sizes: Sizes, rows: int, row_length: int) -> StepMemory:
    """Counts a step of `rows` rows of `row_length` tokens on a mesh of these sizes; `arrays`: see `parameters`."""
    frozen = trained = 0.0
    for array in arrays:
        share = array.entries * array.bytes / math.prod(sizes[axis] for axis in array.spec if axis is not None)
        trained += share if array.trained else 0.0
        frozen += 0.0 if array.trained else share
    arch, size = build.arch, jnp.dtype(build.dtype).itemsize
    tokens = rows * row_length / (sizes["data"] * sizes["fsdp"] * sizes["context"])
    a_layer = tokens * kept_bytes(arch, build.adapters, build.dtype) / arch.layers / sizes["tensor"]
    kept = arch.layers * a_layer if build.remat != "full" else arch.layers * tokens * arch.hidden_size * size + 2 * a_layer
    gathered = 0.0
    if sizes["fsdp"] > 1:
        gathered = (2 * _kernels(arch) + arch.vocab_size * arch.hidden_size) * size / sizes["tensor"]
    return StepMemory(frozen, trained, kept, gathered, LOGITS)


def _kernels(arch: Architecture) -> int:
    """Entries of the kernels of one layer."""
    wide, narrow = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    return arch.hidden_size * (2 * wide + 2 * narrow + 3 * arch.ffw_size)


def assumed_build(config: RunConfig, arch: Architecture, new_rows: int, mesh: Any, memory: float, platform: str | None) -> Build:
    """The decoder of a run whose items are not named yet, with so many new token rows."""
    train = config.train
    dtype, _ = compute_dtype(config.model, platform)
    adapters = configured_spec(config.lora, arch) if train.method == "lora" else None
    remat, _ = choose_remat(config.model, train, arch, adapters, dtype, mesh, memory)
    quantise = None if config.model.quantise == "none" else config.model.quantise
    whole = (TABLES[:1] if arch.tied else TABLES) if train.method == "embeddings" else ()
    frozen = jnp.dtype(jnp.float32) if train.method == "full" else dtype
    rows = tuple(range(arch.vocab_size, arch.vocab_size + new_rows))
    return Build(arch, adapters, rows, dtype, frozen, remat, quantise, whole)


def assumed_new_rows(config: RunConfig, items: int) -> int:
    """How many new tokens so many items are likely to take."""
    kind, semantic = config.items.tokenizer, config.semantic
    if kind == "atomic":
        return items
    if kind in ("rqvae", "rqkmeans", "pq", "opq", "file"):
        own = {"extra": semantic.codes, "item": items}.get(semantic.collisions, 0)
        return semantic.codes * semantic.levels + own
    return 0


def choose_mesh(
    config: RunConfig, arch: Architecture, items: int, devices: list[Any], platform: str | None = None
) -> tuple[MeshConfig, str]:
    """The mesh for `mesh: auto`, and why: of those that hold a training step the one that moves least between devices.

    That is rows divided and parameters whole; else parameters over as few devices as hold them (fsdp), and then, where rows
    are fewer than devices, heads (tensor), and last the tokens of rows (context).

    Raises: UserError where no mesh of these devices holds it.
    """
    memory, train = device_bytes(devices[0]), config.train
    build = assumed_build(config, arch, assumed_new_rows(config, items), None, memory, platform)
    arrays = parameters(build, train.method)
    fitting, smallest = [], None
    for sizes in all_sizes(len(devices)):
        if obstacle(sizes, arch, train) is not None:
            continue
        mesh = AbstractMesh(tuple(sizes[a] for a in AXES), AXES)
        remat, _ = choose_remat(config.model, train, arch, build.adapters, build.dtype, mesh, memory)
        on_mesh = dataclasses.replace(build, remat=remat)
        needed = step_memory(on_mesh, arrays, sizes, train.batch_rows, train.row_length).total
        if smallest is None or needed < smallest[0]:
            smallest = needed, sizes
        if needed <= SHARE * memory:
            fitting.append((sizes["context"], sizes["tensor"], sizes["fsdp"], needed, sizes))
    if smallest is None:
        raise UserError(
            f"no mesh of {len(devices)} devices divides train.batch_rows {train.batch_rows}, {arch.heads} heads and "
            f"{arch.kv_heads} kv-heads; use train.batch_rows {-(-train.batch_rows // len(devices)) * len(devices)}"
        )
    if not fitting:
        raise UserError(
            f"no mesh of {len(devices)} devices holds a step: the best, {named(smallest[1])}, takes {smallest[0] / 1e9:.1f} GB "
            f"of {memory / 1e9:.1f} GB a device; use more devices, fewer train.batch_rows and more train.accumulate, or quantise"
        )
    *_, needed, sizes = min(fitting, key=lambda found: found[:4])
    return dataclasses.replace(config.mesh, auto=False, **sizes), (
        f"auto: a step takes about {needed / 1e9:.1f} of {memory / 1e9:.0f} GB a device"
    )
