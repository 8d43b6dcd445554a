"""RQ-VAE: an autoencoder whose latent vectors are quantised level by level, each level what the ones before left over.

Shapes: n items, E dimensions of an item vector, D latent dimensions, L levels of K codes, B items a step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sftrec_jax.config import SemanticConfig
from sftrec_jax.errors import UserError
from sftrec_jax.items.quantise.quantiser import Layer, Quantiser, squared_distances
from sftrec_jax.items.quantise.sinkhorn import balanced_prices, sinkhorn_prices

Progress = Callable[[int, int, float, float, tuple[int, ...]], None]
"""Called with epochs done, epochs in all, loss, reconstruction error (mean square; the inputs have variance 1), and how many
codes of each level the epoch used."""

START_ITEMS = 16_384
"""At most this many items decide where the codebooks start."""
_EPSILON = 0.01
"""Of the Sinkhorn prices: the fullest of 256 codes held 1.3 times its share under it, 2.6 times under 0.05 (Amazon Beauty)."""
_ITERATIONS = 5
"""A step; it goes on from the prices of the step before."""
_FINAL_ITERATIONS = 200
"""Once, from 0."""
_RESTARTS = 0.8
"""Unused codes are moved in this first share of the epochs; later ones would not find their place before the end."""
_WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""
_DECAY = 1e-4
"""AdamW weight decay of the layers' weights."""


class Params(NamedTuple):
    """What is trained, all float32."""

    encoder: tuple[tuple[jax.Array, jax.Array], ...]
    """Weight [in, out] and bias [out] of the layers from E to D."""
    decoder: tuple[tuple[jax.Array, jax.Array], ...]
    """The layers from D to E."""
    books: jax.Array
    """[L, K, D]."""


class Losses(NamedTuple):
    """What a batch costs, and the codes that it got."""

    total: jax.Array
    """float32: reconstruction + codebook losses + commitment * commitment losses."""
    reconstruction: jax.Array
    """float32: squared error, mean over items and dimensions."""
    levels: jax.Array
    """int32 [B, L]."""
    prices: jax.Array
    """float32 [K] of the last level; 0 where its codes are not balanced."""


class _State(NamedTuple):
    params: Params
    moments: Any
    prices: jax.Array


def fit_rqvae(vectors: np.ndarray, config: SemanticConfig, progress: Progress | None = None) -> tuple[Quantiser, np.ndarray]:
    """Trains encoder, decoder and codebooks (TIGER, Rajput et al. 2023; residual quantisation after Lee et al. 2022).

    The codebooks start at k-means centres of what the untrained encoder makes of the items, level by level. A code that no item
    had in an epoch is moved to what a random item leaves over. With `config.balanced` the last level's codes are chosen
    under Sinkhorn prices (LC-Rec, Zheng et al. 2024), which are computed once more for all items in the end and kept in
    `Quantiser.prices`.

    Args:
        vectors: float32 [n, E], finite and not all the same.
        config: the run's `semantic` section.
        progress: told about every tenth of the epochs.

    Returns: the quantiser and `quantiser.encode(vectors)`, int32 [n, L].

    UserError where there are fewer items than codes, or the training diverges.
    """
    n = len(vectors)
    if n < config.codes:
        raise UserError(f"semantic.codes is {config.codes} but there are only {n} items; set semantic.codes to {n} or less")
    mean = vectors.mean(0, dtype=np.float64).astype(np.float32)
    scale = np.float32(max(np.sqrt(np.square(vectors - mean).mean(dtype=np.float64)), 1e-30))
    inputs = jnp.asarray((vectors - mean) / scale)
    rng = np.random.default_rng(config.seed)
    params = _train(initial_params(inputs, config, rng), inputs, config, rng, progress)
    quantiser = _quantiser(params, mean, scale)
    levels = quantiser.encode(vectors)
    if config.balanced:
        last = config.levels - 1
        price = balanced_prices(quantiser.costs(vectors, levels, last), _EPSILON, _FINAL_ITERATIONS)
        zeros = np.zeros(config.codes, np.float32)
        quantiser = Quantiser(quantiser.kind, quantiser.books, quantiser.encoder, quantiser.decoder, (zeros,) * last + (price,))
        levels = quantiser.encode(vectors)
    return quantiser, levels


