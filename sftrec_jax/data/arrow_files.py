"""Parquet and Arrow files in batches of rows: Parquet as Spark, Beam and BigQuery shard it, folders of Hugging Face datasets."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sftrec_jax.data.table import Column, Table, by_role, require_columns
from sftrec_jax.data.textfile import read_bytes
from sftrec_jax.errors import UserError

ROWS = 1 << 20
"""Of a batch, at most."""
ROOM = 1 << 29
"""Bytes that the texts of a column may take in a batch."""
SHORT = ROOM // ROWS
LARGE = 1 << 24
"""Bytes of a file from which on its statistics are believed."""


def read_parquet(path: Path, columns: Sequence[Column]) -> Iterator[Table]:
    """Types are kept. Columns that are not in the file may be in the names of its folders, as in `date=2024-01-01/`."""
    if not path.exists():
        raise UserError(f"{path}: cannot read the file (No such file or directory); correct the path in the data section")
    folders = dict(part.split("=", 1) for part in path.parts[:-1] if "=" in part)
    names = list(dict.fromkeys(column.name for column in columns))
    row = 0
    try:
        source = io.BytesIO(read_bytes(path)) if path.suffix == ".gz" else path
        with pq.ParquetFile(source) as file:
            present = file.schema_arrow.names
            require_columns(str(path), columns, [*present, *(name for name in folders if name not in present)])
            own = [name for name in names if name in present]
            more = {name: folders[name] for name in names if name not in present}
            for batch in file.iter_batches(batch_size=_rows_at_once(source, file, own), columns=own):
                yield _table(path, batch, columns, more, row)
                row += batch.num_rows
            if row == 0:
                empty = pa.RecordBatch.from_pylist([], schema=pa.schema([file.schema_arrow.field(name) for name in own]))
                yield _table(path, empty, columns, more, 0)
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)}); write or download it again") from None


def _rows_at_once(source: Path | io.BytesIO, file: pq.ParquetFile, names: Sequence[str]) -> int:
    """Rows of a batch: fewer than `ROWS` where texts are long.

    A file of a few kilobytes may hold one long text in a dictionary and say that a million rows have it: dictionaries come first,
    but for those of large files that claim to have short texts. Reading them takes a tenth of a second for a million rows.
    """
    trusted = source.stat().st_size > LARGE if isinstance(source, Path) else False
    longest, told = SHORT, file.metadata
    dictionaries: dict[str, list[int]] = {}
    texts = {
        at: file.schema.column(at).path for at in range(len(file.schema)) if file.schema.column(at).physical_type == "BYTE_ARRAY"
    }
    texts = {at: path for at, path in texts.items() if path.split(".")[0] in names}
    tops = sorted({path.split(".")[0] for path in texts.values()})
    for group in range(told.num_row_groups) if texts else ():
        # To ask what a damaged file says of a column ends the process; reading a row of it is an error that can be told.
        next(file.iter_batches(batch_size=1, row_groups=[group], columns=tops), None)
        for place, path in texts.items():
            chunk = told.row_group(group).column(place)
            if chunk.total_uncompressed_size <= SHORT:
                continue
            said = chunk.statistics if trusted else None
            short = said is not None and said.has_min_max and max(_size(said.min), _size(said.max)) <= SHORT
            if not short and path in names and any("DICTIONARY" in encoding for encoding in chunk.encodings):
                dictionaries.setdefault(path, []).append(group)
            longest = max(longest, chunk.total_uncompressed_size // max(1, chunk.num_values))
    for name, groups in dictionaries.items():
        with pq.ParquetFile(source, metadata=told, read_dictionary=[name]) as kept:
            for group in groups:
                for batch in kept.iter_batches(batch_size=1, row_groups=[group], columns=[name]):
                    values = batch.column(0)
                    if isinstance(values, pa.DictionaryArray) and len(values.dictionary):
                        kinds = pl.Series(pc.cast(values.dictionary, pa.large_binary()))
                        longest = max(longest, int(kinds.bin.size().max() or 0))  # type: ignore[arg-type]
                    break
    return max(1, ROOM // longest)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else ROOM


def read_dataset_folder(folder: Path, columns: Sequence[Column]) -> Iterator[Table]:
    """A folder as `Dataset.save_to_disk` of Hugging Face datasets leaves it. Rows count from 1 over all of its files."""
    row = 0
    files = _arrow_files(folder)
    for name in files:
        path = folder / name
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                require_columns(str(folder), columns, reader.schema.names)
                names = list(dict.fromkeys(column.name for column in columns))
                for batch in reader:
                    for begin in range(0, batch.num_rows, ROWS):
                        some = batch.slice(begin, ROWS).select(names)
                        yield _table(folder, some, columns, {}, row)
                        row += some.num_rows
                if row == 0 and name == files[-1]:
                    empty = pa.RecordBatch.from_pylist([], schema=pa.schema([reader.schema.field(name) for name in names]))
                    yield _table(folder, empty, columns, {}, 0)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: not a readable Arrow file ({_first_line(error)}); save the data set again") from None


def is_dataset_folder(folder: Path) -> bool:
    """Whether Hugging Face datasets wrote the folder; UserError for one of several splits, which are folders below it."""
    splits = folder / "dataset_dict.json"
    if splits.exists():
        found = _json(splits)
        names = found.get("splits") if isinstance(found, dict) else None
        names = [str(name) for name in names] if isinstance(names, list) and names else ["train"]
        raise UserError(f"{folder}: holds the splits {', '.join(names)}; name one, such as {folder}/{names[0]}")
    return (folder / "state.json").exists() and (folder / "dataset_info.json").exists()


def _arrow_files(folder: Path) -> list[str]:
    state = folder / "state.json"
    try:
        names = [str(entry["filename"]) for entry in _json(state)["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{state}: does not name the files of the data set; save it again with Dataset.save_to_disk") from None
    if not names:
        raise UserError(f"{state}: names no file of the data set; save it again with Dataset.save_to_disk")
    if any(Path(name).name != name for name in names):
        raise UserError(f"{state}: names files outside of {folder}; save the data set again with Dataset.save_to_disk")
    return names


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save the data set again with Dataset.save_to_disk") from None


def _table(where: Path, batch: pa.RecordBatch, columns: Sequence[Column], more: dict[str, str], row: int) -> Table:
    for field in batch.schema:
        if not _plain(field.type):
            raise UserError(
                f"{where}: column {field.name!r} holds {field.type}; write it as text, numbers, dates or lists of them"
            )
    batch.validate(full=True)  # whoever wrote the file: lengths, offsets and UTF-8 that are wrong end the process later
    frame = pl.DataFrame(pa.table(batch.columns, names=batch.schema.names))  # without metadata, which may be no text
    frame = frame.with_columns(**{name: pl.lit(value) for name, value in more.items()})
    return Table(by_role(frame, columns, pl.int_range(row + 1, row + pl.len() + 1)), str(where))


def _plain(kind: pa.DataType) -> bool:
    """Whether Polars has such a type."""
    if (
        pa.types.is_dictionary(kind)
        or pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
    ):
        return _plain(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_plain(kind.field(place).type) for place in range(kind.num_fields))
    return any(fits(kind) for fits in _PLAIN)


_PLAIN = (
    pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_string,
    pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_date,
    pa.types.is_timestamp, pa.types.is_time, pa.types.is_decimal128,
)  # fmt: skip


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
