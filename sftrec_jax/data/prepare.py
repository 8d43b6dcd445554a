"""From a configuration to a data set: read, check, filter, order, split."""

import dataclasses
import importlib.resources
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sftrec_jax.config import DataConfig, ProfileConfig
from sftrec_jax.data.catalogue import Catalogue, catalogue_of_log, item_indices, kept, read_catalogue
from sftrec_jax.data.columns import as_words, ratings, text_ids, times
from sftrec_jax.data.dataset import Dataset, ItemText
from sftrec_jax.data.examples import PARTS, read_examples
from sftrec_jax.data.histories import drop_duplicates, k_core, text_hashes, tied_in_file_order, tied_share, time_order
from sftrec_jax.data.profiles import make_profiles
from sftrec_jax.data.readers import TABLE_EXTENSIONS, read_table, unknown_type
from sftrec_jax.data.sequences import read_sequences
from sftrec_jax.data.splits import Split, leave_one_out, temporal
from sftrec_jax.data.table import Column, Table
from sftrec_jax.data.textfile import extension
from sftrec_jax.data.tfds_source import read_tfds
from sftrec_jax.errors import UserError

MOVIELENS = "movielens-latest-small"


def prepare_dataset(config: DataConfig, profile: ProfileConfig | None = None) -> Dataset:
    """Reads log, catalogue and profiles, filters, orders and splits; UserError with file and row for what it cannot use."""
    profile = ProfileConfig() if profile is None else profile
    with importlib.resources.as_file(importlib.resources.files("sftrec_jax.data") / "movielens") as folder:
        shown = config.source
        if config.source == MOVIELENS:
            config = _movielens(config, folder)
        if profile.tags == MOVIELENS:
            profile = dataclasses.replace(profile, tags=str(folder / "tags.csv.gz"))
        dataset = _prepare(config, shown) if config.history_column is None else _prepare_examples(config)
        fields, report = make_profiles(profile, config, dataset)
    dataset.report.update(report)
    return dataclasses.replace(dataset, profiles=fields)


def _movielens(config: DataConfig, folder: Path) -> DataConfig:
    """The column names of the embedded files; a catalogue of the user's own stays."""
    config = dataclasses.replace(
        config,
        source=str(folder / "ratings.csv.gz"),
        user_column="userId",
        item_column="movieId",
        time_column="timestamp",
        rating_column=None if config.rating_column is None else "rating",
    )
    if config.catalogue is not None:
        return config
    return dataclasses.replace(
        config,
        catalogue=str(folder / "movies.csv.gz"),
        catalogue_item_column="movieId",
        title_column="title",
        text_columns=config.text_columns or ("title", "genres"),
    )


