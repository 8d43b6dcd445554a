"""The search itself against plain Python, transformers' logits and NumPy: normalisers, short cuts, ties, what users share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_beam
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from test_beam import CATALOGUES, NEW, PROMPTS, VOCAB, item_codes, model_pair
from transformers import LlamaForCausalLM

from sftrec_jax.config import DecodeConfig
from sftrec_jax.decode import choose, normaliser
from sftrec_jax.decode.prefix import prefill, shared_prefix
from sftrec_jax.decode.recommender import Recommender
from sftrec_jax.model.attention import attend_causal
from sftrec_jax.model.decoder import Decoder

Rows = list[tuple[int, ...]]
Pair = tuple[LlamaForCausalLM, Decoder]
NORMALISERS = ("full", "items", "level", "children")
COLUMNS = [*range(VOCAB), *NEW[1:]]
RAGGED: Rows = CATALOGUES["variable with new rows"][0]
# Choices at the first two tokens, then none.
CHAINS: Rows = [(a, b, (3 * a + b) % 31, (a + 5 * b) % 32, 38) for a in (5, 7, 36) for b in (5, 8, 33, 9)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return model_pair(tmp_path_factory.mktemp("model"), item_codes(RAGGED, NEW), False)


def next_logits(reference: LlamaForCausalLM, prompt: np.ndarray, prefixes: Rows) -> np.ndarray:
    """float64 [n, tokens] logits after the prompt and each prefix, all of one length."""
    with torch.no_grad():
        return reference(torch.tensor([[*prompt.tolist(), *p] for p in prefixes])).logits[:, -1].double().numpy()


def search_by_hand(reference: LlamaForCausalLM, prompt: np.ndarray, rows: Rows, kind: str, width: int) -> dict[tuple, float]:
    """Beam search over Python tuples with each normaliser as its documentation defines it."""
    beams: dict[tuple[int, ...], float] = {(): 0.0}
    for level in range(max(map(len, rows))):
        grown = {beam: value for beam, value in beams.items() if beam in rows}
        open_beams = [beam for beam in beams if beam not in rows]
        if not open_beams:
            break
        for beam, z in zip(open_beams, next_logits(reference, prompt, open_beams), strict=True):
            children = sorted({row[level] for row in rows if row[:level] == beam})
            summed = {
                "full": COLUMNS,
                "items": sorted({token for row in rows for token in row}),
                "level": sorted({row[level] for row in rows if len(row) > level}),
                "children": children,
            }[kind]
            for token in children:
                grown[(*beam, token)] = beams[beam] + z[token] - logsumexp(z[summed])
        beams = dict(sorted(grown.items(), key=lambda entry: -entry[1])[:width])
    return beams


@pytest.mark.parametrize("kind", NORMALISERS)
@pytest.mark.parametrize(("rows", "layout"), [(RAGGED, "csr"), (CHAINS, "dense")], ids=["ragged", "chains"])
def test_normalisers_equal_search_by_hand(pair: Pair, rows: Rows, layout: Any, kind: Any) -> None:
    """Narrow beams, so that the normaliser decides what is found, too; forced tokens, which cost `children` nothing."""
    width, k = 5, 4
    config = DecodeConfig(width, k, 8, layout, kind)
    recommender = Recommender(pair[1], item_codes(rows, NEW), config)
    assert (recommender.index.forced == 2) == (rows is CHAINS)
    ranking = recommender.rank(PROMPTS, None, k)
    for user, prompt in enumerate(PROMPTS):
        found = list(search_by_hand(pair[0], prompt, rows, kind, width).items())[:k]
        assert [rows[i] for i in ranking.items[user]] == [row for row, _ in found]
        np.testing.assert_allclose(ranking.scores[user], [value for _, value in found], atol=1e-4)


@pytest.mark.slow
def test_forced_tail_in_one_pass_equals_token_by_token(pair: Pair) -> None:
    """With lists of items to leave out, which are looked at before the tail begins."""
    codes, k = item_codes(CHAINS, NEW), 6
    recommender = Recommender(pair[1], codes, DecodeConfig(k, k, 8, "compact"))
    assert recommender.index.kinds[2:] == ("tail",) * 3
    deny = [np.arange(n, dtype=np.int32) for n in (0, 1, 4, 11, 12)]
    quick = recommender.rank_both(PROMPTS, deny, k)
    recommender.index = dataclasses.replace(recommender.index, forced=recommender.index.length)
    for one, other in zip(quick, recommender.rank_both(PROMPTS, deny, k), strict=True):
        np.testing.assert_array_equal(one.items, other.items)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


@pytest.mark.parametrize(("vocab", "tied", "new"), [(2500, True, 3), (2048, False, 3), (1030, True, 0), (3100, False, 0)])
def test_full_log_z_in_chunks(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, vocab: int, tied: bool, new: int
) -> None:
    """Chunks of 1024 columns, which mostly do not divide them, against scipy over torch's logits; replaced and new rows."""
    monkeypatch.setattr(test_beam, "VOCAB", vocab)
    monkeypatch.setattr(normaliser, "WHOLE_BYTES", 0)
    monkeypatch.setattr(normaliser, "CHUNK_BYTES", 0)
    rows = (5, vocab - 3, vocab, vocab + 1)[: new + 1] if new else ()  # two of them replaced
    columns = list(range(max(vocab, *(r + 1 for r in rows))) if rows else range(vocab))
    reference, decoder = model_pair(tmp_path_factory.mktemp("model"), item_codes([(1,)], rows), tied)
    hidden, expected = [], []
    for prompt in PROMPTS:
        tokens = torch.tensor(prompt[None]).long()
        with torch.no_grad():
            hidden.append(reference.model(tokens).last_hidden_state[0, -1].numpy())
            expected.append(logsumexp(reference(tokens).logits[0, -1].double().numpy()[columns]))
    found = normaliser.full_log_z(decoder, jnp.asarray(np.stack([hidden, hidden[::-1]], axis=1)))
    np.testing.assert_allclose((found.top + found.rest)[..., 0], np.stack([expected, expected[::-1]], axis=1), rtol=1e-6)


