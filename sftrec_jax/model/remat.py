"""What the backward pass keeps in memory and what it computes again, chosen by what the device holds."""

import os
from typing import Any

import jax
from jax.sharding import Mesh

from sftrec_jax.config import ModelConfig, TrainConfig
from sftrec_jax.model.adapters import AdapterSpec
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.decoder import Remat

SHARE = 0.25
"""All activations of the layers are kept where they take no more than this of a device's memory."""


def choose_remat(
    config: ModelConfig, train: TrainConfig, arch: Architecture, adapters: AdapterSpec | None, dtype: Any, mesh: Mesh | None
) -> tuple[Remat, str]:
    """`model.remat` and the reason for it. `auto`: `none` where memory allows, else `full`; the same on equal machines.

    `dots` is no choice of its own: what it keeps of an adapted model is about as much as everything.
    """
    if config.remat != "auto":
        return config.remat, "as configured"
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    heads = 1 if mesh is None else mesh.shape["tensor"]
    tokens = train.batch_rows * train.row_length / ways
    needed = tokens * kept_bytes(arch, adapters, dtype) / heads
    memory = device_bytes()
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


def device_bytes() -> int:
    """Memory of one device: what the backend says, or of this machine over its devices on a CPU."""
    local = jax.local_devices()
    limit = (local[0].memory_stats() or {}).get("bytes_limit")
    return int(limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(local))
