"""The catalogue: one row an item, with its id and its title."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from sftrec_jax.config import DataConfig
from sftrec_jax.data.columns import as_text, as_words, text_ids
from sftrec_jax.data.readers import read_table
from sftrec_jax.data.repair import repaired
from sftrec_jax.data.table import Column
from sftrec_jax.errors import UserError


@dataclass(frozen=True)
class Catalogue:
    """Items in the order of the file."""

    item_ids: pl.Series
    """Text [n_items], distinct."""
    titles: pl.Series
    """Text [n_items], never empty; not necessarily distinct."""
    texts: pl.Series
    """Text [n_items], what `data.text_columns` say of the item; "" for one of which they say nothing."""
    keyphrases: pl.Series
    """Text [n_items]; "" for an item without one."""
    fields: dict[str, pl.Series]
    """By column, text [n_items]: each of `data.text_columns`; "" where it is empty."""
    missing_titles: int
    """Items without a title; their id stands in for it."""
    repaired_titles: int
    """Titles whose HTML entities or wrong encoding were mended."""
    where: str
    """The source, for messages."""


def read_catalogue(path: Path, config: DataConfig) -> Catalogue:
    """Reads ids, titles and texts; UserError for an id that occurs twice or is missing."""
    columns = [
        Column("item", config.catalogue_item_column, "data.catalogue_item_column"),
        Column("title", config.title_column, "data.title_column", sparse=True),
    ]
    words = config.text_columns or (config.title_column,)
    columns += [Column(f"text_{i}", name, "data.text_columns", sparse=True) for i, name in enumerate(words)]
    if config.keyphrase_column is not None:
        columns.append(Column("keyphrase", config.keyphrase_column, "data.keyphrase_column", sparse=True))
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
    columns_of_text = [as_words(table, f"text_{i}") for i in range(len(words))]
    fixed = 0
    if config.repair_text:
        titles, fixed = repaired(titles)
        columns_of_text = [repaired(values)[0].rename(f"text_{i}") for i, values in enumerate(columns_of_text)]
    parts = pl.DataFrame(columns_of_text)
    texts = parts.select(pl.concat_str(pl.all(), separator=". ", ignore_nulls=True)).to_series()
    keyphrases = as_words(table, "keyphrase") if config.keyphrase_column is not None else pl.repeat(None, ids.len(), eager=True)
    return Catalogue(
        ids,
        titles.zip_with(~empty, ids).rename("title"),
        texts.fill_null("").rename("text"),
        keyphrases.cast(pl.String).fill_null("").rename("keyphrase"),
        {name: parts[f"text_{i}"].fill_null("") for i, name in enumerate(config.text_columns)},
        int(empty.sum()),
        fixed,
        str(path),
    )


def catalogue_of_log(items: pl.Series, where: str) -> Catalogue:
    """The items that a log holds, sorted by id, each id its own title."""
    ids = items.unique().sort().rename("item")
    nothing = pl.Series([""] * ids.len(), dtype=pl.String)
    return Catalogue(ids, ids.rename("title"), nothing.rename("text"), nothing.rename("keyphrase"), {}, 0, 0, where)


def kept(values: pl.Series, keep: np.ndarray) -> np.ndarray:
    """The texts [kept] as an object array, of the items where `keep` (bool [n_items]) is true."""
    return np.array(values.filter(pl.Series(keep)).to_list(), dtype=object)


def item_indices(log: pl.DataFrame, catalogue: Catalogue, where: str) -> pl.Series:
    """Int32 [rows], indices into the catalogue; UserError for an item that it lacks."""
    codes = pl.DataFrame({"item": catalogue.item_ids, "code": np.arange(catalogue.item_ids.len(), dtype=np.int32)})
    joined = log.select("item", "row").join(codes, on="item", how="left", maintain_order="left")
    unknown = joined.filter(pl.col("code").is_null())
    if unknown.height:
        first = unknown.row(0, named=True)
        raise UserError(
            f"{where}: item {first['item']!r} in row {first['row']} is not in the catalogue {catalogue.where}"
            f" ({unknown['item'].n_unique()} such items in {unknown.height} rows); add the items there or remove the rows"
        )
    return joined["code"].rename("item")
