"""`sftrec add-items`: new items of a trained run get codes from tokens that the model knows, so it can name them untrained."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from sftrec_jax.console import console
from sftrec_jax.data.catalogue import Catalogue, read_catalogue
from sftrec_jax.data.dataset import Dataset, ItemText
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.embed.combine import load_vectors
from sftrec_jax.items.naming import extend_title_codes
from sftrec_jax.items.paths import codes_paths, extend_paths_codes, level_tokens
from sftrec_jax.items.quantise.collisions import extend_codes
from sftrec_jax.items.quantise.quantiser import Quantiser
from sftrec_jax.items.titles import distinct_titles
from sftrec_jax.run.naming import LEVELS_FILE, QUANTISER_FILE, SEMANTIC, save_array
from sftrec_jax.run.session import Session
from sftrec_jax.run.vectors import Vectoriser


@dataclass(frozen=True, eq=False)
class NewItems:
    """Items of a catalogue that the run does not have, m of them."""

    item_ids: np.ndarray
    """Text (object) [m]."""
    titles: np.ndarray
    """Text (object) [m], distinct from one another and from those of the run."""
    text: ItemText
    """`rows`: places in the catalogue that was read."""


def read_new_items(session: Session, path: Path) -> NewItems:
    """Items of a catalogue file whose ids the run does not have; UserError where there is none."""
    catalogue: Catalogue = read_catalogue(path, session.config.data)
    known = set(session.dataset.item_ids.tolist())
    new = np.asarray([item not in known for item in catalogue.item_ids], bool)
    if not new.any():
        raise UserError(f"{path}: all {len(new):,} items are in the run already; give a catalogue with others")

    def pick(values: pl.Series) -> np.ndarray:
        return np.array(values.filter(pl.Series(new)).to_list(), dtype=object)

    ids = pick(catalogue.item_ids)
    titles = distinct_titles(pick(catalogue.titles), ids, session.codes.titles)
    return NewItems(ids, titles, ItemText(pick(catalogue.texts), pick(catalogue.keyphrases), np.flatnonzero(new)))


def add_items(session: Session, path: Path, vectors: Path | None) -> NewItems:
    """Names the new items of a catalogue and writes them into the run's `prepared/`, all or nothing."""
    new = read_new_items(session, path)
    prepared = session.folder.prepared
    fresh = prepared.with_name(".prepared.new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(prepared, fresh)
    try:
        codes = _codes(session, new, path, vectors, fresh)
        codes.save(fresh)
        _dataset(session.dataset, new).save(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    old = session.folder.replaced
    shutil.rmtree(old, ignore_errors=True)
    prepared.rename(old)
    fresh.rename(prepared)
    shutil.rmtree(old)
    names = codes_paths(codes)[len(session.dataset.item_ids) :] if codes.new_tokens else None
    for i, (item, title) in enumerate(zip(new.item_ids[:10], new.titles, strict=False)):
        console.print(f"  {item}: {title}" + (f"  {''.join(names[i])}" if names else ""), markup=False, highlight=False)
    console.print(f"{len(new.item_ids):,} items added, {len(codes.codes):,} in all; the model was not changed")
    return new


def _codes(session: Session, new: NewItems, path: Path, vectors: Path | None, folder: Path) -> ItemCodes:
    kind, items = session.config.items.tokenizer, session.config.items
    tokenizer = session.tokenizer
    if kind in ("title", "keyphrase"):
        words = None if kind == "title" else np.where(new.text.keyphrases == "", new.titles, new.text.keyphrases)
        return extend_title_codes(session.codes, new.titles, tokenizer, items.max_title_tokens, new.item_ids, names=words)
    if kind not in SEMANTIC:
        raise UserError(
            f"items.tokenizer is {kind}: a new item's tokens say nothing until they are trained; prepare and train again with "
            "the item in the catalogue, or use rqvae, rqkmeans, opq or title"
        )
    config = session.config
    if config.semantic.collisions == "item":
        raise UserError(
            "semantic.collisions is item: a new item's own token says nothing until it is trained; prepare and train again with "
            "the item in the catalogue, or with semantic.collisions: extra"
        )
    vectoriser = Vectoriser(config, session.source, tokenizer, session.mesh, folder)
    quantiser = Quantiser.load(folder / QUANTISER_FILE)
    own = None if vectors is None else load_vectors(vectors, int(new.text.rows.max()) + 1)[new.text.rows]
    x = vectoriser.extend(new.text.texts.tolist(), quantiser.width, own)
    levels = np.load(folder / LEVELS_FILE)
    # Numbers of the extra level that the run's items carry: a token that no item had in training would rank its item last.
    numbers = int(levels[:, -1].max()) + 1
    added = extend_codes(levels, config.semantic.collisions, quantiser, x, new.item_ids, numbers)
    save_array(folder / LEVELS_FILE, np.concatenate([levels, added]))
    return extend_paths_codes(session.codes, level_tokens(added), new.titles, new.item_ids)


def _dataset(dataset: Dataset, new: NewItems) -> Dataset:
    assert dataset.text is not None
    text = dataset.text
    first = int(dataset.report["catalogue_items_read"]) + int(dataset.report.get("items_added", 0))
    together = ItemText(
        np.concatenate([text.texts, new.text.texts]),
        np.concatenate([text.keyphrases, new.text.keyphrases]),
        np.concatenate([text.rows, first + np.arange(len(new.item_ids))]),
    )
    report = dataset.report | {
        "items": len(dataset.item_ids) + len(new.item_ids),
        "items_added": int(dataset.report.get("items_added", 0)) + len(new.item_ids),
    }
    return dataclasses.replace(
        dataset,
        item_ids=np.concatenate([dataset.item_ids, new.item_ids]),
        titles=np.concatenate([dataset.titles, new.titles]),
        text=together,
        report=report,
    )
