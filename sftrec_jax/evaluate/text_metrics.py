"""Metrics of answers in words: errors of ratings, and overlap with what people wrote."""

import importlib.util
import re
from collections.abc import Sequence

import numpy as np

from sftrec_jax.errors import UserError

_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)?")


def read_rating(text: str) -> float | None:
    """The first number in a text, None where there is none."""
    found = _NUMBER.search(text)
    return None if found is None else float(found.group().replace(",", "."))


def rating_errors(written: Sequence[str], ratings: np.ndarray, fallback: np.ndarray, low: float, high: float) -> dict[str, float]:
    """RMSE and MAE of the ratings that texts name, and the share of texts without one, for which `fallback` stands in.

    Args:
        ratings, fallback: float [n].
        low, high: of all ratings; what lies beyond is brought back to them.
    """
    found = [read_rating(text) for text in written]
    values = np.asarray([other if value is None else value for value, other in zip(found, fallback.tolist(), strict=True)])
    errors = np.clip(values, low, high) - ratings
    return {
        "rmse": float(np.sqrt((errors**2).mean())),
        "mae": float(np.abs(errors).mean()),
        "unreadable": float(np.mean([value is None for value in found])),
    }


def check_installed() -> None:
    """UserError where a library that scores texts is not installed."""
    for name in ("sacrebleu", "rouge_score"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed, which answers in words are scored by; run pip install 'sftrec_jax[words]'")


def overlap(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU (4-grams of the corpus, sacrebleu) and F1 of ROUGE-1, 2 and L (rouge-score, stemmed, mean over texts), 0 to 100.

    Raises: UserError where the libraries are not installed.
    """
    check_installed()
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names), use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(written, references, strict=True)]
    bleu = corpus_bleu(list(written), [list(references)]).score
    return {"bleu": float(bleu)} | {name: 100 * float(np.mean([s[name].fmeasure for s in scores])) for name in names}
