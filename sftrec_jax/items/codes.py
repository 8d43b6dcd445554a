"""Item codes: for each item the language-model tokens that name it, whichever item tokeniser made them."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

import numpy as np

from sftrec_jax.errors import UserError
from sftrec_jax.items.encode import TitleEncoder, encode_apart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
_PLAIN = "".join(set(map(chr, range(33, 127))) - set("%<>|"))


@dataclass(frozen=True, eq=False)
class ItemCodes:
    """Tokens of every item. No item's tokens begin another's, so a decoder knows where an item ends.

    Raises ValueError where the arrays break these rules.
    """

    codes: np.ndarray
    """int32 [n_items, L] token ids, -1 after the end of the item."""
    new_tokens: tuple[str, ...]
    """Token strings that were added to the tokenizer, in id order."""
    new_token_ids: np.ndarray
    """int32 [len(new_tokens)] the ids that the tokenizer gave them."""
    init_tokens: tuple[tuple[int, ...], ...]
    """For each new token the base tokens whose mean embedding starts its row; () stands for the mean of the table."""
    titles: np.ndarray
    """[n_items] str, distinct."""

    def __post_init__(self) -> None:
        _check_codes(self.codes)
        n_new = len(self.new_tokens)
        ids = self.new_token_ids
        if ids.shape != (n_new,) or ids.dtype != np.int32 or len(self.init_tokens) != n_new:
            raise ValueError(
                f"{n_new} new tokens, but new_token_ids is {ids.dtype}{list(ids.shape)}, init_tokens {len(self.init_tokens)} long"
            )
        if (np.diff(ids) <= 0).any() or (ids < 0).any():
            raise ValueError("new_token_ids must rise")
        if self.titles.shape != self.codes.shape[:1]:
            raise ValueError(f"{len(self.codes)} items but titles has shape {self.titles.shape}")
        if len(set(self.titles.tolist())) != len(self.titles):
            raise ValueError("titles must be distinct")

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n_items] tokens of each item."""
        return (self.codes >= 0).sum(axis=1, dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Writes `item_codes.npy` and `item_codes.json` into `folder`; the latter names the former's SHA-256."""
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(self.codes))
        meta = {
            "format": FORMAT_VERSION,
            "codes_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
            "new_tokens": list(self.new_tokens),
            "new_token_ids": self.new_token_ids.tolist(),
            "init_tokens": [list(t) for t in self.init_tokens],
            "titles": self.titles.tolist(),
        }
        _write(folder / "item_codes.npy", buffer.getvalue())
        _write(folder / "item_codes.json", json.dumps(meta, ensure_ascii=False).encode("utf-8"))

    @classmethod
    def load(cls, folder: Path) -> ItemCodes:
        """Reads what `save` wrote. Raises UserError where files are missing, damaged or do not belong together."""
        again = "run `sftrec prepare` again"
        try:
            raw = (folder / "item_codes.npy").read_bytes()
            meta = json.loads((folder / "item_codes.json").read_bytes())
        except OSError as error:
            raise UserError(f"{folder}: item codes cannot be read ({error.strerror}: {error.filename}); {again}") from error
        except ValueError as error:
            raise UserError(f"{folder / 'item_codes.json'}: not valid JSON ({error}); {again}") from error
        version = meta.get("format") if isinstance(meta, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(f"{folder / 'item_codes.json'}: format {version!r}, this version reads {FORMAT_VERSION}; {again}")
        if hashlib.sha256(raw).hexdigest() != meta.get("codes_sha256"):
            raise UserError(f"{folder}: item_codes.npy is damaged or belongs to another item_codes.json; {again}")
        try:
            return cls(
                codes=np.load(io.BytesIO(raw), allow_pickle=False),
                new_tokens=tuple(meta["new_tokens"]),
                new_token_ids=np.asarray(meta["new_token_ids"], np.int32),
                init_tokens=tuple(tuple(t) for t in meta["init_tokens"]),
                titles=_text_array(meta["titles"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'item_codes.json'}: {error!r}; {again}") from error


def item_token(item_id: str) -> str:
    """The token string of an item: `<|item_318|>`.

    Characters beyond printable ASCII, and `%`, `<`, `>`, `|`, are percent-encoded (RFC 3986): byte-level decoders garble the
    former in added tokens, and the latter could make one token contain another.
    """
    return f"<|item_{quote(item_id, safe=_PLAIN)}|>"


def atomic_codes(
    item_ids: Sequence[str] | np.ndarray,
    titles: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    init: Literal["text", "mean"] = "text",
) -> ItemCodes:
    """One new token an item, spelt `<|item_ID|>` (see `item_token`). The tokens are added to `tokenizer` in place.

    Args:
        item_ids: [n_items] ids of the source.
        titles: [n_items] str, distinct (see `distinct_titles`).
        tokenizer: the base model's fast tokenizer, without item tokens.
        init: `text` starts a row at the mean embedding of the title's tokens, `mean` at the mean of the table.

    Returns: ItemCodes with L = 1.
    Raises: UserError for an id whose token the vocabulary has already, an id that the tokenizer cannot read back, or
        (with `text`) a title without tokens.
    """
    names = [item_token(str(i)) for i in item_ids]
    if len(set(names)) < len(names):
        raise UserError(f"catalogue: {len(names) - len(set(names))} item ids occur more than once; make item ids unique")
    vocabulary = tokenizer.get_vocab()
    for row, name in enumerate(names):
        if name in vocabulary:
            raise UserError(f"item {str(item_ids[row])!r}: the tokenizer has a token {name} already; take the base model's own")
    # Titles are read before the item tokens exist: a title that spells one out must not become that item.
    init_tokens: list[list[int]] = [[] for _ in names]
    if init == "text":
        init_tokens = _title_tokens(item_ids, titles, tokenizer, "or set items.init: mean")
    # Not `special`: decoding with skip_special_tokens must keep the answer.
    from transformers import AddedToken  # takes a second, and reading codes does not need it

    new: list[str | AddedToken] = [AddedToken(name, normalized=False, special=False) for name in names]
    tokenizer.add_tokens(new)
    ids = np.asarray(tokenizer.convert_tokens_to_ids(names), np.int32)
    for row, got in enumerate(encode_apart(tokenizer, names)):
        if got != [int(ids[row])]:
            raise UserError(f"item {str(item_ids[row])!r}: the tokenizer does not read {names[row]!r} as one token; rename it")
    order = np.argsort(ids, kind="stable")
    return ItemCodes(
        codes=ids[:, None],
        new_tokens=tuple(names[i] for i in order),
        new_token_ids=ids[order],
        init_tokens=tuple(tuple(init_tokens[i]) for i in order),
        titles=_text_array(titles),
    )


def title_codes(
    titles: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int = 64,
    item_ids: Sequence[str] | np.ndarray | None = None,
) -> ItemCodes:
    """The title's tokens and a terminator that no title contains.

    The terminator is the newline token, or EOS where a newline takes more than one token. Titles are cut at `max_tokens`
    tokens; those that are equal then get a number (` [2]`) inside the limit.

    Args:
        titles: [n_items] str, distinct (see `distinct_titles`).
        tokenizer: the base model's fast tokenizer; it is not changed.
        max_tokens: longest title, terminator not counted.
        item_ids: [n_items] ids of the source, for errors; None: places in `titles` from 1.

    Returns: ItemCodes with L <= max_tokens + 1 and no new tokens.
    Raises: UserError for a title without tokens, or where `max_tokens` leaves no room to keep titles apart.
    """
    end = terminator(tokenizer)
    names = range(1, len(titles) + 1) if item_ids is None else item_ids
    rows = [ids[:max_tokens] for ids in _title_tokens(names, titles, tokenizer, "or use items.tokenizer: atomic")]
    for row, ids in enumerate(rows):
        if end in ids:
            raise UserError(f"title {titles[row]!r} contains the token {end} that ends titles; use items.tokenizer: atomic")
    _separate(rows, titles, tokenizer, max_tokens)
    codes = np.full((len(rows), max(map(len, rows), default=0) + 1), -1, np.int32)
    for row, ids in enumerate(rows):
        codes[row, : len(ids) + 1] = [*ids, end]
    return ItemCodes(codes, (), np.zeros(0, np.int32), (), _text_array(titles))


def terminator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a title: newline if that is one token, else EOS. Raises UserError where there is neither."""
    newline = encode_apart(tokenizer, ["\n"])[0]
    if len(newline) == 1 and newline[0] != tokenizer.unk_token_id:
        return newline[0]
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError("the tokenizer has neither a newline token nor EOS to end titles with; use items.tokenizer: atomic")
    return tokenizer.eos_token_id


def _title_tokens(
    item_ids: Sequence[str] | Sequence[int] | np.ndarray, titles: np.ndarray, tokenizer: PreTrainedTokenizerBase, or_else: str
) -> list[list[int]]:
    titles = _text_array(titles)
    rows = TitleEncoder(tokenizer)(titles.tolist())
    for row, ids in enumerate(rows):
        if not ids:
            raise UserError(
                f"catalogue, item {str(item_ids[row])!r}: the title {titles[row]!r} has no tokens; give it a title, {or_else}"
            )
    return rows


def _separate(rows: list[list[int]], titles: np.ndarray, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, ids in enumerate(rows):
        groups.setdefault(tuple(ids), []).append(row)
    taken = set(groups)
    for cut, members in groups.items():
        members.sort(key=lambda row: str(titles[row]))  # the same numbers whatever the order of the catalogue
        number = 1
        for row in members[1:]:
            candidate = cut
            while candidate in taken:
                number += 1
                mark = encode_apart(tokenizer, [f" [{number}]"])[0]
                if len(mark) >= max_tokens:
                    raise UserError(
                        f"title {titles[row]!r} equals another after the cut to {max_tokens} tokens; raise items.max_title_tokens"
                    )
                candidate = (*cut[: max_tokens - len(mark)], *mark)
            taken.add(candidate)
            rows[row] = list(candidate)


def _check_codes(codes: np.ndarray) -> None:
    if codes.ndim != 2 or codes.dtype != np.int32 or min(codes.shape) < 1:
        raise ValueError(f"codes must be int32 [n_items, L], both at least 1; got {codes.dtype}{list(codes.shape)}")
    present = codes >= 0
    if (codes < -1).any() or not present[:, 0].all() or (present[:, 1:] > present[:, :-1]).any():
        raise ValueError("codes must be token ids from 0 on, at least one an item, with -1 only after the end")
    # Rows as big-endian bytes sort like sequences with the end (-1, here 0) lowest; then a row that begins others stands
    # directly before one of them.
    keys = np.ascontiguousarray((codes.astype(np.int64) + 1).astype(">u4"))
    order = np.argsort(keys.view(np.dtype((np.void, 4 * codes.shape[1])))[:, 0], kind="stable")
    first, second = codes[order[:-1]], codes[order[1:]]
    clash = ((first == second) | (first < 0)).all(axis=1)
    if clash.any():
        at = int(np.argmax(clash))
        raise ValueError(f"the tokens of item {order[at]} equal or begin those of item {order[at + 1]}")


def _text_array(titles: np.ndarray | Sequence[str]) -> np.ndarray:
    # Python strings: a fixed-width array would pad every title to the longest (854 characters in Amazon Beauty).
    out = np.empty(len(titles), object)
    out[:] = [str(t) for t in titles]
    return out


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
