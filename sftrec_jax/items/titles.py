"""Titles that tell items apart, and titles found in text that a person typed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

import numpy as np

from sftrec_jax.errors import UserError

LONGEST = 200
"""Characters of a title that are compared with another's, which takes time with the square of their number."""
_DIGITS = re.compile(r"([0-9]+)")


def distinct_titles(
    titles: Sequence[str] | np.ndarray, item_ids: Sequence[str] | np.ndarray, existing: Iterable[str] = ()
) -> np.ndarray:
    """Titles made distinct by a number: the second `War of the Worlds (2005)` becomes `War of the Worlds (2005) [2]`.

    Titles that differ only in case or white space count as equal, since a person cannot tell them apart either. Among equal
    titles the lowest item id (`9` before `10`) keeps its title; numbers that would give a title which exists are passed
    over. The result does not depend on the order of the catalogue.

    Args:
        titles: [n_items] texts.
        item_ids: [n_items] distinct ids.
        existing: titles of other items, which keep theirs; an item with one of these gets a number.

    Returns: object [n_items] of str, in the order given; titles that were distinct are unchanged.
    """
    out = np.empty(len(titles), object)
    out[:] = [str(t) for t in titles]
    groups: dict[str, list[int]] = {}
    for i, title in enumerate(out):
        groups.setdefault(_normal(title), []).append(i)
    others = {_normal(str(title)) for title in existing}
    taken = others | set(groups)
    # Sorted, so that a number passed over in one group does not depend on which group came first.
    for key in sorted(k for k, members in groups.items() if len(members) > 1 or k in others):
        number = 1
        members = sorted(groups[key], key=lambda i: natural_key(str(item_ids[i])))
        for i in members if key in others else members[1:]:
            number += 1
            while _normal(f"{key} [{number}]") in taken:
                number += 1
            out[i] = f"{out[i].rstrip()} [{number}]"
            taken.add(_normal(out[i]))
    return out


class TitleIndex:
    """Finds items by title: as written, else regardless of case and white space. With `ids` also by id, after the title.

    Args:
        titles: [n_items] distinct titles, see `distinct_titles`.
        ids: [n_items] distinct ids, or none.
    """

    def __init__(self, titles: Iterable[str], ids: Iterable[str] = ()) -> None:
        self._titles = [str(t) for t in titles]
        self._ids = {str(item): i for i, item in enumerate(ids)}
        self._exact = {t: i for i, t in reversed(list(enumerate(self._titles)))}
        self._normal = {_normal(t): i for i, t in reversed(list(enumerate(self._titles)))}
        self._most_semicolons = max((t.count(";") for t in self._titles), default=0)

    def find(self, text: str) -> int | None:
        """Item index of a title (or id), None where there is none."""
        exact = self._exact.get(text, self._exact.get(text.strip(), self._ids.get(text.strip())))
        return self._normal.get(_normal(text)) if exact is None else exact

    def split(self, text: str) -> list[int]:
        """Item indices of titles that `;` divides, in the order written.

        A title may contain `;` itself: at each place the longest title is taken with which the rest can be read as well.
        Nothing between two `;` is passed over.

        Raises: UserError with the three nearest titles for one that no item has.
        """
        parts = text.split(";")
        n = len(parts)
        # step[i]: the piece that starts at part i ends before part step[i][0]; absent where the rest cannot be read.
        step: dict[int, tuple[int, int | None]] = {n: (n, None)}
        for i in range(n - 1, -1, -1):
            for j in range(min(n, i + 1 + self._most_semicolons), i, -1):
                item = self.find(";".join(parts[i:j])) if j in step else None
                if item is not None:
                    step[i] = (j, item)
                    break
            else:
                if not parts[i].strip() and i + 1 in step:
                    step[i] = (i + 1, None)
        if 0 not in step:
            raise self._unknown(self._first_unreadable(parts))
        found = []
        i = 0
        while i < n:
            i, item = step[i]
            if item is not None:
                found.append(item)
        return found

    def nearest(self, text: str, count: int = 3) -> list[str]:
        """The titles most like `text`, best first, with words in any order ("the matrix" is near "Matrix, The (1999)")."""
        text = text[:LONGEST]
        wanted = _pieces(text)
        # Letter-by-letter comparison is slow, so it sees only the 200 titles that share most three-letter pieces.
        shared = np.asarray([sum(p in t for p in wanted) / (len(t) + 20) for t in map(_normal, self._titles)])
        ratios = []
        for i in np.argsort(-shared, kind="stable")[:200].tolist():
            title = self._titles[i][:LONGEST]
            pairs = ((_normal(text), _normal(title)), (_words(text), _words(title)))
            ratios.append((-max(SequenceMatcher(None, *pair).ratio() for pair in pairs), i))
        return [self._titles[i] for _, i in sorted(ratios)[:count]]

    def _first_unreadable(self, parts: list[str]) -> str:
        readable = {0}
        for i in range(len(parts)):
            if i not in readable:
                continue
            ends = range(i + 1, min(len(parts), i + 1 + self._most_semicolons) + 1)
            readable.update(j for j in ends if self.find(";".join(parts[i:j])) is not None)
            if not parts[i].strip():
                readable.add(i + 1)
        return parts[max(readable)]

    def _unknown(self, text: str) -> UserError:
        near = "; ".join(repr(t) for t in self.nearest(text))
        return UserError(
            f"history: no item has the title{' or id' if self._ids else ''} {text.strip()!r}; the nearest titles are {near}"
        )


def match_title(text: str, titles: Iterable[str]) -> int:
    """Item index of one title. Raises UserError with the three nearest titles where there is none."""
    index = TitleIndex(titles)
    item = index.find(text)
    if item is None:
        raise index._unknown(text)
    return item


def split_history(text: str, titles: Iterable[str]) -> list[int]:
    """Item indices of `Toy Story (1995); Heat (1995)`. See `TitleIndex.split`; keep a TitleIndex for many texts."""
    return TitleIndex(titles).split(text)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _words(text: str) -> str:
    return " ".join(sorted(re.findall(r"\w+", _normal(text))))


def natural_key(text: str) -> tuple[list[tuple[int, str]], str]:
    """A key that sorts `9` before `10` and `<a_2>` before `<a_10>`."""
    # Digits compare as numbers: by length without leading zeros, then as text.
    parts = _DIGITS.split(text)
    return [(len(p.lstrip("0")), p.lstrip("0")) if i % 2 else (0, p) for i, p in enumerate(parts)], text


def _pieces(text: str) -> set[str]:
    text = _normal(text)
    return {text[i : i + 3] for i in range(max(1, len(text) - 2))}
