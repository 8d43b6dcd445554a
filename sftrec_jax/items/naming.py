"""Codes from what the source has: one token an item, the words of a title or keyphrase, a number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

import numpy as np

from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes, text_array
from sftrec_jax.items.encode import TitleEncoder, encode_apart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAIN = "".join(set(map(chr, range(33, 127))) - set("%<>|"))


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
    numbers: np.ndarray | None = None,
) -> ItemCodes:
    """One new token an item, spelt `<|item_ID|>` (see `item_token`). The tokens are added to `tokenizer` in place.

    Args:
        item_ids: [n_items] ids of the source.
        titles: [n_items] str, distinct (see `distinct_titles`).
        tokenizer: the base model's fast tokenizer, without item tokens.
        init: `text` starts a row at the mean embedding of the title's tokens, `mean` at the mean of the table.
        numbers: int64 [n_items], distinct: token ids rise with these; None: in the order of `item_ids`.

    Returns: ItemCodes with L = 1.
    Raises: UserError for an id whose token the vocabulary has already, an id that the tokenizer cannot read back, or
        (with `text`) a title without tokens.
    """
    names = [item_token(str(i)) for i in item_ids]
    if len(set(names)) < len(names):
        raise UserError(f"catalogue: {len(names) - len(set(names))} item ids occur more than once; make item ids unique")
    order = list(range(len(names)))
    if numbers is not None:
        order = np.argsort(_distinct(numbers, len(names)), kind="stable").tolist()
    check_absent(names, tokenizer, (f"item {str(i)!r}" for i in item_ids))
    # Titles are read before the item tokens exist: a title that spells one out must not become that item.
    init_tokens: list[list[int]] = [[] for _ in names]
    if init == "text":
        init_tokens = title_tokens(item_ids, titles, tokenizer, "or set items.init: mean")
    new_tokens = [names[i] for i in order]
    new_ids = add_tokens(new_tokens, tokenizer, (f"item {str(item_ids[i])!r}" for i in order))
    codes = np.empty((len(names), 1), np.int32)
    codes[order, 0] = new_ids
    by_id = np.argsort(new_ids, kind="stable")
    return ItemCodes(
        codes=codes,
        new_tokens=tuple(new_tokens[i] for i in by_id),
        new_token_ids=new_ids[by_id],
        init_tokens=tuple(tuple(init_tokens[order[i]]) for i in by_id.tolist()),
        titles=text_array(titles),
    )


def title_codes(
    titles: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int = 64,
    item_ids: Sequence[str] | np.ndarray | None = None,
    names: Sequence[str | None] | np.ndarray | None = None,
) -> ItemCodes:
    """The title's tokens (or those of another text) and a terminator that no title contains.

    The terminator is the newline token, or EOS where a newline takes more than one token. Texts are cut at `max_tokens`
    tokens; those that are equal then get a number (` [2]`) inside the limit.

    Args:
        titles: [n_items] str, distinct (see `distinct_titles`).
        tokenizer: the base model's fast tokenizer; it is not changed.
        max_tokens: longest text, terminator not counted.
        item_ids: [n_items] ids of the source, for errors; None: places in `titles` from 1.
        names: [n_items] texts to write in place of the titles, such as keyphrases (IDGenRec, Tan et al. 2024), equal ones
            allowed; None: the titles.

    Returns: ItemCodes with L <= max_tokens + 1 and no new tokens.
    Raises: UserError for a text without tokens, or where `max_tokens` leaves no room to keep items apart.
    """
    end = terminator(tokenizer)
    rows = _text_rows(titles, tokenizer, max_tokens, item_ids, names, end)
    _separate(rows, titles, tokenizer, max_tokens, set())
    return ItemCodes(_ended(rows, end), (), np.zeros(0, np.int32), (), text_array(titles))


def extend_title_codes(
    codes: ItemCodes,
    titles: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int = 64,
    item_ids: Sequence[str] | np.ndarray | None = None,
    names: Sequence[str | None] | np.ndarray | None = None,
) -> ItemCodes:
    """Appends items to what `title_codes` gave. The old items keep their tokens and titles.

    Args:
        codes: made by `title_codes` with the same tokenizer.
        titles: [n_new] str, distinct also from `codes.titles` (see `distinct_titles`).
        tokenizer, max_tokens, item_ids, names: as for `title_codes`, of the new items.

    Raises: as `title_codes`.
    """
    end = terminator(tokenizer)
    taken = {tuple(row[row >= 0].tolist()) for row in codes.codes}
    if not all(ids[-1] == end for ids in taken):
        raise ValueError("codes do not end with the terminator of this tokenizer")
    rows = _text_rows(titles, tokenizer, max_tokens, item_ids, names, end)
    _separate(rows, titles, tokenizer, max_tokens, {ids[:-1] for ids in taken})
    return appended(codes, _ended(rows, end), titles)


def numeric_codes(numbers: np.ndarray, titles: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> ItemCodes:
    """The item's number in the model's own tokens and the terminator of `title_codes` (P5, Geng et al. 2022).

    Args:
        numbers: int64 [n_items], distinct, 0 or more; written in decimal.
        titles: [n_items] str, distinct.
        tokenizer: the base model's fast tokenizer; it is not changed.

    Returns: ItemCodes without new tokens.
    Raises: UserError for a tokenizer that does not tell two of the numbers apart.
    """
    numbers = _distinct(numbers, len(titles))
    if (numbers < 0).any():
        raise ValueError("numbers must be 0 or more")
    end = terminator(tokenizer)
    rows = encode_apart(tokenizer, map(str, numbers.tolist()))
    seen: dict[tuple[int, ...], int] = {}
    for row, ids in enumerate(rows):
        first = seen.setdefault(tuple(ids), row)
        if first != row or not ids or end in ids:
            raise UserError(
                f"the tokenizer does not tell the numbers {numbers[first]} and {numbers[row]} apart; use items.tokenizer: atomic"
            )
    return ItemCodes(_ended(rows, end), (), np.zeros(0, np.int32), (), text_array(titles))


def terminator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a title: newline if that is one token, else EOS. Raises UserError where there is neither."""
    newline = encode_apart(tokenizer, ["\n"])[0]
    if len(newline) == 1 and newline[0] != tokenizer.unk_token_id:
        return newline[0]
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError("the tokenizer has neither a newline token nor EOS to end titles with; use items.tokenizer: atomic")
    return tokenizer.eos_token_id


def check_absent(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase, owners: Iterable[str]) -> None:
    """UserError for a token that the vocabulary has; `owners` says for each token whose it is."""
    vocabulary = tokenizer.get_vocab()
    for token, owner in zip(tokens, owners, strict=True):
        if token in vocabulary:
            raise UserError(
                f"{owner}: the tokenizer has a token {token} already; take the base model's own tokenizer, or rename it"
            )


def add_tokens(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase, owners: Iterable[str]) -> np.ndarray:
    """Adds tokens to `tokenizer` in place, in the order given.

    Returns: int32 [len(tokens)], their ids.
    Raises: UserError for a token that the tokenizer does not read back as one; `owners` says for each whose it is.
    """
    # Not `special`: decoding with skip_special_tokens must keep the answer.
    from transformers import AddedToken  # takes a second, and reading codes does not need it

    new: list[str | AddedToken] = [AddedToken(token, normalized=False, special=False) for token in tokens]
    tokenizer.add_tokens(new)
    ids = np.asarray(tokenizer.convert_tokens_to_ids(list(tokens)), np.int32)
    for token, owner, want, got in zip(tokens, owners, ids.tolist(), encode_apart(tokenizer, tokens), strict=True):
        if got != [want]:
            raise UserError(f"{owner}: the tokenizer does not read {token!r} as one token; rename it")
    return ids


def title_tokens(
    item_ids: Sequence[str] | Sequence[int] | np.ndarray, titles: np.ndarray, tokenizer: PreTrainedTokenizerBase, or_else: str
) -> list[list[int]]:
    """Tokens of each title. UserError for a title without tokens; `or_else` ends the message with another way out."""
    titles = text_array(titles)
    rows = TitleEncoder(tokenizer)(titles.tolist())
    for row, ids in enumerate(rows):
        if not ids:
            raise UserError(
                f"catalogue, item {str(item_ids[row])!r}: the title {titles[row]!r} has no tokens; give it a title, {or_else}"
            )
    return rows


def appended(codes: ItemCodes, rows: np.ndarray, titles: np.ndarray) -> ItemCodes:
    """The codes with items after the last: int32 [n_new, M] and [n_new] titles. ValueError as for `ItemCodes`."""
    width = max(codes.codes.shape[1], rows.shape[1])
    padded = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in (codes.codes, rows)]
    return ItemCodes(
        np.concatenate(padded), codes.new_tokens, codes.new_token_ids, codes.init_tokens, text_array([*codes.titles, *titles])
    )


def _text_rows(
    titles: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    item_ids: Sequence[str] | np.ndarray | None,
    names: Sequence[str | None] | np.ndarray | None,
    end: int,
) -> list[list[int]]:
    ids = range(1, len(titles) + 1) if item_ids is None else item_ids
    if names is None:
        rows, texts = title_tokens(ids, titles, tokenizer, "or use items.tokenizer: atomic"), titles
    else:
        if len(names) != len(titles):
            raise ValueError(f"{len(titles)} titles but {len(names)} names")
        texts = text_array(["" if name is None else name for name in names])
        rows = TitleEncoder(tokenizer)(texts.tolist())
        missing = [row for row, tokens in enumerate(rows) if not tokens]
        if missing:
            raise UserError(
                f"catalogue, item {str(ids[missing[0]])!r}: has no keyphrase ({len(missing)} of {len(rows)} items have none); "
                "fill it in, or use items.tokenizer: title"
            )
    rows = [tokens[:max_tokens] for tokens in rows]
    for row, tokens in enumerate(rows):
        if end in tokens:
            what = "title" if names is None else "keyphrase"
            raise UserError(f"{what} {texts[row]!r} contains the token {end} that ends titles; use items.tokenizer: atomic")
    return rows


def _separate(
    rows: list[list[int]],
    titles: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    fixed: set[tuple[int, ...]],
) -> None:
    # `fixed` are rows of items that are named already.
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, ids in enumerate(rows):
        groups.setdefault(tuple(ids), []).append(row)
    taken = fixed | set(groups)
    # Groups and members sorted: the same numbers whatever the order of the catalogue.
    for cut in sorted(cut for cut, members in groups.items() if len(members) > 1 or cut in fixed):
        members = sorted(groups[cut], key=lambda row: str(titles[row]))
        number = 1
        for row in members if cut in fixed else members[1:]:
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


def _ended(rows: list[list[int]], end: int) -> np.ndarray:
    codes = np.full((len(rows), max(map(len, rows), default=0) + 1), -1, np.int32)
    for row, ids in enumerate(rows):
        codes[row, : len(ids) + 1] = [*ids, end]
    return codes


def _distinct(numbers: np.ndarray, n: int) -> np.ndarray:
    numbers = np.asarray(numbers)
    if numbers.shape != (n,) or not np.issubdtype(numbers.dtype, np.integer) or len(np.unique(numbers)) < n:
        raise ValueError(f"numbers must be {n} distinct integers; got {numbers.dtype}{list(numbers.shape)}")
    return numbers
