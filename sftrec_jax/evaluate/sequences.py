"""Sequences of numbers in which others are looked for, by hashes of windows."""

import numpy as np


def window_hashes(values: np.ndarray, width: int) -> np.ndarray:
    """uint64 [len - width + 1] polynomial hashes of all windows of uint64 values; equal windows have equal hashes."""
    hashes = np.zeros(max(0, len(values) - width + 1), np.uint64)
    with np.errstate(over="ignore"):
        for step in range(width):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + values[step : step + len(hashes)] + np.uint64(1)
    return hashes


class Sequences:
    """Finds parts in many token sequences, by hashes of windows of `width` tokens, then token by token."""

    def __init__(self, sequences: list[np.ndarray], width: int) -> None:
        self._width = min(width, 16)
        self._tokens = np.concatenate([np.append(s, -1) for s in sequences]).astype(np.int64)  # no part holds a -1
        hashes = window_hashes(self._tokens.astype(np.uint64), self._width)
        self._hashes, self._order = hashes, np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def hold(self, parts: list[np.ndarray]) -> list[bool]:
        """Whether each part (int [at least `width`]) stands in one of the sequences, without a gap."""
        ends = np.stack([part[-self._width :] for part in parts]) if parts else np.zeros((0, self._width))
        wanted = window_hashes(ends.astype(np.uint64).ravel(), self._width)[:: self._width]
        low, high = (np.searchsorted(self._sorted, wanted, side).tolist() for side in ("left", "right"))
        return [self._holds(p, self._order[a:b]) for p, a, b in zip(parts, low, high, strict=True)]

    def _holds(self, part: np.ndarray, ends: np.ndarray) -> bool:
        if not len(ends):
            return False
        begins = ends + self._width - len(part)
        begins = begins[begins >= 0]
        first = window_hashes(part[: self._width].astype(np.uint64), self._width)
        begins = begins[self._hashes[begins] == first]
        return any(np.array_equal(self._tokens[b : b + len(part)], part) for b in begins.tolist())
