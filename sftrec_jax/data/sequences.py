"""A user's items in one place, in time order: a line of text each (S3-Rec), or an entry of a JSON object (LC-Rec, LETTER)."""

import re
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from sftrec_jax.data.json_files import encodable, load_object
from sftrec_jax.data.table import Table
from sftrec_jax.data.textfile import beginning, text_blocks
from sftrec_jax.errors import UserError

_SCHEMA = {"user": pl.String, "item": pl.List(pl.String), "row": pl.Int64}


def read_sequences(path: Path) -> Iterator[Table]:
    """Reads `user item item ...` lines to tables of user, item and row (the line), interactions in file order.

    Empty lines are skipped. UserError when a user has two lines, or no item.
    """
    seen: dict[str, int] = {}
    for block in text_blocks(path, size=1 << 23):
        users, items, rows = [], [], []
        for row, line in enumerate(block.data.decode("utf-8").split("\n"), start=block.lines + 1):
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
        frame = pl.DataFrame({"user": users, "item": items, "row": rows}, schema=_SCHEMA)
        yield Table(frame.explode("item"), str(path))


_FORM = 'write it as {"USER": [ITEM, ...]}'


def is_json_sequences(path: Path) -> bool:
    """Whether the first value of a JSON object is a list."""
    if not path.is_file():
        return False
    return re.match(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\[', beginning(path, 1 << 16)) is not None


def read_json_sequences(path: Path) -> Table:
    """An object of lists to a table of user, item and row (the entry). UserError for a user without items and other values."""
    users: list[str] = []
    items: list[list[str]] = []
    for row, (user, value) in enumerate(load_object(path, _FORM).items(), start=1):
        if not isinstance(value, list) or not all(isinstance(item, str | int) and not isinstance(item, bool) for item in value):
            raise UserError(f"{path}: entry {row}: user {user!r} has no list of item ids; {_FORM}")
        if not value:
            raise UserError(f"{path}: entry {row}: user {user!r} has no item; remove the entry")
        texts = [str(item) for item in value]
        if not encodable("".join([user, *texts])):
            raise UserError(f"{path}: entry {row}: user {user!r} or an item is no text (half of a surrogate pair); {_FORM}")
        users.append(user)
        items.append(texts)
    frame = pl.DataFrame({"user": users, "item": items, "row": range(1, len(users) + 1)}, schema=_SCHEMA)
    return Table(frame.explode("item"), str(path))
