"""Item vectors from the words of a catalogue: TF-IDF and a truncated SVD (latent semantic analysis)."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sftrec_jax.errors import UserError

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

# Single words: with pairs of words as well, fewer next items of Amazon Beauty were among the 100 nearest (13.0 % against
# 13.8 % of 6,000 training pairs, 128 dimensions). Of one character too, for "Vitamin C" and a film called "M".
_WORD = r"(?u)\b\w+\b"
NOISE = 1e-6
"""A row of TF-IDF has length 1; what is left of it after the SVD is rounding below this length."""


@dataclass(frozen=True, eq=False)
class TfidfSpace:
    """Words, their weights and the directions that were kept (Deerwester et al. 1990). V words, D dimensions."""

    vocabulary: tuple[str, ...]
    """Words in the order of the columns."""
    idf: np.ndarray
    """float64 [V]."""
    components: np.ndarray
    """float32 [at most D, V], the largest first; fewer than D where there are fewer words or texts."""
    dim: int
    """D."""

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int, seed: int) -> TfidfSpace:
        """Learns words and directions from `texts`, one an item; UserError where no text has a word."""
        # scikit-learn takes a second to import, and a run without text vectors does not need it.
        from sklearn.decomposition import TruncatedSVD

        vectorizer = _vectorizer(None)
        analyse = vectorizer.build_analyzer()
        if not any(analyse(text) for text in texts):
            raise UserError(
                f"catalogue: none of the {len(texts)} texts has a word; set data.text_columns to columns with text, "
                "or embedding.text: none"
            )
        weights = vectorizer.fit_transform(texts)
        svd = TruncatedSVD(min(dim, *weights.shape), random_state=seed)
        # It also divides by the variance of the columns, which is 0 where all texts are equal.
        with np.errstate(invalid="ignore", divide="ignore"):
            svd.fit(weights)
        words = tuple(str(word) for word in vectorizer.get_feature_names_out())
        return cls(words, vectorizer.idf_, np.asarray(svd.components_, np.float32), dim)

    def transform(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts, known or new: float32 [n, D], rows of length 1; zeros where no word of a text is known."""
        vectorizer = _vectorizer({word: column for column, word in enumerate(self.vocabulary)})
        vectorizer.idf_ = self.idf
        vectors = np.asarray(vectorizer.transform(texts) @ self.components.T)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        shown = lengths > NOISE
        vectors = np.where(shown, vectors / np.where(shown, lengths, 1.0), 0.0)
        return np.pad(vectors, ((0, 0), (0, self.dim - vectors.shape[1]))).astype(np.float32)

    def save(self, path: Path) -> None:
        """Writes an `.npz` file."""
        words = np.frombuffer(json.dumps(self.vocabulary, ensure_ascii=False).encode("utf-8"), np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, words=words, idf=self.idf, components=self.components, dim=np.array(self.dim))
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> TfidfSpace:
        """Reads what `save` wrote; UserError where it is missing or damaged."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                words = tuple(json.loads(data["words"].tobytes().decode("utf-8")))
                space = cls(words, data["idf"], data["components"], int(data["dim"]))
            if space.idf.shape != (len(words),) or space.components.shape[1:] != (len(words),):
                raise ValueError("sizes differ")
        except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
            raise UserError(f"{path}: the words of the item vectors are missing or damaged; run `sftrec prepare` again") from None
        return space


def _vectorizer(vocabulary: dict[str, int] | None) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(sublinear_tf=True, token_pattern=_WORD, vocabulary=vocabulary)
