"""Requests as data: allow-lists, deny-lists and other catalogues, against scoring every item; compilations are counted."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import monitoring
from test_beam import CATALOGUES, NEW, PROMPTS, item_codes, model_pair, score, search_by_hand
from test_index import LAYOUTS, catalogues
from transformers import LlamaForCausalLM

from sftrec_jax.config import DecodeConfig
from sftrec_jax.decode import pruning
from sftrec_jax.decode.batches import ladder
from sftrec_jax.decode.beam import recommend
from sftrec_jax.decode.index import Room, build_index
from sftrec_jax.decode.recommender import Ranking, Recommender
from sftrec_jax.decode.tree import UNROLL_ALL, CodeTree
from sftrec_jax.errors import UserError
from sftrec_jax.model.decoder import Decoder

Rows = list[tuple[int, ...]]
Pair = tuple[LlamaForCausalLM, Decoder]
# Some codes stand for two or three items.
SHARED: dict[str, Rows] = {
    "one token": [(i,) for i in (38, 5, 32, 38, 33, 39, 5, 34, 38, 36)],
    "fixed": [*CATALOGUES["fixed"][0], *CATALOGUES["fixed"][0][:4], CATALOGUES["fixed"][0][2]],
    "ragged": [CATALOGUES["variable with new rows"][0][n % 11 if n < 17 else 2] for n in range(19)],
    "long": [*CATALOGUES["long"][0], *CATALOGUES["long"][0][3:6], CATALOGUES["long"][0][13]],
}
U, K, W = len(PROMPTS), 4, 16
TOKENS = (5, 33, 9, 38)  # two of them have rows of their own
EVERY: Rows = [row for n in (1, 2, 3) for row in product(TOKENS, repeat=n)]
# All codes of three tokens, but one of two in the place of those that it begins.
FULL: Rows = [row for row in EVERY if len(row) == 3 and row[:2] != (38, 38)] + [(38, 38)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One model for all tests, so that programs of equal shapes are compiled once."""
    return model_pair(tmp_path_factory.mktemp("model"), item_codes(FULL, NEW), True)


