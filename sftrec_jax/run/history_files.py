"""Files of histories, read a shard at a time: a million of them take no more memory than a shard."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sftrec_jax.data.textfile import text_blocks
from sftrec_jax.data.told import Told
from sftrec_jax.errors import UserError
from sftrec_jax.items.titles import TitleIndex
from sftrec_jax.run.session import Session

BLOCK = 1 << 22
"""Bytes of text that are read at once."""
ROWS = 1024
"""Of a Parquet file that are turned into Python's values at once."""
LINES = (".jsonl", ".txt")


class Histories(NamedTuple):
    """Some people: names, histories (int32 [n] items, oldest first), and what else is told of each."""

    names: list[str]
    items: list[np.ndarray]
    told: list[Told]


class Shard(NamedTuple):
    """Rows of a file that stand one after the other."""

    first: int
    """Row, from 1."""
    size: int
    source: str
    """SHA-256 of the rows; "" for what stands in no file."""
    read: Callable[[], Histories]
    """What they hold. UserError with file and row."""


def file_shards(session: Session, path: Path, size: int) -> Iterator[Shard]:
    """The file in shards of `size` histories, the last one shorter.

    `.jsonl` or `.parquet`: column `history` with a list of item ids or titles (or one text with `;` between them), and
    optionally `user`, `ratings` and `timestamps` (lists as long as the history), and the fields of profiles. `.txt`: a line a
    user, titles or ids with `;` between them.

    Raises: UserError for a file that cannot be read or holds nothing; a shard's rows are looked at by its `read`.
    """
    check_file(path)
    index = TitleIndex(session.codes.titles, session.dataset.item_ids)
    by_id = {str(item): i for i, item in enumerate(session.dataset.item_ids)}
    profile = session.prompts.writer.profile
    rows = _lines(path) if path.suffix in LINES else _parquet_rows(path, ("history", "user", "ratings", "timestamps", *profile))
    first = 1
    while some := list(islice(rows, size)):

        def read(some: list[Any] = some, first: int = first) -> Histories:
            return _histories(path, _entries(path, some, first), first, index, by_id, profile)

        yield Shard(first, len(some), _digest(some), read)
        first += len(some)
    if first == 1:
        raise UserError(f"{path}: holds no history; write at least one row")


def check_file(path: Path) -> None:
    """UserError for a file that is not there, and for an ending that is none of `file_shards`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .jsonl, .parquet or .txt file of histories")
    if path.suffix not in (*LINES, ".parquet"):
        raise UserError(f"{path}: unknown ending {path.suffix!r}; use .jsonl, .parquet or .txt")


def count_rows(path: Path) -> int:
    """How many histories a file holds, from its footer or its line breaks; for telling how far a job is."""
    if path.suffix == ".parquet":
        with _opened(path) as file:
            return file.metadata.num_rows
    return sum(block.data.count(b"\n") + (not block.data.endswith(b"\n")) for block in text_blocks(path, size=BLOCK))


def _lines(path: Path) -> Iterator[bytes]:
    """Lines without their breaks; those of JSON lines that hold nothing are no rows."""
    for block in text_blocks(path, size=BLOCK):
        lines = block.data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for line in lines:
            if path.suffix == ".txt" or line.strip():
                yield line.removesuffix(b"\r")


def _opened(path: Path) -> pq.ParquetFile:
    try:
        # With a buffer a row group, which may be the whole file, is read in pieces.
        return pq.ParquetFile(path, buffer_size=BLOCK)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    with _opened(path) as file:
        present = file.schema_arrow.names
        if "history" not in present and file.metadata.num_rows:
            raise _no_history(path, 1, present)
        try:
            for batch in file.iter_batches(batch_size=ROWS, columns=[name for name in dict.fromkeys(columns) if name in present]):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); write it again")


def _no_history(path: Path, row: int, columns: Iterable[str]) -> UserError:
    return UserError(f"{path}: row {row} has no column `history`, it has {', '.join(columns)}; rename the column")


def _digest(rows: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row if isinstance(row, bytes) else json.dumps(row, default=str).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def _entries(path: Path, rows: Sequence[Any], first: int) -> list[dict[str, Any]]:
    if path.suffix == ".txt":
        return [{"history": row.decode("utf-8")} for row in rows]
    if path.suffix == ".parquet":
        return list(rows)
    entries = []
    for number, row in enumerate(rows, start=first):
        try:
            entry = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: row {number} is not a JSON object ({error}); write one object a line") from None
        if not isinstance(entry, dict):
            raise UserError(
                f"{path}: row {number} is not a JSON object but {row[:40].decode(errors='replace')!r}; write one object a line"
            )
        entries.append(entry)
    # Writers such as Spark leave out a field that is null, so that a row without a history may lack it; but not all rows.
    if all("history" not in entry for entry in entries):
        raise _no_history(path, first, entries[0])
    return entries


def _histories(
    path: Path,
    rows: Sequence[dict[str, Any]],
    first: int,
    index: TitleIndex,
    by_id: dict[str, int],
    profile: Sequence[str],
) -> Histories:
    names, histories, told = [], [], []
    for number, row in enumerate(rows, start=first):
        name = str(number if row.get("user") is None else row["user"])
        try:
            name.encode()
            items = _items(row.get("history"), index, by_id)
            told.append(_told(row, len(items), profile))
        except UnicodeEncodeError:
            raise UserError(f"{path}: row {number}: user is {name!r}, which is half a character; write UTF-8 text") from None
        except UserError as error:
            raise UserError(f"{path}: row {number}: {error}") from None
        names.append(name)
        histories.append(np.asarray(items, np.int32))
    return Histories(names, histories, told)


def _told(row: dict[str, Any], count: int, profile: Sequence[str]) -> Told:
    lists: dict[str, np.ndarray | None] = {}
    for name, kind in (("ratings", np.float32), ("timestamps", np.int64)):
        values = row.get(name)
        if values is None:
            lists[name] = None
            continue
        if not isinstance(values, list) or len(values) != count or not all(isinstance(v, int | float) for v in values):
            raise UserError(f"{name} is {values!r}; write a list of {count} numbers, one for each item of the history")
        try:
            lists[name] = np.asarray(values, kind)
        except (ValueError, OverflowError):  # no whole seconds can be made of NaN, or of more than 64 bits
            raise UserError(f"{name} is {values!r}; write numbers that 64 bits can hold") from None
    times = lists["timestamps"]
    gaps = None if times is None else np.diff(times, prepend=times[:1] + 1)
    fields = {name: str(row[name]) for name in profile if row.get(name) is not None}
    return Told(lists["ratings"], times, gaps, {}, fields)


def _items(value: Any, index: TitleIndex, by_id: dict[str, int]) -> list[int]:
    """Item indices of a cell: text with `;` between titles, or a list of ids or titles; null is an empty history."""
    if isinstance(value, str):
        return index.split(value)
    if not isinstance(value, list | None):
        raise UserError(f"history is {value!r}; write a list of item ids or titles, or titles with `;` between them")
    return [i for v in value or [] for i in ([by_id[str(v)]] if str(v) in by_id else index.split(str(v)))]
