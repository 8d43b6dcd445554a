"""From a configuration to a data set: read, check, filter, order, split."""

import dataclasses
import importlib.resources
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sftrec_jax.config import DataConfig, ProfileConfig
from sftrec_jax.console import progress
from sftrec_jax.data.catalogue import Catalogue, catalogue_of_log, item_indices, kept, read_catalogue
from sftrec_jax.data.dataset import Dataset, ItemText
from sftrec_jax.data.examples import PARTS, read_examples
from sftrec_jax.data.layouts import with_layout
from sftrec_jax.data.log import Log, LogReader, k_core, tied_in_file_order, tied_share
from sftrec_jax.data.parts import occurrences, parts
from sftrec_jax.data.profiles import make_profiles
from sftrec_jax.data.readers import TABLE_EXTENSIONS, read_tables, unknown_type
from sftrec_jax.data.sequences import is_json_sequences, read_json_sequences, read_sequences
from sftrec_jax.data.splits import Split, leave_one_out, temporal
from sftrec_jax.data.table import Column, Table
from sftrec_jax.data.textfile import extension
from sftrec_jax.data.tfds_source import read_tfds
from sftrec_jax.errors import UserError

REMARKS = ("review", "summary", "explanation")
MOVIELENS = "movielens-latest-small"


def prepare_dataset(config: DataConfig, profile: ProfileConfig | None = None) -> Dataset:
    """Reads log, catalogue and profiles, filters, orders and splits; UserError with file and row for what it cannot use."""
    profile, config = ProfileConfig() if profile is None else profile, with_layout(config)
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
    ordered = _is_sequences(config.source)
    timed = not ordered and config.time_column is not None
    if config.split == "temporal" and not timed:
        raise UserError(f"{config.source}: no time to split by; set data.time_column or data.split: leave_one_out")
    catalogue = None if config.catalogue is None else read_catalogue(Path(config.catalogue), config)
    remarks = [name for name in REMARKS if getattr(config, f"{name}_column") is not None]
    rated = config.rating_column is not None
    ids, where = (None, "") if catalogue is None else (catalogue.item_ids, catalogue.where)
    with LogReader(timed, rated, config.min_rating, remarks, ids, where, config.missing_items, config.time_unit) as reader:
        return _from(reader, config, ordered, catalogue, shown_source)


def _from(reader: LogReader, config: DataConfig, ordered: bool, catalogue: Catalogue | None, shown_source: str) -> Dataset:
    reader.take(_read_log(config, ordered), progress("reading", None, "interactions"))
    _check_read(reader, config)
    ranks = None
    if catalogue is None:
        names, ranks = reader.items.sorted()
        catalogue = catalogue_of_log(pl.Series(names, dtype=pl.String), config.source)
    report: dict[str, Any] = {
        "source": shown_source,
        "interactions_read": reader.read,
        "users_read": len(reader.users),
        "catalogue_items_read": catalogue.item_ids.len(),
        "missing_titles": catalogue.missing_titles,
        "missing_texts": int((catalogue.texts == "").sum()),
        "repaired_titles": catalogue.repaired_titles,
        "items_not_in_catalogue": reader.distinct_missing,
        "interactions_of_items_not_in_catalogue": reader.missing_items,
        "below_min_rating": reader.below_min_rating,
        "missing_ratings": reader.missing_ratings,
    }
    log, report["duplicates_dropped"] = reader.finish(catalogue.item_ids.to_list(), ranks, config.tie_seed)
    before, report["users_without_rows_left"] = len(log.items), int((log.counts == 0).sum())
    report["core_rounds"] = k_core(log, config.user_core, config.item_core)
    report["core_dropped_interactions"] = before - len(log.items)
    log.drop_empty_users()
    report["users_dropped"] = len(reader.users) - len(log.user_ids)
    _check_left(log, reader, config)
    timed = reader.timed
    report["tied_timestamp_share"] = tied_share(log) if timed else None
    report["tied_in_file_order_share"], report["tied_pairs"] = tied_in_file_order(log) if timed else (None, 0)
    texts = {name: np.array([values[row] for row in log.rows.tolist()], dtype=object) for name, values in log.remarks.items()}
    counts = occurrences(log.items, catalogue.item_ids.len())
    keep = counts >= config.item_core
    item_ids, titles = kept(catalogue.item_ids, keep), kept(catalogue.titles, keep)
    offsets, timestamps = log.offsets, log.times
    log.rows = np.zeros(0, np.int64)
    if not timed:
        for part in parts(offsets):
            timestamps[part.where] = part.position
    split = _split(config, offsets, timestamps, report)
    report |= {
        "users": len(log.user_ids),
        "items": len(item_ids),
        "items_without_interactions": int((counts[keep] == 0).sum()),
        "interactions": len(log.items),
        "training_interactions": int(split.train_end.sum()),
        "validation_targets": int((split.valid_position >= 0).sum()),
        "test_targets": int((split.test_position >= 0).sum()),
        "test_targets_without_history": int((split.test_position == 0).sum()),
    }
    return Dataset(
        user_ids=np.array(log.user_ids, dtype=object),
        item_ids=item_ids,
        titles=titles,
        offsets=offsets,
        items=log.items if keep.all() else (np.cumsum(keep) - 1).astype(np.int32)[log.items],
        timestamps=timestamps,
        train_end=split.train_end,
        valid_position=split.valid_position,
        test_position=split.test_position,
        report=report,
        text=_item_text(catalogue, keep),
        ratings=log.ratings,
        remarks=texts,
    )


