"""Even use of codes: the plan against plain Sinkhorn scaling, the assignment against the optimal one of SciPy."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from sftrec_jax.items.quantise.sinkhorn import balanced_assign, balanced_prices


def random_costs(seed: int, n: int, codes: int, dim: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    points, centres = rng.standard_normal((n, dim)), rng.standard_normal((codes, dim))
    return np.square(points[:, None] - centres).sum(-1).astype(np.float32)


def plan(costs: np.ndarray, prices: np.ndarray, epsilon: float) -> np.ndarray:
    costs = costs.astype(np.float64)
    scale = epsilon * (costs - costs.min(1, keepdims=True)).mean()
    weight = np.exp(-(costs + prices - (costs + prices).min(1, keepdims=True)) / scale)
    return weight / weight.sum(1, keepdims=True)


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_plan_is_that_of_sinkhorn_scaling(epsilon: float) -> None:
    costs = random_costs(0, 300, 7)
    kernel = np.exp(-costs.astype(np.float64) / (epsilon * (costs - costs.min(1, keepdims=True)).mean()))
    left, right = np.ones(300), np.ones(7)
    for _ in range(1000):
        left = 1 / (kernel @ right)
        right = 300 / 7 / (kernel.T @ left)
    expected = left[:, None] * kernel * right
    ours = plan(costs, balanced_prices(costs, epsilon, 500), epsilon)
    np.testing.assert_allclose(ours.sum(0), 300 / 7, rtol=1e-3)
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    assert plan(costs, np.zeros(7), epsilon).sum(0).max() > 1.3 * 300 / 7


def test_prices_follow_the_unit_of_the_costs() -> None:
    costs = random_costs(1, 200, 8)
    prices = balanced_prices(costs)
    np.testing.assert_allclose(balanced_prices(costs * 1e6), prices * 1e6, rtol=1e-3, atol=1e3)
    shifted = costs + np.arange(200, dtype=np.float32)[:, None] % 7
    np.testing.assert_allclose(balanced_prices(shifted), prices, atol=1e-3)


def test_prices_of_costs_that_do_not_differ_are_zero() -> None:
    np.testing.assert_array_equal(balanced_prices(np.full((10, 4), 3, np.float32)), 0)


def test_a_far_code_is_used_too() -> None:
    # exp(-cost / temperature) of the last code is 0 in float32: only logarithms tell its costs apart.
    costs = random_costs(2, 400, 8)
    costs[:, -1] += 1e3
    assigned = (costs + balanced_prices(costs, 0.001, 1000)).argmin(1)
    assert np.bincount(assigned, minlength=8).min() > 30


def test_costs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        balanced_prices(np.array([[0.0, np.nan]], np.float32))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "codes"), [(200, 8), (203, 8), (64, 16), (30, 1)])
def test_assignment_keeps_to_the_capacity_and_is_nearly_optimal(seed: int, n: int, codes: int) -> None:
    costs = random_costs(seed, n, codes)
    capacity = -(-n // codes)
    rows, columns = linear_sum_assignment(np.repeat(costs, capacity, axis=1))
    best = float(np.repeat(costs, capacity, axis=1)[rows, columns].sum())
    for prices, factor in ((balanced_prices(costs), 1.12), (np.zeros(codes, np.float32), 1.6)):
        assigned = balanced_assign(costs, prices, capacity)
        assert assigned.dtype == np.int32 and assigned.shape == (n,)
        assert np.bincount(assigned, minlength=codes).max() <= capacity
        assert best * 0.9999 <= costs[np.arange(n), assigned].sum() <= best * factor


def test_fewer_items_than_codes_get_a_code_each() -> None:
    costs = random_costs(4, 5, 8)
    assert len(set(balanced_assign(costs, balanced_prices(costs), 1).tolist())) == 5


def test_items_move_only_where_a_code_is_over_full() -> None:
    costs = random_costs(3, 200, 8)
    np.testing.assert_array_equal(balanced_assign(costs, np.zeros(8, np.float32), 200), costs.argmin(1))
    # Of three items at code 0 with room for two, the one that loses least by moving goes, to the cheaper of the others.
    costs = np.array([[0, 9, 8], [0, 3, 2], [0, 7, 6], [5, 0, 5]], np.float32)
    assert balanced_assign(costs, np.zeros(3, np.float32), 2).tolist() == [0, 2, 0, 1]


def test_more_items_than_the_codes_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="2 codes of 3 items do not hold 7"):
        balanced_assign(np.zeros((7, 2), np.float32), np.zeros(2, np.float32), 3)
