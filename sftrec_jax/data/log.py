"""Interactions read in parts into histories, in memory that grows with a few numbers an interaction and not with its text.

Each part's users and items become numbers at once; the parts wait in temporary files, divided by user, so that each division
can be ordered by itself.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import polars as pl

from sftrec_jax.data.columns import as_words, ratings, text_ids, times
from sftrec_jax.data.histories import pair_hash, text_hashes
from sftrec_jax.data.parts import occurrences, parts
from sftrec_jax.data.table import Table
from sftrec_jax.errors import UserError

DIVISIONS = 32
"""Temporary files."""
RECORD = np.dtype([("user", "<i4"), ("item", "<i4"), ("time", "<i8"), ("row", "<i8"), ("fraction", "<i4"), ("rating", "<f4")])
"""`row` counts over all parts; `fraction` is of a second, in nanoseconds."""


class Ids:
    """Texts as numbers, by first appearance."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def numbers(self, texts: pl.Series) -> np.ndarray:
        """int32 [len(texts)]"""
        distinct = texts.unique(maintain_order=True)
        known = self._numbers
        codes = [known.setdefault(text, len(known)) for text in distinct.to_list()]
        lookup = pl.DataFrame({"text": distinct, "code": pl.Series(codes, dtype=pl.Int32)})
        joined = texts.alias("text").to_frame().join(lookup, on="text", how="left", maintain_order="left")
        return joined["code"].to_numpy()

    def sorted(self) -> tuple[list[str], np.ndarray]:
        """The texts in order, and of each number its place there (int32)."""
        texts = sorted(self._numbers)
        ranks = np.empty(len(texts), np.int32)
        ranks[[self._numbers[text] for text in texts]] = np.arange(len(texts), dtype=np.int32)
        return texts, ranks


