"""Time and memory of one constrained step of the search: every layout of the catalogue index, STATIC, and no constraint.

    python benchmarks/constraint_step.py --quick --plot step.png

A step gets the logits of every beam (there is no model), finds the candidates, adds scores, keeps the W = M best of each user,
and gives their parents, codes and next nodes. Catalogues are random and distinct, 4 codes of 256 or 8 of 2048. The beams of a
level stand on random nodes, 2 users with 70 beams and 8 with 50. The first level, one node a user, is no part of it.

Measured in turns, within each repetition:
- our layouts: `auto` (the default), `compact` (the best per level), `csr`, and where they fit into 1.2 GB (quick: 0.2 GB)
  `bitmap` and `dense`. Where no node has a choice, `compact` has a tail; the search runs such levels in one chunk, here each is
  a step nevertheless;
- `static`: our own writing of STATIC's algorithms 1 and 2 (arXiv 2602.22647), see `static_trie.py`;
- `static_released`: the same arrays, but beyond the second level the best are chosen among the pairs, as in its released code;
- `unconstrained`: the best of all codes of all beams, none masked; `call`: a jitted function that does next to nothing.

Scores, parents, codes and next nodes of all but the last two are compared and must be equal. Times are milliseconds of a call
from Python, least and median. The index is built from rows in random order (`build_seconds`, sorting included), STATIC's from
sorted ones. Bytes are those of all arrays on the device; item ids (4 bytes an item, for all alike) are left out.

The last line is one JSON object. `overhead_ratio_vs_static`: our step in `compact` over STATIC's as published, both as least
times, geometric mean over all rows; `worst_row` has the largest ratio. `bytes_ratio_vs_static`: bytes in `compact` over STATIC's,
largest of all random catalogues. `..._static_released`: against the released form. `auto_...`: the same of the default layout,
which is the dense table while that fits into 64 MB: plain, neither the smallest nor the fastest. A row also has
`over_unconstrained_ms`: steps minus an unconstrained one, often below zero.
"""

import argparse
import gc
import gzip
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from command import run_main
from jax import lax
from static_trie import Chosen, StaticTrie, build

from sftrec_jax.data.known import data_root
from sftrec_jax.decode.beam import Beams, candidates, follow
from sftrec_jax.decode.choose import Best
from sftrec_jax.decode.index import CatalogueIndex, Layout, build_index
from sftrec_jax.decode.normaliser import LogZ
from sftrec_jax.decode.tree import CodeTree
from sftrec_jax.errors import UserError

Step = Callable[..., Chosen]

SHAPES = ((4, 256), (8, 2048))
"""Levels and codes a level."""
BATCHES = ((2, 70), (8, 50))
"""Users and beams."""
ITEMS = (12_000, 100_000, 1_000_000, 10_000_000)
QUICK = ((4, 256, 12_000), (4, 256, 100_000), (4, 256, 1_000_000), (8, 2048, 12_000), (8, 2048, 100_000))
LIMIT, QUICK_LIMIT = 1_200_000_000, 200_000_000
"""Bytes that a layout may take to be measured."""
SETS = 4
"""Random beams and logits that take turns."""
LAYOUTS: tuple[Layout, ...] = ("auto", "compact", "csr", "bitmap", "dense")
STATIC = ("static", "static_released")
LETTER = "amazon-beauty/semantic_ids_letter.json.gz"


