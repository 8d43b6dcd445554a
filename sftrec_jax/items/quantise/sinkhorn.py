"""Codes that are used evenly: Sinkhorn prices for the codes, and an assignment in which no code holds more than its share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_ROWS = 65_536
"""Rows of the costs that are copied at once."""


def sinkhorn_prices(costs: jax.Array, epsilon: float, iterations: int, start: jax.Array | None = None) -> jax.Array:
    """Prices under which the points spread evenly over the codes; to be called inside a jitted function.

    Entropic optimal transport with uniform marginals (Cuturi 2013, "Sinkhorn distances"), in logarithms: the rows of
    softmax(-(costs + prices) / temperature) sum over the points to n / K for every code. The temperature is `epsilon` times
    the mean of what a random code costs more than the cheapest, so that neither the unit of the costs nor a constant added to a
    row matters. LC-Rec (Zheng et al. 2024) calls it uniform semantic mapping.

    Args:
        costs: float32 [n, K].
        epsilon: the smaller, the nearer are the cheapest codes themselves to an even spread, and the more iterations it takes.
        iterations: at least 1.
        start: float32 [K], prices to go on from (of the batch before); None: 0.

    Returns: float32 [K] with mean 0; codes that too many points want cost more.
    """
    n, codes = costs.shape
    temperature = jnp.maximum(epsilon * (costs - costs.min(1, keepdims=True)).mean(), 1e-30)
    scaled = costs / temperature

    def step(_: int, prices: jax.Array) -> jax.Array:
        rows = jax.nn.logsumexp(-scaled - prices, axis=1)
        prices = jax.nn.logsumexp(-scaled - rows[:, None], axis=0) - jnp.log(n / codes)
        return prices - prices.mean()

    first = jnp.zeros(codes) if start is None else start / temperature
    return jax.lax.fori_loop(0, iterations, step, first) * temperature


def balanced_prices(costs: np.ndarray, epsilon: float = 0.05, iterations: int = 50) -> np.ndarray:
    """`sinkhorn_prices` of NumPy arrays: float32 [n, K] to float32 [K].

    ValueError for costs that are not finite (their prices would be NaN).
    """
    prices = np.asarray(_prices(costs, epsilon, iterations))
    if not np.isfinite(prices).all():
        raise ValueError("costs with NaN or infinity have no prices")
    return prices


def balanced_assign(costs: np.ndarray, prices: np.ndarray, capacity: int) -> np.ndarray:
    """The cheapest code of each item, but at most `capacity` items a code.

    From argmin(costs + prices) every over-full code gives away the items that lose least by moving. They go to their cheapest
    code with room; where more want a code than it has room for, those for which the next one costs most more go first.

    Args:
        costs: float32 [n, K].
        prices: float32 [K], such as those of `balanced_prices`; the nearer they are, the fewer items move.
        capacity: items a code, at least n / K (ceil(n / K): as evenly as possible).

    Returns: int32 [n].
    """
    n, codes = costs.shape
    if capacity * codes < n:
        raise ValueError(f"{codes} codes of {capacity} items do not hold {n}")
    assigned = np.zeros(n, np.int32)
    for begin in range(0, n, _ROWS):
        assigned[begin : begin + _ROWS] = (costs[begin : begin + _ROWS] + prices).argmin(1)
    moving = _overflow(costs, prices, assigned, capacity)
    staying = np.ones(n, bool)
    staying[moving] = False
    room = capacity - np.bincount(assigned[staying], minlength=codes)
    wish = costs[moving] + prices
    while len(moving):
        # Every round places all, or fills at least one code: at most K rounds.
        wish[:, room <= 0] = np.inf
        target = wish.argmin(1)
        regret = _regret(wish)
        order = np.lexsort((-regret, target))
        placed = order[_rank(target[order]) < room[target[order]]]
        assigned[moving[placed]] = target[placed]
        room -= np.bincount(target[placed], minlength=codes)
        moving, wish = np.delete(moving, placed), np.delete(wish, placed, axis=0)
    return assigned


@partial(jax.jit, static_argnames="iterations")
def _prices(costs: jax.Array, epsilon: float, iterations: int) -> jax.Array:
    return sinkhorn_prices(costs, epsilon, iterations)


def _overflow(costs: np.ndarray, prices: np.ndarray, assigned: np.ndarray, capacity: int) -> np.ndarray:
    """The items that leave the over-full codes: int64 indices, those whose cheapest code with room costs least more."""
    count = np.bincount(assigned, minlength=costs.shape[1])
    candidates = np.flatnonzero(count[assigned] > capacity)
    if not len(candidates):
        return candidates
    loss = np.zeros(len(candidates), np.float32)
    closed = count >= capacity
    for begin in range(0, len(candidates), _ROWS):
        some = candidates[begin : begin + _ROWS]
        total = costs[some] + prices
        own = total[np.arange(len(some)), assigned[some]]
        total[:, closed] = np.inf
        loss[begin : begin + _ROWS] = total.min(1) - own
    order = np.lexsort((loss, assigned[candidates]))
    codes = assigned[candidates[order]]
    return candidates[order[_rank(codes) < count[codes] - capacity]]


def _regret(wish: np.ndarray) -> np.ndarray:
    """Second smallest of each row less the smallest; infinite where only one code has room."""
    if wish.shape[1] == 1:
        return np.zeros(len(wish), np.float32)
    two = np.partition(wish, 1, axis=1)[:, :2]
    return two[:, 1] - two[:, 0]


def _rank(groups: np.ndarray) -> np.ndarray:
    """Place of each entry within its run of equal entries: [5, 5, 7] to [0, 1, 0]."""
    first = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))
    return np.arange(len(groups)) - np.repeat(first, np.diff(first, append=len(groups)))
