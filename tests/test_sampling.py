"""Items drawn without replacement, diverse beam groups and log-probabilities of given items, against transformers on torch."""

from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from test_beam import CATALOGUES, NEW, PROMPTS, item_codes, model_pair, score
from transformers import LlamaForCausalLM

from sftrec_jax.config import DecodeConfig
from sftrec_jax.decode.index import Layout
from sftrec_jax.decode.recommender import Recommender
from sftrec_jax.decode.tree import UNROLL_ALL
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.decoder import Decoder

Rows = list[tuple[int, ...]]
DRAWS = 2048
UNLIKELY = 1e-3
"""Probability of a chi-square as large as seen, below which draws are of another distribution. Seeds are fixed."""
TINY: dict[str, Rows] = {
    "forced": [(6, 8, 9), (6, 9, 8), (6, 10, 7), (7, 8, 8), (7, 9, 9), (7, 10, 10), (7, 11, 8)],  # no choice at the last token
    "ragged": [(6, 4), (7, 8, 4), (7, 9, 9, 4), (7, 9, 10, 4), (8, 8, 4), (8, 9, 9, 4), (9, 9, 4)],
    "long": [(6, *range(8, 23), 7, 4), (6, 9, 4), (6, 8, 10, 4), (7, 4), (8, 9, 4), (8, 10, 8, 4), (8, 10, 9, 4)],
}
EVERY = {**{f"tiny {name}": rows for name, rows in TINY.items()}, **{name: rows for name, (rows, *_) in CATALOGUES.items()}}


@cache
def made(name: str) -> tuple[ItemCodes, LlamaForCausalLM, Decoder]:
    codes = item_codes(EVERY[name], NEW if name in ("atomic", "variable with new rows") else ())
    with TemporaryDirectory() as folder:
        return codes, *model_pair(Path(folder), codes, name != "fixed")


def recommender(name: str, beam: int, users: int = 8, layout: Layout = "auto", codes: ItemCodes | None = None) -> Recommender:
    own, _, decoder = made(name)
    config = DecodeConfig(beam=beam, top_k=beam, batch_users=users, layout=layout)
    return Recommender(decoder, own if codes is None else codes, config)


def probabilities(reference: LlamaForCausalLM, prompt: np.ndarray, rows: Rows) -> np.ndarray:
    """Of each code: the product over its tokens of the model's probability among those with which a code may go on."""
    longest, at = max(map(len, rows)), len(prompt) - 1
    with torch.no_grad():
        logits = reference(torch.tensor([[*prompt.tolist(), *row, *[0] * (longest - len(row))] for row in rows])).logits.double()
    out = np.ones(len(rows))
    for i, row in enumerate(rows):
        for j, token in enumerate(row):
            follow = sorted({r[j] for r in rows if r[:j] == row[:j]})
            out[i] *= float(torch.softmax(logits[i, at + j, follow], -1)[follow.index(token)])
    return out


def surprise(counts: np.ndarray, expected: np.ndarray) -> float:
    """Probability of counts so far from those expected; rare outcomes (expected fewer than 5 times) are taken together."""
    rare = expected < 5
    seen, wanted = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    if wanted[-1] < 5:
        seen[-2:], wanted[-2:] = seen[-2:].sum() / 2, wanted[-2:].sum() / 2
    return float(chisquare(seen, wanted * (seen.sum() / wanted.sum())).pvalue)


def pairs(q: np.ndarray) -> np.ndarray:
    """Probability of each ordered pair of first draws, without replacement."""
    both = q[:, None] * q / (1 - q[:, None])
    return np.where(np.eye(len(q), dtype=bool), 0.0, both)


@pytest.mark.parametrize(
    "name", ["forced", pytest.param("ragged", marks=pytest.mark.slow), pytest.param("long", marks=pytest.mark.slow)]
)
def test_draws_have_the_distribution_of_sampling_without_replacement(name: str) -> None:
    """Also: all items are drawn in the end, with the model's log-probabilities; a narrow beam draws the same ones first."""
    name, rows = f"tiny {name}", TINY[name]
    n, (codes, reference, _) = len(rows), made(name)
    assert (codes.codes.shape[1] > UNROLL_ALL) == (name == "tiny long")
    prompt = PROMPTS[2]
    drawn = recommender(name, n, DRAWS, "compact").sample([prompt] * DRAWS, None, n, 11)
    np.testing.assert_array_equal(np.sort(drawn.items, axis=1), np.broadcast_to(np.arange(n), (DRAWS, n)))
    exact = score(reference, prompt, rows)
    np.testing.assert_allclose(drawn.scores, exact[drawn.items], atol=1e-4)

    q = probabilities(reference, prompt, rows)
    assert q.sum() == pytest.approx(1)
    model = np.exp(exact) / np.exp(exact).sum()
    assert DRAWS * ((model - q) ** 2 / q).sum() > 100, "the model's own distribution over items would be told from this one"
    first = np.bincount(drawn.items[:, 0], minlength=n)
    assert surprise(first, DRAWS * q) > UNLIKELY
    second = np.bincount(drawn.items[:, 0] * n + drawn.items[:, 1], minlength=n * n)
    assert surprise(second, DRAWS * pairs(q).reshape(-1)) > UNLIKELY
    # Three draws in order, as which items are left then, given what is: the last items depend on all noise.
    left = np.asarray([(q[rest] / q[rest].sum()) for rest in drawn.items[:, 2:]])
    place = np.argsort(drawn.items[:, 2:], axis=1)  # place in the order of drawing, of the items left
    ordered = np.take_along_axis(left, place, axis=1)
    assert surprise(np.bincount(np.argmin(place, axis=1), minlength=n - 2), ordered.sum(axis=0)) > UNLIKELY

    if name != "tiny ragged":
        return
    few = recommender(name, 2, 256).sample([prompt] * 256, None, 2, 11)
    np.testing.assert_array_equal(few.items, drawn.items[:256, :2])


