"""A trained quantiser: item vectors to codes, one code a level, whichever method fitted it.

Shapes: n items, E dimensions of an item vector, D of the space that is quantised, L levels, K_l codes of level l.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sftrec_jax.errors import UserError

CHUNK = 16_384
"""Items whose distances to all codes are held at once."""

_UNREADABLE = (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)
"""What numpy and zipfile raise for a file that is not there, cut off, or has wrong bytes."""

Layer = tuple[np.ndarray, np.ndarray]
"""Weight float32 [in, out] and bias float32 [out]."""


@dataclass(frozen=True, eq=False)
class Quantiser:
    """Codebooks, and the affine layers before and after them.

    `residual`: every level quantises what the levels before it left over; the reconstruction is the sum of the codes' vectors.
    `product`: level l quantises the l-th slice of the vector; the reconstruction is their concatenation.
    """

    kind: Literal["residual", "product"]
    books: tuple[np.ndarray, ...]
    """float32 [K_l, D] (residual) or [K_l, D_l] (product, the D_l sum to D)."""
    encoder: tuple[Layer, ...] = ()
    """Layers from E to D with ReLU between them; () is the identity."""
    decoder: tuple[Layer, ...] = ()
    """Layers from D back to E with ReLU between them; () is the identity."""
    prices: tuple[np.ndarray, ...] = ()
    """float32 [K_l] for each level, added to the squared distances so that codes are used evenly; infinite for a code that is
    never used. () stands for zeros."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """K_l of each level."""
        return tuple(len(book) for book in self.books)

    @property
    def width(self) -> int:
        """E, dimensions of an item vector."""
        if self.encoder:
            return self.encoder[0][0].shape[0]
        return self.books[0].shape[1] if self.kind == "residual" else sum(book.shape[1] for book in self.books)

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """The cheapest code at each level in turn: float32 [n, E] to int32 [n, L]."""
        levels = np.zeros((len(vectors), len(self.books)), np.int32)
        for rows in _chunks(len(vectors)):
            rest = self.project(vectors[rows])
            for level in range(len(self.books)):
                levels[rows, level] = self._costs(rest, level).argmin(1)
                rest = self._without(rest, level, levels[rows, level])
        return levels

    def costs(self, vectors: np.ndarray, levels: np.ndarray, level: int) -> np.ndarray:
        """Squared distance plus price of every code of `level`, the codes before it being `levels[:, :level]`.

        Args:
            vectors: float32 [n, E]; hand in few (the result has n times K_l entries).
            levels: int32 [n, L].

        Returns: float32 [n, K_l].
        """
        rest = self.project(vectors)
        for earlier in range(level):
            rest = self._without(rest, earlier, levels[:, earlier])
        return self._costs(rest, level)

    def project(self, vectors: np.ndarray) -> np.ndarray:
        """The vectors in the space that is quantised: float32 [n, E] to [n, D]."""
        return apply_layers(self.encoder, vectors)

    def distances(self, vectors: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """Squared distance, in the space that is quantised, of float32 [n, E] to what int32 [n, L] stand for: float32 [n]."""
        out = np.zeros(len(vectors), np.float32)
        for rows in _chunks(len(vectors)):
            out[rows] = np.square(self.project(vectors[rows]) - self._join(levels[rows], len(self.books))).sum(1)
        return out

    def reconstruct(self, levels: np.ndarray, count: int | None = None) -> np.ndarray:
        """Vectors float32 [n, E] from the first `count` levels (None: all) of int32 [n, L]."""
        return apply_layers(self.decoder, self._join(levels, len(self.books) if count is None else count))

    def _join(self, levels: np.ndarray, count: int) -> np.ndarray:
        if self.kind == "residual":
            total = np.zeros((len(levels), self.books[0].shape[1]), np.float32)
            for level in range(count):
                total += self.books[level][levels[:, level]]
        else:
            # A slice whose code is not read yet stands at the mean of its codes.
            parts = [
                book[levels[:, level]] if level < count else np.broadcast_to(book.mean(0), (len(levels), book.shape[1]))
                for level, book in enumerate(self.books)
            ]
            total = np.concatenate(parts, axis=1)
        return total

    def level_errors(self, vectors: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """Mean squared error of the reconstruction from the first l levels over the vectors' variance, float64 [L]."""
        mean = vectors.mean(0, dtype=np.float64)
        spread, errors = 0.0, np.zeros(len(self.books))
        for rows in _chunks(len(vectors)):
            spread += float(np.square(vectors[rows] - mean).sum())
            for level in range(len(self.books)):
                difference = vectors[rows] - self.reconstruct(levels[rows], level + 1)
                errors[level] += float(np.square(difference).sum(dtype=np.float64))
        return errors / max(spread, 1e-30)

    def save(self, path: Path) -> None:
        """Writes an `.npz` file: the arrays, `kind`, and `names` that lists the arrays."""
        arrays = {f"book_{i}": book for i, book in enumerate(self.books)}
        arrays |= {f"price_{i}": price for i, price in enumerate(self.prices)}
        for name, layers in (("encoder", self.encoder), ("decoder", self.decoder)):
            for i, (weight, bias) in enumerate(layers):
                arrays |= {f"{name}_{i}_weight": weight, f"{name}_{i}_bias": bias}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        names = np.array(sorted(arrays))
        buffer = io.BytesIO()
        np.savez(buffer, kind=np.array(self.kind), names=names, **arrays)  # pyright: ignore[reportArgumentType]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Quantiser:
        """Reads what `save` wrote; UserError where it is missing or damaged."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as data:
                arrays = {name: data[name] for name in data.files}
            kind, names = str(arrays.pop("kind")), arrays.pop("names").tolist()
            # An entry whose name in the file is damaged would otherwise count as a level less.
            if kind not in ("residual", "product") or names != sorted(arrays):
                raise ValueError
            return cls(
                kind,
                tuple(_numbered(arrays, "book_{}")),
                _layers(arrays, "encoder"),
                _layers(arrays, "decoder"),
                tuple(_numbered(arrays, "price_{}")),
            )
        except _UNREADABLE:
            raise UserError(f"{path}: the item quantiser is missing or damaged; run `sftrec prepare` again") from None

    def _costs(self, rest: np.ndarray, level: int) -> np.ndarray:
        book = self.books[level]
        part = rest if self.kind == "residual" else rest[:, self._slice(level)]
        costs = squared_distances(part, book)
        return costs + self.prices[level] if self.prices else costs

    def _without(self, rest: np.ndarray, level: int, codes: np.ndarray) -> np.ndarray:
        return rest - self.books[level][codes] if self.kind == "residual" else rest

    def _slice(self, level: int) -> slice:
        begin = sum(book.shape[1] for book in self.books[:level])
        return slice(begin, begin + self.books[level].shape[1])


def squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """float32 [n, K] between float32 [n, D] and [K, D], not below 0."""
    # Around the centres' mean: a component that all vectors share would leave float32 few digits for the differences.
    middle = centres.mean(0)
    points, centres = points - middle, centres - middle
    cross = points @ centres.T
    square = np.square(points).sum(1)[:, None] + np.square(centres).sum(1)
    return np.maximum(square - 2 * cross, 0.0)


def apply_layers(layers: Sequence[Layer], vectors: np.ndarray) -> np.ndarray:
    """Affine layers with ReLU between them, float32."""
    out = np.asarray(vectors, np.float32)
    for i, (weight, bias) in enumerate(layers):
        out = out @ weight + bias
        if i + 1 < len(layers):
            out = np.maximum(out, 0.0)
    return out


def _chunks(n: int) -> Iterator[slice]:
    return (slice(begin, begin + CHUNK) for begin in range(0, n, CHUNK))


def _numbered(arrays: dict[str, np.ndarray], name: str) -> Iterator[np.ndarray]:
    i = 0
    while name.format(i) in arrays:
        yield arrays[name.format(i)]
        i += 1


def _layers(arrays: dict[str, np.ndarray], name: str) -> tuple[Layer, ...]:
    weights, biases = _numbered(arrays, name + "_{}_weight"), _numbered(arrays, name + "_{}_bias")
    return tuple(zip(weights, biases, strict=True))