@dataclass(eq=False)
class Log:
    """Interactions of all users, users by id, each user's in time order."""

    user_ids: list[str]
    counts: np.ndarray
    """int64 [U] interactions of each."""
    items: np.ndarray
    """int32 [N]"""
    times: np.ndarray
    """int64 [N], seconds; where the source has no time, the row."""
    rows: np.ndarray
    """int32 or int64 [N], place in the source."""
    fractions: np.ndarray | None
    """int32 [N], nanoseconds; None: all are 0."""
    ratings: np.ndarray | None
    """float32 [N]"""
    remarks: dict[str, list[str]]
    """Texts by place in the source."""

    @property
    def offsets(self) -> np.ndarray:
        """int64 [U + 1], where each user's interactions begin and end."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    def keep(self, mask: np.ndarray) -> None:
        """Leaves out interactions where `mask` (bool [N]) is false; users stay, if with none."""
        counts = np.zeros_like(self.counts)
        for part in parts(self.offsets):
            left = part.owner[mask[part.where]] - part.first
            counts[part.first : part.last] = np.bincount(left, minlength=part.last - part.first)
        self.counts = counts
        for name in ("items", "times", "rows", "fractions", "ratings"):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, values[mask])

    def drop_empty_users(self) -> None:
        """Leaves out users without interactions."""
        some = self.counts > 0
        self.user_ids = [user for user, kept in zip(self.user_ids, some.tolist(), strict=True) if kept]
        self.counts = self.counts[some]

    def same_moment(self) -> np.ndarray:
        """bool [N - 1]: whether an interaction has the user and the time of the one before."""
        same = self.times[1:] == self.times[:-1]
        if self.fractions is not None:
            same &= self.fractions[1:] == self.fractions[:-1]
        starts = np.cumsum(self.counts)[:-1]
        same[starts[(starts > 0) & (starts < len(self.times))] - 1] = False
        return same


class LogReader:
    """Takes a source part by part; a context, at whose end its temporary files go.

    Args:
        timed: whether the source has times; else the order of the source counts.
        min_rating: interactions rated lower are left out, and counted.
        remarks: names of columns with texts, which are kept in memory.
        items: id of every item of the catalogue, or None where the log alone says which there are.
        missing: what becomes of items that the catalogue lacks: `error`, or `drop`.
        time_unit: what numbers of the time column count: s, ms, us, ns.
    """

    def __init__(
        self, timed: bool, rated: bool, min_rating: float | None, remarks: Sequence[str], items: pl.Series | None, catalogue: str,
        missing: str, time_unit: str = "s",
    ):  # fmt: skip
        self._unit = time_unit
        self.timed, self.rated, self.min_rating, self.remarks = timed, rated, min_rating, {name: [] for name in remarks}
        self.users, self.items, self._catalogue, self._missing = Ids(), Ids(), catalogue, missing
        self._lookup = None
        if items is not None:
            self._lookup = pl.DataFrame({"item": items, "code": np.arange(items.len(), dtype=np.int32)})
        self._files: list[BinaryIO] = [tempfile.TemporaryFile() for _ in range(DIVISIONS)]
        self.read = self.below_min_rating = self.missing_items = self.missing_ratings = 0
        self._missed: set[str] = set()
        self._fractions = False

    def __enter__(self) -> "LogReader":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    @property
    def distinct_missing(self) -> int:
        """Items that the catalogue lacks."""
        return len(self._missed)

    def take(self, tables: Iterable[Table], progress: Callable[[int], None] = lambda rows: None) -> None:
        """Reads all parts; `progress` is told the rows of each. UserError for a value that cannot be, with file and row."""
        for table in tables:
            if table.frame.height:
                self._part(table)
            progress(table.frame.height)

    def _part(self, table: Table) -> None:
        users, items = text_ids(table, "user"), text_ids(table, "item")
        part = np.zeros(users.len(), RECORD)
        part["row"] = np.arange(self.read, self.read + len(part))
        if self.timed:
            moments = times(table, self._unit)
            part["time"], part["fraction"] = moments["time"].to_numpy(), moments["fraction"].to_numpy()
            self._fractions |= bool(part["fraction"].any())
        else:
            part["time"] = part["row"]
        low = np.zeros(len(part), bool)
        if self.rated:
            values = ratings(table, self.min_rating).to_numpy()
            part["rating"] = values
            self.missing_ratings += int(np.isnan(values).sum())
            low = values < (-np.inf if self.min_rating is None else self.min_rating)
        part["user"], part["item"] = self.users.numbers(users), self._item_numbers(table, items)
        for name, texts in self.remarks.items():
            texts += as_words(table, name).fill_null("").to_list()
        self.read += len(part)
        if (lacking := part["item"] < 0).any():
            self.missing_items += int(lacking.sum())
        self.below_min_rating += int((low & ~lacking).sum())
        part = part[~(low | lacking)]
        # By division, each in the order of the source.
        division = part["user"] % DIVISIONS
        order = np.argsort(division, kind="stable")
        edges = np.searchsorted(division[order], np.arange(DIVISIONS + 1))
        part = part[order]
        try:
            for file, begin, end in zip(self._files, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                file.write(part[begin:end].tobytes())
                file.flush()
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: cannot hold the interactions while they are ordered ({error.strerror}; "
                f"{RECORD.itemsize} bytes each); set TMPDIR to a folder with more room"
            ) from None

    def _item_numbers(self, table: Table, items: pl.Series) -> np.ndarray:
        if self._lookup is None:
            return self.items.numbers(items)
        named = items.alias("item").to_frame()
        codes = named.join(self._lookup, on="item", how="left", maintain_order="left")["code"]
        unknown = codes.is_null()
        if unknown.any():
            if self._missing == "error":
                row, item = table.frame["row"].filter(unknown)[0], items.filter(unknown)[0]
                count, rows = items.filter(unknown).n_unique(), int(unknown.sum())
                raise UserError(
                    f"{table.where}: item {item!r} in row {row} is not in the catalogue {self._catalogue} ({count} such items in "
                    f"{rows} rows); add the items there, remove the rows, or set data.missing_items: drop"
                )
            self._missed.update(items.filter(unknown).unique().to_list())
        return codes.fill_null(-1).to_numpy()

    def finish(self, item_ids: Sequence[str], item_ranks: np.ndarray | None, tie_seed: int) -> tuple[Log, int]:
        """The log in order, without repeated rows, and how many rows were repeated (the same user, item and time).

        Args:
            item_ids: id of every item by its final index, for the order of ties.
            item_ranks: int32, the final index of every number of `items`; None: they are the same.
            tie_seed: interactions of a user at one time come in the order of a hash of (tie_seed, user, item).
        """
        user_ids, ranks = self.users.sorted()
        hashes = text_hashes(user_ids, tie_seed, "user"), text_hashes(list(item_ids), tie_seed, "item")
        counts, kept, dropped = np.zeros(len(user_ids), np.int64), [], 0
        for file in self._files:
            part, repeated = self._ordered(file, ranks, item_ranks, hashes)
            counts += np.bincount(part["user"], minlength=len(counts))
            dropped += repeated
            file.seek(0)
            file.truncate()
            file.write(part.tobytes())
            kept.append(len(part))
        total = sum(kept)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        log = Log(
            user_ids,
            counts,
            np.empty(total, np.int32),
            np.empty(total, np.int64),
            np.empty(total, np.int32 if self.read < 1 << 31 else np.int64),
            np.empty(total, np.int32) if self._fractions else None,
            np.empty(total, np.float32) if self.rated else None,
            self.remarks,
        )
        for file, count in zip(self._files, kept, strict=True):
            part = _load(file, count)
            first = np.flatnonzero(np.diff(part["user"], prepend=-1))
            place = np.arange(count) - np.repeat(first, np.diff(np.append(first, count)))
            to = offsets[part["user"]] + place
            for name, values in (("item", log.items), ("time", log.times), ("row", log.rows), ("fraction", log.fractions),
                                 ("rating", log.ratings)):  # fmt: skip
                if values is not None:
                    values[to] = part[name]
        return log, dropped

    def _ordered(
        self, file: BinaryIO, ranks: np.ndarray, item_ranks: np.ndarray | None, hashes: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, int]:
        part = _load(file, None)
        part["user"] = ranks[part["user"]]
        if item_ranks is not None:
            part["item"] = item_ranks[part["item"]]
        if not self.timed:
            return part[np.argsort(part["user"], kind="stable")], 0
        ties = pair_hash(hashes[0][part["user"]], hashes[1][part["item"]])
        # The item comes last only to settle a collision of two 64-bit hashes; the row, which of two repeated ones stays.
        columns: dict[str, Any] = {name: part[name] for name in ("user", "time", "fraction", "item", "row")}
        keys = pl.DataFrame(columns | {"tie": ties, "at": np.arange(len(part), dtype=np.int32)})
        order = keys.sort("user", "time", "fraction", "tie", "item", "row")["at"].to_numpy()
        del keys, ties
        part = part[order]
        same = np.ones(max(0, len(part) - 1), bool)
        for name in ("user", "item", "time", "fraction"):
            same &= np.diff(part[name]) == 0
        return (part[np.concatenate([[True], ~same])], int(same.sum())) if len(part) else (part, 0)


def _load(file: BinaryIO, count: int | None) -> np.ndarray:
    file.seek(0)
    data = np.frombuffer(file.read(), RECORD)
    assert count is None or len(data) == count
    return data.copy() if count is None else data


def k_core(log: Log, user_core: int, item_core: int) -> int:
    """Drops interactions of users and items with fewer than asked for, until none has; gives the rounds that dropped some."""
    rounds, items = 0, int(log.items.max(initial=-1)) + 1
    while True:
        few_users = (log.counts < user_core) & (log.counts > 0)
        taken = occurrences(log.items, items)
        few_items = (taken < item_core) & (taken > 0)
        if not few_users.any() and not few_items.any():
            return rounds
        mask = np.repeat(~few_users, log.counts)
        mask &= ~few_items[log.items]
        log.keep(mask)
        rounds += 1


def tied_share(log: Log) -> float:
    """Share of the interactions that have the time of another one of the same user."""
    same = log.same_moment()
    tied = np.concatenate([same, [False]]) | np.concatenate([[False], same])
    return float(tied.mean()) if len(log.items) else 0.0


def tied_in_file_order(log: Log) -> tuple[float | None, int]:
    """Of neighbours in a history with equal times, the share whose rows rise, and their number.

    One half where the order of the file says nothing; None without such neighbours.
    """
    same = log.same_moment()
    pairs = int(same.sum())
    return (int((same & (log.rows[1:] > log.rows[:-1])).sum()) / pairs, pairs) if pairs else (None, 0)