@pytest.mark.slow
def test_draws_depend_on_seed_and_place_alone() -> None:
    """Not on the layout, nor on who else is decoded, nor in which batch."""
    name, n = "tiny ragged", len(TINY["ragged"])
    decode = recommender(name, n)
    drawn, again, other = (decode.sample(PROMPTS, None, n, seed) for seed in (5, 5, 6))
    twos = recommender(name, n, 2, "csr")
    for same in (again, twos.sample(PROMPTS, None, n, 5)):
        np.testing.assert_array_equal(same.items, drawn.items)
        np.testing.assert_allclose(same.scores, drawn.scores, atol=1e-5)
    np.testing.assert_array_equal(twos.sample(PROMPTS[:3], None, n, 5).items, drawn.items[:3])
    assert (other.items != drawn.items).any(axis=1).all()


def test_draws_from_what_a_request_leaves() -> None:
    """As if the catalogue had no other items; items that share a code stand together, and go only all together."""
    rows = [*TINY["ragged"], TINY["ragged"][1], TINY["ragged"][4]]
    _, reference, _ = made("tiny ragged")
    codes, n = item_codes(rows, ()), len(rows)
    excluded, allowed = np.asarray([0, 7, 3], np.int32), np.arange(n) != 6  # item 1 stays of (1, 7)
    prompt = PROMPTS[2]
    some = recommender("tiny ragged", n, DRAWS, "bitmap", codes).sample(
        [prompt] * DRAWS, [excluded] * DRAWS, n, 3, allowed=allowed
    )
    real = [1, 2, 4, 5, 8]
    np.testing.assert_array_equal(np.sort(some.items[:, : len(real)], axis=1), np.broadcast_to(real, (DRAWS, len(real))))
    assert (some.items[:, len(real) :] == -1).all() and (some.scores[:, len(real) :] == -np.inf).all()
    together = np.abs(np.argmax(some.items == 4, axis=1) - np.argmax(some.items == 8, axis=1))
    assert (together == 1).all()
    left = [rows[i] for i in real[:4]]
    q = probabilities(reference, prompt, left)
    whole = probabilities(reference, prompt, TINY["ragged"])[real[:4]]
    assert DRAWS * ((whole / whole.sum() - q) ** 2 / q).sum() > 100
    order = np.asarray([[real.index(item) for item in items if item in real[:4]] for items in some.items.tolist()])
    second = np.bincount(order[:, 0] * 4 + order[:, 1], minlength=16)
    assert surprise(second, DRAWS * pairs(q).reshape(-1)) > UNLIKELY


