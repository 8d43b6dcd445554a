"""Collaborative ids: every item's path in a tree of clusters of the co-occurrence graph."""

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh

from sftrec_jax.data.histories import text_hashes

DEPTH = 12
"""Below this many levels clusters are cut evenly. Amazon Beauty (12,101 items, 16 branches, leaves of 64) has 3."""
DENSE = 600
"""Up to this many items all eigenvectors are computed at once; the iteration for a few of them starts to pay off above."""
REGULARISATION = 0.1
"""Added to every degree, in mean degrees. On Amazon Beauty (16 branches, leaves of 64) 12 % of the co-occurrence weight then
lies inside leaves, 0.2 % would by chance; with 1.0 it is 10 %, and the largest cluster has 41 % of the items instead of 27 %."""
_DIGITS = 6


def cluster_paths(
    counts: sp.csr_matrix, item_ids: Sequence[str] | np.ndarray, branches: int, leaf: int, seed: int
) -> list[tuple[int, ...]]:
    """Recursive spectral clustering as in "How to Index Item IDs for Recommendation Foundation Models" (Hua et al. 2023).

    A cluster of more than `leaf` items is divided into at most `branches`, numbered from the largest. The eigenvectors are
    those of the regularised normalised adjacency, their rows scaled to length 1 (Qin and Rohe 2013): otherwise small groups
    take up the eigenvectors one by one and most items stay in one cluster (93 % of Amazon Beauty with plain rows). A cluster
    that falls apart into groups of at most `leaf` items, that the eigenvectors do not divide, or that lies `DEPTH` levels down
    is cut into even parts, group by group.

    Items without co-occurrence cannot be clustered: they make up the last branch of the root and are cut into even parts there.

    Args:
        counts: symmetric [n, n], not negative, from training interactions (see `cooccurrence`).
        item_ids: [n] distinct ids of the source. Their hashes decide ties and the numbers in a leaf, so that paths do not
            depend on the order of the catalogue.
        branches: at least 2; the root may have one more, for items without co-occurrence.
        leaf: at least 1, items in a leaf.
        seed: of solver and k-means.

    Returns: n distinct paths (c1, ..., cd, i): clusters from the root down, then the number in the leaf, below `leaf`. After
        the same clusters come either clusters or numbers, never both, and so no path begins another. d is 0 where all items
        fit into one leaf.
    """
    n = len(item_ids)
    if counts.shape != (n, n):
        raise ValueError(f"counts {counts.shape} for {n} items")
    ids = [str(item) for item in item_ids]
    hashes = text_hashes(ids, seed, "cluster")
    order = np.asarray(sorted(range(n), key=lambda row: (hashes[row], ids[row])), np.int64)
    graph = _among(sp.csr_matrix(counts, dtype=np.float64), order)
    tree = _Tree(graph, branches, leaf, seed)
    paths: list[tuple[int, ...]] = [()] * n
    for path, members in tree.leaves():
        for number, member in enumerate(members):
            paths[order[member]] = (*path, number)
    return paths


class _Tree:
    """`graph` has the items in the order of their hashes; members of a cluster are row numbers, rising."""

    def __init__(self, graph: sp.csr_matrix, branches: int, leaf: int, seed: int):
        self.graph, self.branches, self.leaf, self.seed = graph, branches, leaf, seed

    def leaves(self) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        connected = np.asarray(self.graph.sum(axis=1)).ravel() > 0
        everything = np.arange(len(connected))
        if len(everything) <= self.leaf:
            yield (), everything
            return
        inside, outside = everything[connected], everything[~connected]
        # Few items with co-occurrence are a branch too, so that those without keep to one of their own.
        parts = self._divide(inside, 0) if len(inside) > self.leaf else [inside] if len(inside) else []
        for number, part in enumerate(parts):
            yield from self._below((number,), part)
        if len(outside):
            yield from self._even((len(parts),) if parts else (), outside)

    def _below(self, path: tuple[int, ...], members: np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        if len(members) <= self.leaf:
            yield path, members
            return
        for number, part in enumerate(self._divide(members, len(path))):
            yield from self._below((*path, number), part)

    def _even(self, path: tuple[int, ...], members: np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        if len(members) <= self.leaf:
            yield path, members
            return
        for number, part in enumerate(np.array_split(members, self._fewest(len(members)))):
            yield from self._even((*path, number), part)

    def _fewest(self, size: int) -> int:
        return min(self.branches, -(-size // self.leaf))

    def _divide(self, members: np.ndarray, depth: int) -> list[np.ndarray]:
        """At least two parts, the largest first."""
        graph = _among(self.graph, members)
        _, component = connected_components(graph, directed=False)
        sizes = np.bincount(component)
        if depth < DEPTH and sizes.max() > self.leaf:
            labels = self._spectral(graph)
            parts = [members[labels == label] for label in np.unique(labels)]
            if len(parts) > 1:
                return sorted(parts, key=lambda part: (-len(part), part[0]))
        together = members[np.lexsort((members, component, -sizes[component]))]
        return [np.sort(part) for part in np.array_split(together, self._fewest(len(together)))]

    def _spectral(self, graph: sp.csr_matrix) -> np.ndarray:
        """int [n] label of each item, all equal where the graph gives nothing to divide by."""
        from sklearn.cluster import KMeans  # takes a second, and most runs have no clusters
        from threadpoolctl import threadpool_limits

        rows = self._embedding(graph, self.branches)
        count = min(self.branches, len(np.unique(rows, axis=0)))
        if count < 2:
            return np.zeros(len(rows), int)
        # One thread: the order in which threads add up their parts of a mean is not fixed.
        with threadpool_limits(1):
            labels = KMeans(count, n_init=4, random_state=self.seed).fit_predict(rows)  # pyright: ignore[reportArgumentType]
        return np.asarray(labels)

    def _embedding(self, graph: sp.csr_matrix, count: int) -> np.ndarray:
        """float64 [n, count] (fewer in tiny graphs), rows of length 1 or zeros."""
        degree = np.asarray(graph.sum(axis=1)).ravel()
        scale = 1 / np.sqrt(degree + REGULARISATION * degree.mean())
        normal = sp.csr_matrix(sp.diags_array(scale) @ graph @ sp.diags_array(scale))
        n = len(degree)
        count = min(count, n - 1)
        if n <= DENSE:
            vectors = scipy.linalg.eigh(normal.toarray(), subset_by_index=(n - count, n - 1))[1]
        else:
            start = np.random.default_rng(self.seed).standard_normal(n)
            vectors = eigsh(normal, k=count, which="LA", v0=start, tol=1e-6)[1]  # pyright: ignore[reportArgumentType]
        # Rows this short are zeros but for rounding: items of a component that has no share in these eigenvectors.
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        rows = np.where(lengths > 1e-8, vectors / np.maximum(lengths, 1e-8), 0.0)
        return np.round(rows, _DIGITS)  # the solver's rounding must not tell items apart


def _among(graph: sp.csr_matrix, members: np.ndarray) -> sp.csr_matrix:
    """Rows and columns of `members`, in their order."""
    part = sp.csr_matrix(graph[members][:, members])  # pyright: ignore[reportOptionalSubscript]
    part.eliminate_zeros()
    part.sort_indices()
    return part
