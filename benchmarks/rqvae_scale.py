"""Seconds of the RQ-VAE on generated item vectors, and what the codes are like.

    python benchmarks/rqvae_scale.py --items 100000 --dim 384 --epochs 20

Vectors lie around 1,000 centres of unequal size. The last line is JSON. `extrapolated_1m_minutes` is the time of a whole default
training on 1,000,000 items: as many passes as `semantic.epochs` and `semantic.max_steps` give there (`passes_1m`) at the
measured seconds an epoch times 1,000,000 over the items, plus the rest (loading the libraries, k-means of at most 16,384
items, compiling) as it was, plus the final encoding in proportion. The first tenth of the epochs holds the compilation, so
the seconds an epoch are those of the other nine tenths.
"""

import argparse
import dataclasses
import json
import time

import numpy as np

from sftrec_jax.config import SemanticConfig
from sftrec_jax.items.quantise.rqvae import fit_rqvae, passes


def clustered_vectors(items: int, dim: int, seed: int) -> np.ndarray:
    """float32 [items, dim], rows of length 1: centre and noise in 32 directions, so that the dimensions are correlated."""
    rng = np.random.default_rng(seed)
    share = rng.pareto(1.5, 1000) + 0.1
    centre = rng.choice(1000, items, p=share / share.sum())
    inner = rng.standard_normal((1000, 32), np.float32)[centre] + 0.7 * rng.standard_normal((items, 32), np.float32)
    vectors = inner @ rng.standard_normal((32, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def perplexity(codes: np.ndarray) -> float:
    """Codes that would be in use if all were used evenly."""
    share = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(np.exp(-(share * np.log(share)).sum()))


def main() -> None:
    default = SemanticConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the items, at least 2")
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--balanced", action="store_true")
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error("--epochs: at least 2")

    vectors = clustered_vectors(args.items, args.dim, 0)
    config = dataclasses.replace(default, epochs=args.epochs, batch=args.batch, balanced=args.balanced)
    times: list[tuple[int, float]] = []

    def progress(epoch: int, total: int, loss: float, reconstruction: float, used: tuple[int, ...]) -> None:
        times.append((epoch, time.perf_counter()))
        print(f"epoch {epoch} of {total}: loss {loss:.4f}, reconstruction {reconstruction:.4f}, codes used {used}", flush=True)

    begin = time.perf_counter()
    _, levels = fit_rqvae(vectors, config, progress)
    end = time.perf_counter()
    (first, since), (last, until) = times[0], times[-1]
    per_epoch = (until - since) / (last - first)
    fixed, encoding = since - begin - first * per_epoch, end - until
    whole = passes(1_000_000, dataclasses.replace(config, epochs=default.epochs))
    million = fixed + (encoding + whole * per_epoch) * 1e6 / args.items
    result = {
        "items": args.items,
        "dim": args.dim,
        "epochs": args.epochs,
        "batch": args.batch,
        "seconds": round(end - begin, 1),
        "seconds_per_epoch": round(per_epoch, 2),
        "passes_1m": whole,
        "extrapolated_1m_minutes": round(million / 60, 1),
        "perplexity": [round(perplexity(levels[:, i]), 1) for i in range(levels.shape[1])],
        "collision_rate": round(1 - len(np.unique(levels, axis=0)) / len(levels), 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
