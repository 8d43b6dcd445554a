"""JSON lines (also Python literals, as in the Amazon dumps of 2014), and JSON objects of objects or of lists."""

import ast
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from polars.exceptions import PolarsError

from sftrec_jax.data.table import Column, Table, by_role, require_columns
from sftrec_jax.data.textfile import Block, beginning, pieces, read_utf8, text_blocks
from sftrec_jax.errors import UserError

_PLAIN = "write texts, numbers and lists of them"
LINES = 1 << 20
"""Most that are parsed at once."""
LITERAL = 1 << 22
"""Most bytes of a line in Python's notation, whose parser takes a hundred times as much."""
KEY = "item_id"
"""Name under which the key of a `.json` object stands beside the fields of its value."""


def read_json_lines(path: Path, columns: Sequence[Column]) -> Iterator[Table]:
    """One object a line. UserError for a line that is none, for a column that the first block of lines lacks, and for a sparse
    one that all lack."""
    awaited, present = [column for column in columns if column.sparse], []
    for block in (piece for whole in text_blocks(path) for piece in pieces(whole, LINES)):
        lines = block.data.split(b"\n")
        rows = [number for number, line in enumerate(lines, start=1) if line.strip()]
        if not rows:
            continue
        frame = _read_block(path, block, lines, rows, list(dict.fromkeys(column.name for column in columns)))
        if not present:
            present = list(dict.fromkeys(key for number in rows[:100] for key in _parsed(lines[number - 1])))
            lacking = [column for column in columns if frame[column.name].null_count() == frame.height and not column.sparse]
            require_columns(str(path), lacking, present)
        awaited = [column for column in awaited if frame[column.name].null_count() == frame.height]
        yield Table(by_role(frame, columns, pl.Series(rows) + block.lines), str(path))
    require_columns(str(path), awaited if present else columns, present)


def _read_block(path: Path, block: Block, lines: Sequence[bytes], rows: Sequence[int], names: Sequence[str]) -> pl.DataFrame:
    """The named fields of the lines that stand in `rows` (from 1 in this block), as text; null where an object lacks one."""
    try:
        frame = pl.read_ndjson(io.BytesIO(block.data), schema={name: pl.String for name in names})
    except PolarsError as error:
        frame, reason = None, str(error).strip().split("\n")[0].rstrip(".")
    else:
        reason = f"{frame.height} objects in {len(rows)} lines"
    if frame is None or frame.height != len(rows):
        entries = _literals([lines[number - 1] for number in rows])
        if entries is None:
            for number in rows:
                if (problem := _json_problem(lines[number - 1])) and _literals([lines[number - 1]]) is None:
                    where = f"{path}: row {number + block.lines}"
                    raise UserError(f"{where} is not a JSON object ({problem}); write one object a line")
            raise UserError(f"{path}: cannot be parsed ({reason}); write one JSON object a line")
        try:
            texts = [{name: _as_text(entry.get(name)) for name in names} for entry in entries]
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: rows {rows[0] + block.lines} to {rows[-1] + block.lines}: {error}; {_PLAIN}") from None
        frame = pl.DataFrame(texts, schema={name: pl.String for name in names})
    return frame


def _parsed(line: bytes) -> dict[str, Any]:
    """A line that `_read_block` took."""
    return (_literals([line]) or [{}])[0] if _json_problem(line) else json.loads(line)


def _json_problem(line: bytes) -> str:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(line, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        return str(error)
    return "" if isinstance(value, dict) else f"found {type(value).__name__}"


def _literals(lines: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """Lines that are dictionaries in Python's notation, which is parsed and never run; None where one is not."""
    out = []
    for line in lines:
        if len(line) > LITERAL:
            return None
        try:
            value = ast.literal_eval(line.decode("utf-8").strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        out.append(value)
    return out


def is_lines(path: Path) -> bool:
    """Whether a `.json` file has an object in its first line and goes on, as dumps of JSON lines do."""
    first, _, rest = beginning(path).lstrip().partition(b"\n")
    return bool(rest.strip()) and (not _json_problem(first) or _literals([first]) is not None)


def read_json_object(path: Path, columns: Sequence[Column]) -> Table:
    """{"0": {"title": ...}, ...} as MiniOneRec's item.json: a row an entry, counted from 1, its key as `item_id`."""
    form = 'write it as {"ITEM": {"title": ...}}, or as .jsonl'
    entries = load_object(path, form)
    if not all(isinstance(value, dict) for value in entries.values()):
        raise UserError(f"{path}: not an object of objects; {form}")
    present = list(dict.fromkeys([KEY, *(name for value in entries.values() for name in value)]))
    require_columns(str(path), columns, present)
    names = {column.name for column in columns}
    try:
        rows = [{name: _as_text(({KEY: key} | value).get(name)) for name in names} for key, value in entries.items()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; {_PLAIN}") from None
    frame = pl.DataFrame(rows, schema={name: pl.String for name in names})
    return Table(by_role(frame, columns, pl.int_range(1, pl.len() + 1)), str(path))


def load_object(path: Path, form: str) -> dict[str, Any]:
    """A JSON object. UserError for anything else; `form` says what to write."""
    try:
        entries = json.loads(read_utf8(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {form}") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: not an object of objects; {form}")
    return entries


def _as_text(value: Any) -> str | None:
    """ValueError for half a surrogate pair, which JSON can spell and text cannot hold; TypeError for what JSON cannot hold."""
    text = value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if text is not None and not text.isascii() and not encodable(text):
        raise ValueError(f"{text!r} is no text (half of a surrogate pair)")
    return text


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON's escapes may spell half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
