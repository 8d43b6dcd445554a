"""Files to tables: CSV, TSV, Parquet, JSON lines, RecBole atomic files; each may be gzipped."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from polars.exceptions import PolarsError

from sftrec_jax.data.recbole import strip_types
from sftrec_jax.data.table import Column, Table, by_role, require_columns
from sftrec_jax.data.textfile import extension, read_bytes, read_utf8
from sftrec_jax.errors import UserError

TABLE_EXTENSIONS = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json", ".inter", ".item")
KEY = "item_id"
"""Name under which the key of a `.json` object stands beside the fields of its value."""


def read_table(path: Path, columns: Sequence[Column]) -> Table:
    """Reads the named columns of a file; the extension tells the format.

    Text formats give every value as text, so that ids keep their spelling; Parquet keeps its types.
    UserError for a missing or damaged file, an unknown extension, a missing column, a malformed row.
    """
    kind = extension(path)
    if kind in (".csv", ".tsv", ".inter", ".item"):
        return _read_delimited(path, kind, columns)
    if kind in (".jsonl", ".ndjson"):
        return _read_json_lines(path, columns)
    if kind == ".json":
        return _read_json_object(path, columns)
    if kind == ".parquet":
        return _read_parquet(path, columns)
    raise unknown_type(path, TABLE_EXTENSIONS)


def unknown_type(path: Path, known: Sequence[str]) -> UserError:
    """The error for a file name whose extension no reader knows."""
    kind = extension(path)
    found = f"unknown file type {kind!r}" if kind else "the name has no extension"
    return UserError(f"{path}: {found}; convert the file to one of {', '.join(known)}, or .gz of it")


def _read_delimited(path: Path, kind: str, columns: Sequence[Column]) -> Table:
    data = read_utf8(path)
    separator = "," if kind == ".csv" else "\t"
    quote = '"' if kind in (".csv", ".tsv") else None
    if not data.strip():
        require_columns(str(path), columns, [])
    try:
        frame = pl.read_csv(io.BytesIO(data), separator=separator, quote_char=quote, infer_schema=False)
    except PolarsError as error:
        raise UserError(_malformed_row(path, data, separator, quote, error)) from None
    if kind in (".inter", ".item"):
        frame = frame.rename(strip_types(str(path), frame.columns))
    require_columns(str(path), columns, frame.columns)
    numbered = frame.with_columns(pl.int_range(2, pl.len() + 2, dtype=pl.Int64).alias("\0row"))
    filled = numbered.filter(~pl.all_horizontal(pl.col(frame.columns).is_null()))  # an empty line reads as a row of nulls
    return Table(by_role(filled, columns, pl.col("\0row")), str(path))


def _malformed_row(path: Path, data: bytes, separator: str, quote: str | None, error: PolarsError) -> str:
    reader = csv.reader(
        io.StringIO(data.decode("utf-8"), newline=""),
        delimiter=separator,
        quotechar=quote,
        quoting=csv.QUOTE_NONE if quote is None else csv.QUOTE_MINIMAL,
        strict=True,
    )
    row, width = 0, 0
    try:
        for row, fields in enumerate(reader, start=1):
            width = width or len(fields)
            if len(fields) > width:
                return f"{path}: row {row} has {len(fields)} fields, the header {width}; quote fields that hold {separator!r}"
    except csv.Error:
        return f"{path}: row {row + 1} has a quotation mark that does not end its field; double it or quote the whole field"
    return f"{path}: cannot be parsed ({_first_line(error)}); check quotation marks and separators"


def _read_json_lines(path: Path, columns: Sequence[Column]) -> Table:
    data = read_utf8(path)
    lines = data.split(b"\n")
    rows = [number for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        require_columns(str(path), columns, [])
    schema: dict[str, type[pl.DataType]] = {column.name: pl.String for column in columns}
    try:
        frame = pl.read_ndjson(io.BytesIO(data), schema=schema)
    except PolarsError as error:
        frame, reason = None, _first_line(error)
    else:
        reason = f"{frame.height} objects in {len(rows)} lines"
    if frame is None or frame.height != len(rows):
        for number in rows:
            problem = _json_problem(lines[number - 1])
            if problem:
                raise UserError(f"{path}: row {number} is not a JSON object ({problem}); write one object a line")
        raise UserError(f"{path}: cannot be parsed ({reason}); write one JSON object a line")
    for column in columns:
        if frame[column.name].null_count() == frame.height:
            present = list(dict.fromkeys(key for number in rows[:100] for key in json.loads(lines[number - 1])))
            require_columns(str(path), [column], present)
    return Table(by_role(frame, columns, pl.Series(rows)), str(path))


def _json_problem(line: bytes) -> str:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(line, parse_constant=refuse)
    except ValueError as error:
        return str(error)
    return "" if isinstance(value, dict) else f"found {type(value).__name__}"


def _read_json_object(path: Path, columns: Sequence[Column]) -> Table:
    """{"0": {"title": ...}, ...} as MiniOneRec's item.json: a row an entry, counted from 1, its key as `item_id`."""
    form = 'write it as {"ITEM": {"title": ...}}, or as .jsonl'
    try:
        entries = json.loads(read_utf8(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {form}") from None
    if not isinstance(entries, dict) or not all(isinstance(value, dict) for value in entries.values()):
        raise UserError(f"{path}: not an object of objects; {form}")
    present = list(dict.fromkeys([KEY, *(name for value in entries.values() for name in value)]))
    require_columns(str(path), columns, present)
    names = {column.name for column in columns}
    rows = [{name: _as_text(({KEY: key} | value).get(name)) for name in names} for key, value in entries.items()]
    frame = pl.DataFrame(rows, schema={name: pl.String for name in names})
    return Table(by_role(frame, columns, pl.int_range(1, pl.len() + 1)), str(path))


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_parquet(path: Path, columns: Sequence[Column]) -> Table:
    data = read_bytes(path)
    try:
        present = list(pl.read_parquet_schema(io.BytesIO(data)))
        require_columns(str(path), columns, present)
        frame = pl.read_parquet(io.BytesIO(data), columns=list(dict.fromkeys(c.name for c in columns)))
    except (PolarsError, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)}); write or download it again") from None
    return Table(by_role(frame, columns, pl.int_range(1, pl.len() + 1)), str(path))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
