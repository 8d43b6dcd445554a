"""Residual k-means and product quantisation: fixed points of k-means, even codes, rotations, few distinct vectors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from sftrec_jax.errors import UserError
from sftrec_jax.items.quantise import kmeans
from sftrec_jax.items.quantise.kmeans import fit_residual_kmeans
from sftrec_jax.items.quantise.product import fit_product


def clustered(n: int, width: int, seed: int, groups: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, width)) * rng.gamma(2, size=width)
    return (centres[rng.integers(0, groups, n)] + 0.4 * rng.standard_normal((n, width))).astype(np.float32)


def lost(points: np.ndarray, book: np.ndarray, codes: np.ndarray) -> float:
    return float(np.square(points.astype(np.float64) - book[codes]).sum())


def test_every_level_is_k_means_of_what_is_left() -> None:
    vectors = clustered(400, 6, 0)
    seen: list[tuple[int, int]] = []
    quantiser, levels = fit_residual_kmeans(vectors, 3, 16, False, 0, lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(levels, quantiser.encode(vectors))
    assert seen == [(1, 3), (2, 3), (3, 3)] and quantiser.kind == "residual" and quantiser.prices == ()
    rest = vectors.astype(np.float64)
    for level, book in enumerate(quantiser.books):
        nearest = np.square(rest[:, None] - book).sum(-1).argmin(1)
        assert (levels[:, level] == nearest).mean() > 0.995  # the rest are ties within float32
        means = np.stack([rest[nearest == code].mean(0) for code in range(16)])
        assert np.abs(means - book).max() < 0.05 * np.abs(book).max()
        best = KMeans(16, n_init=2, random_state=1).fit(rest).inertia_
        assert lost(rest, book, nearest) < 1.25 * best
        rest -= book[levels[:, level]]


def test_balanced_codes_hold_no_more_than_their_share() -> None:
    vectors = clustered(500, 6, 1, groups=5)
    quantiser, levels = fit_residual_kmeans(vectors, 3, 16, True, 0)
    plain, plain_levels = fit_residual_kmeans(vectors, 3, 16, False, 0)
    assert levels.dtype == np.int32 and len(quantiser.prices) == 3
    for level in range(3):
        assert np.bincount(levels[:, level], minlength=16).max() <= 32  # ceil(500 / 16)
    assert np.bincount(plain_levels[:, 0]).max() > 32
    # What the prices do for items to come: nearly even codes without a limit.
    priced = quantiser.encode(vectors)
    assert np.bincount(priced[:, 0], minlength=16).max() < np.bincount(plain_levels[:, 0]).max()
    assert (priced == levels).mean() > 0.8
    # It costs something, and is still far better than even codes at random.
    error = quantiser.level_errors(vectors, levels)
    assert error[0] < 0.5 and (np.diff(error) < 0).all()
    assert error[2] >= plain.level_errors(vectors, plain_levels)[2]


def test_more_items_than_k_means_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "POINTS_PER_CODE", 25)
    monkeypatch.setattr(kmeans, "SEED_POINTS", 50)
    vectors = clustered(1000, 5, 2)
    for balanced in (False, True):
        quantiser, levels = fit_residual_kmeans(vectors, 2, 8, balanced, 0)
        assert levels.shape == (1000, 2) and quantiser.level_errors(vectors, levels)[1] < 0.5
        if balanced:
            assert max(np.bincount(levels[:, level]).max() for level in range(2)) <= 125
        else:
            np.testing.assert_array_equal(levels, quantiser.encode(vectors))


def test_product_quantises_each_slice_alone() -> None:
    vectors = clustered(300, 7, 3)
    quantiser, levels = fit_product(vectors, 3, 12, False, 0)
    assert [book.shape for book in quantiser.books] == [(12, 3), (12, 2), (12, 2)] and quantiser.encoder == ()
    np.testing.assert_array_equal(levels, quantiser.encode(vectors))
    for level, part in enumerate((slice(0, 3), slice(3, 5), slice(5, 7))):
        points = vectors[:, part].astype(np.float64)
        nearest = np.square(points[:, None] - quantiser.books[level]).sum(-1).argmin(1)
        assert (levels[:, level] == nearest).mean() > 0.995
        assert lost(points, quantiser.books[level], nearest) < 1.25 * KMeans(12, n_init=2, random_state=1).fit(points).inertia_


@pytest.mark.parametrize(("width", "levels"), [(8, 2), (9, 4)])
def test_a_rotation_lowers_the_error_of_correlated_vectors(width: int, levels: int) -> None:
    rng = np.random.default_rng(4)
    # Few strong directions, spread over all dimensions: slices share what one of them could say.
    mixing = np.linalg.qr(rng.standard_normal((width, width)))[0] * np.geomspace(8, 0.1, width)[:, None]
    vectors = (rng.standard_normal((800, width)) @ mixing + 5).astype(np.float32)
    plain, plain_levels = fit_product(vectors, levels, 16, False, 0)
    turned, turned_levels = fit_product(vectors, levels, 16, True, 0)
    ((rotation, shift),), ((back, mean),) = turned.encoder, turned.decoder
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(width), atol=1e-5)
    np.testing.assert_array_equal(back, rotation.T)
    np.testing.assert_allclose(shift, -mean @ rotation, atol=1e-5)
    np.testing.assert_allclose(mean, vectors.mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_array_equal(turned_levels, turned.encode(vectors))
    before, after = (q.level_errors(vectors, c)[-1] for q, c in ((plain, plain_levels), (turned, turned_levels)))
    assert after < 0.9 * before
    # The error counted in the rotated space is that of the vectors: nothing is lost on the way.
    assert turned.distances(vectors, turned_levels).sum() == pytest.approx(
        lost(vectors, turned.reconstruct(turned_levels), np.arange(800)), rel=1e-3
    )


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_few_distinct_vectors_leave_codes_unused(data) -> None:
    distinct = data.draw(st.integers(1, 12))
    codes = data.draw(st.integers(max(2, distinct), 20))
    offset = data.draw(st.sampled_from([0.0, 100.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    kinds = (rng.standard_normal((distinct, 4)) + offset).astype(np.float32)
    which = np.concatenate([np.arange(distinct), rng.integers(0, distinct, 30)])
    vectors = kinds[which]
    fits = [fit_residual_kmeans(vectors, 3, codes, False, 0), fit_product(vectors, 2, codes, False, 0)]
    for quantiser, levels in fits:
        np.testing.assert_array_equal(quantiser.reconstruct(levels), vectors)
        assert all(np.isfinite(book).all() for book in quantiser.books)
        for level in range(levels.shape[1]):
            assert len(np.unique(levels[:, level])) <= distinct
        # Equal vectors have equal codes, others have others.
        assert len({(a, *map(int, b)) for a, b in zip(which, levels, strict=True)}) == distinct
        assert len(np.unique(levels, axis=0)) == distinct


@pytest.mark.parametrize("distinct", [1, 3, 10])
def test_balanced_codes_of_few_distinct_vectors(distinct: int) -> None:
    rng = np.random.default_rng(distinct)
    vectors = rng.standard_normal((distinct, 4)).astype(np.float32)[np.arange(33) % distinct]
    quantiser, levels = fit_residual_kmeans(vectors, 2, 10, True, 0)
    for level in range(2):
        assert np.bincount(levels[:, level]).max() <= 4
        assert np.isfinite(quantiser.books[level]).all()
    assert all(np.isfinite(prices).all() for prices in quantiser.prices)


def test_levels_that_leave_only_rounding_raise_no_warning() -> None:
    # 20 vectors, 15 codes: the second level sees a few true residuals and many that are rounding of a mean.
    rng = np.random.default_rng(5)
    for trial in range(10):
        vectors = np.repeat((rng.standard_normal((20, 6)) + 3).astype(np.float32), 7, axis=0)
        quantiser, levels = fit_residual_kmeans(vectors, 3, 15, False, trial)
        assert quantiser.level_errors(vectors, levels)[-1] < 1e-9
        fit_product(vectors, 3, 15, True, trial)


def test_the_same_seed_gives_the_same_codes() -> None:
    vectors = clustered(400, 6, 6)
    for fit in (
        lambda seed: fit_residual_kmeans(vectors, 2, 16, False, seed),
        lambda seed: fit_residual_kmeans(vectors, 2, 16, True, seed),
        lambda seed: fit_product(vectors, 2, 16, True, seed),
    ):
        (first, levels), (second, again), (_, other) = fit(0), fit(0), fit(1)
        np.testing.assert_array_equal(levels, again)
        assert all(np.array_equal(a, b) for a, b in zip(first.books, second.books, strict=True))
        assert (levels != other).any()


def test_impossible_sizes() -> None:
    vectors = clustered(10, 3, 7)
    for fit in (lambda: fit_residual_kmeans(vectors, 2, 11, False, 0), lambda: fit_product(vectors, 2, 11, True, 0)):
        with pytest.raises(UserError, match="semantic.codes is 11 but there are 10 items; set semantic.codes to 10 or less"):
            fit()
    with pytest.raises(UserError, match="semantic.levels is 4 but item vectors have 3 dimensions; set semantic.levels to 3"):
        fit_product(vectors, 4, 4, False, 0)
    quantiser, levels = fit_residual_kmeans(vectors, 2, 10, False, 0)  # one code an item
    np.testing.assert_array_equal(quantiser.reconstruct(levels), vectors)