def passes(n: int, config: SemanticConfig) -> int:
    """Epochs over n items: `semantic.epochs`, fewer where these would take more than `semantic.max_steps` steps, at least 1."""
    steps = max(1, -(-n // config.batch))
    return max(1, min(config.epochs, config.max_steps // steps))


def initial_params(inputs: jax.Array, config: SemanticConfig, rng: np.random.Generator) -> Params:
    """Layers by Glorot and Bengio (2010), codebooks by k-means of at most `START_ITEMS` of the items [n, E]."""
    sizes = (inputs.shape[1], *config.hidden, config.latent)
    encoder, decoder = _initial_layers(sizes, rng), _initial_layers(sizes[::-1], rng)
    some = np.sort(rng.permutation(len(inputs))[:START_ITEMS])
    rest = np.asarray(_apply(encoder, inputs[some]))
    tolerance = max(1e-6 * float(rest.std()), 1e-30)
    books = []
    for _ in range(config.levels):
        centres, codes = _centres(rest, config.codes, tolerance, rng)
        books.append(centres)
        rest = rest - centres[codes]
    return Params(encoder, decoder, jnp.asarray(np.stack(books)))


def losses(params: Params, batch: jax.Array, commitment: float, prices: jax.Array | None = None) -> Losses:
    """Losses of a batch float32 [B, E]; their gradient passes straight through the choice of codes.

    The codebook loss moves a level's codes to what the levels before left over, the commitment loss moves the encoder's output
    to the sum of the codes so far. Both are means over items and latent dimensions, added up over the levels.

    `prices`: float32 [K], those of the batch before (or 0) for the last level; None: its codes are not balanced.
    """
    fixed = jax.lax.stop_gradient
    latent = rest = _apply(params.encoder, batch)
    levels, codebook, committed = [], jnp.zeros(()), jnp.zeros(())
    spent = jnp.zeros(params.books.shape[1])
    for level, book in enumerate(params.books):
        costs = fixed(_distances(rest, book))
        if prices is not None and level == len(params.books) - 1:
            spent = sinkhorn_prices(costs, _EPSILON, _ITERATIONS, prices)
            costs += spent
        levels.append(costs.argmin(1).astype(jnp.int32))
        code = book[levels[-1]]
        codebook += jnp.square(code - fixed(rest)).mean()
        committed += jnp.square(rest - fixed(code)).mean()
        rest = rest - fixed(code)
    # Its value is the sum of the codes, its gradient that of the encoder's output.
    through = latent - fixed(rest)
    reconstruction = jnp.square(_apply(params.decoder, through) - batch).mean()
    total = reconstruction + codebook + commitment * committed
    return Losses(total, reconstruction, jnp.stack(levels, 1), spent)


def revive(params: Params, used: jax.Array, spare: jax.Array) -> Params:
    """Moves every code that is not `used` (bool [L, K]) to what one of the items `spare` (float32 [K, E]) leaves over there."""
    rest = _apply(params.encoder, spare)
    books = []
    for level, book in enumerate(params.books):
        # A code that is used may be one of the chosen, one that is moved not: it would take its own item at distance 0.
        costs = jnp.where(used[level], _distances(rest, book), jnp.inf)
        books.append(jnp.where(used[level][:, None], book, rest))
        rest = rest - book[costs.argmin(1)]
    return params._replace(books=jnp.stack(books))


def _train(
    params: Params, inputs: jax.Array, config: SemanticConfig, rng: np.random.Generator, progress: Progress | None
) -> Params:
    n = len(inputs)
    batch = min(config.batch, n)
    steps = -(-n // batch)
    epochs = passes(len(inputs), config)
    optimizer = _optimizer(config, epochs * steps)
    state = _State(params, optimizer.init(cast(Any, params)), jnp.zeros(config.codes))
    epoch = _epoch(optimizer, config)
    every = max(1, epochs // 10)
    for done in range(1, epochs + 1):
        # The last batch is filled up with the first items of the order.
        order = np.resize(rng.permutation(n), (steps, batch)).astype(np.int32)
        spare = rng.permutation(n)[: config.codes].astype(np.int32)
        state, loss, reconstruction, used = epoch(state, inputs, order, spare, done <= _RESTARTS * epochs)
        if done % every == 0 or done == epochs:
            if not np.isfinite(float(loss)):
                raise UserError(
                    f"semantic.learning_rate is {config.learning_rate}: the RQ-VAE diverged within {done} epochs; lower it"
                )
            if progress is not None:
                progress(done, epochs, float(loss), float(reconstruction), tuple(int(u) for u in used))
    return state.params


def _optimizer(config: SemanticConfig, steps: int) -> optax.GradientTransformation:
    warmup = min(max(1, round(_WARMUP * steps)), steps - 1)
    rate = optax.warmup_cosine_decay_schedule(0.0 if warmup else config.learning_rate, config.learning_rate, warmup, steps)

    def decays(params: Params) -> Params:
        return jax.tree.map(lambda x: x.ndim == 2, params)

    return optax.adamw(rate, weight_decay=_DECAY, mask=cast(Any, decays))


def _epoch(optimizer: optax.GradientTransformation, config: SemanticConfig) -> Callable[..., tuple[_State, Any, Any, Any]]:
    """One pass over the items as one program.

    (state, inputs [n, E], order [steps, B], spare [K], whether unused codes are moved) to (state, loss, reconstruction, codes
    used [L]). `order` and `spare` are rows of `inputs`; the state is donated.
    """

    def objective(params: Params, batch: jax.Array, prices: jax.Array | None) -> tuple[jax.Array, Losses]:
        out = losses(params, batch, config.commitment, prices)
        return out.total, out

    def epoch(
        state: _State, inputs: jax.Array, order: jax.Array, spare: jax.Array, restart: jax.Array
    ) -> tuple[_State, jax.Array, jax.Array, jax.Array]:
        def step(
            carry: tuple[_State, jax.Array], rows: jax.Array
        ) -> tuple[tuple[_State, jax.Array], tuple[jax.Array, jax.Array]]:
            state, used = carry
            prices = state.prices if config.balanced else None
            slope, out = jax.grad(objective, has_aux=True)(state.params, inputs[rows], prices)
            updates, moments = optimizer.update(slope, state.moments, cast(Any, state.params))
            params = cast(Params, optax.apply_updates(cast(Any, state.params), updates))
            used = used.at[jnp.arange(config.levels), out.levels].set(True)
            return (_State(params, moments, out.prices), used), (out.total, out.reconstruction)

        nothing = jnp.zeros((config.levels, config.codes), bool)
        (state, used), (total, reconstruction) = jax.lax.scan(step, (state, nothing), order)
        params = revive(state.params, used | ~restart, inputs[spare])
        return state._replace(params=params), total.mean(), reconstruction.mean(), used.sum(1)

    return jax.jit(epoch, donate_argnums=0)


def _initial_layers(sizes: tuple[int, ...], rng: np.random.Generator) -> tuple[tuple[jax.Array, jax.Array], ...]:
    layers = []
    for size, out in zip(sizes[:-1], sizes[1:], strict=True):
        weight = rng.standard_normal((size, out), np.float32) * np.sqrt(2 / (size + out), dtype=np.float32)
        layers.append((jnp.asarray(weight), jnp.zeros(out)))
    return tuple(layers)


def _centres(points: np.ndarray, codes: int, tolerance: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """k-means of float32 [n, D]: centres float32 [codes, D] and the nearest one of each point, int32 [n].

    Where there are too few points that differ by `tolerance`, these and copies of the last of them.
    """
    from sklearn.cluster import KMeans  # loading it takes longer than printing the help

    _, first, weights = np.unique(np.round(points / tolerance), axis=0, return_index=True, return_counts=True)
    if len(first) <= codes:
        centres = np.pad(points[first], ((0, codes - len(first)), (0, 0)), mode="edge")
    else:
        # In float32 its distances confuse points that differ little, and it warns that there are too few.
        distinct = points[first].astype(np.float64)
        seed = int(rng.integers(2**31))
        means = KMeans(codes, n_init=1, random_state=seed)  # pyright: ignore[reportArgumentType]
        centres = means.fit(distinct, sample_weight=weights).cluster_centers_.astype(np.float32)
    return centres, squared_distances(points, centres).argmin(1)


def _distances(points: jax.Array, centres: jax.Array) -> jax.Array:
    """Squared distances [n, K] less the squared length of each point, which does not tell codes apart."""
    cross = jnp.matmul(points, centres.T, precision="highest")
    return jnp.square(centres).sum(1) - 2 * cross


def _apply(layers: tuple[tuple[jax.Array, jax.Array], ...], x: jax.Array) -> jax.Array:
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight + bias
        if i + 1 < len(layers):
            x = jax.nn.relu(x)
    return x


def _quantiser(params: Params, mean: np.ndarray, scale: np.float32) -> Quantiser:
    """The scaling of the inputs becomes part of the first layer of the encoder and of the last one of the decoder."""
    encoder: list[Layer] = [(np.array(w), np.array(b)) for w, b in params.encoder]
    decoder: list[Layer] = [(np.array(w), np.array(b)) for w, b in params.decoder]
    weight, bias = encoder[0]
    encoder[0] = (weight / scale, bias - (mean / scale) @ weight)
    weight, bias = decoder[-1]
    decoder[-1] = (weight * scale, bias * scale + mean)
    return Quantiser("residual", tuple(np.array(params.books)), tuple(encoder), tuple(decoder))
