"""The catalogue: one row an item, with its id and its title."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from sftrec_jax.config import DataConfig
from sftrec_jax.data.columns import as_text, text_ids
from sftrec_jax.data.readers import read_table
from sftrec_jax.data.table import Column
from sftrec_jax.errors import UserError


@dataclass(frozen=True)
class Catalogue:
    """Items in the order of the file."""

    item_ids: pl.Series
    """Text [n_items], distinct."""
    titles: pl.Series
    """Text [n_items], never empty; not necessarily distinct."""
    missing_titles: int
    """Items without a title; their id stands in for it."""
    where: str
    """The source, for messages."""


def read_catalogue(path: Path, config: DataConfig) -> Catalogue:
    """Reads ids and titles; UserError for an id that occurs twice or is missing."""
    columns = [
        Column("item", config.catalogue_item_column, "data.catalogue_item_column"),
        Column("title", config.title_column, "data.title_column"),
    ]
    table = read_table(path, columns)
    ids = text_ids(table, "item").rename("item")
    titles = as_text(table, "title")
    twice = ids.is_duplicated()
    if twice.any():
        rows = table.frame["row"]
        item = ids.filter(twice)[0]
        first, second = rows.filter(ids == item)[:2]
        count = ids.len() - ids.n_unique()
        raise UserError(f"{path}: item {item!r} stands in rows {first} and {second} ({count} rows too many); keep one an item")
    if ids.len() == 0:
        raise UserError(f"{path}: the catalogue has no item; name a file with at least one row below the header")
    empty = titles.is_null() | (titles.str.strip_chars() == "").fill_null(False)
    return Catalogue(ids, titles.zip_with(~empty, ids).rename("title"), int(empty.sum()), str(path))


def catalogue_of_log(items: pl.Series, where: str) -> Catalogue:
    """The items that a log holds, sorted by id, each id its own title."""
    ids = items.unique().sort().rename("item")
    return Catalogue(ids, ids.rename("title"), 0, where)


def catalogue_arrays(catalogue: Catalogue, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and titles [kept] as object arrays, of the items where `keep` (bool [n_items]) is true."""
    mask = pl.Series(keep)
    return (
        np.array(catalogue.item_ids.filter(mask).to_list(), dtype=object),
        np.array(catalogue.titles.filter(mask).to_list(), dtype=object),
    )
