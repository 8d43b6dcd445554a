"""Every item tokeniser on Amazon Beauty: codebook usage, perplexity and collisions, next to LETTER's published codes.

    python benchmarks/item_tokenizers.py --quick

Vectors: TF-IDF and SVD of title, brand and categories, beside PPMI and SVD of the training interactions. All rates are those of
the quantiser, before collisions are resolved. `--quick` trains RQ-VAE for a tenth of the epochs. The last line is one JSON
object: for each tokeniser `collision_rate` (1 - distinct codes / items), `perplexity` (mean over the levels), `seconds`, and per
level `perplexity_levels`, `usage_levels`, `error_levels`; the same for LETTER's codes under `letter`.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence

import numpy as np
from command import run_main
from transformers import AutoTokenizer

from sftrec_jax.config import DataConfig, SemanticConfig
from sftrec_jax.data.known import check_present, data_root
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.items.embed.clusters import cluster_paths
from sftrec_jax.items.embed.collaborative import cooccurrence, ppmi_vectors
from sftrec_jax.items.embed.combine import combine
from sftrec_jax.items.embed.text import TfidfSpace
from sftrec_jax.items.index_file import read_index
from sftrec_jax.items.naming import title_codes
from sftrec_jax.items.quantise.kmeans import fit_residual_kmeans
from sftrec_jax.items.quantise.product import fit_product
from sftrec_jax.items.quantise.report import CodebookReport, codebook_report
from sftrec_jax.items.quantise.rqvae import fit_rqvae
from sftrec_jax.items.titles import distinct_titles
from sftrec_jax.model.hub import ASSETS
from sftrec_jax.run.naming import keyphrases

LEVELS, CODES = 3, 256


def summary(report: CodebookReport, seconds: float) -> dict[str, object]:
    """One tokeniser's entry of the JSON line; levels apart where they are few (titles have up to 65)."""
    entry: dict[str, object] = {
        "collision_rate": round(report.collision_rate, 5),
        "perplexity": round(float(np.mean([level.perplexity for level in report.levels])), 1),
        "seconds": round(seconds, 1),
    }
    if len(report.levels) > 8:
        return entry
    return entry | {
        "perplexity_levels": [round(level.perplexity, 1) for level in report.levels],
        "usage_levels": [round(level.usage, 3) for level in report.levels],
        "gini_levels": [round(level.gini, 3) for level in report.levels],
        "error_levels": [None if level.error is None else round(level.error, 4) for level in report.levels],
    }


def padded(paths: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [n, L], -1 after the end of a path."""
    levels = np.full((len(paths), max(map(len, paths))), -1, np.int32)
    for i, path in enumerate(paths):
        levels[i, : len(path)] = path
    return levels


def numbers(tokens: np.ndarray) -> np.ndarray:
    """Token ids as numbers counted within each place, -1 kept."""
    out = np.full(tokens.shape, -1, np.int32)
    for place in range(tokens.shape[1]):
        present = tokens[:, place] >= 0
        out[present, place] = np.unique(tokens[present, place], return_inverse=True)[1]
    return out


def counted(levels: np.ndarray) -> CodebookReport:
    """Each level has as many codes as its largest number says."""
    return codebook_report(levels, [int(m) + 1 for m in levels.max(0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="RQ-VAE for a tenth of its epochs: 3 minutes in all")
    quick = parser.parse_args().quick
    folder = data_root() / "amazon-beauty"
    names = ("sequences.txt.gz", "items.jsonl.gz", "semantic_ids_letter.json.gz")
    for name in names:
        check_present(folder / name)
    dataset = prepare_dataset(
        DataConfig(
            source=str(folder / names[0]), catalogue=str(folder / names[1]), time_column=None,
            text_columns=("title", "brand", "categories"), keyphrase_column="keyphrase",
        )
    )  # fmt: skip
    assert dataset.text is not None
    begin = time.monotonic()
    text = TfidfSpace.fit(dataset.text.texts.tolist(), 128, 0).transform(dataset.text.texts.tolist())
    vectors, _ = combine([("text", text, 1.0), ("collaborative", ppmi_vectors(dataset, 128, 5, 0), 1.0)], dataset.item_ids)
    print(f"vectors {vectors.shape}: {time.monotonic() - begin:.1f} s", flush=True)
    result: dict[str, object] = {}

    def measure(name: str, make: Callable[[], CodebookReport]) -> None:
        begin = time.monotonic()
        report = make()
        entry = result[name] = summary(report, time.monotonic() - begin)
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in entry.items()), flush=True)

    def quantised(fit: Callable[[], tuple[object, np.ndarray]]) -> Callable[[], CodebookReport]:
        def make() -> CodebookReport:
            quantiser, levels = fit()
            return codebook_report(levels, quantiser.sizes, quantiser.level_errors(vectors, levels))  # pyright: ignore

        return make

    semantic = SemanticConfig(levels=LEVELS, codes=CODES)
    if quick:
        semantic = dataclasses.replace(semantic, epochs=max(1, semantic.epochs // 10))
    measure("rqvae", quantised(lambda: fit_rqvae(vectors, semantic)))
    balanced = dataclasses.replace(semantic, balanced=True)
    measure("rqvae_balanced", quantised(lambda: fit_rqvae(vectors, balanced)))
    measure("rqkmeans", quantised(lambda: fit_residual_kmeans(vectors, LEVELS, CODES, False, 0)))
    measure("rqkmeans_balanced", quantised(lambda: fit_residual_kmeans(vectors, LEVELS, CODES, True, 0)))
    measure("pq", quantised(lambda: fit_product(vectors, LEVELS, CODES, False, 0)))
    measure("opq", quantised(lambda: fit_product(vectors, LEVELS, CODES, True, 0)))
    measure("cid", lambda: counted(padded(cluster_paths(cooccurrence(dataset, 20), dataset.item_ids, 16, 64, 0))))
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "smollm2-135m")
    titles = distinct_titles(dataset.titles, dataset.item_ids)
    measure("title", lambda: counted(numbers(title_codes(titles, tokenizer, 64, dataset.item_ids).codes)))
    phrases = keyphrases(dataset, titles)
    measure("keyphrase", lambda: counted(numbers(title_codes(titles, tokenizer, 64, dataset.item_ids, phrases).codes)))
    measure("atomic", lambda: counted(np.arange(len(titles), dtype=np.int32)[:, None]))

    def letter() -> CodebookReport:
        paths = read_index(folder / names[2], dataset.item_ids, "row")
        codes = np.asarray([[int(token.strip("<>").split("_")[1]) for token in path] for path in paths], np.int32)
        return codebook_report(codes, [256] * codes.shape[1])

    measure("letter", letter)
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
