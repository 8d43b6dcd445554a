"""Files to tables: CSV, TSV, Parquet, JSON lines, RecBole atomic files; each may be gzipped, or a folder of shards."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from sftrec_jax.data.arrow_files import is_dataset_folder, read_dataset_folder, read_parquet
from sftrec_jax.data.delimited import ATOMIC, read_delimited
from sftrec_jax.data.json_files import is_lines, read_json_lines, read_json_object
from sftrec_jax.data.table import Column, Table
from sftrec_jax.data.textfile import extension
from sftrec_jax.errors import UserError

TABLE_EXTENSIONS = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json", *ATOMIC)


def read_table(path: Path, columns: Sequence[Column]) -> Table:
    """Reads the named columns of a file or a folder of files; the extension tells the format.

    Text formats give every value as text, so that ids keep their spelling; Parquet keeps its types.
    UserError for a missing or damaged file, an unknown extension, a missing column, a malformed row.
    """
    tables = list(read_tables(path, columns))
    if len(tables) == 1:
        return tables[0]
    return Table(pl.concat([table.frame for table in tables], how="vertical_relaxed"), str(path))


def read_tables(path: Path, columns: Sequence[Column]) -> Iterator[Table]:
    """The same in parts of up to a million rows or some tens of megabytes, at least one. Each part names its own file."""
    if path.is_dir():
        if is_dataset_folder(path):
            yield from read_dataset_folder(path, columns)
            return
        for file in shards(path):
            yield from _read_file(file, columns)
        return
    yield from _read_file(path, columns)


def shards(folder: Path) -> list[Path]:
    """The data files below a folder, by name: those of one format, without `_SUCCESS` and hidden ones. UserError for none."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(("_", ".")) for part in file.relative_to(folder).parts)
    )
    kinds = {kind: [file for file in files if extension(file) == kind] for kind in TABLE_EXTENSIONS}
    found = [kind for kind, some in kinds.items() if some]
    if not found:
        raise UserError(f"{folder}: holds no data file; name a folder of files that end in {', '.join(TABLE_EXTENSIONS)}")
    if len(found) > 1:
        raise UserError(
            f"{folder}: holds files of several kinds ({', '.join(found)}); name a folder of shards of one kind, or a file"
        )
    return kinds[found[0]]


def unknown_type(path: Path, known: Sequence[str]) -> UserError:
    """The error for a file name whose extension no reader knows."""
    kind = extension(path)
    found = f"unknown file type {kind!r}" if kind else "the name has no extension"
    return UserError(f"{path}: {found}; convert the file to one of {', '.join(known)}, or .gz of it")


def _read_file(path: Path, columns: Sequence[Column]) -> Iterator[Table]:
    kind = extension(path)
    if kind in (".csv", ".tsv", *ATOMIC):
        return read_delimited(path, kind, columns)
    if kind in (".jsonl", ".ndjson") or (kind == ".json" and is_lines(path)):
        return read_json_lines(path, columns)
    if kind == ".json":
        return iter([read_json_object(path, columns)])
    if kind == ".parquet":
        return read_parquet(path, columns)
    raise unknown_type(path, TABLE_EXTENSIONS)
