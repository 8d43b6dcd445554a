"""`sftrec recommend`: users of the run, typed histories, or shards of a file of histories, to ranked titles."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from sftrec_jax.console import console
from sftrec_jax.data.told import Told
from sftrec_jax.decode.batches import Progress
from sftrec_jax.errors import UserError
from sftrec_jax.items.titles import TitleIndex
from sftrec_jax.run.history_files import Histories
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


class Ranker:
    """Ranks histories with the best checkpoint of a run, and says with which.

    Args:
        k: items for each history.
        keep_seen: items of a history may be recommended again.
        allowed: bool [n_items] items that may be recommended, or None.
    """

    def __init__(self, session: Session, k: int, keep_seen: bool, allowed: np.ndarray | None = None):
        check_k(session, k)
        decoder, self.step = session.trained_decoder()
        self.session, self.k, self.keep_seen, self.allowed = session, k, keep_seen, allowed
        by = session.config.decode.normaliser
        console.print(
            f"model of {session.folder.path}, step {self.step}" + ("" if by == "full" else f", scores normalised over {by}")
        )
        self._decode = recommender(session, decoder)

    def frame(self, people: Histories, report: Progress | None = None) -> tuple[pl.DataFrame, Counter[str]]:
        """Columns as of `recommendation_frame`: the best items for each history; and what `say` says of them."""
        prompts, counts = self._prompts(people)
        seen = None if self.keep_seen else people.items
        ranking = self._decode.rank(prompts, seen, self.k, report, self.allowed)
        counts["short"] = int((ranking.items < 0).any(axis=1).sum())
        data, by = self.session.dataset, self.session.config.decode.normaliser
        return recommendation_frame(people.names, data.item_ids, self.session.codes.titles, ranking, by), counts

    def _prompts(self, people: Histories) -> tuple[list[np.ndarray], Counter[str]]:
        builder, prompts = self.session.prompts, []
        counts = Counter(histories=len(people.names))
        for history, more in zip(people.items, people.told, strict=True):
            for name in (*builder.writer.told, *builder.writer.profile):
                counts[f"without {name}"] += not more.tells(name)
            before = builder.counts["items_cut_to_context"]
            prompts.append(builder.prompt(history, more))
            counts["cut"] += len(history) > builder.max_history or builder.counts["items_cut_to_context"] > before
        return prompts, counts

    def say(self, counts: Counter[str]) -> None:
        """How many histories are not in their prompts whole, lack what prompts name, and got fewer items than `k`."""
        builder, total = self.session.prompts, counts["histories"]
        if cut := counts["cut"]:
            console.print(
                f"{cut:,} of {total:,} histories are longer than a prompt (prompt.max_history is {builder.max_history}, "
                f"train.row_length {self.session.config.train.row_length}); only their newest items count"
            )
        for name in (*builder.writer.told, *builder.writer.profile):
            if count := counts[f"without {name}"]:
                console.print(f"{count:,} of {total:,} prompts do not say {name}, which is not known")
        if short := counts["short"]:
            hidden = "" if self.keep_seen else " (items of the history are left out; --keep-seen allows them)"
            console.print(f"{short:,} of {total:,} lists are shorter than {self.k}: no other item is left to recommend{hidden}")


def check_k(session: Session, k: int) -> None:
    """UserError for lists that the catalogue cannot fill."""
    n_items = len(session.dataset.item_ids)
    if not 1 <= k <= n_items:
        raise UserError(f"--k {k}: the catalogue has {n_items:,} items; use a number from 1 to {n_items}")


def typed_histories(session: Session, users: Sequence[str], histories: Sequence[str], profile: Sequence[str]) -> Histories:
    """Of `--user`, then of `--history` with `--profile`."""
    out = Histories([], [], [])
    for user in users:
        history, told = user_history(session, user)
        _add(out, user, history, told)
    if profile and not histories:
        raise UserError("--profile goes with --history; users of the run and rows of a file have their own")
    if histories:
        said = typed_profile(session, profile)
        index = TitleIndex(session.codes.titles, session.dataset.item_ids)
        for number, text in enumerate(histories, start=1):
            _add(out, f"history {number}", np.asarray(index.split(text), np.int32), said)
    return out


def _add(people: Histories, name: str, items: np.ndarray, told: Told) -> None:
    people.names.append(name)
    people.items.append(items)
    people.told.append(told)
