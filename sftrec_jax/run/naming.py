"""Names the items of a run: codes by the chosen tokeniser, first values of new token rows, a report of the codebooks."""

from pathlib import Path
from typing import Any

import numpy as np

from sftrec_jax.config import RunConfig
from sftrec_jax.console import console
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.prepare import MOVIELENS
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.embed.clusters import cluster_paths
from sftrec_jax.items.embed.collaborative import collaborative_vectors, cooccurrence
from sftrec_jax.items.index_file import read_index
from sftrec_jax.items.naming import atomic_codes, numeric_codes, title_codes
from sftrec_jax.items.order import collaborative_order, random_order, sequential_order
from sftrec_jax.items.paths import cluster_tokens, level_tokens, path_codes
from sftrec_jax.items.quantise.collisions import resolve_extra
from sftrec_jax.items.quantise.report import CodebookReport, codebook_report
from sftrec_jax.items.rows import codebook_rows, member_rows
from sftrec_jax.items.semantic import SemanticIds, semantic_ids
from sftrec_jax.items.titles import distinct_titles
from sftrec_jax.run.folder import write_json
from sftrec_jax.run.vectors import Vectoriser

SEMANTIC = ("rqvae", "rqkmeans", "pq", "opq")

QUANTISER_FILE, LEVELS_FILE, REPORT_FILE, ROWS_FILE = "quantiser.npz", "levels.npy", "codebook.json", "item_vectors.npy"


def name_items(config: RunConfig, dataset: Dataset, vectoriser: Vectoriser) -> ItemCodes:
    """Codes of all items; leaves in `prepared/` what naming new items and loading the model need."""
    items, tokenizer, folder = config.items, vectoriser.tokenizer, vectoriser.folder
    ids = dataset.item_ids
    titles = distinct_titles(dataset.titles, ids)
    init = "text" if items.init in ("text", "collaborative") else "mean"
    semantic: SemanticIds | None = None
    vectors: np.ndarray | None = None
    if items.tokenizer in SEMANTIC or (items.tokenizer == "atomic" and items.init == "codebook"):
        vectors, counts = vectoriser.fit(dataset)
        console.print(f"item vectors: {vectors.shape[1]} dimensions; " + ", ".join(f"{k} {v:,}" for k, v in counts.items()))
    if items.tokenizer in ("title", "keyphrase"):
        words = None if items.tokenizer == "title" else keyphrases(dataset, titles)
        return title_codes(titles, tokenizer, items.max_title_tokens, ids, names=words)
    if items.tokenizer in ("atomic", "numeric"):
        numbers = _numbers(config, dataset)
        if items.tokenizer == "numeric":
            return numeric_codes(np.arange(len(ids)) if numbers is None else numbers, titles, tokenizer)
        codes = atomic_codes(ids, titles, tokenizer, init, numbers)
    elif items.tokenizer == "cid":
        paths = _clusters(config, dataset)
        codes = path_codes(cluster_tokens(paths), titles, ids, tokenizer, init)
        _report(config, folder, _counted(_padded(paths)), {})
    elif items.tokenizer == "file":
        codes = _from_file(config, dataset, titles, vectoriser, init)
    else:
        assert vectors is not None
        semantic = semantic_ids(vectors, ids, items.tokenizer, config.semantic, console.print)
        semantic.quantiser.save(folder / QUANTISER_FILE)
        save_array(folder / LEVELS_FILE, semantic.levels)
        codes = path_codes(level_tokens(semantic.levels), titles, ids, tokenizer, init, _all_tokens(semantic))
        _report(config, folder, semantic.report, {"moved_to_a_free_code": semantic.moved})
    shared = len(ids) - len(np.unique(codes.codes, axis=0))
    assert not shared or config.semantic.collisions == "lists"  # ItemCodes allows it, only `lists` asks for it
    rows = _row_vectors(config, dataset, codes, semantic, vectors)
    if rows is not None:
        save_array(folder / ROWS_FILE, rows)
    return codes


def keyphrases(dataset: Dataset, titles: np.ndarray) -> np.ndarray:
    """Keyphrases, object [n_items]; the title stands in for one that is missing, and these are counted."""
    assert dataset.text is not None
    phrases = dataset.text.keyphrases
    missing = phrases == ""
    if missing.all():
        raise UserError("items.tokenizer: keyphrase, but no item has a keyphrase; set data.keyphrase_column to a column that has")
    if missing.any():
        first = str(dataset.item_ids[missing.argmax()])
        console.print(f"{missing.sum():,} items have no keyphrase (the first is {first!r}); their titles stand in")
    return np.where(missing, titles, phrases)


def _numbers(config: RunConfig, dataset: Dataset) -> np.ndarray | None:
    order = config.items.order
    if order == "sequential":
        return sequential_order(dataset)
    if order == "random":
        return random_order(dataset.item_ids, config.train.seed)
    return collaborative_order(_clusters(config, dataset)) if order == "collaborative" else None


