"""Whether item vectors or codes from a file were fitted on held-out interactions: do they know pairs that training does not show?

A membership test: of held-out pairs (a target and the item before it) that training never puts together, how many does a file
put side by side, and how many do vectors that cannot know them, with as many neighbours an item? Words and train interactions
explain some such pairs; a file that explains many more has seen them. Pairs say nothing of who took them: a finding is a
suspicion with a number, to be settled by how the file was made. Measured: docs/log.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.stats import binom

from sftrec_jax.data.dataset import Dataset
from sftrec_jax.items.embed.collaborative import cooccurrence
from sftrec_jax.items.quantise.collisions import group_index

PAIRS, LEAST_PAIRS, SCORES = 6_000, 2_000, 100_000_000
"""Pairs that are asked for: fewer of a large catalogue, where each is compared with every item (`SCORES` comparisons)."""
WINDOW = 5
"""Items up to this many steps apart in training count as put together."""
NEIGHBOURS = 20
"""Of a vector. Of Amazon Beauty, PPMI of all interactions has 3.0 times the benchmark's pairs among 20 and 2.5 times among 10."""
GROUP = 5
"""A code's neighbours are the items that share its longest beginning which so many others share."""
VECTOR_RATIO, CODE_RATIO = 1.5, 1.2
"""Ratios to the benchmark that count as suspect. A code forgets part of its vector, so honest ones stay lower."""
P_VALUE = 1e-6
_BLOCK = 4_000_000
"""Scores that are held at once."""
_WORD = r"(?u)\b\w+\b"


