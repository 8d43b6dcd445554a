"""Nearest items of free text, against transformers on torch and plain sums of squares."""

import math

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import Case, make_case, save_llama
from transformers import LlamaModel

from sftrec_jax.config import DecodeConfig, MeshConfig
from sftrec_jax.decode import grounding
from sftrec_jax.decode.grounding import Grounder, nearest
from sftrec_jax.decode.recommender import Recommender
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.mesh import make_mesh

END = 2
LENGTH = 5


def item_codes(n: int, seed: int) -> ItemCodes:
    """Titles of one to four tokens and a terminator; the last two items share all tokens with the first two."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, ...]] = []
    while len(rows) < n - 2:
        row = (*rng.integers(3, 40, rng.integers(1, LENGTH)).tolist(), END)
        if row not in rows:
            rows.append(row)
    rows += rows[:2]
    codes = np.full((n, LENGTH), -1, np.int32)
    for item, row in enumerate(rows):
        codes[item, : len(row)] = row
    return ItemCodes(codes, (), np.zeros(0, np.int32), (), np.array([f"title {i}" for i in range(n)], object))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(save_llama(tmp_path_factory.mktemp("llama"), 2, True, 512), None, atomic=False, trained=False)


def grounder(case: Case, codes: ItemCodes) -> Grounder:
    return Grounder(case.decoder, codes, make_mesh(MeshConfig(), jax.devices()[:1]))


def generated(case: Case, codes: ItemCodes) -> tuple[np.ndarray, np.ndarray]:
    """What the model writes after three prompts, but best last; user 1 writes item 4, user 3 nothing."""
    prompts = [np.array([1, 7, 9], np.int32), np.array([1, 30], np.int32), np.array([1, 5, 5, 8], np.int32)]
    tokens, scores = Recommender(case.decoder, codes, DecodeConfig(beam=4, top_k=4)).generate(prompts, 4)
    tokens, scores = tokens[:, ::-1].copy(), scores[:, ::-1].copy()
    assert (np.diff(scores, axis=1) > 0).all()
    tokens[1, 3, : codes.codes.shape[1]] = codes.codes[4]
    nothing = np.full((1, 4, tokens.shape[2]), -1, np.int32), np.full((1, 4), -np.inf, np.float32)
    return np.concatenate([tokens, nothing[0]]), np.concatenate([scores, nothing[1]])


def by_torch(case: Case, sequence: np.ndarray) -> list[float]:
    model = LlamaModel.from_pretrained(case.base, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(sequence[None]).long()).last_hidden_state[0].mean(0).double().tolist()


def brute_force(query: list[float], vectors: list[list[float]], left_out: set[int]) -> list[tuple[float, int]]:
    """(distance, item), nearest first; near-equal distances are called equal, so that rounding does not order them."""
    distances = [math.sqrt(sum((a - b) ** 2 for a, b in zip(query, v, strict=True))) for v in vectors]
    return sorted((round(d, 5), i) for i, d in enumerate(distances) if i not in left_out)


def test_items_and_distances_equal_those_from_torch(llama: Case) -> None:
    codes = item_codes(40, seed=0)
    tokens, scores = generated(llama, codes)
    exclude = [np.array([3, 8, 3]), np.array([4]), np.arange(5, 40), np.array([1])]
    ground = grounder(llama, codes)
    masked, plain = ground.rank(tokens, scores, 40, exclude), ground.rank(tokens, scores, 40, None)
    vectors = [by_torch(llama, row[row >= 0]) for row in codes.codes]
    assert np.std([v[0] for v in vectors]) > 0.01
    for user in range(3):
        best = tokens[user, 3]
        query = by_torch(llama, best[best >= 0])
        for found, left_out in ((masked, set(exclude[user].tolist())), (plain, set())):
            expected = brute_force(query, vectors, left_out)
            count = len(expected)
            assert found.items[user, :count].tolist() == [i for _, i in expected]
            assert (found.items[user, count:] == -1).all() and (found.scores[user, count:] == -np.inf).all()
            np.testing.assert_allclose(-found.scores[user, :count], [d for d, _ in expected], atol=1e-4)
    assert plain.items[1, 0] == 4 and plain.scores[1, 0] == 0  # an item's own tokens: that item, at no distance
    assert (plain.items[3] == -1).all() and (masked.scores[3] == -np.inf).all()
    places = {item: place for place, item in enumerate(plain.items[0].tolist())}
    assert places[38] == places[0] + 1 and places[39] == places[1] + 1  # equal codes: the earlier item first


def test_again_gives_the_same_and_shorter_lists_are_beginnings(llama: Case) -> None:
    codes = item_codes(30, seed=1)
    tokens, scores = generated(llama, codes)
    ground = grounder(llama, codes)
    first = ground.rank(tokens, scores, 30, None)
    again = grounder(llama, codes).rank(tokens, scores, 30, None)
    np.testing.assert_array_equal(first.items, again.items)
    np.testing.assert_array_equal(first.scores, again.scores)
    short = ground.rank(tokens[:2], scores[:2], 3, None)
    np.testing.assert_array_equal(short.items, first.items[:2, :3])


@pytest.mark.parametrize("users, items", [(64, 8192), (2, 7), (1, 1)])
def test_nearest_equals_brute_force(monkeypatch: pytest.MonkeyPatch, users: int, items: int) -> None:
    monkeypatch.setattr(grounding, "USERS", users)
    monkeypatch.setattr(grounding, "ITEMS", items)
    rng = np.random.default_rng(2)
    # Whole numbers far from zero: many exact ties, and squares that float32 could not hold apart.
    vectors = (rng.integers(0, 3, (25, 3)) + 20_000).astype(np.float32)
    queries = (rng.integers(0, 3, (5, 3)) + 20_000).astype(np.float32)
    exclude = [rng.integers(0, 25, n) for n in (0, 1, 5, 24, 60)]
    ties = 0
    found = nearest(queries, vectors, 9, exclude)
    assert found.items.dtype == np.int32 and found.scores.dtype == np.float32
    for user, query in enumerate(queries.tolist()):
        left = [i for i in range(25) if i not in exclude[user].tolist()]
        squares = {i: sum((a - b) ** 2 for a, b in zip(query, vectors[i].tolist(), strict=True)) for i in left}
        expected = sorted(left, key=lambda i: (squares[i], i))[:9]
        assert found.items[user].tolist() == expected + [-1] * (9 - len(expected))
        lengths = [-math.sqrt(squares[i]) for i in expected] + [-math.inf] * (9 - len(expected))
        np.testing.assert_allclose(found.scores[user], lengths, rtol=1e-6)
        ties += len(expected) - len({squares[i] for i in expected})
    assert ties > 5


def test_more_than_the_catalogue_and_nobody(llama: Case) -> None:
    codes = item_codes(6, seed=3)
    tokens, scores = generated(llama, codes)
    ground = grounder(llama, codes)
    for k in (0, 7):
        with pytest.raises(UserError, match=rf"{k} items a user were asked for but the catalogue has 6; use a number from 1"):
            ground.rank(tokens, scores, k, None)
    assert ground.rank(tokens[:0], scores[:0], 6, None).items.shape == (0, 6)
    with pytest.raises(ValueError, match="3 queries but 1 lists"):
        nearest(np.zeros((3, 48), np.float32), ground.vectors, 2, [np.zeros(0, np.int64)])


def test_broken_weights_are_an_error(llama: Case) -> None:
    graphdef, state = nnx.split(llama.decoder)
    broken = nnx.merge(graphdef, jax.tree.map(lambda x: x * np.nan, state))
    with pytest.raises(UserError, match="not finite: its weights are broken"):
        Grounder(broken, item_codes(6, seed=3), make_mesh(MeshConfig(), jax.devices()[:1]))