def catalogue(n: int, levels: int, codes: int, seed: int) -> np.ndarray:
    """Distinct random codes in lexicographic order: the smallest unsigned type [n, levels].

    Rows are drawn as integers. Where all levels do not fit into 64 bits, the first ones differ already.
    """
    rng = np.random.default_rng(seed)
    bits = codes.bit_length() - 1
    first = min(levels, 64 // bits)
    keys = np.unique(rng.integers(0, 1 << bits * first, n + n // 50 + 100, np.uint64))
    keys = np.delete(keys, rng.choice(len(keys), len(keys) - n, replace=False))
    rows = np.empty((n, levels), np.min_scalar_type(codes - 1))
    for level in range(levels):
        inside = keys >> np.uint64(bits * max(first - 1 - level, 0)) & np.uint64(codes - 1)
        rows[:, level] = inside if level < first else rng.integers(0, codes, n)
    return rows


def ours(
    index: CatalogueIndex, level: int, logits: jax.Array, log_z: Any, score: jax.Array, state: jax.Array, width: int
) -> Chosen:
    """One step as the search makes it (without the model): candidates, plain beam search, next states."""
    beams = Beams(score, state, state, None)
    found = candidates(index, level, beams, logits, LogZ(*log_z), None, level, False)
    places, _ = Best().choose(found, None, width)
    beams, parent = follow(index, level, beams, found, places)
    return Chosen(beams.score, parent, beams.token, beams.state)


def unconstrained(logits: jax.Array, log_z: Any, score: jax.Array, width: int) -> tuple[jax.Array, ...]:
    """Score, parent and code of the best of all codes."""
    b, _, codes = logits.shape
    best, place = lax.top_k((score[..., None] + ((logits - log_z[0]) - log_z[1])).reshape(b, -1), width)
    return best, place // codes, place % codes


def static_state(tree: CodeTree, tokens: int, depth: int, node: np.ndarray) -> np.ndarray:
    """STATIC's number of nodes of our tree, int32."""
    if depth == 1:
        return tree.tokens[0][node] + np.int32(1)
    return (tokens + 1 + sum(tree.nodes[2:depth]) + node).astype(np.int32)


def steps(
    tree: CodeTree, tokens: int, indexes: dict[str, CatalogueIndex], static: StaticTrie, level: int, batch: tuple[int, int]
) -> list[dict[str, Callable[[], Any]]]:
    """Calls without arguments for every way to take a step, of each set of random beams."""
    rng = np.random.default_rng(level)
    width = batch[1]
    run: dict[str, Callable[..., Any]] = {
        "ours": jax.jit(ours, static_argnums=(1, 6)),
        "static": jax.jit(StaticTrie.published, static_argnums=(1, 6)),
        "static_released": jax.jit(StaticTrie.compact, static_argnums=(1, 6)),
        "unconstrained": jax.jit(unconstrained, static_argnums=3),
        "call": jax.jit(lambda logits, log_z, score, state: (score + 1, state + 1, state + 2)),
    }
    sets = []
    for _ in range(SETS):
        logits = rng.standard_normal((*batch, tokens), np.float32)
        node = rng.integers(0, tree.nodes[level], batch)
        top = logits.max(-1, keepdims=True)
        log_z = (jnp.asarray(top), jnp.log(jnp.exp(logits - top).sum(-1, keepdims=True)))
        score = jnp.asarray(-rng.exponential(4.0, batch).astype(np.float32))
        columns, every = jnp.asarray(logits[..., tree.tokens[level]]), jnp.asarray(logits)
        theirs = jnp.asarray(static_state(tree, tokens, level, node))
        calls: dict[str, Callable[[], Any]] = {}
        for name, index in indexes.items():
            state = jnp.asarray((index.starts[level] + node).astype(np.int32))
            calls[name] = partial(run["ours"], index, level, columns, log_z, score, state, width)
        for name in STATIC:
            calls[name] = partial(run[name], static, level, every, log_z, score, theirs, width)
        calls["unconstrained"] = partial(run["unconstrained"], every, log_z, score, width)
        calls["call"] = partial(run["call"], every, log_z, score, theirs)
        sets.append(calls)
    return sets


def check(tree: CodeTree, tokens: int, level: int, calls: dict[str, Callable[[], Any]], starts: int) -> None:
    """All constrained steps choose the same, to the bit."""
    results = {name: jax.tree.map(np.asarray, call()) for name, call in calls.items() if name not in ("unconstrained", "call")}
    expected = results["csr"]
    assert np.isfinite(expected.score).all()
    theirs = static_state(tree, tokens, level + 1, expected.state - starts)
    for name, result in results.items():
        for field in ("score", "parent", "token"):
            assert (getattr(result, field) == getattr(expected, field)).all(), f"level {level}: {field} of {name} differs"
        if name not in STATIC:
            assert (result.state == expected.state).all(), f"level {level}: next node of {name} differs"
        elif level + 1 < tree.length:
            assert (result.state == theirs).all(), f"level {level}: next state of {name} differs"


def timed(sets: list[dict[str, Callable[[], Any]]], seconds: float) -> dict[str, list[float]]:
    """Least and median milliseconds of each, in turns, in another order each time: a step leaves caches behind for the next."""
    names, rng = list(sets[0]), np.random.default_rng(0)
    for calls in sets:
        jax.block_until_ready([call() for call in calls.values()])
    times: dict[str, list[float]] = {name: [] for name in names}
    begin, repetition = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or repetition < 24:
        calls = sets[repetition % SETS]
        for name in rng.permutation(names):
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            times[name].append(time.perf_counter() - start)
        repetition += 1
    return {name: [round(1e3 * min(t), 4), round(1e3 * float(np.median(t)), 4)] for name, t in times.items()}


def layout_bytes(tree: CodeTree, layout: str) -> int:
    """What the large arrays of a layout take."""
    codes = [len(t) for t in tree.tokens]
    a_row = {"dense": lambda c: 4 * c, "bitmap": lambda c: -(-c // 32) * 4 + 4}.get(layout)
    return 0 if a_row is None else sum(tree.nodes[level] * a_row(codes[level]) for level in range(1, tree.length))


def clock(make: Callable[[], Any]) -> tuple[Any, float]:
    """What `make` returns, and its seconds until all of it is on the device."""
    begin = time.perf_counter()
    result = make()
    jax.block_until_ready(jax.tree.leaves(result))
    return result, time.perf_counter() - begin


def sizes(tree: CodeTree, indexes: dict[str, CatalogueIndex], static: StaticTrie, items: int) -> dict[str, Any]:
    """Bytes an item of what was built, and the ratios."""
    held = {name: index.nbytes for name, index in indexes.items()} | {"static": static.nbytes}
    return {
        "kinds": list(indexes["auto"].kinds),
        "compact_kinds": list(indexes["compact"].kinds),
        "branch": list(tree.fanout),
        "bytes_an_item": {name: round(b / items, 2) for name, b in held.items()},
        "bytes_ratio": round(held["compact"] / held["static"], 4),
        "auto_bytes_ratio": round(held["auto"] / held["static"], 4),
    }


def measure(levels: int, codes: int, n: int, seconds: float, limit: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One catalogue: its entry of `catalogues`, and its rows."""
    rows = catalogue(n, levels, codes, 0)
    shuffled = rows[np.random.default_rng(1).permutation(n)]
    (tree, auto), build_seconds = clock(lambda: (tree := CodeTree.of(shuffled), build_index(tree, "auto")))
    del shuffled
    static, static_seconds = clock(lambda: build(rows, codes))
    del rows
    fit: list[Layout] = [layout for layout in LAYOUTS[1:] if layout_bytes(tree, layout) <= limit]
    indexes: dict[str, CatalogueIndex] = {"auto": auto}
    for layout in fit:
        indexes[layout] = build_index(tree, layout)
    shape = f"{levels}x{codes}"
    entry = {"shape": shape, "items": n} | sizes(tree, indexes, static, n)
    entry |= {"build_seconds": round(build_seconds, 3), "static_build_seconds": round(static_seconds, 3)}
    print("\n" + ", ".join(f"{k} {v}" for k, v in entry.items()), flush=True)
    out = []
    for batch in BATCHES:
        for level in range(1, levels):
            sets = steps(tree, codes, indexes, static, level, batch)
            for calls in sets:
                check(tree, codes, level, calls, auto.starts[level + 1])
            ms = timed(sets, seconds)
            best = {name: t[0] for name, t in ms.items()}
            row = {
                "shape": shape, "items": n, "batch": f"{batch[0]}x{batch[1]}", "level": level, "branch": tree.fanout[level],
                "kind": indexes["compact"].kinds[level], "ratio": round(best["compact"] / best["static"], 4),
                "auto_ratio": round(best["auto"] / best["static"], 4),
                "ratio_static_released": round(best["compact"] / best["static_released"], 4),
                "auto_ratio_static_released": round(best["auto"] / best["static_released"], 4),
                "over_unconstrained_ms": {k: round(best[k] - best["unconstrained"], 4) for k in ("auto", "compact", *STATIC)},
                "ms": ms,
            }  # fmt: skip
            out.append(row)
            line = " ".join(f"{name} {least:.3f}/{median:.3f}" for name, (least, median) in ms.items())
            print(
                f"  {row['batch']} level {level} K {row['branch']} {row['kind']}: {row['ratio']:.2f} of STATIC; {line}",
                flush=True,
            )
    return entry, out


def published_codes() -> Iterator[tuple[str, np.ndarray]]:
    """Real catalogues at hand: int [n, L] codes counted within each level."""
    path = data_root() / LETTER
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            codes = [[int(t.strip("<>").split("_")[1]) for t in tokens] for tokens in json.load(file).values()]
        yield "LETTER, Amazon Beauty", np.asarray(codes, np.int32)


def real() -> Iterator[dict[str, Any]]:
    """Bytes an item of real catalogues."""
    for name, codes in published_codes():
        tree = CodeTree.of(codes)
        static = build(codes[tree.order], 1 << int(codes.max()).bit_length())
        indexes: dict[str, CatalogueIndex] = {
            layout: build_index(tree, layout) for layout in LAYOUTS if layout_bytes(tree, layout) <= LIMIT
        }
        entry = {"name": name, "items": len(codes)} | sizes(tree, indexes, static, len(codes))
        print("\n" + ", ".join(f"{k} {v}" for k, v in entry.items()), flush=True)
        yield entry


def mean(rows: list[dict[str, Any]], key: str) -> float:
    """Geometric."""
    return round(math.exp(sum(math.log(row[key]) for row in rows) / len(rows)), 4)


def plot(path: Path, catalogues: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Least times of all levels and bytes an item, against items."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ("auto", "compact", *STATIC, "unconstrained")
    figure, axes = pyplot.subplots(2, len(SHAPES), figsize=(12, 8), squeeze=False)
    for column, (levels, codes) in enumerate(SHAPES):
        shape = f"{levels}x{codes}"
        mine = [entry for entry in catalogues if entry["shape"] == shape]
        above, below = axes[0, column], axes[1, column]
        for name in names:
            points = [
                (entry["items"], sum(r["ms"][name][0] for r in rows if (r["shape"], r["items"]) == (shape, entry["items"])))
                for entry in mine
            ]
            if points:
                above.plot(*zip(*points, strict=True), marker="o", label=name)
        for name in (*LAYOUTS, "static"):
            points = [(e["items"], e["bytes_an_item"][name]) for e in mine if name in e["bytes_an_item"]]
            if points:
                below.plot(*zip(*points, strict=True), marker="o", label=name)
        above.set(title=f"{shape}: steps of all levels but the first, both batches", xscale="log", yscale="log", ylabel="ms")
        below.set(title=f"{shape}: memory", xscale="log", yscale="log", xlabel="items", ylabel="bytes an item")
        above.legend()
        below.legend()
    figure.tight_layout()
    figure.savefig(path)
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 100,000 items, and 1,000,000 of 4x256: under 3 minutes")
    parser.add_argument("--items", type=int, nargs="+", help=f"sizes of catalogues (default: {' '.join(map(str, ITEMS))})")
    parser.add_argument("--shapes", nargs="+", metavar="LxC", help="levels x codes, a power of two (default: 4x256 8x2048)")
    parser.add_argument("--seconds", type=float, help="of repetitions a row, at least 24 (default: 2, quick 0.3)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw times and bytes, PNG or SVG; needs matplotlib")
    options = parser.parse_args()
    shapes = [tuple(map(int, s.split("x"))) for s in options.shapes] if options.shapes else SHAPES
    cases = [(*shape, n) for shape in shapes for n in options.items or ITEMS]
    if options.quick:
        cases = [case for case in QUICK if case[:2] in shapes and (not options.items or case[2] in options.items)]
    seconds = options.seconds or (0.3 if options.quick else 2.0)
    device = jax.devices()[0]
    load = round(os.getloadavg()[0], 1)
    print(f"{device.device_kind}, {os.cpu_count()} cores, load {load}, jax {jax.__version__}", flush=True)
    catalogues, rows = [], []
    for levels, codes, n in cases:
        entry, measured = measure(levels, codes, n, seconds, QUICK_LIMIT if options.quick else LIMIT)
        catalogues.append(entry)
        rows += measured
        jax.clear_caches()
        gc.collect()
    found = list(real())
    if options.plot:
        plot(options.plot, catalogues, rows)
    worst = max(rows, key=lambda row: row["ratio"])
    result = {
        "overhead_ratio_vs_static": mean(rows, "ratio"),
        "worst_row": {k: v for k, v in worst.items() if k != "over_unconstrained_ms"},
        "bytes_ratio_vs_static": max(entry["bytes_ratio"] for entry in catalogues),
        "overhead_ratio_vs_static_released": mean(rows, "ratio_static_released"),
        "auto_overhead_ratio_vs_static": mean(rows, "auto_ratio"),
        "auto_overhead_ratio_vs_static_released": mean(rows, "auto_ratio_static_released"),
        "auto_bytes_ratio_vs_static": max(entry["auto_bytes_ratio"] for entry in catalogues),
        "catalogues": catalogues + found,
        "rows": rows,
        "device": f"{device.platform}: {device.device_kind}, {os.cpu_count()} cores",
        "load_before": load,
        "jax": jax.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