def _clusters(config: RunConfig, dataset: Dataset) -> list[tuple[int, ...]]:
    items = config.items
    counts = cooccurrence(dataset, items.collaborative_window)
    return cluster_paths(counts, dataset.item_ids, items.cluster_branches, items.cluster_leaf, config.train.seed)


def _from_file(config: RunConfig, dataset: Dataset, titles: np.ndarray, vectoriser: Vectoriser, init: Any) -> ItemCodes:
    assert config.items.codes_file is not None  # the config checks it
    path = Path(config.items.codes_file)
    if config.items.codes_keys == "row" and config.data.catalogue is None and config.data.source != MOVIELENS:
        raise UserError("items.codes_keys: row needs a catalogue whose rows they count; set data.catalogue, or use keys: id")
    paths = read_index(path, dataset.item_ids, config.items.codes_keys)
    levels = numbered(paths)
    report = _counted(levels)
    if config.semantic.collisions == "nearest" and report.colliding_items:
        raise UserError(
            f"{path}: {report.colliding_items} items share a code, and imported codes have no codebook to find the nearest "
            "free one; set semantic.collisions: extra or lists"
        )
    own = config.semantic.collisions == "item"
    if own or (config.semantic.collisions == "extra" and report.colliding_items):
        place = max(map(len, paths))
        extra = np.full((len(paths), place + 1), 0, np.int32)
        extra[:, place] = np.arange(len(paths)) if own else resolve_extra(levels, dataset.item_ids)[:, -1]
        paths = [[*names, last[place]] for names, last in zip(paths, level_tokens(extra), strict=True)]
    _report(config, vectoriser.folder, report, {})
    return path_codes(paths, titles, dataset.item_ids, vectoriser.tokenizer, init)


def numbered(paths: list[list[str]]) -> np.ndarray:
    """Token strings as numbers int32 [n, L], each place counted by itself in sorted order; -1 after the end of a path."""
    levels = np.full((len(paths), max(map(len, paths))), -1, np.int32)
    for place in range(levels.shape[1]):
        number = {name: i for i, name in enumerate(sorted({p[place] for p in paths if len(p) > place}))}
        levels[:, place] = [number[p[place]] if len(p) > place else -1 for p in paths]
    return levels


def _counted(levels: np.ndarray) -> CodebookReport:
    """A report of codes without a codebook: each level has as many codes as its largest number says."""
    return codebook_report(levels, [int(m) + 1 for m in levels.max(0)])


def _padded(paths: list[tuple[int, ...]]) -> np.ndarray:
    levels = np.full((len(paths), max(map(len, paths))), -1, np.int32)
    for i, path in enumerate(paths):
        levels[i, : len(path)] = path
    return levels


def _all_tokens(ids: SemanticIds) -> list[str]:
    """Every token that an item may ever get: all codes of all levels, and all numbers of the extra level."""
    sizes = [*ids.quantiser.sizes, *([ids.extra_size] if ids.extra_size else [])]
    names = []
    for level, size in enumerate(sizes):
        path = np.zeros((size, level + 1), np.int32)
        path[:, level] = np.arange(size)
        names += [tokens[level] for tokens in level_tokens(path)]
    return names


def _report(config: RunConfig, folder: Path, report: CodebookReport, more: dict[str, Any]) -> None:
    collisions = config.semantic.collisions if config.items.tokenizer != "cid" else "none"
    about = {"tokenizer": config.items.tokenizer, "collisions": collisions}
    write_json(folder / REPORT_FILE, about | report.to_dict() | more)
    console.print(report.table())
    if report.colliding_items:
        how = {
            "extra": "told apart by one more token",
            "item": "told apart by the item's own token",
            "lists": "left to share it",
            "nearest": "moved until each has its own",
        }
        console.print(f"{report.colliding_items:,} items shared a code with another: {how[collisions]}")


def _row_vectors(
    config: RunConfig, dataset: Dataset, codes: ItemCodes, semantic: SemanticIds | None, vectors: np.ndarray | None
) -> np.ndarray | None:
    """float32 [n_new, E], what `items.init` adds to new token rows; None for nothing."""
    items = config.items
    if items.init == "collaborative":
        vectors = collaborative_vectors(dataset, items.collaborative_dim, items.collaborative_window, config.train.seed)
        return member_rows(codes, vectors) * items.collaborative_scale
    if items.init != "codebook":
        return None
    if semantic is not None and config.semantic.collisions != "item":
        return codebook_rows(codes, semantic.quantiser)
    assert vectors is not None  # the config allows `codebook` for atomic and semantic ids only
    return member_rows(codes, vectors)


def save_array(path: Path, values: np.ndarray) -> None:
    """Writes a `.npy` file under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.name}")
    np.save(temporary, values)
    temporary.replace(path)
