"""How well codes are used: usage, perplexity, evenness and reconstruction of each level, collisions of whole codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from sftrec_jax.items.quantise.collisions import group_index


@dataclass(frozen=True)
class LevelReport:
    """One level of the codes."""

    size: int
    """Codes that there are (K)."""
    used: int
    """Codes that at least one item has."""
    usage: float
    """used / size."""
    perplexity: float
    """exp of the entropy of the codes' shares of items: K where they are used evenly; 0 where no item has a code."""
    gini: float
    """Gini coefficient of the items a code, unused codes included: 0 even, 1 - 1/K where one code has all."""
    error: float | None
    """Share of the vectors' variance that this level and those before it leave over; None where it is not known."""


@dataclass(frozen=True)
class CodebookReport:
    """All levels, and the codes as wholes."""

    levels: tuple[LevelReport, ...]
    items: int
    distinct: int
    """Different codes."""
    collision_rate: float
    """1 - distinct / items."""
    largest_group: int
    """Items of the code that most items share."""
    colliding_items: int
    """Items that share their code with another."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"levels": [asdict(level) for level in self.levels]}

    def table(self) -> Table:
        """One row a level; collisions in the title."""
        table = Table(
            title=f"codes: {self.items:,} items, {self.distinct:,} distinct, collision rate {self.collision_rate:.2%}, "
            f"largest group {self.largest_group:,}"
        )
        for name in ("level", "codes", "used", "usage", "perplexity", "gini", "error"):
            table.add_column(name, justify="right")
        for i, level in enumerate(self.levels):
            error = "-" if level.error is None else f"{level.error:.4f}"
            shown = (f"{level.size:,}", f"{level.used:,}", f"{level.usage:.1%}", f"{level.perplexity:.1f}", f"{level.gini:.3f}")
            table.add_row(str(i + 1), *shown, error)
        return table


def codebook_report(levels: np.ndarray, sizes: Sequence[int], errors: np.ndarray | None = None) -> CodebookReport:
    """Counts the codes.

    Args:
        levels: int32 [n, L], -1 after the end of a code.
        sizes: codes of each level, L of them.
        errors: float64 of the first levels, such as `Quantiser.level_errors` gives; None: not known.
    """
    if len(sizes) != levels.shape[1]:
        raise ValueError(f"{len(sizes)} sizes for {levels.shape[1]} levels")
    known = [] if errors is None else [float(error) for error in errors]
    known += [None] * (len(sizes) - len(known))
    parts = tuple(_level(levels[:, i], size, known[i]) for i, size in enumerate(sizes))
    counts = np.bincount(group_index(levels))
    n = len(levels)
    return CodebookReport(
        parts,
        items=n,
        distinct=len(counts),
        collision_rate=1 - len(counts) / n,
        largest_group=int(counts.max()),
        colliding_items=int(counts[counts > 1].sum()),
    )


def _level(codes: np.ndarray, size: int, error: float | None) -> LevelReport:
    counts = np.bincount(codes[codes >= 0], minlength=size)
    if len(counts) > size:
        raise ValueError(f"code {len(counts) - 1} in a level of {size}")
    total = int(counts.sum())
    used = int((counts > 0).sum())
    perplexity = gini = 0.0
    if total:
        shares = counts[counts > 0] / total
        perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
        places = 2 * np.arange(1, size + 1) - size - 1
        gini = float((places * np.sort(counts)).sum() / (size * total))
    return LevelReport(size, used, used / size, perplexity, gini, error)
