"""Tables that a run shows and writes: metrics beside baselines, recommendations with titles."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from sftrec_jax.data.dataset import Dataset
from sftrec_jax.decode.recommender import Ranking
from sftrec_jax.distributed import is_main
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.comparison import BASELINES

AT_ONCE = 8192
"""Users whose lists are turned into titles at once."""
SHOWN = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@20", "ndcg@20", "mrr")


def short(name: str) -> str:
    """R@5 for recall@5, and so on."""
    return name.replace("recall", "R").replace("ndcg", "N").upper()


def row_name(row: str) -> str:
    """What stands for a row of the result in a table."""
    return row.replace("popularity", "pop.").replace("_", " ")


def metrics_table(result: dict[str, Any]) -> Table:
    """Model and baselines."""
    by = result.get("normaliser", "full")
    how = "" if by == "full" else f", scores normalised over {by}"
    seen = "seen items masked" if result.get("mask_seen", True) else "seen items allowed"
    table = Table(title=f"test: {result['users']} users, all {result['items']:,} items, {seen}{how}")
    table.add_column("")
    for name in SHOWN:
        table.add_column(short(name), justify="right")
    for row in ("model", *BASELINES):
        mark = " (below)" if row == "model" and result.get("below_counter") else ""
        table.add_row(
            row_name(row) + mark,
            *(f"{result[row][name]:.4f}" if name in result[row] else "-" for name in SHOWN),
        )
    return table


def recommendation_frame(
    names: list[str], item_ids: np.ndarray, titles: np.ndarray, ranking: Ranking, normaliser: str
) -> pl.DataFrame:
    """Columns user, rank (from 1), item_id, title, score (log-probability); one row for each item that was found.

    Scores of another normaliser than `full` are named by a last column, `normaliser`.
    """
    users, ranks = np.nonzero(ranking.items >= 0)
    items = ranking.items[users, ranks]
    frame = pl.DataFrame(
        {
            "user": [names[u] for u in users],
            "rank": (ranks + 1).astype(np.int32),
            "item_id": [str(item_ids[i]) for i in items],
            "title": [str(titles[i]) for i in items],
            "score": ranking.scores[users, ranks].astype(np.float32),
        },
        schema={"user": pl.String, "rank": pl.Int32, "item_id": pl.String, "title": pl.String, "score": pl.Float32},
    )
    return frame if normaliser == "full" else frame.with_columns(pl.lit(normaliser).alias("normaliser"))


def check_frame_path(path: Path) -> None:
    """UserError for an ending that `write_frame` does not know, and for a folder that is not there."""
    if path.suffix not in (".parquet", ".jsonl"):
        raise UserError(f"{path}: unknown ending {path.suffix!r}; use .parquet or .jsonl")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it or choose another place")


def write_frame(path: Path, frame: pl.DataFrame) -> None:
    """Parquet or JSON lines by the ending of `path`, atomically; of several processes the first alone writes."""
    check_frame_path(path)
    if not is_main():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        frame.write_parquet(temporary) if path.suffix == ".parquet" else frame.write_ndjson(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None


def write_frames(file: BinaryIO, ending: str, frames: Iterable[pl.DataFrame]) -> int:
    """Frames of the same columns one after the other, at least one, as Parquet or JSON lines by `ending`; returns the rows."""
    rows = 0
    if ending == ".jsonl":
        for frame in frames:
            frame.write_ndjson(file)
            rows += frame.height
        return rows
    writer: pq.ParquetWriter | None = None
    try:
        for frame in frames:
            table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
            schema = pa.schema([(f.name, pa.string() if pa.types.is_large_string(f.type) else f.type) for f in table.schema])
            writer = writer or pq.ParquetWriter(file, schema, compression="zstd")
            writer.write_table(table.cast(schema))
            rows += frame.height
    finally:
        if writer is not None:
            writer.close()
    return rows


def write_recommendations(
    path: Path, dataset: Dataset, titles: np.ndarray, users: np.ndarray, ranking: Ranking, normaliser: str
) -> None:
    """recommendations.parquet of a run, users in the order of the data set."""
    order = np.argsort(users, kind="stable")

    def frame(some: np.ndarray) -> pl.DataFrame:
        names = [str(dataset.user_ids[users[i]]) for i in some]
        ordered = Ranking(ranking.items[some], ranking.scores[some])
        return recommendation_frame(names, dataset.item_ids, titles, ordered, normaliser)

    if len(order) <= AT_ONCE:
        write_frame(path, frame(order))
        return
    if not is_main():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write_frames(file, path.suffix, (frame(order[at : at + AT_ONCE]) for at in range(0, len(order), AT_ONCE)))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None