def diverse_by_hand(
    scores: dict[tuple[int, ...], float], rows: Rows, width: int, k: int, groups: int, penalty: float
) -> list[int]:
    """Diverse beam search over Python tuples: the items found, best first. `scores` has every prefix of a code."""
    length, share, each = max(map(len, rows)), -(-k // groups), max(width // groups, -(-k // groups))
    forced = length
    while forced > 1 and length <= UNROLL_ALL and len({r[: forced - 1] for r in rows}) == len({r[:forced] for r in rows}):
        forced -= 1
    forced = forced if all(len(r) == length for r in rows) else length
    beams: list[list[tuple[int, ...]]] = [[()] for _ in range(groups)]
    # Beyond what is unrolled all levels keep all beams, and the lists are cut afterwards.
    for level in range(length + (length > UNROLL_ALL)):
        last = level == max(length - 1, length if length > UNROLL_ALL else 0)
        taken: Counter[int] = Counter()
        gone: set[tuple[int, ...]] = set()
        for number, own in enumerate(beams):
            grown = {beam for beam in own if beam in rows}
            grown |= {
                r[: level + 1] for r in rows for beam in own if len(beam) == level and r[:level] == beam and beam not in grown
            }

            def worth(beam: tuple[int, ...], level: int = level, taken: Counter[int] = taken) -> float:
                return scores[beam] - penalty * (taken[beam[level]] if level < min(forced, len(beam)) else 0)

            best = sorted(grown - gone, key=worth, reverse=True)[: share if last else each]
            taken.update(beam[level] for beam in best if len(beam) > level)
            gone |= set(best) if last else set()
            beams[number] = best
    found = sorted((beam for own in beams for beam in own), key=lambda beam: -scores[beam])
    return [rows.index(beam) for beam in found[:k]]


def prefix_scores(reference: LlamaForCausalLM, prompt: np.ndarray, rows: Rows) -> dict[tuple[int, ...], float]:
    prefixes = sorted({row[:j] for row in rows for j in range(1, len(row) + 1)})
    return dict(zip(prefixes, score(reference, prompt, prefixes).tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "beam", "k", "groups", "layout"),
    [
        ("atomic", 9, 5, 2, "auto"),
        ("fixed", 12, 6, 3, "auto"),
        ("variable with new rows", 10, 7, 3, "csr"),  # neither the beams nor the list divide
        ("tiny forced", 12, 7, 3, "compact"),  # groups have more room than there are items
        ("tiny ragged", 4, 4, 4, "auto"),
        ("tiny long", 8, 5, 2, "csr"),
    ],
)
def test_diverse_groups_equal_search_by_hand(name: str, beam: int, k: int, groups: int, layout: Layout) -> None:
    rows, (_, reference, _) = EVERY[name], made(name)
    decode = recommender(name, beam, layout=layout)
    width = decode.config.beam if max(map(len, rows)) > 1 else -(-k // groups) * groups
    prefixes = [prefix_scores(reference, prompt, rows) for prompt in PROMPTS]
    several = []
    for penalty in (0.0, 1.5, 100.0):
        found = decode.diverse(PROMPTS, None, k, groups, penalty)
        for user, scores in enumerate(prefixes):
            expected = diverse_by_hand(scores, rows, width, k, groups, penalty)
            n = len(expected)
            assert len(set(expected)) == n
            assert found.items[user].tolist() == [*expected, *[-1] * (k - n)]
            np.testing.assert_allclose(found.scores[user, :n], [scores[rows[i]] for i in expected], atol=1e-4)
            assert (found.scores[user, n:] == -np.inf).all()
        several.append(np.mean([len({rows[i][0] for i in items if i >= 0}) for items in found.items]))
    if beam == groups and groups == len({row[0] for row in rows}):
        assert several[2] == groups > several[0], "a high penalty gives each group a first token of its own"


def test_one_group_is_the_plain_beam_and_requests_hold() -> None:
    name, k = "tiny ragged", 4
    decode = recommender(name, k)
    plain, one = decode.rank(PROMPTS, None, k), decode.diverse(PROMPTS, None, k, 1, 3.0)
    np.testing.assert_array_equal(plain.items, one.items)
    np.testing.assert_array_equal(plain.scores, one.scores)
    allowed, seen = np.ones(len(EVERY[name]), bool), [np.asarray(items[:2]) for items in plain.items]
    allowed[plain.items[0, 2]] = False
    some = decode.diverse(PROMPTS, seen, k, 2, 1.0, allowed=allowed)
    for items, gone in zip(some.items, seen, strict=True):
        items = items[items >= 0]
        assert len(items) and len(set(items.tolist())) == len(items)
        assert not np.isin(items, gone).any() and allowed[items].all()


def test_bad_arguments_are_one_line() -> None:
    decode = recommender("fixed", 4)
    for groups, penalty, k, said in [
        (0, 1.0, 4, "0 groups share 4 beams"), (5, 1.0, 4, "5 groups share 4 beams"), (2, -1.0, 4, "penalty is -1"),
        (2, float("nan"), 4, "penalty is nan"), (2, float("inf"), 4, "penalty is inf"),
        (2, 1.0, 0, "0 items a user"), (2, 1.0, 18, "catalogue has 17"),
        (2, 1.0, 5, "raise decode.beam"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said) as error:
            decode.diverse(PROMPTS, None, k, groups, penalty)
        assert "\n" not in str(error.value)
    for prompts, k, said in [(PROMPTS, 0, "0 items"), (PROMPTS, 18, "catalogue has 17"), ([PROMPTS[0][:0]], 2, "empty")]:
        with pytest.raises(UserError, match=said) as error:
            decode.sample(prompts, None, k, 0)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="empty"):
        decode.log_probabilities([PROMPTS[0][:0]], np.zeros((1, 1), np.int32))
    assert decode.sample([], None, 2, 0).items.shape == decode.diverse([], None, 2, 2, 1.0).items.shape == (0, 2)


@pytest.mark.parametrize("name", ["atomic", "fixed", "variable with new rows"])
def test_log_probabilities_of_given_items(name: str) -> None:
    """Whatever the beam; the same item may be asked for twice."""
    rows, (_, reference, _) = EVERY[name], made(name)
    rng = np.random.default_rng(0)
    items = rng.integers(-1, len(rows), (len(PROMPTS), 12)).astype(np.int32)
    items[:, 0], items[1:, 1] = np.arange(5), -1
    found = recommender(name, 1, 4).log_probabilities(PROMPTS, items)
    assert found.dtype == np.float32 and (found[items < 0] == -np.inf).all() and (items < 0).sum() > 4
    for user, prompt in enumerate(PROMPTS):
        asked = items[user] >= 0
        np.testing.assert_allclose(found[user, asked], score(reference, prompt, rows)[items[user, asked]], atol=1e-4)
