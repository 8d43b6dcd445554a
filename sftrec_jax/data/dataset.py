"""Histories of all users and the catalogue, in memory and in a folder."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from polars.exceptions import PolarsError

from sftrec_jax.data.parts import Part, parts
from sftrec_jax.data.told import Many, Told
from sftrec_jax.data.windows import Windows
from sftrec_jax.errors import UserError

FORMAT_VERSION = 2


@dataclass(frozen=True, eq=False)
class ItemText:
    """What the catalogue says of each item beside its title."""

    texts: np.ndarray
    """Text (object) [n_items], `data.text_columns` joined; "" for an item of which they say nothing."""
    keyphrases: np.ndarray
    """Text (object) [n_items]; "" for an item without one."""
    rows: np.ndarray
    """int64 [n_items], place in the catalogue as it was read, from 0."""
    fields: dict[str, np.ndarray] = field(default_factory=dict)
    """By column, text (object) [n_items]: each of `data.text_columns` by itself."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Histories of all users in time order, as indices into the catalogue."""

    user_ids: np.ndarray
    """Text (object) [U], sorted."""
    item_ids: np.ndarray
    """Text (object) [n_items], in the order of the catalogue."""
    titles: np.ndarray
    """Text (object) [n_items], as in the catalogue: not necessarily distinct."""
    offsets: np.ndarray
    """int64 [U+1]; user u has items[offsets[u]:offsets[u+1]]."""
    items: np.ndarray
    """int32 [N], indices into the catalogue."""
    timestamps: np.ndarray
    """int64 [N], seconds; the position in the history where the source has no time."""
    train_end: np.ndarray
    """int64 [U], leading items of each history that are training data."""
    valid_position: np.ndarray
    """int64 [U], position of the validation target in the history, -1: none."""
    test_position: np.ndarray
    """int64 [U], position of the test target in the history, -1: none."""
    report: dict[str, Any]
    """Counts: what came in, what was kept, why the rest was not; numbers, texts and nulls only."""
    text: ItemText | None = None
    """None for a data set made by hand."""
    train_begin: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [U], position of the first training target; the items before it are its context alone, told of in other rows
    (0 but for data that come as examples)."""
    ratings: np.ndarray | None = None
    """float32 [N]; None where `data.rating_column` is not set."""
    remarks: dict[str, np.ndarray] = field(default_factory=dict)
    """Text (object) [N] by name (review, summary, explanation), where `data` names their columns."""
    profiles: dict[str, np.ndarray] = field(default_factory=dict)
    """What is known of users, text (object) [U] by name; "" where nothing is."""

    def __post_init__(self) -> None:
        if not len(self.train_begin):
            object.__setattr__(self, "train_begin", np.zeros(len(self.user_ids), np.int64))

    @property
    def trains(self) -> np.ndarray:
        """bool [N], which interactions are training targets: each training interaction of the source once."""
        out = np.empty(len(self.items), bool)
        for part in self.parts():
            out[part.where] = self.trained(part)
        return out

    def parts(self) -> Iterator[Part]:
        """All histories, about a million interactions at a time."""
        return parts(self.offsets)

    def trained(self, part: Part) -> np.ndarray:
        """bool [n], which interactions of a part are training targets."""
        return (part.position >= self.train_begin[part.owner]) & (part.position < self.train_end[part.owner])

    @property
    def training(self) -> Windows:
        """Of each history with training targets where in `items` its training part begins, has its first target, and ends."""
        some = np.flatnonzero(self.train_end > self.train_begin)
        return Windows(*(self.offsets[some] + at for at in (0, self.train_begin[some], self.train_end[some])))

    @property
    def given(self) -> bool:
        """Whether the data came as examples, with their split."""
        return self.report.get("split") == "given"

    @cached_property
    def timed(self) -> bool:
        """Whether the source has times; else `timestamps` are positions."""
        return not all(np.array_equal(self.timestamps[part.where], part.position) for part in self.parts())

    @property
    def item_fields(self) -> dict[str, np.ndarray]:
        """What templates may say of items: text (object) [n_items] by column."""
        return {} if self.text is None else self.text.fields

    @property
    def interaction_fields(self) -> tuple[str, ...]:
        """What templates may say of interactions."""
        rated = () if self.ratings is None else ("rating",)
        return (*rated, *(("gap", "date") if self.timed and not self.given else ()), *self.remarks)

    def told(self, user: int, end: int | None = None) -> Told:
        """What is told of the first `end` interactions of the user with this index (None: all), and of the user."""
        begin = int(self.offsets[user])
        here = slice(begin, int(self.offsets[user + 1]) if end is None else begin + end)
        times = self.timestamps[here] if "date" in self.interaction_fields else None
        gaps = None if times is None else np.diff(times, prepend=times[:1])
        if gaps is not None:
            gaps[:1] = -1
        ratings = None if self.ratings is None else self.ratings[here]
        return Told(ratings, times, gaps, {name: values[here] for name, values in self.remarks.items()}, self.profile(user))

    def profile(self, user: int) -> dict[str, str]:
        """What is known of the user with this index."""
        return {name: str(values[user]) for name, values in self.profiles.items()}

    @property
    def told_in_training(self) -> Many:
        """What is told of all histories of `training`."""
        some = np.flatnonzero(self.train_end > self.train_begin).tolist()
        times, gaps = None, None
        if "date" in self.interaction_fields:
            times, gaps = self.timestamps, np.diff(self.timestamps, prepend=0)
            gaps[self.offsets[:-1][np.diff(self.offsets) > 0]] = -1
        told = Told(self.ratings, times, gaps, self.remarks)
        return Many(told, [self.profile(user) for user in some] if self.profiles else None)

    def history(self, user: int) -> np.ndarray:
        """All items of the user with this index, int32 [n], oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def train_history(self, user: int) -> np.ndarray:
        """The leading items of the user that are training data, int32 [train_end[user]]."""
        return self.items[self.offsets[user] : self.offsets[user] + self.train_end[user]]

    def save(self, folder: Path) -> None:
        """Writes interactions.parquet, users.parquet, catalogue.parquet, and dataset.json last with their SHA-256."""
        folder.mkdir(parents=True, exist_ok=True)
        writers: dict[str, Callable[[Path], None]] = {
            "interactions.parquet": self._write_interactions,
            "users.parquet": self._users().write_parquet,
            "catalogue.parquet": self._catalogue().write_parquet,
        }
        digests = {name: _written(folder / name, write) for name, write in writers.items()}
        summary = {"format_version": FORMAT_VERSION, "files": digests, "report": self.report}
        text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        _written(folder / "dataset.json", lambda path: path.write_text(text, encoding="utf-8"))

    def _write_interactions(self, path: Path) -> None:
        tables = self._interactions()
        first = next(tables)
        with pq.ParquetWriter(path, first.schema, compression="zstd") as file:
            for table in itertools.chain([first], tables):
                file.write_table(table)

    def _interactions(self) -> Iterator[pa.Table]:
        for part in self.parts():
            rated = {} if self.ratings is None else {"rating": pa.array(self.ratings[part.where], pa.float32())}
            yield pa.table(
                {
                    "user": pa.array(part.owner.astype(np.int32)),
                    "item": pa.array(self.items[part.where], pa.int32()),
                    "timestamp": pa.array(self.timestamps[part.where], pa.int64()),
                    "position": pa.array(part.position.astype(np.int32)),
                    **rated,
                    **{f"remark:{n}": pa.array(v[part.where].tolist(), pa.large_string()) for n, v in self.remarks.items()},
                }
            )

    def _users(self) -> pl.DataFrame:
        return pl.DataFrame(
            {
                "user_id": pl.Series(self.user_ids.tolist(), dtype=pl.String),
                "train_begin": self.train_begin,
                "train_end": self.train_end,
                "valid_position": self.valid_position,
                "test_position": self.test_position,
                **{f"profile:{n}": pl.Series(v.tolist(), dtype=pl.String) for n, v in self.profiles.items()},
            }
        )

    def _catalogue(self) -> pl.DataFrame:
        text = self.text or ItemText(
            np.full(len(self.titles), "", object), np.full(len(self.titles), "", object), np.arange(len(self.titles))
        )
        return pl.DataFrame(
            {
                "item_id": self.item_ids.tolist(),
                "title": self.titles.tolist(),
                "text": text.texts.tolist(),
                "keyphrase": text.keyphrases.tolist(),
                "row": text.rows.tolist(),
                **{f"field:{name}": values.tolist() for name, values in text.fields.items()},
            },
            schema={"item_id": pl.String, "title": pl.String, "text": pl.String, "keyphrase": pl.String, "row": pl.Int64}
            | {f"field:{name}": pl.String for name in text.fields},
        )

    @classmethod
    def load(cls, folder: Path) -> "Dataset":
        """Reads what `save` wrote; UserError when a file is missing, changed, or of another format version."""
        try:
            summary = json.loads(_read(folder / "dataset.json"))
            version, digests, report = summary["format_version"], summary["files"], summary["report"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{folder / 'dataset.json'}: not a summary of a prepared data set; prepare it again") from None
        if version != FORMAT_VERSION:
            raise UserError(f"{folder}: format version {version}, this program reads {FORMAT_VERSION}; prepare the data again")
        interactions = _read_parquet(folder, "interactions.parquet", digests)
        users = _read_parquet(folder, "users.parquet", digests)
        catalogue = _read_parquet(folder, "catalogue.parquet", digests)
        return cls(
            user_ids=np.array(users["user_id"].to_list(), dtype=object),
            item_ids=_texts(catalogue["item_id"]),
            titles=_texts(catalogue["title"]),
            offsets=np.searchsorted(interactions["user"].to_numpy(), np.arange(users.height + 1, dtype=np.int32)),
            items=interactions["item"].to_numpy(),
            timestamps=interactions["timestamp"].to_numpy(),
            train_end=users["train_end"].to_numpy(),
            valid_position=users["valid_position"].to_numpy(),
            test_position=users["test_position"].to_numpy(),
            report=report,
            text=ItemText(
                _texts(catalogue["text"]),
                _texts(catalogue["keyphrase"]),
                catalogue["row"].to_numpy(),
                _named(catalogue, "field"),
            ),
            # Data prepared before there were examples as a source lack the column.
            train_begin=users["train_begin"].to_numpy() if "train_begin" in users.columns else np.zeros(users.height, np.int64),
            ratings=interactions["rating"].to_numpy() if "rating" in interactions.columns else None,
            remarks=_named(interactions, "remark"),
            profiles=_named(users, "profile"),
        )


def _texts(values: pl.Series) -> np.ndarray:
    return np.array(values.to_list(), dtype=object)


def _named(frame: pl.DataFrame, kind: str) -> dict[str, np.ndarray]:
    """Texts of the columns `KIND:NAME`, by name."""
    return {name.split(":", 1)[1]: _texts(frame[name]) for name in frame.columns if name.startswith(f"{kind}:")}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unread(path, error) from None


def _unread(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot read the prepared data ({error.strerror}); prepare the data first")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_parquet(folder: Path, name: str, digests: dict[str, str]) -> pl.DataFrame:
    try:
        if _sha256(folder / name) != digests.get(name):
            raise UserError(f"{folder / name}: not the file that dataset.json describes (damaged or replaced); prepare it again")
        return pl.read_parquet(folder / name)
    except OSError as error:
        raise _unread(folder / name, error) from None
    except PolarsError as error:
        raise UserError(f"{folder / name}: not readable ({str(error).splitlines()[0]}); prepare the data again") from None


def _written(path: Path, write: Callable[[Path], Any]) -> str:
    """Writes a file under another name and then renames it; gives its SHA-256."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        digest = _sha256(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest
