"""Codes from paths: every item is a short sequence of tokens, such as <a_183> <b_70> <c_232>, that items share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from sftrec_jax.data.histories import text_hashes
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes, text_array
from sftrec_jax.items.naming import add_tokens, appended, check_absent, title_tokens
from sftrec_jax.items.titles import natural_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INIT_ITEMS = 64
"""At most this many items of a token give their titles to its first row."""
INIT_TOKENS = 256
"""At most this many tokens of those titles are averaged."""


def path_codes(
    paths: Sequence[Sequence[str]],
    titles: np.ndarray,
    item_ids: Sequence[str] | np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    init: Literal["text", "mean"] = "text",
    spare: Sequence[str] = (),
) -> ItemCodes:
    """Codes from token strings. Every distinct one becomes a new token; the tokens are added to `tokenizer` in place.

    Token ids rise with the level at which a token first occurs, then in natural order (`<a_2>` before `<a_10>`), so they do
    not depend on the order of the catalogue; spare tokens come last.

    Args:
        paths: [n_items] token strings of each item, at least one; lengths may differ, and items may share a path.
        titles: [n_items] str, distinct (see `distinct_titles`).
        item_ids: [n_items] ids of the source.
        tokenizer: the base model's fast tokenizer, without item tokens.
        init: `text` starts a token's row at the mean embedding of tokens from the titles of the items that carry it: at
            most `INIT_ITEMS` items, drawn by a hash of the item id, and `INIT_TOKENS` tokens, evenly spaced over their
            titles. `mean`: at the mean of the table, as spare tokens do.
        spare: tokens for items that come later; one that an item uses already is passed over.

    Returns: ItemCodes with L = length of the longest path.
    Raises: UserError for a path that begins another, a token that the vocabulary has already, a token that the tokenizer
        cannot read back, or (with `text`) a drawn title without tokens.
    """
    if not len(paths) == len(titles) == len(item_ids):
        raise ValueError(f"{len(paths)} paths, {len(titles)} titles, {len(item_ids)} item ids")
    if not all(len(path) for path in paths):
        raise ValueError("a path is empty")
    _check_prefixes(paths, [f"item {str(i)!r}" for i in item_ids])
    used, first = _tokens_in_order(paths)
    tokens = used + sorted(set(spare) - set(used), key=natural_key)
    owners = [f"items, path of {str(item_ids[first[t]])!r}" if t in first else "items, spare tokens" for t in tokens]
    check_absent(tokens, tokenizer, owners)
    place = {token: i for i, token in enumerate(tokens)}
    places = _padded([[place[token] for token in path] for path in paths])
    init_tokens: list[tuple[int, ...]] = [()] * len(tokens)
    if init == "text":
        # Titles are read before the new tokens exist: a title that spells one out must not become that token.
        init_tokens = _title_samples(_draw_items(places, item_ids, len(tokens)), titles, item_ids, tokenizer)
    ids = add_tokens(tokens, tokenizer, owners)
    order = np.argsort(ids, kind="stable")
    return ItemCodes(
        codes=np.where(places >= 0, ids[places], -1).astype(np.int32),
        new_tokens=tuple(tokens[i] for i in order.tolist()),
        new_token_ids=ids[order],
        init_tokens=tuple(init_tokens[i] for i in order.tolist()),
        titles=text_array(titles),
    )


def extend_paths_codes(
    codes: ItemCodes, paths: Sequence[Sequence[str]], titles: np.ndarray, item_ids: Sequence[str] | np.ndarray
) -> ItemCodes:
    """Appends items whose tokens the codes have already. The old items keep their tokens and titles.

    Args:
        codes: made by `path_codes`.
        paths: [n_new] token strings of each new item; one may equal an old item's or another new item's.
        titles: [n_new] str, distinct also from `codes.titles` (see `distinct_titles`).
        item_ids: [n_new] ids of the new items, for errors.

    Raises: UserError for a token that the codes lack, or a path that begins another or that another begins.
    """
    if not len(paths) == len(titles) == len(item_ids) or not all(len(path) for path in paths):
        raise ValueError(f"{len(paths)} paths, {len(titles)} titles, {len(item_ids)} item ids, or a path is empty")
    known = dict(zip(codes.new_tokens, codes.new_token_ids.tolist(), strict=True))
    for item, path in zip(item_ids, paths, strict=True):
        lacking = [token for token in path if token not in known]
        if lacking:
            raise UserError(
                f"new item {str(item)!r}: the run has no token {lacking[0]}, and a trained model cannot get one; "
                "prepare and train again with the item in the catalogue"
            )
    old = codes_paths(codes)
    owners = [f"item {title!r}" for title in codes.titles] + [f"new item {str(i)!r}" for i in item_ids]
    _check_prefixes([*old, *paths], owners)
    return appended(codes, _padded([[known[token] for token in path] for path in paths]), titles)


def codes_paths(codes: ItemCodes) -> list[list[str]]:
    """Token strings of each item. UserError for codes that contain tokens of the base model, such as titles."""
    names = dict(zip(codes.new_token_ids.tolist(), codes.new_tokens, strict=True))
    foreign = (codes.codes >= 0) & ~np.isin(codes.codes, codes.new_token_ids)
    if foreign.any():
        row = int(foreign.any(axis=1).argmax())
        raise UserError(
            f"item {codes.titles[row]!r}: is written in tokens of the base model, not in tokens of its own; "
            "use an items.tokenizer that adds tokens (atomic, cid, rqvae, rqkmeans, pq, opq, file)"
        )
    return [[names[token] for token in row if token >= 0] for row in codes.codes.tolist()]


def level_tokens(levels: np.ndarray) -> list[list[str]]:
    """Codes to token strings, spelt as LETTER and MiniOneRec do: a letter for the level, then the code.

    Args:
        levels: int32 [n_items, L], at least one code an item, -1 after the last.

    Returns: for each item `<a_183>`, `<b_70>` and so on; the levels after `z` are `aa`, `ab`.
    """
    present = levels >= 0
    if levels.ndim != 2 or not present[:, :1].all() or (present[:, 1:] > present[:, :-1]).any() or (levels < -1).any():
        raise ValueError(f"levels must be [n_items, L] codes from 0 on with -1 only after the end; got {list(levels.shape)}")
    letters = [_letters(level) for level in range(levels.shape[1])]
    return [[f"<{x}_{code}>" for x, code in zip(letters, row, strict=True) if code >= 0] for row in levels.tolist()]


def cluster_tokens(paths: Sequence[tuple[int, ...]]) -> list[list[str]]:
    """Paths in a tree of clusters to token strings: `<a_3>`, `<b_7>` for clusters, `<item_5>` for the last number.

    Levels have one or two letters, so no cluster's token equals an item's, and no path begins another.
    """
    letters = [_letters(level) for level in range(max(map(len, paths), default=1) - 1)]
    # Paths may be shorter than the deepest one.
    return [[*(f"<{x}_{c}>" for x, c in zip(letters, path[:-1], strict=False)), f"<item_{path[-1]}>"] for path in paths]


def _letters(level: int) -> str:
    if level >= 26 * 27:
        raise ValueError(f"level {level} has no name of two letters")
    return (chr(ord("a") + level // 26 - 1) if level >= 26 else "") + chr(ord("a") + level % 26)


def _tokens_in_order(paths: Sequence[Sequence[str]]) -> tuple[list[str], dict[str, int]]:
    # The distinct tokens, and for each the first item that carries it.
    level: dict[str, int] = {}
    first: dict[str, int] = {}
    for item, path in enumerate(paths):
        for place, token in enumerate(path):
            if place < level.get(token, place + 1):
                level[token] = place
            first.setdefault(token, item)
    return sorted(level, key=lambda token: (level[token], natural_key(token))), first


def _check_prefixes(paths: Sequence[Sequence[str]], owners: Sequence[str]) -> None:
    first: dict[tuple[str, ...], int] = {}
    for item, path in enumerate(paths):
        first.setdefault(tuple(path), item)
    lengths = sorted({len(path) for path in first})
    for path, item in first.items():
        for length in lengths:
            if length >= len(path):
                break
            shorter = first.get(path[:length])
            if shorter is not None:
                raise UserError(
                    f"{owners[shorter]} has the code {''.join(path[:length])}, which begins {''.join(path)} of {owners[item]}; "
                    "lengthen the shorter one, so that the end of an item can be told"
                )


def _draw_items(places: np.ndarray, item_ids: Sequence[str] | np.ndarray, n_tokens: int) -> list[list[int]]:
    # places: int32 [n_items, L] index of each token, -1 after the end. For each token the items that start its row.
    items, _ = np.nonzero(places >= 0)
    tokens = places[places >= 0]
    by_hash = np.argsort(text_hashes([str(i) for i in item_ids], 0, "first rows"), kind="stable")
    ranks = np.empty(len(places), np.int64)
    ranks[by_hash] = np.arange(len(places))
    # Each pair of token and item once (a path may repeat a token), by token, then by rank.
    pairs = np.unique(tokens * np.int64(len(places)) + ranks[items])
    token_of, rank_of = np.divmod(pairs, len(places))
    bounds = np.searchsorted(token_of, np.arange(n_tokens + 1)).tolist()
    return [
        by_hash[rank_of[begin : min(end, begin + INIT_ITEMS)]].tolist()
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def _title_samples(
    drawn: list[list[int]],
    titles: np.ndarray,
    item_ids: Sequence[str] | np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
) -> list[tuple[int, ...]]:
    # Only titles that are drawn are tokenised: 100,000 took about 10 s, and of a large catalogue few are.
    items = sorted({item for group in drawn for item in group})
    some = text_array([titles[item] for item in items])
    words = title_tokens([str(item_ids[item]) for item in items], some, tokenizer, "or set items.init: mean")
    of_item = dict(zip(items, words, strict=True))
    out: list[tuple[int, ...]] = []
    for group in drawn:
        joined = [token for item in group for token in of_item[item]]
        count = min(len(joined), INIT_TOKENS)
        out.append(tuple(joined[i * len(joined) // count] for i in range(count)))
    return out


def _padded(rows: list[list[int]]) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows), default=1)), -1, np.int32)
    present = np.arange(out.shape[1]) < np.array([len(row) for row in rows])[:, None]
    out[present] = [token for row in rows for token in row]
    return out
