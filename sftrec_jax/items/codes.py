"""Item codes: for each item the language-model tokens that name it, whichever item tokeniser made them."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sftrec_jax.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class ItemCodes:
    """Tokens of every item. No item's tokens begin another's, so a decoder knows where an item ends; items may share all tokens.

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
                titles=text_array(meta["titles"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'item_codes.json'}: {error!r}; {again}") from error


def _check_codes(codes: np.ndarray) -> None:
    if codes.ndim != 2 or codes.dtype != np.int32 or min(codes.shape) < 1:
        raise ValueError(f"codes must be int32 [n_items, L], both at least 1; got {codes.dtype}{list(codes.shape)}")
    present = codes >= 0
    if (codes < -1).any() or not present[:, 0].all() or (present[:, 1:] > present[:, :-1]).any():
        raise ValueError("codes must be token ids from 0 on, at least one an item, with -1 only after the end")
    # Rows as big-endian bytes sort like sequences with the end (-1, here 0) lowest; then a row that begins others stands
    # directly before one of them, or before rows equal to it of which the last does.
    keys = np.ascontiguousarray((codes.astype(np.int64) + 1).astype(">u4"))
    order = np.argsort(keys.view(np.dtype((np.void, 4 * codes.shape[1])))[:, 0], kind="stable")
    first, second = codes[order[:-1]], codes[order[1:]]
    clash = ((first == second) | (first < 0)).all(axis=1) & (first != second).any(axis=1)
    if clash.any():
        at = int(np.argmax(clash))
        raise ValueError(f"the tokens of item {order[at]} begin those of item {order[at + 1]}")


def text_array(titles: np.ndarray | Sequence[str]) -> np.ndarray:
    """object [n] of str."""
    # Python strings: a fixed-width array would pad every title to the longest (854 characters in Amazon Beauty).
    out = np.empty(len(titles), object)
    out[:] = [str(t) for t in titles]
    return out


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