def ranked(recommender: Recommender, prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    ranking = recommender.rank(prompts, None, 4)
    return ranking.items, ranking.scores


def test_common_prefix_changes_nothing(pair: Pair) -> None:
    """Prompts of several lengths with a common beginning, all of them and each alone; prompts that have it not."""
    codes, config = item_codes(RAGGED, NEW), DecodeConfig(5, 4, 8, "csr")
    common = np.arange(1, 11, dtype=np.int32)
    prompts = [np.concatenate([common, prompt]) for prompt in PROMPTS]
    plain = Recommender(pair[1], codes, config)
    shared = Recommender(pair[1], codes, config, common=common)
    items, scores = ranked(plain, prompts)
    for _ in range(2):  # computed, then remembered
        found = ranked(shared, prompts)
        np.testing.assert_array_equal(found[0], items)
        np.testing.assert_allclose(found[1], scores, atol=1e-5)
    assert shared._shared is not None and shared._shared[0].shape[1] == len(common)
    for user, prompt in enumerate(prompts):
        alone = ranked(plain, [prompt] * len(prompts))  # nobody beside it is longer; a batch of one would be compiled anew
        np.testing.assert_array_equal(alone[0][0], items[user])
        np.testing.assert_allclose(alone[1][0], scores[user], atol=1e-5)
    others = [common, *PROMPTS]
    for a, b in zip(ranked(shared, others), ranked(plain, others), strict=True):
        np.testing.assert_array_equal(a, b)
    graphdef, state = nnx.split(pair[1])
    shared.update(nnx.merge(graphdef, jax.tree.map(lambda x: x * 1.5, state)))
    plain.update(nnx.merge(graphdef, jax.tree.map(lambda x: x * 1.5, state)))
    (moved, _), expected = ranked(shared, prompts), ranked(plain, prompts)[0]
    np.testing.assert_array_equal(moved, expected)
    assert (moved != items).any()


@pytest.mark.parametrize("begin", [0, 7])
def test_last_layer_of_a_prompt_is_only_needed_for_its_last_token(pair: Pair, begin: int) -> None:
    """The hidden state and all keys and values are those of the plain forward pass."""
    decoder = pair[1]
    rng = np.random.default_rng(begin)
    common = rng.integers(0, VOCAB, begin).astype(np.int32)
    lengths = np.asarray([len(p) for p in PROMPTS], np.int32)
    padded = np.zeros((len(PROMPTS), 32), np.int32)
    for row, prompt in enumerate(PROMPTS):
        padded[row, : len(prompt)] = prompt

    def keeping(query: Any, key: Any, value: Any, cache: None, window: None) -> Any:
        return attend_causal(query, key, value), (key, value)

    @jax.jit
    def both(padded: Any, lengths: Any) -> Any:
        whole = jnp.concatenate([jnp.broadcast_to(jnp.asarray(common), (len(PROMPTS), begin)), padded], axis=1)
        at = jnp.broadcast_to(jnp.arange(whole.shape[1]), whole.shape)
        plain = decoder.hidden(whole, at, keeping)
        shared = shared_prefix(decoder, jnp.asarray(common)) if begin else None
        return plain, prefill(decoder, padded, lengths, shared)

    (hidden, (key, value)), prefix = both(padded, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(prefix.hidden[row, 0], hidden[row, begin + length - 1], atol=1e-5)
        for own, all_keys in ((prefix.key, key), (prefix.value, value)):
            np.testing.assert_allclose(own[:, row, :length], all_keys[:, row, begin : begin + length], atol=1e-5)
    if begin:
        assert prefix.shared is not None
        np.testing.assert_allclose(prefix.shared[0], key[:, 0, :begin], atol=1e-5)
        np.testing.assert_allclose(prefix.shared[1], value[:, 0, :begin], atol=1e-5)
    np.testing.assert_array_equal(prefix.positions, begin + lengths)


CHOICES: list[Callable] = [choose.flat, choose.grouped, choose.two_stage, choose.top_places]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(2, 5, 128, 2), (3, 4, 128, 8), (1, 16, 64, 4), (2, 3, 192, 9)]),
    values=st.integers(1, 40), dead=st.floats(0, 1), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_ways_to_find_the_best_agree(shape: tuple[int, int, int, int], values: int, dead: float, seed: int) -> None:
    """Few distinct scores and many -inf; of equal ones the first, as NumPy's stable sort has it."""
    *size, width = shape
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, values, size).astype(np.float32) / -8
    scores[rng.random(size) < dead] = -np.inf
    flat = scores.reshape(size[0], -1)
    places = np.argsort(-flat, axis=1, kind="stable")[:, :width]
    for how in CHOICES:
        top, at = how(jnp.asarray(scores), width)
        np.testing.assert_array_equal(at, places)
        np.testing.assert_array_equal(top, np.take_along_axis(flat, places, axis=1))


