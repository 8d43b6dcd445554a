"""`sftrec recommend`: users of the run, typed histories, or a file of histories, to ranked titles."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from sftrec_jax.console import console, progress
from sftrec_jax.data.told import NOTHING, Told
from sftrec_jax.errors import UserError
from sftrec_jax.items.titles import TitleIndex
from sftrec_jax.run.session import Session, recommender
from sftrec_jax.run.tables import recommendation_frame


def user_history(session: Session, user: str) -> tuple[np.ndarray, Told]:
    """All items of a user of the run and what is told of them; raises UserError with users that exist for another."""
    found = np.flatnonzero(session.dataset.user_ids == user)
    if not len(found):
        some = ", ".join(str(u) for u in session.dataset.user_ids[:3])
        raise UserError(
            f"--user {user}: not a user of this run, which has {len(session.dataset.user_ids):,} (such as {some}); "
            "give a --history"
        )
    return session.dataset.history(int(found[0])), session.dataset.told(int(found[0]))


def file_histories(session: Session, path: Path) -> tuple[list[str], list[np.ndarray], list[Told]]:
    """Names, histories and what else is told, from a file.

    `.jsonl` or `.parquet`: column `history` with a list of item ids or titles (or one text with `;` between them), and
    optionally `user`, `ratings` and `timestamps` (lists as long as the history), and the fields of profiles. `.txt`: a line a
    user, titles or ids with `;` between them.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; give a .jsonl, .parquet or .txt file of histories")
    try:
        if path.suffix == ".txt":
            rows: list[dict[str, Any]] = [{"history": line} for line in path.read_text(encoding="utf-8").splitlines()]
        elif path.suffix == ".jsonl":
            rows = pl.read_ndjson(path).to_dicts()
        elif path.suffix == ".parquet":
            rows = pl.read_parquet(path).to_dicts()
        else:
            raise UserError(f"{path}: unknown ending {path.suffix!r}; use .jsonl, .parquet or .txt")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert it with `iconv -t UTF-8`") from None
    except (PolarsError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not rows:
        raise UserError(f"{path}: holds no history; write at least one row")
    index = TitleIndex(session.codes.titles, session.dataset.item_ids)
    by_id = {str(item): i for i, item in enumerate(session.dataset.item_ids)}
    names, histories, told = [], [], []
    for number, row in enumerate(rows, start=1):
        if "history" not in row:
            raise UserError(f"{path}: row {number} has no column `history`, it has {', '.join(row)}; rename the column")
        try:
            items = _items(row["history"], index, by_id)
            told.append(_told(row, len(items), session.prompts.writer.profile))
        except UserError as error:
            raise UserError(f"{path}: row {number}: {error}") from None
        names.append(str(number if row.get("user") is None else row["user"]))
        histories.append(np.asarray(items, np.int32))
    return names, histories, told


def _told(row: dict[str, Any], count: int, profile: Sequence[str]) -> Told:
    lists: dict[str, np.ndarray | None] = {}
    for name, kind in (("ratings", np.float32), ("timestamps", np.int64)):
        values = row.get(name)
        if values is None:
            lists[name] = None
            continue
        if (
            not isinstance(values, list)
            or len(values) != count
            or not all(isinstance(v, int | float) and abs(v) < 3e38 for v in values)
        ):
            raise UserError(f"{name} is {values!r}; write a list of {count} numbers, one for each item of the history")
        lists[name] = np.asarray(values, kind)
    times = lists["timestamps"]
    gaps = None if times is None else np.diff(times, prepend=times[:1] + 1)
    fields = {name: str(row[name]) for name in profile if row.get(name) is not None}
    return Told(lists["ratings"], times, gaps, {}, fields)


def typed_profile(session: Session, words: Sequence[str]) -> Told:
    """`FIELD=TEXT` of the command line. Raises UserError for a field that prompts do not say."""
    fields = {}
    known = session.prompts.writer.profile
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            says = f"say {', '.join(known)} of a user; write FIELD=TEXT" if known else "say nothing of a user; leave it out"
            raise UserError(f"--profile {word}: prompts of this run {says}")
        fields[name] = value
    return Told(profile=fields)


def _items(value: Any, index: TitleIndex, by_id: dict[str, int]) -> list[int]:
    """Item indices of a cell: text with `;` between titles, or a list of ids or titles; null is an empty history."""
    if isinstance(value, str):
        return index.split(value)
    if not isinstance(value, list | None):
        raise UserError(f"history is {value!r}; write a list of item ids or titles, or titles with `;` between them")
    return [i for v in value or [] for i in ([by_id[str(v)]] if str(v) in by_id else index.split(str(v)))]


def allowed_items(session: Session, only: Path | None, without: Path | None) -> np.ndarray | None:
    """bool [n_items] of what two files of items (a line each, id or title) leave; None without files."""
    if only is None and without is None:
        return None
    allowed = np.ones(len(session.dataset.item_ids), bool)
    if only is not None:
        allowed[:] = False
        allowed[_listed(session, only)] = True
    if without is not None:
        allowed[_listed(session, without)] = False
    if not allowed.any():
        raise UserError(f"{only or without}: leaves no item of the catalogue to recommend; allow at least one")
    return allowed


def _listed(session: Session, path: Path) -> list[int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); give a file with an item a line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert it with `iconv -t UTF-8`") from None
    index = TitleIndex(session.codes.titles, session.dataset.item_ids)
    by_id = {str(item): i for i, item in enumerate(session.dataset.item_ids)}
    items: list[int] = []
    for number, line in enumerate(lines, start=1):
        if text := line.strip():
            try:
                items += [by_id[text]] if text in by_id else index.split(text)
            except UserError as error:
                raise UserError(f"{path}: line {number}: {str(error).removeprefix('history: ')}") from None
    return items


def recommend(
    session: Session,
    names: Sequence[str],
    histories: Sequence[np.ndarray],
    k: int,
    keep_seen: bool,
    allowed: np.ndarray | None = None,
    told: Sequence[Told] | None = None,
) -> pl.DataFrame:
    """Columns as of `recommendation_frame`: the `k` best items for each history, without those in it.

    `allowed`: bool [n_items] items that may be recommended, or None; `told`: of each history what else is known. Says how many
    lists are shorter than `k`, and how many histories lack what prompts name.
    """
    n_items = len(session.dataset.item_ids)
    if not 1 <= k <= n_items:
        raise UserError(f"--k {k}: the catalogue has {n_items:,} items; use a number from 1 to {n_items}")
    decoder, step = session.trained_decoder()
    by = session.config.decode.normaliser
    console.print(f"model of {session.folder.path}, step {step}" + ("" if by == "full" else f", scores normalised over {by}"))
    prompts = _prompts(session, histories, [NOTHING] * len(histories) if told is None else told)
    seen = None if keep_seen else list(histories)
    ranking = recommender(session, decoder).rank(prompts, seen, k, progress("recommending", len(prompts)), allowed)
    short = int((ranking.items < 0).any(axis=1).sum())
    if short:
        hidden = "" if keep_seen else " (items of the history are left out; --keep-seen allows them)"
        console.print(f"{short:,} of {len(prompts):,} lists are shorter than {k}: no other item is left to recommend{hidden}")
    return recommendation_frame(list(names), session.dataset.item_ids, session.codes.titles, ranking, by)


def _prompts(session: Session, histories: Sequence[np.ndarray], told: Sequence[Told]) -> list[np.ndarray]:
    """Prompts; says how many do not hold the whole history, and what they would say if it were told."""
    builder, prompts, cut = session.prompts, [], 0
    untold: dict[str, int] = {}
    for history, more in zip(histories, told, strict=True):
        for name in (*builder.writer.told, *builder.writer.profile):
            untold[name] = untold.get(name, 0) + (not more.tells(name))
        before = builder.counts["items_cut_to_context"]
        prompts.append(builder.prompt(history, more))
        cut += len(history) > builder.max_history or builder.counts["items_cut_to_context"] > before
    if cut:
        console.print(
            f"{cut:,} of {len(prompts):,} histories are longer than a prompt (prompt.max_history is {builder.max_history}, "
            f"train.row_length {session.config.train.row_length}); only their newest items count"
        )
    for name, count in untold.items():
        if count:
            console.print(f"{count:,} of {len(prompts):,} prompts do not say {name}, which is not known")
    return prompts
