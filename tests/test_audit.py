"""The exact ranking of the whole catalogue, whatever the beam, against plain scoring of every item by transformers on torch."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from test_beam import CATALOGUES, NEW, PROMPTS, item_codes, model_pair, score

from sftrec_jax.config import DecodeConfig
from sftrec_jax.decode.audit import Exact, exact_ranking, missed
from sftrec_jax.decode.recommender import Ranking, Recommender
from sftrec_jax.decode.tree import UNROLL_ALL
from sftrec_jax.errors import UserError

Rows = list[tuple[int, ...]]
EVERY: dict[str, Rows] = {name: rows for name, (rows, *_) in CATALOGUES.items()}
EVERY["shared"] = [EVERY["variable with new rows"][n % 11 if n < 17 else 2] for n in range(19)]


@cache
def made(name: str, beam: int) -> tuple[Recommender, np.ndarray]:
    """With a beam as narrow as said, and float64 [U, n] log-probabilities of all items."""
    codes = item_codes(EVERY[name], () if name in ("fixed", "long") else NEW)
    with TemporaryDirectory() as folder:
        reference, decoder = model_pair(Path(folder), codes, True)
    config = DecodeConfig(beam=beam, top_k=beam, batch_users=8)
    return Recommender(decoder, codes, config), np.stack([score(reference, prompt, EVERY[name]) for prompt in PROMPTS])


def check(ranking: Ranking, scores: np.ndarray, exclude: Sequence[np.ndarray], k: int) -> None:
    """Each list has the best scores of the items that are left, and items that have them; ties may stand in any order."""
    for user, all_scores in enumerate(scores):
        best = np.sort(np.delete(all_scores, exclude[user]))[::-1][:k]
        n = len(best)
        items = ranking.items[user, :n]
        np.testing.assert_allclose(ranking.scores[user, :n], best, atol=1e-4)
        np.testing.assert_allclose(all_scores[items], best, atol=1e-4)
        assert (items >= 0).all() and len(set(items.tolist())) == n and not np.isin(items, exclude[user]).any()
        assert (ranking.items[user, n:] == -1).all() and (ranking.scores[user, n:] == -np.inf).all()


class Runs:
    """Stands before `Recommender.search` and writes down how many prompts were searched with how many beams."""

    def __init__(self, decode: Recommender, monkeypatch: pytest.MonkeyPatch):
        self.of_beam: dict[int, int] = {}
        self.search = decode.search
        monkeypatch.setattr(decode, "search", self)

    def __call__(self, prompts: Sequence[np.ndarray], pruner: Any, k: int, beam: int, *rest: Any) -> None:
        assert beam not in self.of_beam
        self.of_beam[beam] = len(prompts)
        self.search(prompts, pruner, k, beam, *rest)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("variable with new rows", "long")]


@pytest.mark.parametrize("name", ["fixed", pytest.param("shared", marks=pytest.mark.slow), *SLOW])
def test_exact_lists_equal_scoring_every_item(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With beams far too narrow for it; who has been shown a list that is exact is not searched again."""
    rows, (decode, scores), k = EVERY[name], made(name, 1), 3
    n, every = len(rows), np.arange(len(rows), dtype=np.int32)
    assert (decode.index.length > UNROLL_ALL) == (name == "long") and decode.config.beam < k
    # Nobody's list, the best three items, two of one code, all items but two, all items.
    exclude = [every[:0], np.argsort(-scores[1])[:3].astype(np.int32), every[[0, 11]], every[2:], every]
    runs, done = Runs(decode, monkeypatch), list[int]()
    exact = exact_ranking(decode, PROMPTS, exclude, k, done.append)
    check(exact.ranking, scores, exclude, k)
    check_widths(exact, runs, done)
    monkeypatch.undo()
    assert exact.widths.min() < exact.widths.max()
    whole = exact_ranking(decode, PROMPTS, exclude, n)
    check(whole.ranking, scores, exclude, n)


