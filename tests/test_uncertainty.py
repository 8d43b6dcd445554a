"""Intervals and paired tests against scipy's."""

import numpy as np
import pytest
from scipy.stats import bootstrap, permutation_test, ttest_rel

from sftrec_jax.evaluate.comparison import compare
from sftrec_jax.evaluate.uncertainty import intervals, paired

RNG = np.random.default_rng(0)
HITS = (RNG.random(400) < 0.1).astype(float)
"""As of recall: 0 or 1 a user."""
GAINS = HITS / np.log2(2 + RNG.integers(0, 10, 400))
OTHER = np.where(RNG.random(400) < 0.9, HITS, RNG.random(400) < 0.3)
"""Agrees with HITS for most users, so a paired test sees more than the intervals show."""


def test_intervals_are_those_of_scipy() -> None:
    """Both have noise of the draws: 10,000 here and there leave less than a fortieth of the width."""
    found = intervals({"recall@10": HITS, "ndcg@10": GAINS}, seed=3, draws=10_000)
    for name, values in (("recall@10", HITS), ("ndcg@10", GAINS)):
        theirs = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(5))
        low, high = theirs.confidence_interval
        assert found[name] == pytest.approx((low, high), abs=(high - low) / 20)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    rounds = [(rng.random(300) < 0.2).astype(float) for _ in range(300)]
    bounds = [intervals({"hit": values}, seed, 300)["hit"] for seed, values in enumerate(rounds)]
    assert 0.90 < np.mean([low <= 0.2 <= high for low, high in bounds]) < 0.985


def test_paired_test_is_that_of_scipy() -> None:
    rng = np.random.default_rng(2)
    for shift in (0.0, 0.02, 0.05):
        first = GAINS + shift + rng.normal(0, 0.2, 400)
        found = paired({"ndcg@10": first, "only": first}, {"ndcg@10": GAINS}, draws=5000)
        assert set(found) == {"ndcg@10"}
        one = found["ndcg@10"]
        theirs = permutation_test(
            (first, GAINS), lambda a, b, axis: (a - b).mean(axis=axis), permutation_type="samples", n_resamples=5000,
            vectorized=True, rng=np.random.default_rng(7),
        )  # fmt: skip
        assert one.difference == pytest.approx(first.mean() - GAINS.mean())
        assert one.p == pytest.approx(theirs.pvalue, abs=0.04)
        assert one.p == pytest.approx(ttest_rel(first, GAINS).pvalue, abs=0.04)
        spread = (first - GAINS).std() / 20
        assert (one.low, one.high) == pytest.approx(
            (one.difference - 1.96 * spread, one.difference + 1.96 * spread), abs=spread / 4
        )


def test_equal_rankings_do_not_differ() -> None:
    assert paired({"recall@10": HITS}, {"recall@10": HITS})["recall@10"] == (0, 0, 0, 1)
    first, again = (intervals({"recall@10": HITS, "ndcg@10": GAINS}, seed=4) for _ in range(2))
    assert first == again  # and the same users are drawn whatever stands beside a metric
    assert intervals({"ndcg@10": GAINS}, seed=4)["ndcg@10"] == pytest.approx(first["ndcg@10"], rel=1e-9)


def test_a_model_below_the_counter_is_marked() -> None:
    better, worse = HITS, HITS * (np.arange(400) % 2)
    for model, counter, below in ((worse, better, True), (better, worse, False), (better, better, False)):
        rows = {"model": {"ndcg@10": model, "ndcg@20": counter}, "item_item": {"ndcg@10": counter, "ndcg@20": model}}
        assert compare(rows, 0)["below_counter"] is below


def test_no_users_are_refused() -> None:
    with pytest.raises(ValueError, match="no users"):
        intervals({"recall@10": HITS[:0]})
