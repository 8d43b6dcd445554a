"""What is known of users: columns of a table, and what their training interactions say of them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sftrec_jax.config import DataConfig, ProfileConfig
from sftrec_jax.data.columns import as_words, first_row, text_ids, times
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.readers import read_table
from sftrec_jax.data.table import Column
from sftrec_jax.data.templates import field_name
from sftrec_jax.errors import UserError


def make_profiles(config: ProfileConfig, data: DataConfig, dataset: Dataset) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Fields by name, text (object) [U] each, "" where nothing is known; and counts for the report.

    Nothing of validation or test goes into `favourites` and `tags`.

    Raises: UserError for a column that is not there, a user with two rows, and data that came as examples.
    """
    fields: dict[str, np.ndarray] = {}
    report: dict[str, Any] = {}
    asked = config.source is not None or config.favourites is not None or config.tags is not None
    if asked and dataset.given:
        raise UserError("profile: the data come as examples (data.history_column), which name no users; leave profile out")
    if config.source is not None:
        fields |= _columns(config, Path(config.source), dataset, report)
    if config.favourites is not None:
        fields["favourites"] = _favourites(config, dataset)
    if config.tags is not None:
        fields["tags"] = _tags(config, Path(config.tags), data, dataset, report)
    known = np.zeros(len(dataset.user_ids), bool)
    for name, values in fields.items():
        has = values != ""
        known |= has
        report[f"users_with_{name}"] = int(has.sum())
    if fields:
        report["users_without_profile"] = int((~known).sum())
    return fields, report


def _columns(config: ProfileConfig, path: Path, dataset: Dataset, report: dict[str, Any]) -> dict[str, np.ndarray]:
    columns = [Column("user", config.user_column, "profile.user_column")]
    columns += [Column(f"field_{i}", name, "profile.columns") for i, name in enumerate(config.columns)]
    table = read_table(path, columns)
    users = text_ids(table, "user")
    twice = users.is_duplicated()
    if twice.any():
        user = users.filter(twice)[0]
        rows = table.frame["row"].filter(users == user)
        raise UserError(f"{path}: user {user!r} stands in rows {rows[0]} and {rows[1]}; keep one a user")
    place = {user: at for at, user in enumerate(dataset.user_ids.tolist())}
    at = [place.get(user, -1) for user in users.to_list()]
    report["profiles_of_other_users"] = at.count(-1)
    fields = {}
    for i, name in enumerate(config.columns):
        values = np.full(len(dataset.user_ids), "", object)
        for user, value in zip(at, as_words(table, f"field_{i}").to_list(), strict=True):
            if user >= 0 and value is not None:
                values[user] = value
        fields[field_name(name)] = values
    return fields


def _favourites(config: ProfileConfig, dataset: Dataset) -> np.ndarray:
    assert config.favourites is not None
    column = dataset.item_fields.get(config.favourites)
    if column is None:
        known = ", ".join(dataset.item_fields) or "none"
        raise UserError(f"profile.favourites is {config.favourites!r}; use one of data.text_columns ({known})")
    values = [[v.strip() for v in str(text).split(config.favourites_separator) if v.strip()] for text in column]
    out = np.full(len(dataset.user_ids), "", object)
    for user in range(len(out)):
        # Counted in the order of the history, so that of equally frequent values the one met first comes first.
        counts = Counter(value for item in dataset.train_history(user).tolist() for value in values[item])
        out[user] = ", ".join(value for value, _ in counts.most_common(config.favourites_count))
    return out


def _tags(config: ProfileConfig, path: Path, data: DataConfig, dataset: Dataset, report: dict[str, Any]) -> np.ndarray:
    columns = [
        Column("user", data.user_column, "data.user_column"),
        Column("item", data.item_column, "data.item_column"),
        Column("tag", config.tag_column, "profile.tag_column"),
    ]
    if dataset.timed and data.time_column is not None:
        columns.append(Column("time", data.time_column, "data.time_column"))
    table = read_table(path, columns)
    words = as_words(table, "tag")
    if words.is_null().any():
        raise UserError(f"{path}: row {first_row(table, words.is_null())} has no tag; fill it in or remove the row")
    moments = times(table)["time"].to_list() if len(columns) > 3 else [None] * words.len()
    users = {user: at for at, user in enumerate(dataset.user_ids.tolist())}
    items = {item: at for at, item in enumerate(dataset.item_ids.tolist())}
    counts: list[Counter[str]] = [Counter() for _ in users]
    used = 0
    ids = zip(text_ids(table, "user").to_list(), text_ids(table, "item").to_list(), words.to_list(), moments, strict=True)
    trained = [set(dataset.train_history(user).tolist()) for user in range(len(users))]
    for name, item, tag, moment in ids:
        user = users.get(name)
        if user is None or items.get(item) not in trained[user] or not _before(dataset, user, moment):
            continue
        used += 1
        counts[user][tag.lower()] += 1
    report |= {"tags_read": words.len(), "tags_of_training": used}
    out = np.full(len(users), "", object)
    out[:] = [", ".join(tag for tag, _ in c.most_common(config.tags_count)) for c in counts]
    return out


def _before(dataset: Dataset, user: int, moment: int | None) -> bool:
    """Whether a time is not after the user's last training interaction."""
    return moment is None or moment <= int(dataset.timestamps[dataset.offsets[user] + dataset.train_end[user] - 1])
