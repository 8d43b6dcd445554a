"""Residual k-means: at every level, k-means of what the levels before it left over."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sftrec_jax.errors import UserError
from sftrec_jax.items.quantise.quantiser import CHUNK, Quantiser, squared_distances
from sftrec_jax.items.quantise.sinkhorn import balanced_assign, balanced_prices

POINTS_PER_CODE = 256
"""Items a code that k-means looks at; with more, an even draw of them. FAISS's limit: more points hardly move the centres."""

SEED_POINTS = 16_384
"""Points among which k-means++ seeks its start; it reads all of them once a code."""

ITERATIONS = 30
"""Lloyd iterations at most."""

TOLERANCE = 1e-4
"""Lloyd's iterations end when the error falls by less than this share."""

BALANCED_ITERATIONS = 5
"""Rounds of even assignment and new means."""

Progress = Callable[[int, int], None]
"""Called with (levels fitted, levels)."""


def fit_residual_kmeans(
    vectors: np.ndarray, levels: int, codes: int, balanced: bool, seed: int, progress: Progress | None = None
) -> tuple[Quantiser, np.ndarray]:
    """Codebooks by k-means on residuals, as QARM (Luo et al. 2024) and OneRec (Deng et al. 2025) make semantic ids.

    The centres come from at most POINTS_PER_CODE * codes items. Balanced: at each level a code holds at most ceil(n / codes)
    items; the quantiser keeps the prices that nearly do so, for new items. Memory beside the vectors: little; balanced, a copy
    of them and float32 [n, codes].

    Args:
        vectors: float32 [n, E], finite.
        levels: L.
        codes: K, at most n.
        balanced: codes are used evenly.
        seed: of the draw and the start.
        progress: called after each level.

    Returns: the quantiser, and int32 [n, L]: plain, what its `encode` says; balanced, the even assignment.
    Raises: UserError for fewer items than codes.
    """
    check_codes(len(vectors), codes)
    generator = np.random.default_rng(seed)
    sample = draw(len(vectors), codes, generator)
    points = np.array(vectors[sample], np.float32)
    tiny = rounding(points)
    rest = np.array(vectors, np.float32) if balanced else points
    assigned = np.zeros((len(vectors), levels), np.int32)
    books: list[np.ndarray] = []
    prices: list[np.ndarray] = []
    for level in range(levels):
        points = rest[sample] if balanced else rest
        book, price = fit_codes(points, codes, generator, tiny)
        if balanced:
            book, price = _even(points, book, price)
            costs = _all_distances(rest, book)
            assigned[:, level] = balanced_assign(costs, price, -(-len(rest) // codes))
            rest -= book[assigned[:, level]]
        else:
            rest -= book[Quantiser("residual", (book,), prices=(price,)).encode(rest)[:, 0]]
        books.append(book)
        prices.append(price)
        if progress is not None:
            progress(level + 1, levels)
    quantiser = Quantiser("residual", tuple(books), prices=some_prices(prices))
    return quantiser, assigned if balanced else quantiser.encode(vectors)


def check_codes(n: int, codes: int) -> None:
    """UserError for more codes a level than items."""
    if codes > n:
        raise UserError(f"semantic.codes is {codes} but there are {n} items; set semantic.codes to {n} or less")


def draw(n: int, codes: int, generator: np.random.Generator) -> np.ndarray:
    """The items that k-means looks at: int64, rising, at most POINTS_PER_CODE * codes of n."""
    limit = POINTS_PER_CODE * codes
    return np.arange(n) if n <= limit else np.sort(generator.choice(n, limit, replace=False))


def rounding(points: np.ndarray) -> float:
    """Length under which a residual of float32 [m, D] is nothing but rounding."""
    return 1e-6 * float(np.sqrt(np.square(points, dtype=np.float64).sum(1).mean()))


def fit_codes(points: np.ndarray, codes: int, generator: np.random.Generator, tiny: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """k-means of float32 [m, D]: centres float32 [codes, D] and prices float32 [codes].

    Up to `codes` distinct points are the centres themselves; spare codes stand at the mean with an infinite price, so that no
    rounding gives them items. All other prices are 0. Points shorter than `tiny` count as 0.
    """
    from sklearn.cluster import kmeans_plusplus  # takes half a second, and most commands do without

    points = np.where((np.square(points).sum(1) <= tiny**2)[:, None], np.float32(0), points)
    prices = np.zeros(codes, np.float32)
    distinct = _distinct(points, codes)
    if distinct is not None:
        book = np.tile(points.mean(0), (codes, 1))
        book[: len(distinct)] = distinct
        prices[len(distinct) :] = np.inf
        return book, prices
    seed = int(generator.integers(2**31))
    limit = max(SEED_POINTS, 4 * codes)
    some = points if len(points) <= limit else points[np.sort(generator.choice(len(points), limit, replace=False))]
    # float64: from float32 scikit-learn would convert all points once a code, ten times the work.
    start, _ = kmeans_plusplus(some.astype(np.float64), codes, random_state=seed)
    return _lloyd(points, start.astype(np.float32)), prices


def _lloyd(points: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Lloyd's iterations from float32 [K, D] centres; centres without points move to the points that are farthest from theirs.

    Not scikit-learn's KMeans: it warns where a centre ends without points, which vectors that occur several times lead to.
    """
    last = np.inf
    for _ in range(ITERATIONS):
        assigned, distances = _nearest(points, book)
        book = means(points, assigned, book)
        empty = np.flatnonzero(np.bincount(assigned, minlength=len(book)) == 0)
        book[empty] = points[np.argsort(-distances, kind="stable")[: len(empty)]]
        error = float(distances.sum(dtype=np.float64))
        if not len(empty) and error > (1 - TOLERANCE) * last:
            break
        last = error
    return book


def _nearest(points: np.ndarray, book: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centre of each point and its squared distance: int64 [m], float32 [m]."""
    assigned, distances = np.zeros(len(points), np.int64), np.zeros(len(points), np.float32)
    for begin in range(0, len(points), CHUNK):
        costs = squared_distances(points[begin : begin + CHUNK], book)
        assigned[begin : begin + CHUNK] = costs.argmin(1)
        distances[begin : begin + CHUNK] = costs.min(1)
    return assigned, distances


def means(points: np.ndarray, assigned: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Mean of the points of each code, float32 [K, D]; a code without points keeps its row of `book`."""
    from scipy import sparse

    count = np.bincount(assigned, minlength=len(book))
    ones = np.ones(len(points), np.float64)
    members = sparse.csr_array((ones, assigned, np.arange(len(points) + 1)), shape=(len(points), len(book)))
    centres = (members.T @ points) / np.maximum(count, 1)[:, None]
    return np.where(count[:, None] > 0, centres, book).astype(np.float32)


def some_prices(prices: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Prices as a quantiser keeps them: none at all where all are 0."""
    return tuple(prices) if any(price.any() for price in prices) else ()


def _even(points: np.ndarray, book: np.ndarray, price: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """k-means in which every code has its share of the points, from the plain centres: centres and prices."""
    # Where there are fewer distinct points than codes, several codes share each.
    used = book[np.isfinite(price)]
    book = used[np.arange(len(book)) % len(used)]
    capacity = -(-len(points) // len(book))
    for _ in range(BALANCED_ITERATIONS):
        costs = squared_distances(points, book)
        book = means(points, balanced_assign(costs, balanced_prices(costs), capacity), book)
    return book, balanced_prices(squared_distances(points, book))


def _all_distances(points: np.ndarray, book: np.ndarray) -> np.ndarray:
    costs = np.empty((len(points), len(book)), np.float32)
    for begin in range(0, len(points), CHUNK):
        costs[begin : begin + CHUNK] = squared_distances(points[begin : begin + CHUNK], book)
    return costs


def _distinct(points: np.ndarray, limit: int) -> np.ndarray | None:
    """The distinct rows in the order of their first appearance, None where there are more than `limit`."""
    rows = np.ascontiguousarray(points + np.float32(0))  # -0.0 has other bytes than 0.0
    seen: dict[bytes, int] = {}
    for i in range(len(rows)):
        seen.setdefault(rows[i].tobytes(), i)
        if len(seen) > limit:
            return None
    return rows[list(seen.values())]
