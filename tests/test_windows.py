"""Sliding windows and soft caps on every path of attention, against the rule in words, pair by pair, in float64."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from family_models import save_family
from helpers import make_case
from random_trees import Marks, errors, random_arrays, random_rows, with_gradients

from sftrec_jax.config import DecodeConfig
from sftrec_jax.decode.prefix import extend, prefill, shared_prefix
from sftrec_jax.decode.recommender import Recommender
from sftrec_jax.model.attention import attend, attend_beams, attend_causal, attend_to, first_seen, packed_mask
from sftrec_jax.model.blockwise import block_attention
from sftrec_jax.model.packed_attention import packed_attention
from sftrec_jax.model.tree_attention import tree_attention

TOKENS = 96
CASES = [(2, None), (7, None), (24, None), (1000, None), (None, 1.5), (7, 1.5)]
PATHS: dict[str, Callable[..., jax.Array]] = {
    "whole": lambda q, k, v, marks, since, cap: attend(q, k, v, packed_mask(*marks, since), cap),
    "blocks": lambda q, k, v, marks, since, cap: block_attention(q, k, v, _with(marks, since), 16, cap),
    "tpu": lambda q, k, v, marks, since, cap: tree_attention(q, k, v, *marks, since, softcap=cap, block=16, interpret=True),
    "gpu": lambda q, k, v, marks, since, cap: tree_attention(q, k, v, *marks, since, softcap=cap, block=16, interpret="gpu"),
}


def _with(marks: Marks, since: jax.Array | None) -> Marks:
    return marks if since is None else (*marks, since)


def seen_in_words(marks: Marks, window: int | None) -> np.ndarray:
    """[B, T, T]: same segment; a trunk token before the fork, or one of the own branch that is not later; and by its position
    less than a window before the query.
    """
    positions, segments, branches, forks = (np.asarray(x) for x in marks)
    out = np.zeros((*positions.shape, positions.shape[1]), bool)
    for b, q, k in np.ndindex(*out.shape):
        if segments[b, q] != segments[b, k]:
            continue
        on_trunk = branches[b, k] == 0 and positions[b, k] < forks[b, q]
        on_branch = branches[b, k] == branches[b, q] and positions[b, k] <= positions[b, q]
        near = window is None or positions[b, q] - positions[b, k] < window
        out[b, q, k] = (on_trunk or on_branch) and near
    return out


def by_pairs(query: Any, key: Any, value: Any, seen: Any, cap: float | None) -> jax.Array:
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    scores = jnp.einsum("bqnh,bknh->bnqk", query, key) / np.sqrt(query.shape[-1])
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    weights = jnp.where(seen[:, None], jnp.exp(scores), 0)
    return jnp.einsum("bnqk,bknh->bqnh", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("window", "cap"), CASES)
def test_values_and_gradients_follow_the_rule(path: str, window: int | None, cap: float | None) -> None:
    marks, arrays = random_rows(5, TOKENS), random_arrays(5, 2, TOKENS, 4, 2, 16)
    since = None if window is None else first_seen(marks[0], jnp.int32(window))
    seen = seen_in_words(marks, window)
    if window == 7:  # positions of a branch stand further apart in the row than in the window
        rows = np.arange(TOKENS)
        assert (seen != seen_in_words(marks, None) & (rows[:, None] - rows < window)).any()

    def ours(q: Any, k: Any, v: Any, *marks: Any) -> jax.Array:
        return PATHS[path](q, k, v, marks, since, cap)

    found = jax.jit(lambda arrays, marks: with_gradients(ours, arrays, marks))(arrays, marks)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in arrays]
        expected = with_gradients(lambda q, k, v, *_: by_pairs(q, k, v, jnp.asarray(seen), cap), wide, marks)
    assert all(error < 1e-5 for error in errors(found, expected))


@pytest.mark.parametrize("window", [None, 5, 40])
def test_packed_rows_take_windows(window: int | None) -> None:
    """Through the choice of path on this backend, in blocks and with the mask whole."""
    for t in (48, 96):
        marks, (query, key, value, _) = random_rows(2, t), random_arrays(2, 2, t, 2, 1, 16)
        attention = packed_attention(marks, None, 2.0)
        found = attention(query, key, value, None if window is None else jnp.int32(window))
        expected = by_pairs(query, key, value, jnp.asarray(seen_in_words(marks, window)), 2.0)
        real = np.asarray(marks[1]) > 0
        np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], atol=2e-6)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [3, 20])
def test_causal_attention_after_shared_tokens(window: int, cap: float | None) -> None:
    query, key, value, _ = random_arrays(1, 2, 160, 4, 2, 16)
    at = np.arange(160)
    seen = jnp.asarray((at[:, None] >= at) & (at[:, None] - at < window))[None]
    key, value = (x.at[1, :9].set(x[0, :9]) for x in (key, value))  # the first nine tokens are shared by both rows
    expected = by_pairs(query, key, value, seen, cap)[:, 9:]
    before = key[0, :9], value[0, :9]
    found = attend_causal(query[:, 9:], key[:, 9:], value[:, 9:], before, jnp.int32(window), cap)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    one = attend_to(query[:, 30:31], [(key[:, 9:], value[:, 9:], seen[:, 30:31, 9:])], before, seen[0, 30:31, :9], cap)
    np.testing.assert_allclose(one[:, 0], expected[:, 21], atol=2e-6)
    # Two beams, alike, of four tokens each after 26 of the prompt, feeding their last two.
    tails = [jnp.broadcast_to(x[:, None, 35:39], (2, 2, 4, 2, 16)) for x in (key, value)]
    asked = jnp.broadcast_to(query[:, None, 37:39], (2, 2, 2, 4, 16))
    prompt = key[:, 9:35], value[:, 9:35], jnp.broadcast_to(seen[:, 37:39, 9:35], (2, 2, 26))
    beams = attend_beams(asked, prompt, *tails, seen[0, 37:39, 35:39], before, seen[:, 37:39, :9].repeat(2, 0), cap)
    for beam in range(2):
        np.testing.assert_allclose(beams[:, beam], expected[:, 28:30], atol=2e-6)


@pytest.mark.parametrize("shared", [0, 9], ids=["alone", "shared tokens"])
@pytest.mark.parametrize(
    "name", ["gemma2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mistral", "smollm3, sliding", "gemma3"))]
)
def test_a_search_sees_what_training_sees(name: str, shared: int, tmp_path: Path) -> None:
    """Hidden states by prompt and then token by token, or a few at once, equal those of the whole sequence at once."""
    save_family(name, tmp_path, 512)
    decoder = make_case(tmp_path, None, atomic=False, trained=False).decoder
    rng = np.random.default_rng(0)
    common = rng.integers(3, 512, shared).astype(np.int32)
    lengths, tails = np.asarray([14, 3], np.int32), rng.integers(3, 512, (2, 2, 6)).astype(np.int32)
    prompts = rng.integers(3, 512, (2, 14)).astype(np.int32)

    def whole(tokens: np.ndarray) -> np.ndarray:
        at = jnp.arange(len(tokens))[None]

        def masked(query: Any, key: Any, value: Any, cache: None, window: Any) -> Any:
            seen = packed_mask(at, at * 0 + 1, at * 0, at + 1, None if window is None else first_seen(at, window))
            return attend(query, key, value, seen, decoder.arch.softcap), None

        return np.asarray(decoder.hidden(jnp.asarray(tokens)[None], at, masked)[0][0])

    @jax.jit
    def search(prompts: Any, lengths: Any, tails: Any) -> tuple[Any, ...]:
        before = shared_prefix(decoder, jnp.asarray(common)) if shared else None
        prefix = prefill(decoder, prompts, lengths, before)
        first, tail = extend(decoder, prefix, tails[..., :2], prefix.empty_tail(2, 0))
        second, _ = extend(decoder, prefix, tails[..., 2:], tail)
        room = prefix.empty_tail(2, 6)
        singly = []
        for slot in range(6):
            hidden, room = extend(decoder, prefix, tails[..., slot : slot + 1], room, jnp.int32(slot))
            singly.append(hidden)
        return prefix.hidden, jnp.concatenate([first, second], 2), jnp.concatenate(singly, 2)

    last, chunks, singly = search(prompts, lengths, tails)
    for user in range(2):
        for beam in range(2):
            expected = whole(np.concatenate([common, prompts[user, : lengths[user]], tails[user, beam]]))
            begin = shared + lengths[user]
            np.testing.assert_allclose(last[user, 0], expected[begin - 1], atol=2e-4)
            for found in (chunks, singly):
                np.testing.assert_allclose(found[user, beam], expected[begin:], atol=2e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_lists_have_the_log_probabilities_of_transformers(name: str, tmp_path: Path) -> None:
    """Items of three tokens of the base: scores are torch's, item by item."""
    reference = save_family(name, tmp_path, 512)
    case = make_case(tmp_path, None, atomic=False, trained=False)
    items = np.random.default_rng(2).integers(3, 512, (6, 3)).astype(np.int32)
    codes = type(case.codes)(items, (), np.zeros(0, np.int32), (), np.asarray(list("abcdef"), object))
    prompts = [np.arange(5, 5 + n, dtype=np.int32) for n in (17, 4)]
    ranking = Recommender(case.decoder, codes, DecodeConfig(beam=6, top_k=6)).rank(prompts, None, 6)
    for user, prompt in enumerate(prompts):
        scores = []
        for item in items:
            tokens = torch.tensor(np.concatenate([prompt, item])[None]).long()
            with torch.no_grad():
                logp = torch.log_softmax(reference(tokens).logits[0].double(), -1)
            scores.append(sum(float(logp[len(prompt) - 1 + at, token]) for at, token in enumerate(item)))
        order = np.argsort(scores)[::-1]
        assert ranking.items[user].tolist() == order.tolist()
        np.testing.assert_allclose(ranking.scores[user], np.asarray(scores)[order], atol=1e-4)


def test_a_window_by_rows_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that DESIGN warns of: the distance in the row in place of positions."""
    marks, (query, key, value, _) = random_rows(5, TOKENS), random_arrays(5, 2, TOKENS, 2, 1, 16)
    rows = jnp.broadcast_to(jnp.arange(TOKENS), marks[0].shape)
    wrong = packed_mask(*marks) & (rows[:, None, :] >= first_seen(rows, jnp.int32(7))[:, :, None])
    found, expected = (partial(by_pairs, query, key, value)(mask, None) for mask in (wrong, seen_in_words(marks, 7)))
    real = np.asarray(marks[1]) > 0
    assert np.abs(np.asarray(found - expected))[real].max() > 0.1
