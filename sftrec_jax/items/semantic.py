"""Semantic ids: item vectors to codes by the chosen quantiser, collisions resolved and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sftrec_jax.config import SemanticConfig
from sftrec_jax.errors import UserError
from sftrec_jax.items.quantise.collisions import resolve_extra, resolve_nearest
from sftrec_jax.items.quantise.kmeans import fit_residual_kmeans
from sftrec_jax.items.quantise.product import fit_product
from sftrec_jax.items.quantise.quantiser import Quantiser
from sftrec_jax.items.quantise.report import CodebookReport, codebook_report
from sftrec_jax.items.quantise.rqvae import fit_rqvae

Method = Literal["rqvae", "rqkmeans", "pq", "opq"]

Progress = Callable[[str], None]
"""Called with a line of text now and then."""


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """Codes of n items, and what made them."""

    quantiser: Quantiser
    levels: np.ndarray
    """int32 [n, L], or [n, L + 1] with the extra level; equal rows only where collisions are kept as lists."""
    extra_size: int
    """Numbers that the extra level may take, 0 where there is none."""
    report: CodebookReport
    """Of the codes before collisions were resolved."""
    moved: int
    """Items that got another code than the quantiser's (`nearest`)."""


def semantic_ids(
    vectors: np.ndarray, item_ids: Sequence[str] | np.ndarray, method: Method, config: SemanticConfig, say: Progress
) -> SemanticIds:
    """Fits the quantiser to float32 [n, E] vectors and names every item.

    Raises: UserError for fewer items than codes, or too few codes for `semantic.collisions: nearest`.
    """
    quantiser, raw = _fit(vectors, method, config, say)
    report = codebook_report(raw, quantiser.sizes, quantiser.level_errors(vectors, raw))
    if config.collisions == "extra":
        levels = resolve_extra(raw, item_ids)
        return SemanticIds(quantiser, levels, int(levels[:, -1].max()) + 1, report, 0)
    if config.collisions == "item":
        levels = np.concatenate([raw.astype(np.int32), np.arange(len(raw), dtype=np.int32)[:, None]], axis=1)
        return SemanticIds(quantiser, levels, len(raw), report, 0)
    if config.collisions == "nearest":
        levels, moved = resolve_nearest(raw, quantiser, vectors, item_ids)
        return SemanticIds(quantiser, levels, 0, report, moved)
    return SemanticIds(quantiser, raw, 0, report, 0)


def _fit(vectors: np.ndarray, method: Method, config: SemanticConfig, say: Progress) -> tuple[Quantiser, np.ndarray]:
    n = len(vectors)
    if n < config.codes:
        raise UserError(f"semantic.codes is {config.codes} but there are {n} items; use at most {n}")
    if config.balanced and method in ("pq", "opq"):
        raise UserError(f"semantic.balanced: items.tokenizer {method} has no balanced form; use rqkmeans or rqvae")
    if method == "rqvae":

        def progress(epoch: int, total: int, loss: float, reconstruction: float, used: tuple[int, ...]) -> None:
            say(f"rqvae: epoch {epoch} of {total}, loss {loss:.4f}, reconstruction {reconstruction:.4f}, codes used {used}")

        return fit_rqvae(vectors, config, progress)
    if method == "rqkmeans":
        return fit_residual_kmeans(vectors, config.levels, config.codes, config.balanced, config.seed)
    return fit_product(vectors, config.levels, config.codes, method == "opq", config.seed)
