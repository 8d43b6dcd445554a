"""How fast training runs, and how much of the device that is: rates of each step and of the whole run."""

import resource
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

from sftrec_jax.model.adapters import AdapterSpec
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.train.batches import Counts
from sftrec_jax.train.flops import peak_flops, step_flops

Method = Literal["rows", "embeddings", "lora", "full"]


@dataclass
class Meter:
    """Counts work and time. A step that compiled, and steps before it finished, are no measure of speed and stand apart."""

    arch: Architecture
    adapters: AdapterSpec | None
    method: Method
    new_rows: int
    dtype: Any
    devices: int = 1
    _totals: np.ndarray = field(default_factory=lambda: np.zeros(8))
    _peak: tuple[float, str] | None = None

    @property
    def peak(self) -> tuple[float, str]:
        """FLOP/s of all devices at their best, and how that was got."""
        if self._peak is None:
            one, how = peak_flops(self.dtype)
            # Virtual devices of a CPU share its cores, all of which the product had.
            self._peak = (one * (1 if jax.default_backend() == "cpu" else self.devices), how)
        return self._peak

    def step(
        self, values: dict[str, float], counts: Counts, seconds: float, waited: float, rows_only: bool, steady: bool
    ) -> dict[str, float]:
        """Rates of one step, for its record.

        Args:
            values: `tokens`, `targets`, `pairs` of the step (see `make_train_step`).
            counts: what the plan says of the step.
            seconds: since the step before was done.
            waited: seconds of them that the loop waited for the loader.
            rows_only: whether the step trained token rows alone.
            steady: False where `seconds` include compiling.
        """
        method = "rows" if rows_only else self.method
        tokens, targets, pairs = (values[name] for name in ("tokens", "targets", "pairs"))
        flops = step_flops(self.arch, self.adapters, method, tokens, targets, pairs, self.new_rows).total
        if steady:
            self._totals += (tokens, targets, counts.items, flops, seconds, waited, counts.tokens_apart, counts.positions)
        return {
            "tokens_per_s": tokens / seconds,
            "target_tokens_per_s": targets / seconds,
            "examples_per_s": counts.items / seconds,
            "mfu": flops / seconds / self.peak[0],
            "loader_wait_s": waited,
            "positions_used": tokens / counts.positions,
            "saved_by_sharing": counts.tokens_apart / max(tokens, 1),
            "peak_bytes": memory_peak(),
        }

    def summary(self) -> dict[str, Any]:
        """Rates over all steady steps (empty without one), share of positions used, tokens of prompts one by one over those
        trained on, and the memory peak in bytes."""
        tokens, targets, examples, flops, seconds, waited, apart, positions = self._totals
        found: dict[str, Any] = {"peak_bytes": memory_peak()}
        if seconds:
            found |= {
                "tokens_per_s": tokens / seconds,
                "target_tokens_per_s": targets / seconds,
                "examples_per_s": examples / seconds,
                "flops_per_s": flops / seconds,
                "mfu": flops / seconds / self.peak[0],
                "loader_wait_share": waited / seconds,
                "positions_used": tokens / positions,
                "saved_by_sharing": apart / max(tokens, 1),
            }
        return found

    def describe(self) -> str:
        """`summary` in a line."""
        s, (peak, how) = self.summary(), self.peak
        memory = f"memory peak {s['peak_bytes'] / 1e9:.2f} GB"
        if "mfu" not in s:
            return f"{memory}; no step without compiling to time"
        return (
            f"{s['tokens_per_s']:,.0f} tokens/s, {s['examples_per_s']:,.1f} targets/s ({s['target_tokens_per_s']:,.0f} tokens); "
            f"{s['flops_per_s'] / 1e9:,.0f} GFLOP/s, MFU {s['mfu']:.1%} of {peak / 1e9:,.0f} ({how}); "
            f"{s['positions_used']:.1%} of positions used, {s['saved_by_sharing']:.2f} times as many tokens one by one; "
            f"waited for the loader {s['loader_wait_share']:.1%} of the time; {memory}"
        )


def memory_peak() -> int:
    """Bytes: the largest use of a device's memory so far, or where devices do not tell (CPU) of this process."""
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if max(used):
        return max(used)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