def _prepare(config: DataConfig, shown_source: str) -> Dataset:
    table = _read_log(config)
    timed = not table.in_order and config.time_column is not None
    if config.split == "temporal" and not timed:
        raise UserError(f"{table.where}: no time to split by; set data.time_column or data.split: leave_one_out")
    log = _checked_log(table, config, timed)
    catalogue = (
        catalogue_of_log(log["item"], table.where) if config.catalogue is None else read_catalogue(Path(config.catalogue), config)
    )
    log = log.with_columns(item_indices(log, catalogue, table.where))
    report: dict[str, Any] = {
        "source": shown_source,
        "interactions_read": log.height,
        "users_read": log["user"].n_unique(),
        "catalogue_items_read": catalogue.item_ids.len(),
        "missing_titles": catalogue.missing_titles,
        "missing_texts": int((catalogue.texts == "").sum()),
    }
    log = _filtered(log, config, timed, report, table.where)

    user_ids = log["user"].unique().sort()
    codes = pl.DataFrame({"user": user_ids, "code": np.arange(user_ids.len(), dtype=np.int32)})
    log = log.join(codes, on="user", how="left", maintain_order="left").with_columns(user=pl.col("code")).drop("code")
    log = _ordered(log, timed, config.tie_seed, user_ids, catalogue)
    report["tied_timestamp_share"] = tied_share(log) if timed else None
    report["tied_in_file_order_share"], report["tied_pairs"] = tied_in_file_order(log) if timed else (None, 0)

    items = log["item"].to_numpy()
    remarks = [name for name in ("review", "summary", "explanation") if getattr(config, f"{name}_column") is not None]
    counts = np.bincount(items, minlength=catalogue.item_ids.len())
    keep = counts >= config.item_core
    item_ids, titles = kept(catalogue.item_ids, keep), kept(catalogue.titles, keep)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(log["user"].to_numpy()))]).astype(np.int64)
    timestamps = log["time"].to_numpy()
    split = _split(config, offsets, timestamps, report)
    report |= {
        "users": user_ids.len(),
        "items": len(item_ids),
        "items_without_interactions": int((counts[keep] == 0).sum()),
        "interactions": log.height,
        "training_interactions": int(split.train_end.sum()),
        "validation_targets": int((split.valid_position >= 0).sum()),
        "test_targets": int((split.test_position >= 0).sum()),
        "test_targets_without_history": int((split.test_position == 0).sum()),
    }
    return Dataset(
        user_ids=np.array(user_ids.to_list(), dtype=object),
        item_ids=item_ids,
        titles=titles,
        offsets=offsets,
        items=(np.cumsum(keep) - 1)[items].astype(np.int32),
        timestamps=timestamps,
        train_end=split.train_end,
        valid_position=split.valid_position,
        test_position=split.test_position,
        report=report,
        text=_item_text(catalogue, keep),
        ratings=log["rating"].to_numpy().astype(np.float32) if config.rating_column is not None else None,
        remarks={name: np.array(log[name].to_list(), dtype=object) for name in remarks},
    )


def _item_text(catalogue: Catalogue, keep: np.ndarray) -> ItemText:
    fields = {name: kept(values, keep) for name, values in catalogue.fields.items()}
    return ItemText(kept(catalogue.texts, keep), kept(catalogue.keyphrases, keep), np.flatnonzero(keep), fields)


def _prepare_examples(config: DataConfig) -> Dataset:
    """Every row a history of its own: nothing is filtered, ordered or split here."""
    read = read_examples(config)
    catalogue = (
        catalogue_of_log(read.items, config.source)
        if config.catalogue is None
        else read_catalogue(Path(config.catalogue), config)
    )
    log = pl.DataFrame({"item": read.items, "row": read.rows})
    ends = read.offsets[np.cumsum([0, *(read.counts[part] for part in PARTS)])]
    parts = [
        item_indices(log[int(begin) : int(end)], catalogue, read.where[int(np.searchsorted(read.offsets, begin))])
        for begin, end in zip(ends[:-1], ends[1:], strict=True)
        if end > begin
    ]
    items = np.concatenate([part.to_numpy() for part in parts]).astype(np.int32)
    everything = np.ones(catalogue.item_ids.len(), bool)
    lengths = np.diff(read.offsets)
    dataset = Dataset(
        user_ids=np.array(read.names, dtype=object),
        item_ids=kept(catalogue.item_ids, everything),
        titles=kept(catalogue.titles, everything),
        offsets=read.offsets,
        items=items,
        timestamps=np.arange(len(items)) - np.repeat(read.offsets[:-1], lengths),
        train_end=read.split.train_end,
        valid_position=read.split.valid_position,
        test_position=read.split.test_position,
        report={},
        text=_item_text(catalogue, everything),
        train_begin=read.train_begin,
    )
    trained = np.bincount(items[dataset.trains], minlength=len(everything)) > 0
    targets = items[(read.offsets[:-1] + read.split.test_position)[read.split.test_position >= 0]]
    dataset.report.update(
        {
            "source": config.source,
            "split": "given",
            "catalogue_items_read": len(everything),
            "missing_titles": catalogue.missing_titles,
            "missing_texts": int((catalogue.texts == "").sum()),
            "training_interactions": read.counts["train"],
            "validation_targets": read.counts["valid"],
            "test_targets": read.counts["test"],
            "test_targets_without_history": int((read.split.test_position == 0).sum()),
            "test_targets_never_trained": int((~trained[targets]).sum()),
            "tied_timestamp_share": None,
        }
    )
    return dataset


