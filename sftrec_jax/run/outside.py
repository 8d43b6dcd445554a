"""`sftrec evaluate RUN --lists FILE`: ranked lists that another tool made, scored by the protocol of a run without a model."""

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from polars.exceptions import PolarsError
from rich.markup import escape
from rich.table import Table as Shown

from sftrec_jax.config import RunConfig
from sftrec_jax.console import console
from sftrec_jax.data.columns import as_text, first_row, text_ids
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.readers import read_table
from sftrec_jax.data.table import Column, Table
from sftrec_jax.data.textfile import extension, read_bytes, read_utf8
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.checks import check_targets
from sftrec_jax.evaluate.comparison import BASELINES, COUNTER, compare, fit_baselines
from sftrec_jax.evaluate.metrics import DEFAULT_KS, user_metrics
from sftrec_jax.evaluate.uncertainty import draw
from sftrec_jax.items.titles import natural_key
from sftrec_jax.run.card import data_card
from sftrec_jax.run.folder import RunFolder, check_free, write_json
from sftrec_jax.run.lint import check_data
from sftrec_jax.run.tables import SHOWN, row_name, short

COLUMNS = {"user": "user", "rank": "rank", "item": "item_id"}
"""Columns that a file of lists must have, by role."""
ONE_VALUE = ("seed", "run", "normaliser")
"""Columns that it may have; more than one value in them is more than one run."""
EXTENSIONS = (".parquet", ".jsonl", ".csv")


@dataclass(frozen=True, eq=False)
class Lists:
    """Ranked lists of the users that are evaluated, U of them."""

    items: np.ndarray
    """int32 [U, L] item indices, best first; -1 after the end of a list."""
    lengths: np.ndarray
    """int64 [U], 1 or more."""
    without_target: int
    """Users of the file that the run knows but has no test target for."""
    not_drawn: int
    """Users of the file with a test target that `evaluate.users` left out."""


def lists_stage(folder: RunFolder, config: RunConfig, path: Path, to: Path | None, overwrite: bool) -> dict[str, Any]:
    """Scores a file of lists beside the baselines; prints a table, and writes JSON where `to` is given.

    The metrics are those of `evaluate_stage`, up to the largest cut-off that the shortest list reaches; `mrr`, which is cut
    at 20, only where that is 20. An item is a hit where it is the target, whatever codes the run gave its items.

    Args:
        folder: of a run that is at least prepared.
        config: of the run, options of the command line included: `evaluate.users`, `mask_seen`, `counter_decay`, `train.seed`.
        path: the lists, see `read_lists`.
        to: `.json`, or None.
        overwrite: replace `to`.

    Returns: metrics of `lists` and of each baseline; `ci`, `paired`, `below_counter` as of `compare`; `users`, `items`,
        `mask_seen`, `protocol` with the name and SHA-256 of the file.
    """
    if to is not None:
        check_free(to, overwrite)
    # `add-items` that was stopped between its two renames leaves the folder under its other name.
    prepared = folder.replaced if folder.replaced.exists() and not folder.prepared.exists() else folder.prepared
    dataset = Dataset.load(prepared)
    check_targets(folder.path, config, dataset)
    users = draw(np.flatnonzero(dataset.test_position >= 0), config.evaluate.users, config.train.seed)
    mask = config.evaluate.mask_seen
    targets = dataset.items[dataset.offsets[users] + dataset.test_position[users]]
    histories = [dataset.history(int(u))[: dataset.test_position[u]] for u in users]
    lists = read_lists(path, dataset, users, histories if mask else None)
    leaks = check_data(dataset, config)
    ks = tuple(k for k in DEFAULT_KS if k <= lists.lengths.min())
    values = {"model": _values(lists.items, targets, ks)}
    for name, baseline in fit_baselines(dataset, config.evaluate.counter_decay).items():
        values[name] = _values(baseline.rank(histories, max(ks), mask), targets, ks)
    compared = compare(values, config.train.seed)
    named = {"lists" if name == "model" else name: row for name, row in values.items()}
    result: dict[str, Any] = {name: {m: float(v.mean()) for m, v in row.items()} for name, row in named.items()}
    result |= compared | {"ci": {"lists" if name == "model" else name: row for name, row in compared["ci"].items()}}
    result |= {"users": len(users), "items": len(dataset.item_ids), "mask_seen": mask}
    result["protocol"] = data_card(config, dataset, len(users)) | {
        "seeds": {"tie": config.data.tie_seed, "train": config.train.seed},
        "leaks": leaks,
        "lists": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
    }
    console.print(_table(result, path))
    for remark in _remarks(result, lists, users, dataset, ks):
        console.print(remark)
    if to is not None:
        write_json(to, result)
        console.print(f"wrote {escape(str(to))}")
    return result