@dataclass(frozen=True)
class Membership:
    """What a file knows of held-out pairs, and what it could know without having seen them."""

    pairs: int
    hits: int
    """Pairs whose target is among the neighbours of the item before it."""
    benchmark: int
    """The same for as many nearest items by words, or by words and training interactions: the larger of both."""
    suspect: bool

    @property
    def ratio(self) -> float:
        """Hits over the benchmark's."""
        return self.hits / max(1, self.benchmark)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Held-out pairs that training does not show, m of them."""

    before: np.ndarray
    """int64 [m] items."""
    target: np.ndarray
    """int64 [m] items."""

    def where(self, chosen: np.ndarray) -> Pairs:
        """Those that bool [m] `chosen` names."""
        return Pairs(self.before[chosen], self.target[chosen])

    def blocks(self, n_items: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All pairs in turn, so many at once that their scores for all items can be held."""
        size = max(1, _BLOCK // n_items)
        for begin in range(0, len(self.before), size):
            yield self.before[begin : begin + size], self.target[begin : begin + size]


def fresh_pairs(dataset: Dataset, seed: int = 0) -> Pairs:
    """Held-out targets with the items before them, those never within `WINDOW` steps in training; drawn where they are many."""
    n = len(dataset.item_ids)
    places = [dataset.offsets[:-1][p >= 1] + p[p >= 1] for p in (dataset.valid_position, dataset.test_position)]
    at = np.sort(np.concatenate(places))
    before, target = dataset.items[at - 1].astype(np.int64), dataset.items[at].astype(np.int64)
    together = cooccurrence(dataset, WINDOW).tocoo()
    known = together.row.astype(np.int64) * n + together.col
    fresh = np.flatnonzero(~np.isin(before * n + target, known) & (before != target))
    most = min(PAIRS, max(LEAST_PAIRS, SCORES // max(1, n)))
    if len(fresh) > most:
        fresh = np.sort(np.random.default_rng(seed).choice(fresh, most, replace=False))
    return Pairs(before[fresh], target[fresh])


def of_vectors(vectors: np.ndarray, dataset: Dataset, texts: Sequence[str], seed: int = 0) -> Membership:
    """The test of item vectors: neighbours are the `NEIGHBOURS` nearest by cosine.

    Args:
        vectors: float [n_items, E]; zeros for an item without one, whose pairs are left out.
        dataset: with the split under which the vectors may know training alone.
        texts: [n_items], what the catalogue says of each item; "" for nothing.
        seed: of the draw of pairs.
    """
    pairs = fresh_pairs(dataset, seed)
    known = np.asarray(vectors.any(axis=1))
    pairs = pairs.where(known[pairs.before] & known[pairs.target])
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit = (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
    hits = sum(
        int((_places(unit[before] @ unit.T, before, target) < NEIGHBOURS).sum()) for before, target in pairs.blocks(len(unit))
    )
    sizes = np.full(len(pairs.before), NEIGHBOURS)
    return _judged(hits, sizes, pairs, dataset, texts, VECTOR_RATIO)


def of_codes(levels: np.ndarray, dataset: Dataset, texts: Sequence[str], seed: int = 0) -> Membership:
    """The test of codes: neighbours are the items that share a beginning (see `GROUP`).

    Args:
        levels: int [n_items, L] codes, -1 after the end.
        dataset, texts, seed: as for `of_vectors`.
    """
    pairs = fresh_pairs(dataset, seed)
    sizes = np.zeros(len(pairs.before), np.int64)
    hit = np.zeros(len(pairs.before), bool)
    for length in range(levels.shape[1], 0, -1):
        group = group_index(levels[:, :length])
        others = np.bincount(group)[group[pairs.before]] - 1
        first = (sizes == 0) & (others >= GROUP)
        hit[first] = (group[pairs.before] == group[pairs.target])[first]
        sizes[first] = others[first]
    grouped = sizes > 0
    return _judged(int(hit.sum()), sizes[grouped], pairs.where(grouped), dataset, texts, CODE_RATIO)


def _judged(hits: int, sizes: np.ndarray, pairs: Pairs, dataset: Dataset, texts: Sequence[str], ratio: float) -> Membership:
    asked = len(pairs.before)
    if not asked:
        return Membership(0, 0, 0, False)
    words, taken = _words(texts), _taken(dataset)
    by_words = by_both = done = 0
    for before, target in pairs.blocks(len(dataset.item_ids)):
        within = sizes[done : done + len(before)]
        done += len(before)
        scores = (words[before] @ words.T).toarray()
        by_words += int((_places(scores, before, target) < within).sum())
        scores += (taken[before] @ taken.T).toarray()
        by_both += int((_places(scores, before, target) < within).sum())
    benchmark = max(by_words, by_both)
    likely = float(binom.sf(hits - 1, asked, min(1.0, (benchmark + 1) / (asked + 1))))
    return Membership(asked, hits, benchmark, hits >= ratio * benchmark and likely < P_VALUE)


def _words(texts: Sequence[str]) -> sp.csr_matrix:
    """TF-IDF float64 [n_items, words], rows of length 1; zeros for a text without a word."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second, and most runs read no such file

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=_WORD)
    analyse = vectorizer.build_analyzer()
    if not any(analyse(text) for text in texts):
        return sp.csr_matrix(np.zeros((len(texts), 1)))
    return sp.csr_matrix(vectorizer.fit_transform(texts))


def _taken(dataset: Dataset) -> sp.csr_matrix:
    """Positive pointwise mutual information of training float64 [n_items, n_items], rows of length 1 or zeros.

    Whole rows, not their SVD: items that never met are compared by whom they both met.
    """
    counts = cooccurrence(dataset, WINDOW).tocoo()
    marginal = np.asarray(counts.sum(axis=1)).ravel()
    information = np.log(counts.data * marginal.sum() / (marginal[counts.row] * marginal[counts.col]))
    positive = information > 0
    matrix = sp.csr_matrix((information[positive], (counts.row[positive], counts.col[positive])), counts.shape)
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    return sp.csr_matrix(sp.diags_array(1 / np.where(lengths > 0, lengths, 1.0)) @ matrix)


def _places(scores: np.ndarray, before: np.ndarray, target: np.ndarray) -> np.ndarray:
    """How many other items score higher than the target, int64 [m]; items that score the same share the places evenly."""
    rows = np.arange(len(before))
    own, wanted = scores[rows, before], scores[rows, target]
    higher = (scores > wanted[:, None]).sum(axis=1) - (own > wanted)
    same = (scores == wanted[:, None]).sum(axis=1) - (own == wanted) - 1
    return higher + same // 2
