"""One user a line: user id, then item ids in time order, separated by white space (the layout of S3-Rec)."""

from pathlib import Path

import polars as pl

from sftrec_jax.data.table import Table
from sftrec_jax.data.textfile import read_utf8
from sftrec_jax.errors import UserError


def read_sequences(path: Path) -> Table:
    """Reads `user item item ...` lines to a table of user, item and row (the line), interactions in file order.

    Empty lines are skipped. UserError when a user has two lines, or no item.
    """
    users: list[str] = []
    items: list[list[str]] = []
    rows: list[int] = []
    seen: dict[str, int] = {}
    for row, line in enumerate(read_utf8(path).decode("utf-8").split("\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        user = fields[0]
        if user in seen:
            raise UserError(f"{path}: user {user!r} has rows {seen[user]} and {row}; join them into one line in time order")
        if len(fields) == 1:
            raise UserError(f"{path}: row {row}: user {user!r} has no item; remove the row")
        seen[user] = row
        users.append(user)
        items.append(fields[1:])
        rows.append(row)
    schema = {"user": pl.String, "item": pl.List(pl.String), "row": pl.Int64}
    frame = pl.DataFrame({"user": users, "item": items, "row": rows}, schema=schema)
    return Table(frame.explode("item"), str(path), in_order=True)
