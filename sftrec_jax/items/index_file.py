"""Item codes as LETTER and MiniOneRec publish them: a JSON object from item to token strings, maybe gzipped."""

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sftrec_jax.data.textfile import read_bytes
from sftrec_jax.errors import UserError

_FORM = '{"ITEM": ["<a_1>", "<b_2>"]}'


def read_index(path: Path, item_ids: Sequence[str] | np.ndarray, keys: Literal["id", "row"]) -> list[list[str]]:
    """Reads {"0": ["<a_183>", "<b_70>"], ...}.

    Args:
        path: a `.json` file, or `.json.gz`.
        item_ids: [n_items] ids of the catalogue.
        keys: the file's keys are item ids, or (LETTER) places in `item_ids` from 0.

    Returns: token strings of each item, in the order of `item_ids`.
    Raises: UserError for a missing or damaged file, another form, a key that occurs twice, an item without tokens, a token
        with white space, an item without a key and a key without an item.
    """
    table = _object(path)
    for key, tokens in table.items():
        _check_tokens(path, key, tokens)
    ids = [str(i) for i in item_ids]
    wanted = ids if keys == "id" else [str(row) for row in range(len(ids))]
    known = set(wanted)
    missing = [row for row, key in enumerate(wanted) if key not in table]
    foreign = [key for key in table if key not in known]
    if missing or foreign:
        found = []
        if missing:
            row = f" (row {missing[0]})" if keys == "row" else ""
            found.append(f"no codes for item {ids[missing[0]]!r}{row} ({len(missing):,} of {len(ids):,} items have none)")
        if foreign:
            what = "item of the catalogue" if keys == "id" else "row of the catalogue"
            found.append(f"the key {foreign[0]!r} is no {what} ({len(foreign):,} of {len(table):,} keys)")
        raise UserError(f"{path}: {'; '.join(found)}; {_way_out(table, ids, keys, bool(missing))}")
    return [table[key] for key in wanted]


def write_index(
    path: Path, paths: Sequence[Sequence[str]], item_ids: Sequence[str] | np.ndarray, overwrite: bool = False
) -> None:
    """Writes what `read_index` reads with `keys: id`; gzipped where the name ends in `.gz`.

    Args:
        path: the file; its folder must exist.
        paths: [n_items] token strings of each item (see `codes_paths`), not empty, without white space.
        item_ids: [n_items] distinct ids.
        overwrite: replace a file that exists.

    Raises: UserError where the file exists (without `overwrite`) or cannot be written.
    """
    table = {str(item): list(tokens) for item, tokens in zip(item_ids, paths, strict=True)}
    if len(table) < len(item_ids):
        raise ValueError("item ids must be distinct")
    for key, tokens in table.items():
        _check_tokens(path, key, tokens)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; name another file or add --overwrite")
    content = json.dumps(table, ensure_ascii=False).encode("utf-8")
    if path.suffix.lower() == ".gz":
        content = gzip.compress(content, mtime=0)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); name a file in a folder that can be written to") from None


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; correct items.codes_file")
    twice: list[str] = []

    def pairs(values: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(values)
        if len(table) < len(values):
            twice.append(Counter(key for key, _ in values).most_common(1)[0][0])
        return table

    try:
        table = json.loads(read_bytes(path).decode("utf-8-sig"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); write it as {_FORM}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: holds a {type(table).__name__}, not an object of lists; write it as {_FORM}")
    if twice:
        raise UserError(f"{path}: the key {twice[0]!r} occurs twice; keep one list an item")
    return table


def _check_tokens(path: Path, key: str, tokens: Any) -> None:
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{path}: the key {key!r} has {_short(tokens)}, which is no list of texts; write it as {_FORM}")
    if not tokens:
        raise UserError(f"{path}: the key {key!r} has an empty list; give the item at least one token")
    for token in tokens:
        if not token or " " in token or not token.isprintable():
            raise UserError(
                f"{path}: the key {key!r} has the token {token!r}; write tokens without white space and control characters"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _way_out(table: dict[str, Any], ids: list[str], keys: str, missing: bool) -> str:
    rows = {str(row) for row in range(len(ids))}
    if keys == "id" and table.keys() == rows:
        if _ascending(ids):
            return f"the keys run from 0 to {len(ids) - 1}: set items.codes_keys: row"
        # Reading them as rows would give items each other's codes without any error.
        return "the keys count from 0 but items are not in the order of their ids: sort data.catalogue, then codes_keys: row"
    if keys == "row" and table.keys() == set(ids):
        return "the keys are the item ids: set items.codes_keys: id"
    if keys == "row" and table.keys() == {str(row + 1) for row in range(len(ids))}:
        return f"the keys run from 1 to {len(ids)}, rows count from 0: take 1 off every key"
    numbers = [_number(i) for i in ids]
    for shift in (-1, 1) if keys == "id" else ():
        if table.keys() == {str(n + shift) for n in numbers if n is not None}:
            off, put = ("less", "add 1 to") if shift < 0 else ("plus", "take 1 off")
            return f"the keys are the item ids {off} 1: {put} every key"
    if missing:
        return "give every item of the catalogue a list, or name the catalogue that the codes were made for"
    return "take the keys out, or name the catalogue that the codes were made for"


def _ascending(ids: list[str]) -> bool:
    # Ids that are no numbers give no hint that the catalogue is in another order than the file.
    numbers = [_number(i) for i in ids]
    whole = [n for n in numbers if n is not None]
    return len(whole) < len(ids) or whole == sorted(whole)


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text) else None