def read_lists(path: Path, dataset: Dataset, users: np.ndarray, seen: Sequence[np.ndarray] | None) -> Lists:
    """Reads a file with a row for each listed item.

    Args:
        path: `.parquet`, `.jsonl` or `.csv` with columns `user`, `rank` (from 1) and `item_id`, in any order of rows; others
            are passed over, but `seed`, `run` and `normaliser`, which may hold one value each.
        dataset: whose users and items are meant.
        users: int64 [U] indices of the users that must have a list.
        seen: [U] items that no list of theirs may have; None: all are allowed.

    Raises: UserError with row and value for an unknown user or item, a rank that is missing, no whole number, given twice or
        not reached without gaps from 1, an item twice in a list or seen; for a user without a list; for a file that cannot be
        read, is empty, lacks a column or holds several runs. Rows of users that are not asked for are checked no further.
    """
    table = _read(path)
    user = _indices(table, "user", dataset.user_ids, "user of this run", "lists of other data, or prepared otherwise")
    place = np.full(len(dataset.user_ids), -1, np.int64)
    place[users] = np.arange(len(users))
    asked = place[user] >= 0
    others = np.unique(user[~asked])
    targeted = int((dataset.test_position[others] >= 0).sum())
    table = Table(table.frame.filter(pl.Series(asked)), table.where)
    at = place[user[asked]]
    item = _indices(table, "item", dataset.item_ids, "item of the catalogue", "leave it out, or prepare with its catalogue")
    rank, row = _ranks(table), table.frame["row"].to_numpy()

    order = np.lexsort((row, rank, at))
    at, rank, item, row = at[order], rank[order], item[order], row[order]
    counts = np.bincount(at, minlength=len(users))
    column = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
    _check_places(path, dataset.user_ids[users], at, rank, row, column)
    pairs = at * len(dataset.item_ids) + item

    def told(where: int) -> str:
        """User, item and rank of a row, for messages."""
        return f"user {dataset.user_ids[users[at[where]]]!r} has item {dataset.item_ids[item[where]]!r} at rank {rank[where]:.0f}"

    twice = _repeated(pairs, row)
    if twice is not None:
        first, again = twice
        raise UserError(
            f"{path}: row {row[again]}: {told(again)}, which row {row[first]} lists at rank {rank[first]:.0f} already; "
            "list an item once and close the ranks up"
        )
    if seen is not None:
        sizes = [len(items) for items in seen]
        taken = np.repeat(np.arange(len(users)), sizes) * len(dataset.item_ids) + np.concatenate([*seen, np.zeros(0, np.int64)])
        bad = np.flatnonzero(np.isin(pairs, taken))
        if len(bad):
            worst = bad[row[bad].argmin()]
            raise UserError(
                f"{path}: row {row[worst]}: {told(worst)}, an item of the user's history ({len(bad):,} such rows), and this run "
                "masks seen items; leave seen items out of the lists, or evaluate with `--evaluate.no-mask-seen`"
            )
    if (counts == 0).any():
        lacking = int((counts == 0).sum())
        raise UserError(
            f"{path}: has no list for {lacking:,} of the {len(users):,} users with a test target, such as "
            f"{str(dataset.user_ids[users[counts.argmin()]])!r}; give each of them one, of popular items where the tool had none"
        )
    items = np.full((len(users), counts.max()), -1, np.int32)
    items[at, column] = item
    return Lists(items, counts, len(others) - targeted, targeted)


