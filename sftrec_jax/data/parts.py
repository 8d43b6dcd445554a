"""Histories a million interactions at a time, so that what is worked out of them on the way takes little memory."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SIZE = 1 << 20
"""Interactions of a part."""


class Part(NamedTuple):
    """The whole histories of users first..last-1, which lie side by side."""

    first: int
    last: int
    where: slice
    """Their interactions among all."""
    owner: np.ndarray
    """int64 [n], the user of each."""
    position: np.ndarray
    """int64 [n], its position in the history."""


def parts(offsets: np.ndarray) -> Iterator[Part]:
    """All histories, in parts of about `SIZE` interactions; user u has those of offsets[u]..offsets[u + 1]-1 (int64 [U + 1])."""
    first, users = 0, len(offsets) - 1
    while first < users:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + SIZE, "right")) - 1)
        begins, counts = offsets[first:last], np.diff(offsets[first : last + 1])
        where = slice(int(offsets[first]), int(offsets[last]))
        position = np.arange(where.start, where.stop) - np.repeat(begins, counts)
        yield Part(first, last, where, np.repeat(np.arange(first, last), counts), position)
        first = last


def occurrences(values: np.ndarray, count: int) -> np.ndarray:
    """int64 [count], how often each number below `count` stands in `values` (int32 [N])."""
    out = np.zeros(count, np.int64)
    for begin in range(0, len(values), SIZE):
        out += np.bincount(values[begin : begin + SIZE], minlength=count)
    return out