def check_widths(exact: Exact, runs: Runs, done: list[int]) -> None:
    widths = list(runs.of_beam)
    assert widths == sorted(widths) and sum(done) == len(PROMPTS)
    for before, width in zip([0, *widths], widths, strict=False):
        assert runs.of_beam[width] == (exact.widths > before).sum()
    assert set(exact.widths.tolist()) <= set(widths)


@pytest.mark.parametrize(
    ("name", "beam", "k"), [("fixed", 5, 1), pytest.param("variable with new rows", 6, 2, marks=pytest.mark.slow)]
)
def test_missed_items_are_those_that_the_beam_lost(name: str, beam: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, scores = made(name, beam)
    runs, done = Runs(decode, monkeypatch), list[int]()
    exact, none = exact_ranking(decode, PROMPTS, None, k, done.append), [np.zeros(0, np.int32)] * len(PROMPTS)
    check(exact.ranking, scores, none, k)
    check_widths(exact, runs, done)
    monkeypatch.undo()
    found = decode.rank(PROMPTS, None, k)
    lost = [len(set(np.argsort(-s)[:k].tolist()) - set(items.tolist())) for s, items in zip(scores, found.items, strict=True)]
    assert missed(found, exact.ranking).tolist() == lost
    assert max(lost) > 0, "else the beam was wide enough"
    # Whom the first search served has lost nothing: it was a beam search with these beams.
    served = exact.widths == beam
    assert served.any() and not np.asarray(lost)[served].any()


def test_missed_counts_by_hand() -> None:
    """Items that tie with the last of the list may stand for each other, but for no better one."""

    def ranking(*lists: dict[int, float]) -> Ranking:
        out = Ranking.empty(len(lists), 3)
        for user, items in enumerate(lists):
            out.items[user, : len(items)], out.scores[user, : len(items)] = list(items), list(items.values())
        return out

    cases: list[tuple[dict[int, float], dict[int, float], int]] = [
        ({0: -1, 1: -2, 2: -3}, {0: -1, 1: -2, 2: -3}, 0),
        ({0: -1, 1: -2, 2: -3}, {0: -1, 2: -3, 3: -4}, 1),
        ({0: -1, 1: -2, 2: -3}, {}, 3),
        ({0: -1, 1: -2, 2: -2}, {0: -1, 3: -2, 4: -2}, 0),  # four items tie
        ({0: -1, 1: -2, 2: -2}, {1: -2, 2: -2, 3: -2}, 1),  # item 0 is lost, the tied ones do not make up for it
        ({0: -1, 1: -1.5, 2: -2}, {2: -2, 3: -2, 4: -2}, 2),
        ({0: -1, 1: -2, 2: -2}, {0: -1, 3: -2}, 1),
        ({0: -1}, {0: -1}, 0),  # short lists
        ({0: -1}, {}, 1),
        ({}, {}, 0),
    ]
    exact, found = ranking(*(case[0] for case in cases)), ranking(*(case[1] for case in cases))
    assert missed(found, exact).tolist() == [case[2] for case in cases]


def test_one_token_and_bad_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, scores = made("atomic", 1)
    n = len(EVERY["atomic"])
    runs, done = Runs(decode, monkeypatch), list[int]()
    seen = [np.arange(size, dtype=np.int32) for size in (0, 1, 4, n - 1, n)]
    exact = exact_ranking(decode, PROMPTS, seen, n, done.append)
    check(exact.ranking, scores, seen, n)
    check_widths(exact, runs, done)
    assert len(runs.of_beam) == 1, "one token is ranked exactly at once"
    assert exact_ranking(decode, [], None, 2).ranking.items.shape == (0, 2)
    for prompts, k, said in [(PROMPTS, 0, "0 items"), (PROMPTS, n + 1, "catalogue has 9"), ([PROMPTS[0][:0]], 1, "empty")]:
        with pytest.raises(UserError, match=said) as error:
            exact_ranking(decode, prompts, None, k)
        assert "\n" not in str(error.value)
