"""Parquet and Arrow files in batches of rows: Parquet as Spark, Beam and BigQuery shard it, folders of Hugging Face datasets."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from sftrec_jax.data.table import Column, Table, by_role, require_columns
from sftrec_jax.data.textfile import read_bytes
from sftrec_jax.errors import UserError

ROWS = 1 << 20
"""Of a batch."""


def read_parquet(path: Path, columns: Sequence[Column]) -> Iterator[Table]:
    """Types are kept. Columns that are not in the file may be in the names of its folders, as in `date=2024-01-01/`."""
    if not path.exists():
        raise UserError(f"{path}: cannot read the file (No such file or directory); correct the path in the data section")
    folders = dict(part.split("=", 1) for part in path.parts[:-1] if "=" in part)
    names = list(dict.fromkeys(column.name for column in columns))
    row = 0
    try:
        with pq.ParquetFile(io.BytesIO(read_bytes(path)) if path.suffix == ".gz" else path) as file:
            present = file.schema_arrow.names
            require_columns(str(path), columns, [*present, *(name for name in folders if name not in present)])
            own = [name for name in names if name in present]
            more = {name: folders[name] for name in names if name not in present}
            for batch in file.iter_batches(batch_size=ROWS, columns=own):
                yield _table(path, batch, columns, more, row)
                row += batch.num_rows
            if row == 0:
                empty = pa.RecordBatch.from_pylist([], schema=pa.schema([file.schema_arrow.field(name) for name in own]))
                yield _table(path, empty, columns, more, 0)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)}); write or download it again") from None


def read_dataset_folder(folder: Path, columns: Sequence[Column]) -> Iterator[Table]:
    """A folder as `Dataset.save_to_disk` of Hugging Face datasets leaves it. Rows count from 1 over all of its files."""
    row = 0
    for name in _arrow_files(folder):
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
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Arrow file ({_first_line(error)}); save the data set again") from None


def is_dataset_folder(folder: Path) -> bool:
    """Whether Hugging Face datasets wrote the folder; UserError for one of several splits, which are folders below it."""
    splits = folder / "dataset_dict.json"
    if splits.exists():
        names = _json(splits).get("splits") or []
        raise UserError(
            f"{folder}: holds the splits {', '.join(names)}; name one, such as {folder / str((names or ['train'])[0])}"
        )
    return (folder / "state.json").exists() and (folder / "dataset_info.json").exists()


def _arrow_files(folder: Path) -> list[str]:
    state = folder / "state.json"
    try:
        names = [str(entry["filename"]) for entry in _json(state)["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{state}: does not name the files of the data set; save it again with Dataset.save_to_disk") from None
    if any(Path(name).name != name for name in names):
        raise UserError(f"{state}: names files outside of {folder}; save the data set again with Dataset.save_to_disk")
    return names


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save the data set again with Dataset.save_to_disk") from None


def _table(where: Path, batch: pa.RecordBatch, columns: Sequence[Column], more: dict[str, str], row: int) -> Table:
    frame = pl.DataFrame(pa.Table.from_batches([batch]))
    frame = frame.with_columns(**{name: pl.lit(value) for name, value in more.items()})
    return Table(by_role(frame, columns, pl.int_range(row + 1, row + pl.len() + 1)), str(where))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