def test_long_rows_take_the_short_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which way is taken is no matter of the result."""
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(2, 9, 256)), 1).astype(np.float32)
    expected = np.argsort(-scores.reshape(2, -1), axis=1, kind="stable")[:, :7]
    for limit in (1, 1 << 30):
        monkeypatch.setattr(choose, "LONG", limit)
        np.testing.assert_array_equal(choose.top_places(jnp.asarray(scores), 7)[1], expected)


def test_beams_of_512(pair: Pair) -> None:
    """More beams than the catalogue has prefixes at first, fewer than it has from the third token on."""
    tokens = np.random.default_rng(0).choice([5, 33, 9, 38, 7, 36, 11, 12, 13], (1500, 4))
    rows = sorted({tuple(row) for row in tokens.tolist()})
    assert len({row[:3] for row in rows}) > 512 > len({row[:2] for row in rows})
    recommender = Recommender(pair[1], item_codes(rows, NEW), DecodeConfig(512, 500, 2, "bitmap"))
    ranking = recommender.rank(PROMPTS[:2], None, 500)
    for user, prompt in enumerate(PROMPTS[:2]):
        found = search_by_hand(pair[0], prompt, rows, "full", 512)
        items = ranking.items[user].tolist()
        assert len(set(items)) == 500
        np.testing.assert_allclose(ranking.scores[user], list(found.values())[:500], atol=1e-4)
        np.testing.assert_allclose(ranking.scores[user], [found[rows[i]] for i in items], atol=1e-4)
