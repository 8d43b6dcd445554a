"""What the vendors say of accelerators: peak, memory, links."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them."""

    flops: float
    """Dense bfloat16 operations a second."""
    hbm_bytes: float
    """Memory."""
    hbm_rate: float
    """Bytes a second from and to memory."""
    link_rate: float = 0.0
    """Bytes a second through one link to a neighbour, in one direction; 0: not known."""
    links: int = 0
    """Links to neighbours, two for each axis of the torus."""


_V4 = Chip(275e12, 32e9, 1228e9, 50e9, 6)
_V5E = Chip(197e12, 16e9, 819e9, 50e9, 4)
_V5P = Chip(459e12, 95e9, 2765e9, 100e9, 6)
_V6E = Chip(918e12, 32e9, 1600e9, 100e9, 4)
_A100 = 312e12
CHIPS = {
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA A100-SXM4-40GB": Chip(_A100, 40e9, 1555e9),
    "NVIDIA A100-SXM4-80GB": Chip(_A100, 80e9, 2039e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9),
}
"""By JAX's `device_kind`. TPU: Cloud TPU documentation, pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" (system architecture;
memory is the smaller reading of GB; the interconnect of a chip, 2400, 1600, 4800 and 3200 Gbps, divided by its links). NVIDIA:
data sheets of A100 and H100 SXM (half of the peak that they give with sparsity)."""
