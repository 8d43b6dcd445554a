"""Data that come as examples: rows of a history and the item after it, in files of their own for train, validation and test."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sftrec_jax.config import DataConfig
from sftrec_jax.data.columns import text_ids
from sftrec_jax.data.json_files import LITERAL, encodable
from sftrec_jax.data.readers import read_table
from sftrec_jax.data.splits import Split
from sftrec_jax.data.table import Column, Table
from sftrec_jax.errors import UserError

PARTS = ("test", "train", "valid")
"""Sorted, as the names of the rows are."""


@dataclass(frozen=True, eq=False)
class Examples:
    """All rows, test before train before validation, each a history of its own that ends with the target."""

    names: list[str]
    """[U] part and row in its file, such as `test:00017`; sorted."""
    items: pl.Series
    """Text [N] item ids, history by history."""
    rows: np.ndarray
    """int64 [N] row of the file."""
    offsets: np.ndarray
    """int64 [U + 1]"""
    split: Split
    train_begin: np.ndarray
    """int64 [U], position of the target in rows of train, 0 elsewhere."""
    counts: dict[str, int]
    """Rows of each part."""
    where: list[str]
    """[U] file of each row, for messages."""


def read_examples(config: DataConfig) -> Examples:
    """Reads `data.source`, `data.valid_source` and `data.test_source`.

    Histories are lists: of Parquet, JSON arrays, or Python literals as in the files of BIGRec, D3 and MiniOneRec; a literal
    is parsed, never run. UserError for a row that has no list, and for a part without rows.
    """
    assert config.history_column is not None
    files = {"train": config.source, "valid": config.valid_source, "test": config.test_source}
    columns = [
        Column("history", config.history_column, "data.history_column"),
        Column("item", config.item_column, "data.item_column"),
    ]
    names: list[str] = []
    histories: list[list[str]] = []
    numbers: list[int] = []
    where: list[str] = []
    counts: dict[str, int] = {}
    for part in PARTS:
        file = files[part]
        if file is None:
            counts[part] = 0
            continue
        table = read_table(Path(file), columns)
        if table.frame.height == 0:
            raise UserError(f"{file}: has no row; name a file with at least one example, or set data.{_setting(part)}: null")
        targets, rows = text_ids(table, "item").to_list(), table.frame["row"].to_list()
        width = len(str(rows[-1]))
        for history, target, row in zip(_lists(table), targets, rows, strict=True):
            names.append(f"{part}:{row:0{width}d}")
            histories.append([*history, target])
        numbers += rows
        where += [table.where] * len(rows)
        counts[part] = len(rows)
    lengths = np.asarray([len(h) for h in histories], np.int64)
    kind = np.asarray([name[: name.index(":")] for name in names])
    at = {part: np.where(kind == part, lengths - 1, np.int64(-1)) for part in PARTS}
    return Examples(
        names=names,
        items=pl.Series("item", [item for history in histories for item in history], dtype=pl.String),
        rows=np.repeat(np.asarray(numbers, np.int64), lengths),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        split=Split(np.where(kind == "train", lengths, 0), at["valid"], at["test"]),
        train_begin=np.maximum(at["train"], 0),
        counts=counts,
        where=where,
    )


def _setting(part: str) -> str:
    return "source" if part == "train" else f"{part}_source"


def _lists(table: Table) -> list[list[str]]:
    values, rows = table.frame["history"], table.frame["row"].to_list()
    nested = isinstance(values.dtype, pl.List)
    if not nested and values.dtype != pl.String:
        raise UserError(f"{table.where}: data.history_column holds {values.dtype}; name a column of lists such as [12, 7]")
    out = []
    for value, row in zip(values.to_list(), rows, strict=True):
        parsed = value if nested else _literal(value)
        if not isinstance(parsed, list | tuple) or not all(isinstance(i, str | int) and i != "" for i in parsed):
            raise UserError(f"{table.where}: row {row} has the history {value!r}, which is no list of item ids such as [12, 7]")
        texts = [str(i) for i in parsed]
        if not encodable("".join(texts)):
            raise UserError(f"{table.where}: row {row} has an id that is no text (half of a surrogate pair); write ids in UTF-8")
        out.append(texts)
    return out


def _literal(text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError):
        pass
    if len(text or "") > LITERAL:
        return None
    try:
        return ast.literal_eval(text or "")
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