def _read_log(config: DataConfig) -> Table:
    if not config.source.startswith("tfds:") and extension(Path(config.source)) == ".txt":
        if config.rating_column is not None:
            raise UserError(f"{config.source}: a sequence file has no ratings; set data.rating_column: null")
        return read_sequences(Path(config.source))
    columns = [Column("user", config.user_column, "data.user_column"), Column("item", config.item_column, "data.item_column")]
    if config.time_column is not None:
        columns.append(Column("time", config.time_column, "data.time_column"))
    if config.rating_column is not None:
        columns.append(Column("rating", config.rating_column, "data.rating_column"))
    for role in ("review", "summary", "explanation"):
        name = getattr(config, f"{role}_column")
        columns += [] if name is None else [Column(role, name, f"data.{role}_column")]
    if config.source.startswith("tfds:"):
        return read_tfds(config.source, columns)
    path = Path(config.source)
    if path.exists() and extension(path) not in TABLE_EXTENSIONS:
        raise unknown_type(path, (*TABLE_EXTENSIONS, ".txt (one user a line)"))
    return read_table(path, columns)


def _checked_log(table: Table, config: DataConfig, timed: bool) -> pl.DataFrame:
    """Columns user, item (text), row, time, fraction (int64), and rating (float64) when one is configured."""
    if table.frame.height == 0:
        raise UserError(f"{table.where}: no interactions; name a log with at least two users")
    log = pl.DataFrame({"user": text_ids(table, "user"), "item": text_ids(table, "item"), "row": table.frame["row"]})
    if log["user"].n_unique() < 2:
        raise UserError(
            f"{table.where}: only one user ({log['user'][0]!r}); a recommender needs at least two, check data.user_column"
        )
    if timed:
        log = log.hstack(times(table))
    else:
        log = log.with_columns(time=pl.int_range(pl.len(), dtype=pl.Int64), fraction=pl.lit(0, dtype=pl.Int64))
    for role in ("review", "summary", "explanation"):
        if role in table.frame.columns:
            log = log.with_columns(as_words(table, role).fill_null("").alias(role))
    return log if config.rating_column is None else log.with_columns(rating=ratings(table))


def _filtered(log: pl.DataFrame, config: DataConfig, timed: bool, report: dict[str, Any], where: str) -> pl.DataFrame:
    read, users = log.height, log["user"].n_unique()
    if config.min_rating is not None:
        log = log.filter(pl.col("rating") >= config.min_rating)
    report["below_min_rating"] = read - log.height
    before = log.height
    if timed:
        log = drop_duplicates(log)
    report["duplicates_dropped"] = before - log.height
    before = log.height
    log, report["core_rounds"] = k_core(log, config.user_core, config.item_core)
    report["core_dropped_interactions"] = before - log.height
    report["users_dropped"] = users - log["user"].n_unique()
    if log["user"].n_unique() < 2:
        lower = [f"data.user_core ({config.user_core})", f"data.item_core ({config.item_core})"]
        if config.min_rating is not None:
            lower.append(f"data.min_rating ({config.min_rating})")
        raise UserError(
            f"{where}: of {read} interactions and {users} users the filters leave {log.height} and {log['user'].n_unique()}"
            f" (at least two users are needed); lower {' or '.join(lower)}"
        )
    return log


def _ordered(log: pl.DataFrame, timed: bool, tie_seed: int, user_ids: pl.Series, catalogue: Catalogue) -> pl.DataFrame:
    if timed:
        users = text_hashes(user_ids.to_list(), tie_seed, "user")
        return time_order(log, users, text_hashes(catalogue.item_ids.to_list(), tie_seed, "item"))
    return log.sort("user", "time").with_columns(time=pl.int_range(pl.len(), dtype=pl.Int64).over("user"))


def _split(config: DataConfig, offsets: np.ndarray, timestamps: np.ndarray, report: dict[str, Any]) -> Split:
    report["split"] = config.split
    if config.split == "temporal":
        split, report["valid_from"], report["test_from"] = temporal(
            offsets, timestamps, config.valid_fraction, config.test_fraction
        )
        return split
    lengths = np.diff(offsets)
    report["users_too_short_to_split"] = int((lengths < 3).sum())
    return leave_one_out(lengths)
