"""A table read from a source: the columns asked for, under the names of their roles, and each row's place in the file."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from sftrec_jax.errors import UserError


@dataclass(frozen=True)
class Column:
    """A column that the configuration asks for."""

    role: str
    """Name of the column in `Table.frame`: user, item, time, rating or title."""
    name: str
    """Name of the column in the source."""
    setting: str
    """Configuration key that chose the name, for messages."""
    sparse: bool = False
    """Whether most rows may lack it."""


@dataclass(frozen=True)
class Table:
    """Columns by role, and `row` (Int64): where the row stands in the source, a header being row 1."""

    frame: pl.DataFrame
    where: str
    """The source, for messages."""


def require_columns(where: str, columns: Sequence[Column], present: Sequence[str]) -> None:
    """UserError for the first column that the source lacks; it lists what there is and the nearest name."""
    for column in columns:
        if column.name in present:
            continue
        if not present:
            raise UserError(f"{where}: no column {column.name!r}, the file is empty; name a file with a header")
        # The comparison takes time with the square of the length.
        lowered = {name.lower(): name for name in present[:1000] if len(name) <= 100}
        close = difflib.get_close_matches(column.name.lower()[:100], list(lowered), n=1, cutoff=0.0)
        nearest = lowered[close[0]] if close else present[0]
        shown = ", ".join(name if len(name) <= 100 else f"{name[:97]}..." for name in present[:20])
        shown += ", ..." if len(present) > 20 else ""
        way_out = f"set {column.setting} (nearest: {nearest!r})"
        if column.role == "time":
            way_out += ", or null if each user's rows are in time order"
        raise UserError(f"{where}: no column {column.name!r}; it has {shown}; {way_out}")


def by_role(frame: pl.DataFrame, columns: Sequence[Column], rows: pl.Series | pl.Expr) -> pl.DataFrame:
    """Renames the columns asked for to their roles and adds `row`."""
    return frame.select(*(pl.col(c.name).alias(c.role) for c in columns), rows.cast(pl.Int64).alias("row"))
