"""Item vectors from a sentence-transformers model."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sftrec_jax.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Progress = Callable[[int], None]
"""Called with the number of texts just finished."""

# Pickled weights and the copies for other runtimes are left on the hub.
_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]


def sentence_vectors(texts: Sequence[str], model: str, batch: int = 64, progress: Progress | None = None) -> np.ndarray:
    """Sentence embeddings (Reimers and Gurevych 2019) as the model defines them, cut where it cuts texts.

    Args:
        texts: one an item; blank ones get zeros.
        model: folder or hub id of a sentence-transformers model with safetensors.
        batch: texts in one forward pass.

    Returns: float32 [n, E], rows of length 1 or zeros.
    Raises: UserError where sentence-transformers is not installed or the model cannot be had.
    """
    encoder = _load(model)
    # Texts of about one length go together, so that little padding is computed.
    order = sorted((row for row, text in enumerate(texts) if text.strip()), key=lambda row: (-len(texts[row]), row))
    vectors: np.ndarray | None = None
    for begin in range(0, len(order), batch):
        rows = order[begin : begin + batch]
        part = np.asarray(encoder.encode([texts[row] for row in rows], batch_size=batch, show_progress_bar=False), np.float32)
        if vectors is None:
            vectors = np.zeros((len(texts), part.shape[1]), np.float32)
        vectors[rows] = part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
        if progress is not None:
            progress(len(rows))
    if vectors is None:
        raise UserError(f"catalogue: all {len(texts)} texts are blank; set data.text_columns, or embedding.text: none")
    return vectors


def _load(model: str) -> "SentenceTransformer":
    try:
        from sentence_transformers import SentenceTransformer  # takes seconds, and loads torch
    except ImportError as error:
        raise UserError(
            f"embedding.text: sentence needs sentence-transformers ({error.name} is missing); "
            'install it with `pip install "sftrec-jax[text]"`, or set embedding.text: tfidf'
        ) from error
    path = Path(os.path.expanduser(model))
    folder = path if path.is_dir() else _snapshot(model)
    try:
        return SentenceTransformer(str(folder), local_files_only=True, model_kwargs={"use_safetensors": True})
    except Exception as error:  # transformers, tokenizers and safetensors each have exceptions of their own
        raise UserError(
            f"embedding.sentence_model: {model!r} cannot be loaded ({_one_line(error)}); "
            "name a folder or hub id of a sentence-transformers model with safetensors"
        ) from error


def _snapshot(model: str) -> str:
    import huggingface_hub

    # sentence-transformers itself would try for over a minute where there is no network.
    try:
        return huggingface_hub.snapshot_download(model, allow_patterns=_PATTERNS)
    except Exception as error:  # every transport below the client has exceptions of its own
        raise UserError(
            f"embedding.sentence_model: {model!r} is not a folder and could not be fetched from the hub ({_one_line(error)}); "
            "check the name and the network, or name a local folder"
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
