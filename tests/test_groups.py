"""Items that share codes: lists and metrics against plain scoring of every item, and against chance."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_beam import CATALOGUES, NEW, PROMPTS, item_codes, model_pair, score

from sftrec_jax.config import DecodeConfig
from sftrec_jax.decode.groups import CodeGroups
from sftrec_jax.decode.recommender import Ranking, Recommender
from sftrec_jax.decode.tree import CodeTree
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.metrics import ranking_metrics
from sftrec_jax.items.codes import ItemCodes

Rows = list[tuple[int, ...]]
# Codes of several lengths, of which some stand for two or three items, spread over the catalogue.
SHARED: Rows = [CATALOGUES["variable with new rows"][0][n % 11 if n < 17 else 2] for n in range(19)]
EVERY_SEEN = [[], [0], [0, 11], [2, 13, 17, 18, 2], list(range(18)), list(range(19))]


def groups_of(rows: Rows) -> CodeGroups:
    return groups_in(item_codes(rows, ()))


def groups_in(codes: ItemCodes) -> CodeGroups:
    return CodeGroups.of(CodeTree.of(codes.codes), codes.titles)


def as_arrays(lists: list[list[int]]) -> list[np.ndarray]:
    return [np.asarray(items, np.int32) for items in lists]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5).map(lambda token: (token,)), min_size=1, max_size=12), st.data())
def test_groups_against_dictionaries(rows: Rows, data: st.DataObject) -> None:
    groups = groups_of(rows)
    members: dict[tuple[int, ...], list[int]] = {}
    for item, row in enumerate(rows):
        members.setdefault(row, []).append(item)
    members = dict(sorted(members.items()))
    assert groups.group.tolist() == [list(members).index(row) for row in rows]
    found = [groups.members[a:b].tolist() for a, b in itertools.pairwise(groups.offsets)]
    assert [sorted(f) for f in found] == list(members.values())
    assert groups.shared == sum(len(m) for m in members.values() if len(m) > 1)
    seen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
    blocked = [g for g, m in enumerate(members.values()) if set(m) <= set(seen)]
    assert groups.excluded(np.asarray(seen)).tolist() == blocked


def test_the_order_inside_a_group_says_nothing() -> None:
    """One group of many: the order is no order of the catalogue, and is that of the same items in another catalogue."""
    n = 400
    codes = item_codes([(3,)] * n, ())
    order = groups_in(codes).members
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.2
    assert (np.diff(order) > 0).mean() == pytest.approx(0.5, abs=0.1)
    turned = item_codes([(3,)] * n, ())
    turned.titles[:] = codes.titles[::-1]
    assert turned.titles[groups_in(turned).members].tolist() == codes.titles[order].tolist()


def check(ranking: Ranking, user: int, scores: np.ndarray, seen: list[int], rows: Rows, k: int) -> None:
    """The list is that of sorting all items that were not seen; those with one code stand in any order."""
    left = [i for i in range(len(rows)) if i not in seen]
    expected = sorted(left, key=lambda i: -scores[i])[:k]
    n = len(expected)
    found = ranking.items[user, :n].tolist()
    assert [rows[i] for i in found] == [rows[i] for i in expected] and len(set(found)) == n and not set(found) & set(seen)
    np.testing.assert_allclose(ranking.scores[user, :n], scores[found], atol=1e-4)
    assert (ranking.items[user, n:] == -1).all() and (ranking.scores[user, n:] == -np.inf).all()


@pytest.mark.parametrize(
    ("rows", "k"), [(SHARED, 7), ([(38,), (5,), (38,), (33,), (5,), (39,), (38,)], 7)], ids=["several tokens", "one token"]
)
def test_lists_equal_scoring_every_item(tmp_path: Path, rows: Rows, k: int) -> None:
    """Cut inside groups; and all items of a catalogue of fewer codes."""
    codes = item_codes(rows, NEW)
    reference, decoder = model_pair(tmp_path, codes, False)
    prompts = [*PROMPTS, PROMPTS[0]]
    seen = [sorted({i % len(rows) for i in items}) for items in EVERY_SEEN]
    recommender = Recommender(decoder, codes, DecodeConfig(beam=30, top_k=5, batch_users=4), None)
    assert recommender.tree.n_leaves == len(set(rows))
    masked, unmasked = recommender.rank_both(prompts, as_arrays(seen), k)
    for user, prompt in enumerate(prompts):
        scores = score(reference, prompt, rows)
        check(unmasked, user, scores, [], rows, k)
        check(masked, user, scores, seen[user], rows, k)
    with pytest.raises(UserError, match=f"catalogue has {len(rows)}; use a number"):
        recommender.rank(prompts, None, len(rows) + 1)


def test_beams_hold_codes_and_not_items(tmp_path: Path) -> None:
    """As many items as are asked for, though there are fewer beams: three codes, seven items."""
    rows: Rows = [(5, 6), (7, 8), (5, 6), (5, 9), (5, 6), (7, 8), (5, 9)]
    codes = item_codes(rows, ())
    reference, decoder = model_pair(tmp_path, codes, True)
    recommender = Recommender(decoder, codes, DecodeConfig(beam=3, top_k=3), None)
    ranking = recommender.rank(PROMPTS, as_arrays([[0, 2, 4]] * 5), 7)
    for user, prompt in enumerate(PROMPTS):
        check(ranking, user, score(reference, prompt, rows), [0, 2, 4], rows, 7)
    assert recommender.invalid_rate(PROMPTS, 3) == Recommender(
        decoder, item_codes([(5, 6), (7, 8), (5, 9)], ()), DecodeConfig(beam=3, top_k=3), None
    ).invalid_rate(PROMPTS, 3)


def expected_metrics(scores: np.ndarray, seen: list[int], target: int, rows: Rows, ks: tuple[int, ...]) -> np.ndarray:
    """Mean recall, NDCG and MRR at each k over all orders of the target's group in the full list of items not seen."""
    left = [i for i in range(len(rows)) if i not in seen]
    ordered = sorted(left, key=lambda i: (-scores[i], i))
    tied = [i for i in ordered if rows[i] == rows[target]]
    out = []
    for order in itertools.permutations(tied):
        places = iter(order)
        whole = [next(places) if rows[i] == rows[target] else i for i in ordered]
        rank = whole.index(target) + 1 if target in whole else np.inf
        out.append([(rank <= k) * gain for k in ks for gain in (1.0, 1 / np.log2(rank + 1), 1 / rank)])
    return np.mean(out, axis=0) if out else np.zeros(3 * len(ks))