def _check_read(reader: LogReader, config: DataConfig) -> None:
    if reader.read == 0:
        raise UserError(f"{config.source}: no interactions; name a log with at least two users")
    if len(reader.users) < 2:
        only = reader.users.sorted()[0][0]
        raise UserError(f"{config.source}: only one user ({only!r}); a recommender needs at least two, check data.user_column")


def _check_left(log: Log, reader: LogReader, config: DataConfig) -> None:
    if len(log.user_ids) >= 2:
        return
    lower = [f"data.user_core ({config.user_core})", f"data.item_core ({config.item_core})"]
    if config.min_rating is not None:
        lower.append(f"data.min_rating ({config.min_rating})")
    raise UserError(
        f"{config.source}: of {reader.read} interactions and {len(reader.users)} users the filters leave {len(log.items)} and "
        f"{len(log.user_ids)} (at least two users are needed); lower {' or '.join(lower)}"
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
            "repaired_titles": catalogue.repaired_titles,
            "training_interactions": read.counts["train"],
            "validation_targets": read.counts["valid"],
            "test_targets": read.counts["test"],
            "test_targets_without_history": int((read.split.test_position == 0).sum()),
            "test_targets_never_trained": int((~trained[targets]).sum()),
            "tied_timestamp_share": None,
        }
    )
    return dataset


def _is_sequences(source: str) -> bool:
    """Whether a source has a user's items in one place, in time order."""
    path = Path(source)
    if source.startswith("tfds:") or path.is_dir():
        return False
    return extension(path) == ".txt" or (extension(path) == ".json" and is_json_sequences(path))


def _read_log(config: DataConfig, ordered: bool) -> Iterable[Table]:
    path = Path(config.source)
    if ordered:
        if config.rating_column is not None:
            raise UserError(f"{config.source}: a sequence file has no ratings; set data.rating_column: null")
        if said := [name for name in REMARKS if getattr(config, f"{name}_column") is not None]:
            raise UserError(f"{config.source}: a sequence file has no {said[0]}; set data.{said[0]}_column: null")
        return read_sequences(path) if extension(path) == ".txt" else [read_json_sequences(path)]
    columns = [Column("user", config.user_column, "data.user_column"), Column("item", config.item_column, "data.item_column")]
    for role in ("time", "rating", *REMARKS):
        name = getattr(config, f"{role}_column")
        columns += [] if name is None else [Column(role, name, f"data.{role}_column", sparse=role in REMARKS)]
    if config.source.startswith("tfds:"):
        return read_tfds(config.source, columns)
    if path.is_file() and extension(path) not in TABLE_EXTENSIONS:
        raise unknown_type(path, (*TABLE_EXTENSIONS, ".txt (one user a line)"))
    return read_tables(path, columns)


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
