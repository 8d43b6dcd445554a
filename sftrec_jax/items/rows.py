"""Vectors for the rows of new tokens: from the codebooks that the tokens stand for, or from the items that carry them."""

from __future__ import annotations

import numpy as np

from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.paths import level_tokens
from sftrec_jax.items.quantise.quantiser import Quantiser


def codebook_rows(codes: ItemCodes, quantiser: Quantiser) -> np.ndarray:
    """The codebook vector of each new token, float32 [n_new, D]; zeros for tokens of the extra level.

    Vectors are centred within their level and have a mean squared length of 1 there: the deeper a level, the shorter its
    residuals, but not the less its tokens matter. Slices of a product quantiser stand at their place in the whole vector.
    """
    width = quantiser.books[0].shape[1] if quantiser.kind == "residual" else sum(book.shape[1] for book in quantiser.books)
    place = {name: i for i, name in enumerate(codes.new_tokens)}
    rows = np.zeros((len(place), width), np.float32)
    begin = 0
    for level, book in enumerate(quantiser.books):
        path = np.zeros((len(book), level + 1), np.int32)
        path[:, level] = np.arange(len(book))
        found = [(place[names[level]], k) for k, names in enumerate(level_tokens(path)) if names[level] in place]
        at, code = np.asarray(found, np.int64).reshape(-1, 2).T
        end = begin + book.shape[1]
        rows[at, begin:end] = _normal(book[code] - book[code].mean(0))
        begin = 0 if quantiser.kind == "residual" else end
    return rows


def member_rows(codes: ItemCodes, vectors: np.ndarray) -> np.ndarray:
    """For each new token the mean vector of the items that carry it, float32 [n_new, E] from float32 [n_items, E].

    Scaled to a mean squared length of 1 over the tokens of each place in the codes: means over many items are short. Zeros
    for a token that no item carries.
    """
    n_new = len(codes.new_tokens)
    rows = np.zeros((n_new, vectors.shape[1]), np.float32)
    for place in range(codes.codes.shape[1]):
        token = codes.codes[:, place]
        at = np.minimum(np.searchsorted(codes.new_token_ids, token), n_new - 1)
        items = np.flatnonzero(codes.new_token_ids[at] == token)
        sums = np.zeros_like(rows)
        np.add.at(sums, at[items], vectors[items])
        count = np.bincount(at[items], minlength=n_new)
        used = (count > 0) & ~rows.any(1)  # a token that stands at several places keeps its first mean
        rows[used] = _normal(sums[used] / count[used, None])
    return rows


def _normal(vectors: np.ndarray) -> np.ndarray:
    if not len(vectors):
        return vectors
    lengths = np.square(vectors).sum(1)
    mean = float(lengths[lengths > 0].mean()) if lengths.any() else 1.0
    return (vectors / np.sqrt(mean)).astype(np.float32)
