"""Quantisers against plain loops in float64; files that come back as they were, or are refused; the report against counters."""

import dataclasses
import io
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sftrec_jax.errors import UserError
from sftrec_jax.items.quantise.quantiser import CHUNK, Quantiser, squared_distances
from sftrec_jax.items.quantise.report import codebook_report

SIZES = (5, 3, 4)


def random_quantiser(kind: str, seed: int, priced: bool = False, layers: int = 0) -> Quantiser:
    """5 dimensions in and out; with layers a ReLU network of 7 hidden units to and from 6."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    inner = 6 if layers else 5
    widths = (inner,) * 3 if kind == "residual" else (2, 1, inner - 3)
    books = tuple(normal(size, width) for size, width in zip(SIZES, widths, strict=True))
    ways = ([5, *[7] * (layers - 1), 6], [6, *[7] * (layers - 1), 5]) if layers else ([], [])
    encoder, decoder = (tuple((normal(a, b), normal(b)) for a, b in itertools.pairwise(way)) for way in ways)
    prices = tuple(np.abs(normal(size)) for size in SIZES) if priced else ()
    return Quantiser(kind, books, encoder, decoder, prices)  # pyright: ignore[reportArgumentType]


def run_layers(layers, vector: list[float]) -> list[float]:
    for i, (weight, bias) in enumerate(layers):
        vector = [float(bias[o]) + sum(v * float(weight[k, o]) for k, v in enumerate(vector)) for o in range(len(bias))]
        if i + 1 < len(layers):
            vector = [max(v, 0.0) for v in vector]
    return vector


def reference(quantiser: Quantiser, vector: np.ndarray, given: list[int] | None = None) -> tuple[list[int], list[list[float]]]:
    """Codes and the costs of every level, one number at a time; the codes that costs follow are `given`, or the cheapest."""
    rest = run_layers(quantiser.encoder, [float(v) for v in vector])
    codes, costs = [], []
    for level, book in enumerate(quantiser.books):
        begin = 0 if quantiser.kind == "residual" else sum(b.shape[1] for b in quantiser.books[:level])
        part = rest[begin : begin + book.shape[1]]
        row = [sum((p - float(c)) ** 2 for p, c in zip(part, code, strict=True)) for code in book]
        if quantiser.prices:
            row = [cost + float(price) for cost, price in zip(row, quantiser.prices[level], strict=True)]
        costs.append(row)
        codes.append(row.index(min(row)) if given is None else given[level])
        if quantiser.kind == "residual":
            rest = [r - float(c) for r, c in zip(rest, book[codes[-1]], strict=True)]
    return codes, costs


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("priced", [False, True])
@pytest.mark.parametrize("kind", ["residual", "product"])
def test_encode_and_costs_equal_loops(kind: str, priced: bool, layers: int) -> None:
    quantiser = random_quantiser(kind, 1, priced, layers)
    vectors = np.random.default_rng(2).standard_normal((40, 5)).astype(np.float32)
    levels = quantiser.encode(vectors)
    assert levels.dtype == np.int32 and quantiser.sizes == SIZES and quantiser.width == 5
    other = np.random.default_rng(3).integers(0, SIZES, (40, 3)).astype(np.int32)
    for row, vector in enumerate(vectors):
        assert levels[row].tolist() == reference(quantiser, vector)[0]
        costs = reference(quantiser, vector, other[row].tolist())[1]
        for level in range(3):
            np.testing.assert_allclose(
                quantiser.costs(vectors[row : row + 1], other[row : row + 1], level)[0], costs[level], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("kind", ["residual", "product"])
def test_reconstruction_distances_and_errors_equal_loops(kind: str, layers: int) -> None:
    quantiser = random_quantiser(kind, 4, layers=layers)
    vectors = np.random.default_rng(5).standard_normal((30, 5)).astype(np.float32) + 3
    levels = np.random.default_rng(6).integers(0, SIZES, (30, 3)).astype(np.int32)
    lost = [0.0] * 3
    for row in range(30):
        for count in (1, 2, 3):
            read = [book[levels[row, i]] if i < count else None for i, book in enumerate(quantiser.books)]
            if kind == "residual":
                joined = [sum(float(r[d]) for r in read if r is not None) for d in range(quantiser.books[0].shape[1])]
            else:
                means = [[sum(map(float, column)) / len(book) for column in book.T] for book in quantiser.books]
                joined = [float(v) for r, mean in zip(read, means, strict=True) for v in (mean if r is None else r)]
            expected = run_layers(quantiser.decoder, joined)
            np.testing.assert_allclose(quantiser.reconstruct(levels, count)[row], expected, rtol=1e-4, atol=1e-4)
            lost[count - 1] += sum((float(v) - e) ** 2 for v, e in zip(vectors[row], expected, strict=True))
        inside = run_layers(quantiser.encoder, [float(v) for v in vectors[row]])
        distance = sum((a - b) ** 2 for a, b in zip(inside, joined, strict=True))
        assert quantiser.distances(vectors, levels)[row] == pytest.approx(distance, rel=1e-4)
    spread = sum((float(v) - vectors[:, d].astype(float).mean()) ** 2 for row in vectors for d, v in enumerate(row))
    np.testing.assert_allclose(quantiser.level_errors(vectors, levels), np.array(lost) / spread, rtol=1e-4)


def test_chunks_are_joined_in_order() -> None:
    quantiser = random_quantiser("residual", 7)
    vectors = np.random.default_rng(8).standard_normal((2 * CHUNK + 3, 5)).astype(np.float32)
    some = [0, CHUNK - 1, CHUNK, 2 * CHUNK, 2 * CHUNK + 2]
    levels = quantiser.encode(vectors)
    np.testing.assert_array_equal(levels[some], quantiser.encode(vectors[some]))
    np.testing.assert_allclose(quantiser.distances(vectors, levels)[some], quantiser.distances(vectors[some], levels[some]))


def test_distances_keep_their_digits_far_from_the_origin() -> None:
    rng = np.random.default_rng(9)
    points, centres = (rng.standard_normal((n, 8)).astype(np.float32) + np.float32(1000) for n in (50, 20))
    exact = np.square(points[:, None].astype(np.float64) - centres).sum(-1)
    np.testing.assert_allclose(squared_distances(points, centres), exact, rtol=1e-3)


def test_a_code_with_an_infinite_price_is_never_taken() -> None:
    quantiser = random_quantiser("residual", 10)
    prices = tuple(np.where(np.arange(size) == 1, np.inf, 0).astype(np.float32) for size in SIZES)
    levels = dataclasses.replace(quantiser, prices=prices).encode(np.repeat(quantiser.books[0][1:2], 9, 0))
    assert (levels != 1).all()


@pytest.mark.parametrize("kind", ["residual", "product"])
def test_files_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    for priced, layers in itertools.product([False, True], [0, 2]):
        quantiser = random_quantiser(kind, 11, priced, layers)
        quantiser.save(tmp_path / "quantiser.npz")
        loaded = Quantiser.load(tmp_path / "quantiser.npz")
        assert loaded.kind == kind and [p.name for p in tmp_path.iterdir()] == ["quantiser.npz"]
        for name in ("books", "prices"):
            pairs = zip(getattr(quantiser, name), getattr(loaded, name), strict=True)
            assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
        for name in ("encoder", "decoder"):
            pairs = zip(getattr(quantiser, name), getattr(loaded, name), strict=True)
            assert all(np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in pairs)
        content = (tmp_path / "quantiser.npz").read_bytes()
        loaded.save(tmp_path / "quantiser.npz")
        assert (tmp_path / "quantiser.npz").read_bytes() == content


def test_damaged_files_are_refused_or_make_no_difference(tmp_path: Path) -> None:
    path = tmp_path / "quantiser.npz"
    quantiser = random_quantiser("product", 12, True, 1)
    quantiser.save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(13)
    for cut in (0, 1, 30, *rng.integers(0, len(content), 40)):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"quantiser.npz: the item quantiser is missing or damaged; run `sftrec prepare`"):
            Quantiser.load(path)
    refused = 0
    for at in rng.integers(0, len(content), 300):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :])
        try:
            loaded = Quantiser.load(path)
        except UserError:
            refused += 1
            continue
        assert loaded.kind == "product" and loaded.sizes == SIZES  # a byte that nothing reads, such as a date
        assert all(
            np.array_equal(a, b) for a, b in zip(loaded.books + loaded.prices, quantiser.books + quantiser.prices, strict=True)
        )
    assert refused > 150
    with np.load(io.BytesIO(content)) as data:
        arrays = dict(data)
    for name in ("book_2", "price_2", "decoder_0_bias", "kind", "names"):
        np.savez(path, **{key: array for key, array in arrays.items() if key != name})
        with pytest.raises(UserError, match="missing or damaged"):
            Quantiser.load(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    for other in (tmp_path / "array.npy", tmp_path / "missing.npz", tmp_path):
        with pytest.raises(UserError, match="missing or damaged"):
            Quantiser.load(other)


@settings(deadline=None)
@given(st.data())
def test_the_report_equals_plain_counters(data) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    code = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    codes = data.draw(st.lists(code, min_size=1, max_size=25))
    cuts = data.draw(st.lists(st.integers(1, len(sizes)), min_size=len(codes), max_size=len(codes)))
    codes = [c[:cut] + (-1,) * (len(sizes) - cut) for c, cut in zip(codes, cuts, strict=True)]
    report = codebook_report(np.asarray(codes, np.int32), sizes, np.arange(len(sizes) - 1) / 4)
    groups = Counter(codes)
    assert (report.items, report.distinct, report.largest_group) == (len(codes), len(groups), max(groups.values()))
    assert report.collision_rate == pytest.approx(1 - len(groups) / len(codes))
    assert report.colliding_items == sum(groups[c] > 1 for c in codes)
    for level, size in enumerate(sizes):
        counts = Counter(c[level] for c in codes if c[level] >= 0)
        total = sum(counts.values())
        got = report.levels[level]
        assert (got.size, got.used, got.usage) == (size, len(counts), len(counts) / size)
        entropy = -sum(v / total * math.log(v / total) for v in counts.values())
        assert got.perplexity == pytest.approx(math.exp(entropy) if total else 0)
        # Gini as the mean difference of all pairs over twice the mean.
        pairs = sum(abs(counts[a] - counts[b]) for a in range(size) for b in range(size))
        assert got.gini == pytest.approx(pairs / (2 * size * total) if total else 0)
        assert got.error == (None if level == len(sizes) - 1 else level / 4)
    assert json.loads(json.dumps(report.to_dict()))["levels"][0]["size"] == sizes[0]


def test_the_report_as_a_table() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(codebook_report(np.asarray([[0, 1], [0, 1], [2, -1]], np.int32), (4, 2), np.array([0.25])).table())
    text = " ".join(console.export_text().split())
    assert "3 items, 2 distinct, collision rate 33.33%, largest group 2" in text
    assert "50.0%" in text and "0.2500" in text and "1.9" in text
    with pytest.raises(ValueError, match="code 4 in a level of 4"):
        codebook_report(np.asarray([[4]], np.int32), (4,))
    with pytest.raises(ValueError, match="2 sizes for 1 levels"):
        codebook_report(np.asarray([[3]], np.int32), (4, 4))
