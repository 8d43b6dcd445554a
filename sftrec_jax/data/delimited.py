"""CSV, TSV and RecBole's atomic files, in blocks."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
from polars.exceptions import PolarsError

from sftrec_jax.data.recbole import strip_types
from sftrec_jax.data.table import Column, Table, by_role, require_columns
from sftrec_jax.data.textfile import Block, pieces, text_blocks
from sftrec_jax.errors import UserError

ATOMIC = (".inter", ".item", ".user")
COLUMNS = 50_000
"""Most of a file; each takes memory, whatever it holds."""
CELLS = 1 << 22
"""Most that are parsed at once, where lines are short: a line of one byte is a row of all columns."""


def read_delimited(path: Path, kind: str, columns: Sequence[Column]) -> Iterator[Table]:
    """Every value as text. UserError for a missing column and a malformed row."""
    separator = "," if kind == ".csv" else "\t"
    quote = None if kind in ATOMIC else '"'
    header, rows = b"", 0
    for block in _blocks(path, separator.encode(), None if quote is None else b'"'):
        data = header + block.data
        if not data.strip():
            continue
        if not header and (count := data.count(separator.encode(), 0, data.find(b"\n") % (len(data) + 1)) + 1) > COLUMNS:
            raise UserError(f"{path}: row 1 has {count:,} fields; keep the columns that are needed, {COLUMNS:,} at most")
        try:
            frame = pl.read_csv(io.BytesIO(data), separator=separator, quote_char=quote, infer_schema=False)
        except PolarsError as error:
            raise UserError(_malformed_row(path, data, separator, quote, error, rows)) from None
        if not header:
            end = data.find(b"\n") + 1  # a header has no line break in a name
            header = data[:end] if end else data
        if kind in ATOMIC:
            frame = frame.rename(strip_types(str(path), frame.columns))
        require_columns(str(path), columns, frame.columns)
        numbered = frame.with_columns(pl.int_range(2 + rows, pl.len() + 2 + rows, dtype=pl.Int64).alias("\0row"))
        rows += frame.height
        # An empty line reads as a row of nulls.
        filled = numbered.filter(~pl.all_horizontal(pl.col(frame.columns).is_null()))
        yield Table(by_role(filled, columns, pl.col("\0row")), str(path))
    if not header:
        require_columns(str(path), columns, [])


def _blocks(path: Path, separator: bytes, quote: bytes | None) -> Iterator[Block]:
    columns = 0
    for block in text_blocks(path, quote):
        columns = columns or block.data.count(separator, 0, block.data.find(b"\n") % (len(block.data) + 1)) + 1
        yield from pieces(block, max(1, CELLS // columns), quote)


def _malformed_row(path: Path, data: bytes, separator: str, quote: str | None, error: PolarsError, before: int) -> str:
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
                found = f"row {row + before} has {len(fields)} fields, the header {width}"
                return f"{path}: {found}; quote fields that hold {separator!r}"
    except csv.Error as problem:
        if "field limit" in str(problem):
            limit = csv.field_size_limit()
            return f"{path}: row {row + 1 + before} has a field of more than {limit:,} characters; check quotation marks there"
        return (
            f"{path}: row {row + 1 + before} has a quotation mark that does not end its field; double it or quote the whole field"
        )
    reason = str(error).strip().split("\n")[0].rstrip(".")
    return f"{path}: cannot be parsed ({reason}); check quotation marks and separators"
