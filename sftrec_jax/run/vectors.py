"""Item vectors of a run: the blocks that `embedding` asks for, put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from sftrec_jax.config import RunConfig, TrainConfig
from sftrec_jax.console import console
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.embed.collaborative import collaborative_vectors, ppmi_vectors
from sftrec_jax.items.embed.combine import combine, load_vectors
from sftrec_jax.items.embed.sentence import sentence_vectors
from sftrec_jax.items.embed.text import TfidfSpace
from sftrec_jax.items.encode import TitleEncoder
from sftrec_jax.model.hub import BaseSource
from sftrec_jax.model.load import load_decoder, make_build, source_architecture
from sftrec_jax.model.pool import mean_pooled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TFIDF_FILE = "text_space.npz"

Block = tuple[str, np.ndarray, float]


@dataclass(frozen=True, eq=False)
class Vectoriser:
    """What is needed to give an item its vector; `folder` is the run's `prepared/`."""

    config: RunConfig
    source: BaseSource
    tokenizer: "PreTrainedTokenizerFast"
    """Without item tokens."""
    mesh: Mesh
    folder: Path

    def fit(self, dataset: Dataset) -> tuple[np.ndarray, dict[str, Any]]:
        """Vectors float32 [n_items, E] of the run's items and counts of items without a block; leaves what `extend` needs."""
        embedding, text = self.config.embedding, dataset.text
        assert text is not None  # every prepared data set has it
        blocks: list[Block] = []
        if embedding.text == "tfidf":
            space = TfidfSpace.fit(text.texts.tolist(), embedding.dim, embedding.seed)
            space.save(self.folder / TFIDF_FILE)
        if embedding.text != "none":
            blocks.append(("text", self._text(text.texts.tolist()), embedding.text_weight))
        if embedding.collaborative != "none":
            make = ppmi_vectors if embedding.collaborative == "ppmi" else collaborative_vectors
            vectors = make(dataset, embedding.dim, embedding.window, embedding.seed)
            blocks.append(("collaborative", vectors, embedding.collaborative_weight))
        if embedding.file is not None:
            rows = dataset.report["catalogue_items_read"]
            blocks.append(("file", load_vectors(Path(embedding.file), rows)[text.rows], embedding.file_weight))
        return combine(blocks, dataset.item_ids)

    def extend(self, texts: Sequence[str], width: int, file_vectors: np.ndarray | None) -> np.ndarray:
        """Vectors float32 [m, width] of new items. They have no interactions, so their collaborative block is zero."""
        embedding = self.config.embedding
        parts: list[np.ndarray] = []
        if embedding.text != "none":
            parts.append(_unit(self._text(texts)) * embedding.text_weight)
        if embedding.collaborative != "none":
            parts.append(np.zeros((len(texts), embedding.dim), np.float32))
        if embedding.file is not None:
            if file_vectors is None:
                raise UserError(f"the run's items have vectors from {embedding.file}; give those of the new items with --vectors")
            parts.append(_unit(file_vectors) * embedding.file_weight)
        vectors = np.concatenate(parts, axis=1).astype(np.float32)
        if vectors.shape[1] != width:
            raise UserError(
                f"the new items' vectors have {vectors.shape[1]} dimensions, the run's {width}; use the same embedding"
            )
        return vectors

    def _text(self, texts: Sequence[str]) -> np.ndarray:
        embedding = self.config.embedding
        if embedding.text == "tfidf":
            return TfidfSpace.load(self.folder / TFIDF_FILE).transform(texts)
        if embedding.text == "sentence":
            return sentence_vectors(texts, embedding.sentence_model)
        if self.config.model.from_scratch:
            raise UserError("embedding.text: lm needs a trained base, but model.from_scratch is set; use tfidf or sentence")
        return self._pooled(texts)

    def _pooled(self, texts: Sequence[str]) -> np.ndarray:
        arch = source_architecture(self.source)
        # A base without item tokens or adapters: the codes only say that there are none.
        nothing = ItemCodes(np.zeros((1, 1), np.int32), (), np.zeros(0, np.int32), (), np.array([""], object))
        build = make_build(self.config.model, self.config.lora, TrainConfig(method="full"), arch, nothing)
        decoder = load_decoder(build, self.source, nothing, self.mesh, 0, False)
        tokens = [np.asarray(ids, np.int32) for ids in TitleEncoder(self.tokenizer)(texts)]
        console.print(f"item vectors: {len(texts):,} texts through {self.source.label}")
        return mean_pooled(decoder, tokens, self.mesh)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)