def test_metrics_of_lists_are_means_over_all_orders_of_a_group(tmp_path: Path) -> None:
    """Every target for every user: cut-offs inside groups, members that were seen, targets that were seen themselves."""
    codes = item_codes(SHARED, NEW)
    reference, decoder = model_pair(tmp_path, codes, False)
    users = list(zip([*PROMPTS, *PROMPTS[::-1]], [*EVERY_SEEN[:5], *EVERY_SEEN[:5]], strict=True))
    prompts, seen = [u[0] for u in users], as_arrays([u[1] for u in users])
    recommender = Recommender(decoder, codes, DecodeConfig(beam=11, top_k=5, batch_users=8), None)
    masked, unmasked = recommender.rank_both(prompts, seen, 6)
    ks = (1, 2, 3, 6)
    scores = [score(reference, prompt, SHARED) for prompt in prompts]
    for target in range(len(SHARED)):
        targets = np.full(len(users), target, np.int32)
        for ranking, left_out in ((masked, seen), (unmasked, None)):
            found = ranking_metrics(ranking.items, targets, ks, recommender.groups.ties(ranking.items, targets, left_out))
            of_user = [
                expected_metrics(scores[u], [] if left_out is None else left_out[u].tolist(), target, SHARED, ks)
                for u in range(len(users))
            ]
            got = [found[f"{name}@{k}"] for k in ks for name in ("recall", "ndcg", "mrr")]
            np.testing.assert_allclose(got, np.mean(of_user, axis=0), atol=1e-9)


@pytest.mark.parametrize("length", [1, 2])
def test_a_tokeniser_that_tells_nothing_apart_scores_like_chance(tmp_path: Path, length: int) -> None:
    """One code for n items: recall at K is K / n, never 1; with s items seen it is K / (n - s)."""
    n = 25
    codes = item_codes([(6, 7)[:length]] * n, ())
    decoder = model_pair(tmp_path, codes, True)[1]
    recommender = Recommender(decoder, codes, DecodeConfig(beam=20, top_k=20), None)
    prompts, targets = [PROMPTS[0]] * n, np.arange(n, dtype=np.int32)
    seen = as_arrays([[(i + 1) % n, (i + 2) % n] for i in range(n)])
    masked, unmasked = recommender.rank_both(prompts, seen, 20)
    for ranking, left_out, possible in ((unmasked, None, n), (masked, seen, n - 2)):
        found = ranking_metrics(ranking.items, targets, ties=recommender.groups.ties(ranking.items, targets, left_out))
        for k in (1, 5, 10, 20):
            places = np.arange(1, k + 1)
            assert found[f"recall@{k}"] == pytest.approx(k / possible)
            assert found[f"ndcg@{k}"] == pytest.approx((1 / np.log2(places + 1)).sum() / possible)
            assert found[f"mrr@{k}"] == pytest.approx((1 / places).sum() / possible)
    # What the lists themselves hit is chance, too: the order inside the group knows no target.
    plain = ranking_metrics(unmasked.items, targets)
    assert plain["recall@10"] == pytest.approx(10 / n)


def test_distinct_codes_are_left_alone() -> None:
    groups = groups_of([(9, 1), (3, 4), (7, 8), (3, 2)])
    assert groups.shared == 0 and groups.group.tolist() == groups.members.tolist() == [3, 1, 2, 0]
    assert groups.offsets.tolist() == [0, 1, 2, 3, 4]