def _read(path: Path) -> Table:
    """The rows of the file under `user`, `rank`, `item` and `row`, of one run, with ids as text."""
    if extension(path) not in EXTENSIONS:
        raise UserError(f"{path}: unknown ending {path.suffix!r}; use {', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a file of lists with the columns {', '.join(COLUMNS.values())}")
    empty = UserError(f"{path}: is empty; write a row for each listed item, with the columns {', '.join(COLUMNS.values())}")
    if not path.stat().st_size:
        raise empty
    present = _header(path)
    missing = [name for name in COLUMNS.values() if name not in present]
    if present and missing:
        near = difflib.get_close_matches(missing[0], present, n=1)
        nearest = f" (nearest: {near[0]!r})" if near else ""
        shown = ", ".join(present[:20]) + (", ..." if len(present) > 20 else "")
        raise UserError(f"{path}: no column {missing[0]!r}; it has {shown}; rename the one that is meant{nearest}")
    columns = [Column(role, name, f"the column {name}") for role, name in COLUMNS.items()]
    columns += [Column(name, name, f"the column {name}") for name in ONE_VALUE if name in present]
    if not present and extension(path) != ".parquet" and not read_utf8(path).strip():
        raise empty
    table = read_table(path, columns)
    if not table.frame.height:
        raise empty
    for name in ONE_VALUE:
        if name in table.frame.columns:
            _check_one(table, name)
    ids = {role: text_ids(table, role) for role in ("user", "item")}
    return Table(table.frame.select("row", "rank").with_columns(**ids), table.where)


def _header(path: Path) -> list[str]:
    """Names of the columns; none where the file cannot be read, of which `read_table` says why."""
    try:
        if extension(path) == ".parquet":
            return list(pl.read_parquet_schema(io.BytesIO(read_bytes(path))))
        if extension(path) == ".csv":
            first = io.StringIO(read_utf8(path).decode("utf-8"), newline="")
            return next(csv.reader(first), [])
        rows = [json.loads(line) for line in read_utf8(path).split(b"\n", 100)[:100] if line.strip()]
        return list(dict.fromkeys(key for row in rows for key in row)) if all(isinstance(row, dict) for row in rows) else []
    except (PolarsError, OSError, csv.Error, ValueError, RecursionError):
        return []


def _check_one(table: Table, name: str) -> None:
    """UserError where rows differ in a column that tells runs apart; no value counts as one."""
    values = as_text(table, name).unique().to_list()
    if len(values) > 1:
        told = sorted((str(v) for v in values if v is not None), key=natural_key) + ["none"] * (None in values)
        shown = ", ".join(told[:8]) + (", ..." if len(told) > 8 else "")
        raise UserError(f"{table.where}: mixed runs: column {name} holds {shown}; evaluate a file with the rows of one")


def _indices(table: Table, role: str, ids: np.ndarray, what: str, why: str) -> np.ndarray:
    """int64 [rows] place of each id of the column among `ids`."""
    values = table.frame[role]
    names = [str(one) for one in ids]
    found = values.replace_strict(names, list(range(len(names))), default=-1, return_dtype=pl.Int64)
    unknown = found < 0
    if unknown.any():
        value = values.filter(unknown)[0]
        near = difflib.get_close_matches(value, names, n=1)
        example = f"nearest: {near[0]!r}" if near else f"such as {names[0]!r}"
        raise UserError(
            f"{table.where}: row {first_row(table, unknown)}: {value!r} is no {what}, which has {len(names):,} ({example}); {why}"
        )
    return found.to_numpy()