@pytest.fixture(scope="module")
def known(pair: Pair) -> list[dict[tuple[int, ...], float]]:
    """Of each prompt the reference's scores of all codes of at most three of the tokens."""
    return [dict(zip(EVERY, score(pair[0], prompt, EVERY), strict=True)) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def roomy(pair: Pair) -> Iterator[dict[str, Recommender]]:
    """Of each layout a Recommender with room for other catalogues. All requests have lists of one width: one program each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "ladder", lambda count: 48)
        yield {
            layout: Recommender(pair[1], item_codes(FULL, NEW), DecodeConfig(W, K, 8, layout), capacity=len(FULL) + 3)
            for layout in LAYOUTS
        }


def rank_all(recommender: Recommender) -> Ranking:
    """A request that leaves everything in, of the shape of all others."""
    deny, allow = [np.zeros(0, np.int32)] * U, np.ones((2, recommender.tree.n_items), bool)
    return recommender.rank(PROMPTS, deny, K, allowed=(allow, np.zeros(U, np.int64)))


@pytest.fixture(params=["table", "lists"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How the nodes that a user may not reach are looked up."""
    if request.param == "lists":
        monkeypatch.setattr(pruning, "SCATTER_BYTES", 0)
    recommend.clear_cache()
    yield request.param
    recommend.clear_cache()


def requests(n: int, masks: int, seed: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Deny-lists that take nothing, one item, some (with repeats), all but one, all; masks; and the mask of each user."""
    rng = np.random.default_rng(seed)
    sizes = (0, 1, n // 2, n - 1, n)
    deny = [rng.choice(n, size, replace=False).astype(np.int32) for size in sizes]
    deny[2] = np.append(deny[2], deny[2][:1])
    allow = rng.random((masks, n)) < 0.7
    allow[:, 0], allow[0] = True, True
    return deny, allow, rng.permutation(np.arange(U) % masks)


def remaining(n: int, deny: np.ndarray, allow: np.ndarray) -> list[int]:
    return [i for i in range(n) if allow[i] and i not in deny.tolist()]


def check(ranking: Ranking, user: int, scores: np.ndarray, left: list[int]) -> None:
    """The list is that of sorting the items that are left by the reference's scores; ties may stand in any order."""
    k = ranking.items.shape[1]
    best = np.sort(scores[left])[::-1][:k]
    n = len(best)
    found = ranking.items[user, :n].tolist()
    assert len(set(found)) == n and set(found) <= set(left)
    np.testing.assert_allclose(ranking.scores[user, :n], best, atol=1e-4)
    np.testing.assert_allclose(ranking.scores[user, :n], scores[found], atol=1e-4)
    assert (ranking.items[user, n:] == -1).all() and (ranking.scores[user, n:] == -np.inf).all()


@pytest.mark.parametrize(("name", "path"), [("one token", "table"), ("long", "lists")], indirect=["path"])
def test_wide_beam_ranks_what_is_left(pair: Pair, name: str, path: str) -> None:
    """Both kinds of lists together, all items asked for: lists end where no item is left, groups are cut item by item."""
    rows = SHARED[name]
    n = len(rows)
    assert (len(rows[13 % n]) > UNROLL_ALL) == (name == "long")
    deny, allow, which = requests(n, 3, 0)
    recommender = Recommender(pair[1], item_codes(rows, NEW), DecodeConfig(n, 5, 8, "csr"))
    ranking = recommender.rank(PROMPTS, deny, n, allowed=(allow, which))
    for user, prompt in enumerate(PROMPTS):
        check(ranking, user, score(pair[0], prompt, rows), remaining(n, deny[user], allow[which[user]]))


@pytest.mark.parametrize(
    ("name", "layout", "path"),
    [("fixed", "compact", "table"), ("ragged", "dense", "lists"), ("long", "bitmap", "table")],
    indirect=["path"],
)
def test_narrow_beam_searches_as_if_the_catalogue_lacked_the_rest(pair: Pair, name: str, layout: Any, path: str) -> None:
    rows, width = SHARED[name], 3
    n = len(rows)
    recommender = Recommender(pair[1], item_codes(rows, NEW), DecodeConfig(width, width, 8, layout))
    for seed in range(3):
        deny, allow, which = requests(n, 3, seed)
        ranking = recommender.rank(PROMPTS, deny, width, allowed=(allow, which))
        for user, prompt in enumerate(PROMPTS):
            left = remaining(n, deny[user], allow[which[user]])
            codes = sorted({rows[i] for i in left})
            found = [codes[c] for c in search_by_hand(pair[0], prompt, codes, width)] if codes else []
            expected = [code for code in found for i in left if rows[i] == code][:width]
            items = [i for i in ranking.items[user].tolist() if i >= 0]
            assert [rows[i] for i in items] == expected and len(set(items)) == len(items) and set(items) <= set(left)
            assert len(items) == width or len(items) == len(left), "a short list though items remain"
            if expected:
                np.testing.assert_allclose(ranking.scores[user, : len(items)], score(pair[0], prompt, expected), atol=1e-4)
            assert (ranking.scores[user, len(items) :] == -np.inf).all()


def test_random_catalogues_and_requests(roomy: dict[str, Recommender], known: list[dict[tuple[int, ...], float]]) -> None:
    """Layouts bit for bit, and against the reference; each catalogue is put in the place of the last."""
    examples = []

    @settings(max_examples=20, deadline=None, database=None, derandomize=True)
    @given(codes=catalogues(tokens=4, longest=3), data=st.data())
    def run(codes: list[tuple[int, ...]], data: st.DataObject) -> None:
        codes = [code[: -UNROLL_ALL or None] if len(code) > UNROLL_ALL else code for code in codes]
        rows = [tuple(TOKENS[t if t < 1000 else t // 1000] for t in code) for code in codes]
        rows += rows[:1] * (K - len(rows))
        n = len(rows)
        mask = st.lists(st.booleans(), min_size=n, max_size=n).filter(any)
        allow = np.asarray(data.draw(st.lists(mask, min_size=2, max_size=2)))
        which = np.asarray(data.draw(st.lists(st.integers(0, 1), min_size=U, max_size=U)))
        lists = st.lists(st.integers(0, n - 1), max_size=n + 2).map(lambda items: np.asarray(items, np.int32))
        deny = data.draw(st.lists(lists, min_size=U, max_size=U))
        results = []
        for recommender in roomy.values():
            recommender.swap(item_codes(rows, NEW))
            results.append(recommender.rank(PROMPTS, deny, K, allowed=(allow, which)))
        for other in results[1:]:
            np.testing.assert_array_equal(results[0].items, other.items)
            np.testing.assert_array_equal(results[0].scores, other.scores)
        for user in range(U):
            scores = np.asarray([known[user][row] for row in rows])
            check(results[0], user, scores, remaining(n, deny[user], allow[which[user]]))
        examples.append((n, len(set(rows)), len(set(map(len, rows))) > 1))

    run()
    several, shared = sum(e[2] for e in examples), sum(e[0] > e[1] for e in examples)
    print(f"{len(examples)} examples in {len(LAYOUTS)} layouts, {several} with several lengths, {shared} with shared codes")
    assert len(examples) >= 15 and several and shared


def test_another_catalogue_gives_what_a_new_recommender_gives(pair: Pair, roomy: dict[str, Recommender]) -> None:
    """Items removed until the codes that are left are shorter; items added until the room is full. Beams are narrow."""
    fewer = [*(row for row in EVERY if len(row) == 2 and row[0] != 33), (33,)]
    more = [*FULL[::-1], *FULL[:3]]
    for rows in (fewer, more):
        codes = item_codes(rows, NEW)
        expected = Recommender(pair[1], codes, DecodeConfig(W, K, 8, "csr")).rank(PROMPTS, None, K)
        assert (expected.items >= 0).all()
        for recommender in roomy.values():
            recommender.swap(codes)
            ranking = rank_all(recommender)
            np.testing.assert_array_equal(ranking.items, expected.items)
            np.testing.assert_allclose(ranking.scores, expected.scores, atol=1e-5)


def test_a_catalogue_without_room_is_refused_and_the_old_one_stays(pair: Pair, roomy: dict[str, Recommender]) -> None:
    small = Recommender(pair[1], item_codes(FULL[:20], NEW), DecodeConfig(W, K), capacity=22)
    fixed = Recommender(pair[1], item_codes(FULL[:20], ()), DecodeConfig(W, K), capacity=22)
    recommender = roomy["bitmap"]
    recommender.swap(item_codes(FULL, NEW))
    before = rank_all(recommender)
    cases: list[tuple[Recommender, Rows, str]] = [
        (small, FULL[:23], "23 prefixes at level 3, there is room for 22; make a new Recommender with a larger capacity"),
        (recommender, [*FULL, (6,)], "5 prefixes at level 1, there is room for 4"),
        (recommender, [(*row, 5) for row in FULL[:4]], "others than codes of up to 3 tokens"),
        (recommender, [(5, 500), (9, 9)], "item 0: its token 500 is not in the model's vocabulary"),
        (fixed, [(5,), *FULL[20:]], "others than codes of exactly 3 tokens"),
        (fixed, [(5, 5)], "others than codes of exactly 3 tokens"),
        (Recommender(pair[1], item_codes(FULL, ()), DecodeConfig(W, K)), FULL, "no room for other catalogues"),
    ]
    for other, rows, said in cases:
        old = other.codes, other.tree, other.groups, other.index
        with pytest.raises(UserError, match=said) as caught:
            other.swap(item_codes(rows, NEW))
        assert "\n" not in str(caught.value)
        assert all(a is b for a, b in zip(old, (other.codes, other.tree, other.groups, other.index), strict=True))
    after = rank_all(recommender)
    np.testing.assert_array_equal(before.items, after.items)
    np.testing.assert_array_equal(before.scores, after.scores)


def test_arrays_of_a_room_do_not_depend_on_the_catalogue() -> None:
    """Fewer tokens, lengths or levels than at first: shapes and types stay, or programs would be compiled anew."""
    first = CodeTree.of(item_codes([*((i, j) for i in range(3) for j in range(300)), (3,)], ()).codes)
    long = CodeTree.of(item_codes([tuple(range(20)), (1, 2), (2,)], ()).codes)
    for tree, others in (
        (first, [[(i, j) for i in range(2) for j in range(250)], [(1,), (2,)], [(7, 7)]]),
        (long, [[tuple(range(18)), (1, 2)], [(1, 2), (3, 2)], [(4,)]]),
    ):
        for layout in LAYOUTS:
            room = Room.for_items(tree, 1000)
            expected = build_index(tree, layout, room)
            for rows in others:
                index = build_index(CodeTree.of(item_codes(rows, ()).codes, room.length), layout, room)
                assert jax.tree.structure(index) == jax.tree.structure(expected)
                assert jax.tree.map(lambda x: (x.shape, x.dtype), index) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


def test_writing_freely_after_another_catalogue(pair: Pair) -> None:
    """What ends a sequence is the business of the catalogue: 38 ends all codes of the first one and none of the second."""
    first, second = item_codes([(5, 38), (38,)], NEW), item_codes([(5, 33), (9,)], NEW)
    config, k = DecodeConfig(40, K), 40
    recommender = Recommender(pair[1], first, config, capacity=2)
    recommender.swap(second)
    expected = Recommender(pair[1], second, config, capacity=2).generate(PROMPTS[:1], k)
    for a, b in zip(recommender.generate(PROMPTS[:1], k), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (expected[0] >= 0).all()  # nothing ends before the second token


COMPILED: list[str] = []
"""Names of all programs that jax has compiled since the listener was registered."""
_EVENT = "/jax/core/compile/backend_compile_duration"
monitoring.register_event_duration_secs_listener(lambda event, _, **names: event == _EVENT and COMPILED.append(names["fun_name"]))


@pytest.mark.slow
def test_requests_and_catalogues_compile_nothing(
    pair: Pair, known: list[dict[tuple[int, ...], float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program for each width of prompts and each kind of request, whatever its lists hold and whatever the catalogue.

    Deny-lists that kill up to 16 nodes a user (then 32, 48, 64, 96, ...) and up to 4 masks (then 8, 16, ...) share one.
    """
    monkeypatch.setattr(pruning, "ladder", ladder)
    rng = np.random.default_rng(0)
    rows = [row for row in EVERY if len(row) == 2]
    recommender = Recommender(pair[1], item_codes(rows, NEW), DecodeConfig(7, 3, 8, "compact"), capacity=len(rows))
    graphdef, state = nnx.split(pair[1])
    trained = jax.tree.map(lambda x: x * 1, state)
    prompts = {16: [0, 2, 3, 4, 3], 32: range(U)}
    asked: dict[tuple[int, str], int] = {}

    def ask(width: int, kind: str) -> None:
        n = recommender.tree.n_items
        scores = [[known[user][tuple(code.tolist())] for code in recommender.codes.codes] for user in prompts[width]]
        deny = [rng.choice(n, rng.integers(0, 11)).astype(np.int32) for _ in range(U)]
        allow, which = rng.random((rng.integers(3, 5), n)) < 0.5, rng.integers(0, 3, U)
        allow[:, rng.integers(n)] = True
        some, without = [PROMPTS[user] for user in prompts[width]], None
        if "without" in kind:
            ranking, without = recommender.rank_both(some, deny, 3)
        else:
            lists = deny if "deny" in kind else None
            ranking = recommender.rank(some, lists, 3, allowed=(allow, which) if "allow" in kind else None)
        for user in range(U):
            gone = deny[user] if "deny" in kind else deny[user][:0]
            left = remaining(n, gone, allow[which[user]] if "allow" in kind else np.ones(n, bool))
            check(ranking, user, np.asarray(scores[user]), left)
            if without is not None:
                check(without, user, np.asarray(scores[user]), list(range(n)))

    recommend.clear_cache()
    for kind in [(16, "all"), (16, "deny"), (16, "allow"), (16, "deny and allow"), (16, "deny, with and without"), (32, "deny")]:
        before = len(COMPILED)
        ask(*kind)
        asked[kind] = COMPILED[before:].count("jit(recommend)")
        before = len(COMPILED)
        for turn in range(12):
            some = [rows[i] for i in rng.permutation(16)[: [16, 9, 2, 5, 12][turn % 5]]]
            recommender.swap(item_codes([*some, *some[:1] * (1 + turn % 2)], NEW))  # fewer codes than are asked for, too
            recommender.update(nnx.merge(graphdef, trained))
            ask(*kind)
        assert COMPILED[before:] == []
    print("programs of 13 requests and 12 changes of catalogue each:", asked)
    assert set(asked.values()) == {1}


def test_more_draws_than_beams(pair: Pair, roomy: dict[str, Recommender]) -> None:
    """Room for other catalogues or not: as many draws are made as are asked for, up to every item."""
    n = len(FULL)
    assert n > W
    recommender = roomy["csr"]
    recommender.swap(item_codes(FULL, NEW))
    for one in (recommender, Recommender(pair[1], item_codes(FULL, NEW), DecodeConfig(W, K, 8, "csr"))):
        for user in one.sample(PROMPTS, None, n, 3).items:
            assert sorted(user.tolist()) == list(range(n))


def test_bad_requests(pair: Pair, roomy: dict[str, Recommender]) -> None:
    recommender = roomy["dense"]
    recommender.swap(item_codes(FULL, NEW))
    n, nothing = len(FULL), [np.zeros(0, np.int32)] * U
    none, one = np.zeros(n, bool), np.arange(n) == 3
    masks = np.stack([one, none])
    cases: list[tuple[Any, Any, int, Any, str]] = [
        (PROMPTS, None, K, none, "allow-list 0 holds no item of the catalogue; name at least one"),
        (PROMPTS, nothing, K, (masks, np.zeros(U, int)), "allow-list 1 holds no item"),
        (PROMPTS, nothing, 0, None, f"0 items a user were asked for but the catalogue has {n}; use a number from 1 to {n}"),
        (PROMPTS, nothing, n + 1, one, f"{n + 1} items a user were asked for but the catalogue has {n}"),
        (PROMPTS, nothing, W + 1, one, f"but decode.beam is {W}; raise decode.beam"),
        ([*PROMPTS[:4], np.zeros(62, np.int32)], nothing, K, one, "prompt 4 has 62 tokens and the answer 3, but .* is 64"),
        (
            [*PROMPTS[:3], np.asarray([3, 999]), PROMPTS[4]],
            nothing,
            K,
            one,
            "prompt 3 has the token 999, which the model does not",
        ),
        ([np.asarray([-5]), *PROMPTS[1:]], nothing, K, one, "prompt 0 has the token -5"),
    ]
    for prompts, deny, k, allowed, said in cases:
        with pytest.raises(UserError, match=said) as caught:
            recommender.rank(prompts, deny, k, allowed=allowed)
        assert "\n" not in str(caught.value)
    wrong: list[tuple[Any, Any]] = [
        (nothing[1:], None), (None, one[1:]), (None, one.astype(int)), (None, (masks, np.zeros(U - 1, int))),
        (None, (masks[:1], np.ones(U, int))), ([np.asarray([n])] * U, None), ([np.asarray([-1])] * U, one),
    ]  # fmt: skip
    for deny, allowed in wrong:
        with pytest.raises(ValueError):
            recommender.rank(PROMPTS, deny, K, allowed=allowed)
    for items in ([[n]] * U, [[-2]] * U, [[0]] * (U - 1), [0] * U):
        with pytest.raises(ValueError):
            recommender.log_probabilities(PROMPTS, np.asarray(items, np.int32))
    with pytest.raises(UserError, match=f"capacity of {n - 1} items is less than the {n} of the catalogue; raise it"):
        Recommender(pair[1], item_codes(FULL, NEW), DecodeConfig(W, K), capacity=n - 1)
    graphdef, state = nnx.split(pair[1])
    recommender.update(nnx.merge(graphdef, jax.tree.map(lambda x: x * jnp.nan, state)))
    with pytest.raises(UserError, match="scores are NaN: its weights are broken; use an earlier checkpoint"):
        rank_all(recommender)
    recommender.update(pair[1])
    one_mask = recommender.rank(PROMPTS, nothing, K, allowed=(np.stack([one, ~one]), np.zeros(U, int)))
    assert one_mask.items.tolist() == [[3] + [-1] * (K - 1)] * U  # though nobody asks for the other
