"""RQ-VAE: losses and gradients against torch, codebooks that recover, codes that are those of the saved quantiser."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sftrec_jax.config import SemanticConfig
from sftrec_jax.errors import UserError
from sftrec_jax.items.quantise import rqvae
from sftrec_jax.items.quantise.rqvae import Params, fit_rqvae, initial_params, losses, revive
from sftrec_jax.items.quantise.sinkhorn import balanced_prices

SMALL: dict[str, Any] = dict(levels=2, codes=16, latent=8, hidden=(32,), epochs=20, batch=64, learning_rate=3e-3)


def clustered(seed: int, n: int = 400, dim: int = 12, clusters: int = 30) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.pareto(1.0, clusters) + 0.05
    centres = rng.standard_normal((clusters, dim))[rng.choice(clusters, n, p=weight / weight.sum())]
    return (5 + 3 * (centres + 0.1 * rng.standard_normal((n, dim)))).astype(np.float32)


def perplexity(codes: np.ndarray) -> float:
    share = np.bincount(codes) / len(codes)
    return float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))


def small_params(seed: int, levels: int = 3, codes: int = 10, dim: int = 5) -> Params:
    rng = np.random.default_rng(seed)

    def layers(*sizes: int) -> tuple[tuple[jax.Array, jax.Array], ...]:
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        made = [(rng.standard_normal((i, o)) / np.sqrt(i), 0.1 * rng.standard_normal(o)) for i, o in pairs]
        return tuple((jnp.asarray(w, jnp.float32), jnp.asarray(b, jnp.float32)) for w, b in made)

    books = rng.standard_normal((levels, codes, dim)) * 0.6 ** np.arange(levels)[:, None, None]
    return Params(layers(7, 16, dim), layers(dim, 16, 7), jnp.asarray(books, jnp.float32))


def test_losses_and_gradients_equal_torch() -> None:
    params, commitment = small_params(0), 0.3
    batch = np.random.default_rng(1).standard_normal((20, 7)).astype(np.float32)

    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in jax.tree.leaves(params)]
    w1, b1, w2, b2, w3, b3, w4, b4, books = leaves
    x = torch.tensor(batch)
    z = torch.relu(x @ w1 + b1) @ w2 + b2
    total, chosen, loss = torch.zeros_like(z), [], torch.zeros(())
    for book in books:
        rest = z - total.detach()
        codes = torch.cdist(rest, book).argmin(1)
        vector = torch.nn.functional.embedding(codes, book)
        loss = loss + torch.nn.functional.mse_loss(vector, rest.detach())
        loss = loss + commitment * torch.nn.functional.mse_loss(z, total.detach() + vector.detach())
        total, chosen = total + vector, [*chosen, codes]
    decoded = torch.relu((z + (total - z).detach()) @ w3 + b3) @ w4 + b4
    reconstruction = torch.nn.functional.mse_loss(decoded, x)
    loss = loss + reconstruction
    loss.backward()

    def objective(p: Params) -> tuple[jax.Array, Any]:
        out = losses(p, jnp.asarray(batch), commitment)
        return out.total, out

    gradient, out = jax.jit(jax.grad(objective, has_aux=True))(params)
    np.testing.assert_array_equal(out.levels, torch.stack(chosen, 1).numpy())
    np.testing.assert_allclose(out.total, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(out.reconstruction, reconstruction.item(), rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), leaves, strict=True):
        assert theirs.grad is not None and float(theirs.grad.abs().max()) > 1e-4
        np.testing.assert_allclose(ours, theirs.grad.numpy(), atol=1e-5)


def test_balanced_losses_choose_under_prices_at_the_last_level_only() -> None:
    params = small_params(2)
    batch = jnp.asarray(np.random.default_rng(3).standard_normal((200, 7)), jnp.float32)
    plain = losses(params, batch, 0.25)
    step = jax.jit(lambda prices: losses(params, batch, 0.25, prices))
    balanced = step(jnp.zeros(10))
    for _ in range(200):
        balanced = step(balanced.prices)
    np.testing.assert_array_equal(balanced.levels[:, :2], plain.levels[:, :2])
    (w1, b1), (w2, b2) = [(np.asarray(w), np.asarray(b)) for w, b in params.encoder]
    rest = np.maximum(np.asarray(batch) @ w1 + b1, 0) @ w2 + b2
    books = np.asarray(params.books)
    rest = rest - books[0][np.asarray(plain.levels[:, 0])] - books[1][np.asarray(plain.levels[:, 1])]
    costs = np.square(rest[:, None] - books[2]).sum(-1)
    expected = (costs + balanced_prices(costs, rqvae._EPSILON, 1000)).argmin(1)
    assert np.mean(np.asarray(balanced.levels[:, 2]) == expected) > 0.95
    assert np.bincount(balanced.levels[:, 2]).max() <= 30 < np.bincount(plain.levels[:, 2]).max()


def test_codes_are_those_of_the_quantiser_and_vectors_come_back() -> None:
    vectors = clustered(0)
    reports: list[tuple[int, int, float, float, tuple[int, ...]]] = []
    config = SemanticConfig(**{**SMALL, "epochs": 60})
    quantiser, levels = fit_rqvae(vectors, config, lambda *args: reports.append(args))
    assert levels.shape == (400, 2) and levels.dtype == np.int32 and quantiser.sizes == (16, 16)
    np.testing.assert_array_equal(levels, quantiser.encode(vectors))

    # The layers of the quantiser take and give vectors as they are, not scaled.
    (w1, b1), (w2, b2) = quantiser.encoder
    (w3, b3), (w4, b4) = quantiser.decoder
    for i in range(0, 400, 40):
        rest = np.maximum(vectors[i] @ w1 + b1, 0) @ w2 + b2
        code = np.zeros(8)
        for level in range(2):
            nearest = min(range(16), key=lambda k: float(np.square(rest - code - quantiser.books[level][k]).sum()))
            assert nearest == levels[i, level]
            code = code + quantiser.books[level][nearest]
        decoded = np.maximum(code @ w3 + b3, 0) @ w4 + b4
        np.testing.assert_allclose(quantiser.reconstruct(levels[i : i + 1])[0], decoded, rtol=1e-4, atol=1e-3)
    error = np.square(vectors - quantiser.reconstruct(levels)).sum() / np.square(vectors - vectors.mean(0)).sum()
    assert error < 0.2
    # What training reports for its last epoch is this error, up to that epoch's updates at a rate near 0.
    assert [r[0] for r in reports] == list(range(6, 61, 6)) and {r[1] for r in reports} == {60}
    assert abs(reports[-1][3] - error) < 0.02 and reports[-1][2] > reports[-1][3]
    assert reports[-1][4] == tuple(len(set(column)) for column in levels.T.tolist())


def test_revive_moves_unused_codes_to_what_items_leave_over() -> None:
    params = small_params(4, levels=2)
    spare = np.random.default_rng(5).standard_normal((10, 7)).astype(np.float32)
    used = np.ones((2, 10), bool)
    used[0, 3] = used[1, [0, 9]] = False
    (w1, b1), (w2, b2) = [(np.asarray(w), np.asarray(b)) for w, b in params.encoder]
    latent = np.maximum(spare @ w1 + b1, 0) @ w2 + b2
    # The code that is moved away lies where item 0 would have taken it.
    params = params._replace(books=params.books.at[0, 3].set(latent[0]))
    books = np.asarray(revive(params, jnp.asarray(used), jnp.asarray(spare)).books)
    np.testing.assert_array_equal(books[used], np.asarray(params.books)[used])
    np.testing.assert_allclose(books[0, 3], latent[3], atol=1e-5)
    for code in (0, 9):
        old = np.delete(books[0], 3, axis=0)
        left = latent[code] - old[np.square(latent[code] - old).sum(1).argmin()]
        np.testing.assert_allclose(books[1, code], left, atol=1e-5)


def test_codes_that_start_unused_are_used_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def sabotaged(*args: Any) -> Params:
        params = initial_params(*args)
        return params._replace(books=params.books.at[:, 1:].add(1000.0))

    vectors = clustered(6, clusters=200)
    monkeypatch.setattr(rqvae, "initial_params", sabotaged)
    used: list[tuple[int, ...]] = []
    _, levels = fit_rqvae(vectors, SemanticConfig(**SMALL), lambda *args: used.append(args[4]))
    assert all(len(np.unique(levels[:, level])) >= 15 for level in range(2)), used
    monkeypatch.setattr(rqvae, "_RESTARTS", 0.0)
    _, levels = fit_rqvae(vectors, SemanticConfig(**SMALL))
    assert all(len(np.unique(levels[:, level])) == 1 for level in range(2))


def test_seed_and_vectors_decide() -> None:
    vectors, config = clustered(7), SemanticConfig(**{**SMALL, "epochs": 3})
    first, levels = fit_rqvae(vectors, config)
    again, same = fit_rqvae(vectors.copy(), config)
    np.testing.assert_array_equal(levels, same)
    for a, b in zip(jax.tree.leaves((first.books, first.encoder)), jax.tree.leaves((again.books, again.encoder)), strict=True):
        np.testing.assert_array_equal(a, b)
    other, _ = fit_rqvae(vectors, SemanticConfig(**{**SMALL, "epochs": 3, "seed": 1}))
    assert np.abs(other.books[0] - first.books[0]).max() > 0.01


def test_balanced_last_level_is_flatter_and_prices_are_kept() -> None:
    vectors = clustered(8)
    plain, levels = fit_rqvae(vectors, SemanticConfig(**SMALL))
    quantiser, balanced = fit_rqvae(vectors, SemanticConfig(**SMALL, balanced=True))
    assert plain.prices == () and not quantiser.prices[0].any() and quantiser.prices[1].any()
    assert perplexity(balanced[:, 1]) > 15 > 1.05 * perplexity(levels[:, 1])
    np.testing.assert_array_equal(balanced, quantiser.encode(vectors))
    half = quantiser.encode(vectors[::2])
    np.testing.assert_array_equal(half, balanced[::2])


def test_fewer_distinct_vectors_than_codes() -> None:
    vectors = np.repeat(clustered(9, n=5), 8, axis=0)
    quantiser, levels = fit_rqvae(vectors, SemanticConfig(**SMALL))
    assert len(np.unique(levels, axis=0)) == 5
    assert (levels.reshape(5, 8, 2) == levels[::8, None]).all()
    assert all(np.isfinite(book).all() for book in quantiser.books)


def test_no_hidden_layers_and_batches_larger_than_the_catalogue() -> None:
    vectors = clustered(10, n=40)
    quantiser, levels = fit_rqvae(vectors, SemanticConfig(**{**SMALL, "hidden": (), "batch": 1000, "epochs": 1}))
    assert len(quantiser.encoder) == len(quantiser.decoder) == 1
    np.testing.assert_array_equal(levels, quantiser.encode(vectors))


def test_fewer_items_than_codes_are_refused() -> None:
    with pytest.raises(UserError, match=r"semantic\.codes is 16 but there are only 15 items; set semantic\.codes to 15 or less"):
        fit_rqvae(clustered(0, n=15), SemanticConfig(**SMALL))


def test_divergence_is_an_error() -> None:
    with pytest.raises(UserError, match=r"semantic\.learning_rate is 1e\+30: the RQ-VAE diverged within 2 epochs"):
        fit_rqvae(clustered(0), SemanticConfig(**{**SMALL, "learning_rate": 1e30}))