def _ranks(table: Table) -> np.ndarray:
    """float64 [rows], whole numbers from 1."""
    text = as_text(table, "rank").str.strip_chars()
    values = text.cast(pl.Float64, strict=False)
    bad = ~((values.is_finite()) & (values >= 1) & (values.floor() == values)).fill_null(False)
    if bad.any():
        value = text.filter(bad)[0]
        told = "no rank" if value is None else f"the rank {value!r}"
        raise UserError(f"{table.where}: row {first_row(table, bad)} has {told}; ranks are whole numbers from 1, the best item")
    return values.to_numpy()


def _check_places(path: Path, names: np.ndarray, at: np.ndarray, rank: np.ndarray, row: np.ndarray, column: np.ndarray) -> None:
    """UserError where a user's ranks, in order, are not 1, 2, 3 and so on; `column`: how many of the user's rows came before."""
    wrong = np.flatnonzero(rank != column + 1)
    if not len(wrong):
        return
    first = int(wrong[0])
    user, given = names[at[first]], f"{rank[first]:.0f}"
    if column[first] and rank[first] == rank[first - 1]:
        raise UserError(
            f"{path}: row {row[first]}: user {user!r} has rank {given} a second time, after row {row[first - 1]}; "
            "give each item a rank of its own (two runs in one file?)"
        )
    raise UserError(
        f"{path}: row {row[first]}: user {user!r} has rank {given} but no rank {column[first] + 1}; "
        "number the items of a list from 1 without gaps"
    )


def _repeated(values: np.ndarray, row: np.ndarray) -> tuple[int, int] | None:
    """Places of a value and of its repetition, which is the first in the file; None where all are distinct."""
    order = np.lexsort((row, values))
    again = np.flatnonzero(values[order][1:] == values[order][:-1])
    if not len(again):
        return None
    one = again[row[order[again + 1]].argmin()]
    return int(order[one]), int(order[one + 1])


def _values(items: np.ndarray, targets: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """float64 [U] each; without `mrr` where the lists do not reach the cut-off that it has in `metrics.json`."""
    found = user_metrics(items[:, : max(ks)], targets, ks)
    return {name: v for name, v in found.items() if name != "mrr" or max(ks) == max(DEFAULT_KS)}


def _table(result: dict[str, Any], path: Path) -> Shown:
    seen = "seen items masked" if result["mask_seen"] else "seen items allowed"
    table = Shown(title=f"test: {result['users']:,} users, all {result['items']:,} items, {seen}; lists of {escape(path.name)}")
    for column in ("", *map(short, SHOWN)):
        table.add_column(column, justify="right" if column else "left")
    for row in ("lists", *BASELINES):
        mark = " (below)" if row == "lists" and result["below_counter"] else ""
        table.add_row(row_name(row) + mark, *(f"{result[row][m]:.4f}" if m in result[row] else "-" for m in SHOWN))
    return table


def _remarks(result: dict[str, Any], lists: Lists, users: np.ndarray, dataset: Dataset, ks: Sequence[int]) -> list[str]:
    """How far metrics go and why, the metric with its interval, how it stands against the counter, who was left out."""
    k = max(k for k in ks if k <= 10)
    name, shortest = f"ndcg@{k}", int(lists.lengths.argmin())
    (low, high), other = result["ci"]["lists"][name], result["paired"][COUNTER][name]
    below = "; the lists are BELOW item_item, which only counts" if result["below_counter"] else ""
    remarks = [
        f"lists N@{k} {result['lists'][name]:.4f}, 95 % interval over users [{low:.4f}, {high:.4f}]; against item_item "
        f"{other['difference']:+.4f} [{other['low']:+.4f}, {other['high']:+.4f}], p = {other['p']:.3g}{below}"
    ]
    if max(ks) < max(DEFAULT_KS):
        remarks.append(
            f"metrics end at {max(ks)}: the shortest list, of user {escape(str(dataset.user_ids[users[shortest]]))}, has "
            f"{lists.lengths[shortest]} items"
        )
    if lists.without_target:
        remarks.append(f"{lists.without_target:,} users of the file have no test target in this run and were left out")
    if lists.not_drawn:
        remarks.append(f"{lists.not_drawn:,} users of the file are not among those that evaluate.users drew and were left out")
    return remarks
