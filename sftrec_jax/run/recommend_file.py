"""`sftrec recommend` for files of any length: a shard is read, ranked and kept; where all are there, they become one file.

A run that was killed goes on after the shards that are whole, and the file is the same to the byte: what the batches of a shard
look like depends on the shard alone.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import polars as pl

from sftrec_jax.console import Progress, console, progress
from sftrec_jax.errors import UserError
from sftrec_jax.run.history_files import Histories, Shard, check_file, count_rows, file_shards
from sftrec_jax.run.identity import identity
from sftrec_jax.run.parts import Parts, sha256_of
from sftrec_jax.run.recommend import Ranker
from sftrec_jax.run.session import Session
from sftrec_jax.run.tables import write_frames

SHARD = 8192
"""Histories that are read, ranked and kept together."""


class Asked:
    """Everybody to recommend to: typed histories, and those of a file in shards of `size`.

    Raises: UserError for a file that cannot be read or whose first shard holds an error, before a model is loaded.
    """

    def __init__(self, session: Session, typed: Histories, file: Path | None, size: int):
        self.file, self.size = file, size
        self.total = len(typed.names)
        typed_as = [(name, items.tolist(), dict(told.profile)) for name, items, told in zip(*typed, strict=True)]
        self.source = hashlib.sha256(f"{typed_as} {'' if file is None else _digest(file)}".encode()).hexdigest()
        """SHA-256 of all that is asked about."""
        self._shards: Iterator[Shard] = iter(())
        if typed.names:
            self._shards = iter([Shard(1, len(typed.names), "", lambda: typed)])
        if file is not None:
            rest = file_shards(session, file, size)
            first = next(rest)
            people = first.read()
            self._shards = chain(self._shards, [first._replace(read=lambda: people)], rest)
            self.total += count_rows(file)

    def __iter__(self) -> Iterator[Shard]:
        """Once."""
        return self._shards


def _digest(file: Path) -> str:
    check_file(file)
    try:
        return sha256_of(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); correct the path") from None


def recommended(ranker: Ranker, asked: Asked) -> Iterator[pl.DataFrame]:
    """A frame a shard; then says what there is to say."""
    report, counts = progress("recommending", asked.total), Counter[str]()
    for shard in asked:
        frame, found = _ranked(ranker, asked, shard, report)
        counts += found
        yield frame
    ranker.say(counts)


def check_out(out: Path, overwrite: bool) -> None:
    """UserError for a file that must stay; one that a killed run may just have finished is looked at later."""
    if out.exists() and not overwrite and not _folder(out).exists():
        raise _exists(out)


def recommend_to(ranker: Ranker, asked: Asked, out: Path, overwrite: bool) -> None:
    """Writes the lists of everybody to `out`, Parquet or JSON lines; goes on where an earlier run of the same request stopped.

    Raises: UserError where `.OUT.parts` beside it holds shards of another request; `overwrite` removes these and `out`.
    """
    parts = Parts(_folder(out), _request(ranker, asked))
    if difference := parts.differences():
        if not overwrite:
            raise UserError(
                f"{parts.folder}: holds parts of another request ({difference}); ask as before to go on with it, "
                "or add --overwrite to start again"
            )
        parts.drop()
    if out.exists():
        if parts.joined == {"of": asked.source, "sha256": sha256_of(out)}:
            parts.drop()
            console.print(f"{out}: an earlier run of this command had written it whole")
            return
        if not overwrite:
            raise _exists(out)
    parts.begin()
    names, counts, kept, again = [], Counter[str](), 0, 0
    report = progress("recommending", asked.total)
    for number, shard in enumerate(asked):
        name = f"{number:05d}.parquet"
        names.append(name)
        known = parts.finished(name, shard.source) if shard.source else None
        if known is not None:
            kept += shard.size
            report.passed(shard.size)
            counts.update(known)
            continue
        again += bool(shard.source) and parts.path(name).exists()
        frame, found = _ranked(ranker, asked, shard, report)
        parts.write(name, shard.source, found, frame.write_parquet)
        counts.update(found)
    if kept:
        console.print(f"{kept:,} of {counts['histories']:,} histories had been ranked by an earlier run")
    if again:
        console.print(f"{again:,} shards of an earlier run were damaged or of other rows and have been ranked again")
    rows = _join(parts, names, asked.source, out)
    ranker.say(counts)
    console.print(f"wrote {rows:,} rows to {out}")


def _join(parts: Parts, names: list[str], source: str, out: Path) -> int:
    """One file of all parts, renamed when it is whole and on the disk; then the parts go. Returns its rows."""
    temporary = parts.path(f".joined.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            rows = write_frames(file, out.suffix, (pl.read_parquet(parts.path(name)) for name in names))
            file.flush()
            os.fsync(file.fileno())
        parts.conclude({"of": source, "sha256": sha256_of(temporary)})
        os.replace(temporary, out)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); free space and go on") from None
    parts.drop()
    return rows


def _ranked(ranker: Ranker, asked: Asked, shard: Shard, report: Progress) -> tuple[pl.DataFrame, Counter[str]]:
    people = shard.read()
    try:
        return ranker.frame(people, report)
    except UserError as error:
        where = f"{asked.file}: rows {shard.first:,} to {shard.first + shard.size - 1:,}: " if shard.source else ""
        raise UserError(f"{where}{error}") from None


def _request(ranker: Ranker, asked: Asked) -> dict[str, object]:
    allowed = None if ranker.allowed is None else hashlib.sha256(ranker.allowed.tobytes()).hexdigest()
    asks = {"k": ranker.k, "keep_seen": ranker.keep_seen, "allowed_items": allowed, "shard": asked.size}
    return {"file": asked.file and asked.file.name, **asks, **identity(ranker.session, ranker.step)}


def _folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


def _exists(out: Path) -> UserError:
    return UserError(f"--to {out}: exists already; name another file or add --overwrite")
