"""How far back each training target sees, and which targets share a beginning: rules on positions, for all histories at once.

A window is a run of items in one history of which the last ones are targets. Positions count through all histories, one after
the other; `sums[i]` is the number of tokens that all items before position i take in a prompt.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Windows:
    """int64 arrays [n], one entry a window: the targets p = first..end-1 are asked for after the items begin..p-1."""

    begin: np.ndarray
    first: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.begin)

    def ordered(self) -> "Windows":
        """By position of the first target."""
        order = np.argsort(self.first, kind="stable")
        return Windows(self.begin[order], self.first[order], self.end[order])


def _joined(made: list[Windows]) -> Windows:
    if not made:
        return Windows(*(np.zeros(0, np.int64) for _ in range(3)))
    return Windows(*(np.concatenate([getattr(w, name) for w in made]) for name in ("begin", "first", "end"))).ordered()


def back_to_back(sums: np.ndarray, histories: Windows, most: int, room: int, last_only: bool) -> Windows:
    """Windows of at most `most` items and `room` tokens that lie side by side, from the newest back.

    Args:
        sums: int64 [N + 1].
        histories: of each history where it begins, its first target and its end.
        most: items.
        room: tokens of all items of a window.
        last_only: only each history's newest window.

    Returns: windows that hold every target (with `last_only`, the newest), each seeing its window's items alone. One with begin =
    end stands for an item that exceeds `room`.
    """
    made = []
    begin, first, end = histories.begin, histories.first, histories.end
    while True:
        left = end > first
        begin, first, end = begin[left], first[left], end[left]
        if not len(end):
            return _joined(made)
        start = np.maximum(np.maximum(begin, end - most), np.searchsorted(sums, sums[end] - room))
        made.append(Windows(start, np.minimum(np.maximum(first, start), end), end))
        if last_only or (start == end).any():
            return _joined(made)
        end = start


def with_history(sums: np.ndarray, histories: Windows, most: int, room: int | np.ndarray, stride: int) -> Windows:
    """Windows for targets that each want the items before them: at most `most` of them, in at most `room` tokens.

    A window begins where its history does for as long as that leaves the limits kept, and then moves on: to the newest
    `most` + 1 - `stride` items, and the same share of `room`. A stride of 1 gives every target just the newest items that the
    limits allow; a longer one lets neighbours share a beginning.

    Args: as `back_to_back`, `room` of all histories or int64 [H] of each; targets lie behind the begin of their history.
    Returns: windows with every target once. One with begin = first stands for a target whose newest item exceeds `room`.
    """
    kept = most + 1 - stride
    made = []
    begin, first, end = histories.begin, histories.first, histories.end
    start, room = begin, np.broadcast_to(room, begin.shape)
    while True:
        left = first < end
        start, first, end, room = start[left], first[left], end[left], room[left]
        if not len(first):
            return _joined(made)
        # Move where the first target does not fit.
        over = (first - start > most) | (sums[first] - sums[start] > room)
        fitting = np.maximum(first - most, np.searchsorted(sums, sums[first] - room))
        wanted = np.maximum(first - kept, np.searchsorted(sums, sums[first] - room * kept // most))
        start = np.where(over, np.maximum(np.maximum(fitting, np.minimum(wanted, first - 1)), start), start)
        stop = np.minimum(np.minimum(start + most, np.searchsorted(sums, sums[start] + room, side="right") - 1) + 1, end)
        made.append(Windows(start, first, np.maximum(stop, first + 1)))
        if (start == first).any():
            return _joined(made)
        first = made[-1].end


def split(windows: Windows, need: np.ndarray, offset: np.ndarray, labels: np.ndarray, tokens: int, targets: int) -> Windows:
    """Windows whose targets exceed a row, as several that repeat the beginning.

    Args:
        windows: to split.
        need, offset: int64 [N + 1], rising, and [2, N + 1]: a window has need[end] - offset[0, begin] - offset[1, first] tokens.
        labels: int64 [N + 1] sums of target tokens.
        tokens: capacity of a row.
        targets: capacity of a row.

    Returns: windows with at least one target each; one that alone exceeds a row stays as it is.
    """
    made = []
    begin, first, end = windows.begin, windows.first, windows.end
    while len(first):
        stop = np.searchsorted(need, tokens + offset[0][begin] + offset[1][first], side="right") - 1
        stop = np.minimum(stop, np.searchsorted(labels, labels[first] + targets, side="right") - 1)
        stop = np.minimum(np.maximum(stop, first + 1), end)
        made.append(Windows(begin, first, stop))
        left = stop < end
        begin, first, end = begin[left], stop[left], end[left]
    return _joined(made)


def one_by_one(windows: Windows) -> Windows:
    """Every target in a window of its own."""
    counts = windows.end - windows.first
    first = np.repeat(windows.first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(counts.sum())
    return Windows(np.repeat(windows.begin, counts), first, first + 1)
