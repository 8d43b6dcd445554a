"""What the backward pass keeps in memory and what it computes again, chosen by what the device holds."""

import os
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from sftrec_jax.config import ModelConfig, TrainConfig
from sftrec_jax.model.adapters import AdapterSpec
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.chips import CHIPS
from sftrec_jax.model.decoder import Remat

SHARE = 0.25
"""All activations of the layers are kept where they take no more than this of a device's memory."""


def choose_remat(
    config: ModelConfig,
    train: TrainConfig,
    arch: Architecture,
    adapters: AdapterSpec | None,
    dtype: Any,
    mesh: Mesh | AbstractMesh | None,
    memory: float | None = None,
) -> tuple[Remat, str]:
    """`model.remat` and the reason for it. `auto`: `none` where memory allows, else `full`; the same on equal machines.
    `memory`: bytes of a device, None to ask.

    `dots` is no choice of its own: what it keeps of an adapted model is about as much as everything.
    """
    if config.remat != "auto":
        return config.remat, "as configured"
    devices = 1 if mesh is None else mesh.size
    needed = train.batch_rows * train.row_length * kept_bytes(arch, adapters, dtype) / devices
    if memory is None:
        memory = device_bytes(mesh.devices.flat[0] if isinstance(mesh, Mesh) else None)
    fits = needed <= SHARE * memory
    why = f"all activations take {needed / 1e9:.1f} GB, {needed / memory:.0%} of a device's {memory / 1e9:.0f} GB"
    return ("none" if fits else "full"), why


def kept_bytes(arch: Architecture, adapters: AdapterSpec | None, dtype: Any) -> int:
    """Bytes a token that the backward pass of all layers needs where nothing is computed again: an estimate by counting."""
    wide, narrow = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    rank = sum(adapters.rank(name) for name in adapters.targets) if adapters else 0
    # Inputs of both norms and of the products behind them; queries, outputs of attention in its layout and in rows, keys and
    # values; gate, its sigmoid, SiLU, up, and their product.
    values = 4 * arch.hidden_size + 3 * wide + 2 * narrow + 5 * arch.ffw_size + rank
    return arch.layers * values * jax.numpy.dtype(dtype).itemsize


def device_bytes(device: Any = None) -> int:
    """Memory of a device (None: of the first): as the backend says, or the vendor; on a CPU this machine's over its devices."""
    local = jax.local_devices()
    device = local[0] if device is None else device
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that is not there, see `run/compile.py`
        limit = None
    if limit is None and device.device_kind in CHIPS:
        limit = CHIPS[device.device_kind].hbm_bytes
    return int(limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(local))
