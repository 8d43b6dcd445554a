"""Product quantisation: the vector in slices, one code for each, after a rotation if asked for."""

from __future__ import annotations

import numpy as np

from sftrec_jax.errors import UserError
from sftrec_jax.items.quantise.kmeans import Progress, check_codes, draw, fit_codes, means, some_prices
from sftrec_jax.items.quantise.quantiser import Quantiser, apply_layers, squared_distances

ROTATION_ITERATIONS = 30
"""Rounds of new codes, new means and a new rotation."""


def fit_product(
    vectors: np.ndarray, levels: int, codes: int, rotate: bool, seed: int, progress: Progress | None = None
) -> tuple[Quantiser, np.ndarray]:
    """Product quantisation (Jegou et al. 2011); rotated, optimised product quantisation (Ge et al. 2013), as RPG uses it.

    Slices are of nearly equal width where L does not divide E. Centres and rotation come from at most as many items as
    `kmeans.draw` gives.

    Args:
        vectors: float32 [n, E], finite.
        levels: slices (L), at most E.
        codes: K, at most n.
        rotate: with a rotation, kept as the quantiser's encoder and decoder.
        seed: of the draw and the start.
        progress: called after each slice.

    Returns: the quantiser and what its `encode` says, int32 [n, L].
    Raises: UserError for fewer items than codes, or fewer dimensions than levels.
    """
    check_codes(len(vectors), codes)
    width = vectors.shape[1]
    if levels > width:
        raise UserError(
            f"semantic.levels is {levels} but item vectors have {width} dimensions; set semantic.levels to {width} or less"
        )
    generator = np.random.default_rng(seed)
    points = np.array(vectors[draw(len(vectors), codes, generator)], np.float32)
    slices = _slices(width, levels)
    encoder = decoder = ()
    if rotate:
        mean = points.mean(0, dtype=np.float64).astype(np.float32)
        rotation = _rotation(points - mean, slices, codes, generator)
        encoder, decoder = ((rotation, -mean @ rotation),), ((np.ascontiguousarray(rotation.T), mean),)
        points = apply_layers(encoder, points)
    books: list[np.ndarray] = []
    prices: list[np.ndarray] = []
    for level, part in enumerate(slices):
        book, price = fit_codes(points[:, part], codes, generator)
        books.append(book)
        prices.append(price)
        if progress is not None:
            progress(level + 1, levels)
    quantiser = Quantiser("product", tuple(books), encoder, decoder, some_prices(prices))
    return quantiser, quantiser.encode(vectors)


def _slices(width: int, levels: int) -> list[slice]:
    ends = [part[-1] + 1 for part in np.array_split(np.arange(width), levels)]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def _rotation(points: np.ndarray, slices: list[slice], codes: int, generator: np.random.Generator) -> np.ndarray:
    """Orthogonal float32 [E, E] after which codes of the slices lose least of the centred points."""
    from scipy.linalg import orthogonal_procrustes

    rotation = _principal(points, slices)
    turned = points @ rotation
    books = [turned[np.sort(generator.choice(len(points), codes, replace=False))][:, part] for part in slices]
    for _ in range(ROTATION_ITERATIONS):
        turned = points @ rotation
        for level, part in enumerate(slices):
            assigned = squared_distances(turned[:, part], books[level]).argmin(1)
            books[level] = means(turned[:, part], assigned, books[level])
            turned[:, part] = books[level][assigned]
        rotation, _ = orthogonal_procrustes(points, turned)
    return np.ascontiguousarray(rotation, np.float32)


def _principal(points: np.ndarray, slices: list[slice]) -> np.ndarray:
    """Principal axes dealt out so that the slices' products of variances are alike (Ge et al. 2013, section 3.2)."""
    variance, axes = np.linalg.eigh(points.T.astype(np.float64) @ points)
    # Over the smallest: a factor below 1 would make a slice look emptier the more axes it has.
    logs = np.log(np.maximum(variance, 1e-9 * variance.max()))
    logs -= logs.min()
    filled = np.zeros(len(slices))
    dealt: list[list[int]] = [[] for _ in slices]
    for axis in range(len(variance))[::-1]:
        room = [level for level, part in enumerate(slices) if len(dealt[level]) < part.stop - part.start]
        level = min(room, key=lambda at: (filled[at], at))
        dealt[level].append(axis)
        filled[level] += logs[axis]
    return np.ascontiguousarray(axes[:, [axis for level in dealt for axis in level]], np.float32)
