"""The beam search against plain scoring of every item, and against `generate`, by transformers on torch."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM

from sftrec_jax.config import DecodeConfig, MeshConfig
from sftrec_jax.decode.batches import plan_batches
from sftrec_jax.decode.recommender import Ranking, Recommender
from sftrec_jax.decode.tree import UNROLL_ALL
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.hub import BaseSource
from sftrec_jax.model.load import Build, load_decoder, source_architecture
from sftrec_jax.model.mesh import make_mesh

VOCAB, NEW = 32, (5, 32, 33, 34, 35, 36, 37, 38, 39)  # one new row replaces a row of the table, the rest lie past it
PROMPTS = [np.random.default_rng(n).integers(0, VOCAB, n).astype(np.int32) for n in (3, 20, 7, 1, 12)]


def item_codes(rows: list[tuple[int, ...]], new: tuple[int, ...]) -> ItemCodes:
    codes = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for i, row in enumerate(rows):
        codes[i, : len(row)] = row
    names = tuple(f"<{i}>" for i in new)
    titles = np.asarray([f"item {i}" for i in range(len(rows))], object)
    return ItemCodes(codes, names, np.asarray(new, np.int32), ((),) * len(new), titles)


def random_codes(n: int, shortest: int, longest: int, tokens: list[int], end: int | None, seed: int = 0) -> list[tuple[int, ...]]:
    """Distinct codes; with `end` each gets this terminator, which makes codes of several lengths prefix-free."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < n:
        # The first tokens come from few, so that codes share beginnings.
        body = rng.choice(tokens[:3], 2).tolist() + rng.choice(tokens, longest).tolist()
        found[(*body[: rng.integers(shortest, longest + 1)], *(() if end is None else (end,)))] = None
    return list(found)


def model_pair(folder: Path, codes: ItemCodes, tied: bool) -> tuple[LlamaForCausalLM, Decoder]:
    """The same random model in transformers and here; new tokens are rows of its resized tables, trainable rows of ours."""
    torch.manual_seed(len(codes.codes))
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    reference = LlamaForCausalLM(config).eval()
    reference.save_pretrained(folder)
    source = BaseSource(folder=folder, gguf=None, tokenizer=folder, label=str(folder))
    row_ids = tuple(codes.new_token_ids.tolist())
    build = Build(source_architecture(source), None, row_ids, jnp.dtype(jnp.float32), jnp.dtype(jnp.float32), "full")
    decoder = load_decoder(build, source, codes, make_mesh(MeshConfig()), 0, False)
    if row_ids:
        reference.resize_token_embeddings(max(VOCAB, row_ids[-1] + 1), mean_resizing=False)
        tables = [(reference.get_input_embeddings(), decoder.embed_tokens)]
        tables += [] if tied else [(reference.get_output_embeddings(), decoder.lm_head)]
        for theirs, ours in tables:
            with torch.no_grad():
                theirs.weight[list(row_ids)] = 0.3 * torch.randn(len(row_ids), 16)
            ours.rows[...] = jnp.asarray(theirs.weight.detach()[list(row_ids)].numpy())
    return reference, decoder


def score(reference: LlamaForCausalLM, prompt: np.ndarray, sequences: list[tuple[int, ...]]) -> np.ndarray:
    """Log-probability of each sequence after the prompt, by one plain forward pass over all of them."""
    longest = max(map(len, sequences))
    rows = torch.tensor([[*prompt.tolist(), *s, *[0] * (longest - len(s))] for s in sequences])
    with torch.no_grad():
        log_prob = torch.log_softmax(reference(rows).logits.float(), -1)
    at = len(prompt) - 1
    return np.asarray([sum(float(log_prob[i, at + j, t]) for j, t in enumerate(s)) for i, s in enumerate(sequences)])


def check_ranking(ranking: Ranking, user: int, scores: np.ndarray, allowed: np.ndarray) -> None:
    """The list is that of sorting all allowed items by the reference's scores."""
    order = allowed[np.argsort(-scores[allowed], kind="stable")][: ranking.items.shape[1]]
    n = len(order)
    assert np.diff(np.sort(scores)).min() > 1e-4, "ties would make the order a matter of rounding"
    np.testing.assert_array_equal(ranking.items[user, :n], order)
    np.testing.assert_allclose(ranking.scores[user, :n], scores[order], atol=1e-4)
    assert (ranking.items[user, n:] == -1).all() and (ranking.scores[user, n:] == -np.inf).all()


SEVERAL = list(range(6, 20))
CATALOGUES = {
    "atomic": ([(i,) for i in (38, 5, 32, 33, 39, 34, 36, 35, 37)], NEW, True),
    "fixed": (random_codes(17, 3, 3, SEVERAL, None), (), False),
    "variable with new rows": (random_codes(17, 1, 3, [33, 36, 39, 5, *SEVERAL], 38), NEW, False),
    # Longer than what is unrolled: most levels run in a loop, which ends before L = 22 where all beams have.
    "long": ([*random_codes(13, 1, 14, SEVERAL, 4), (*SEVERAL, *SEVERAL[:7], 4)], (), True),
}


SLOW = ("long", "variable with new rows")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CATALOGUES])
def test_wide_beam_equals_scoring_every_item(tmp_path: Path, name: str) -> None:
    """Also: mixed prompt lengths in a batch, seen items, more beams than items or first tokens, all layouts bit for bit."""
    rows, new, tied = CATALOGUES[name]
    codes = item_codes(rows, new)
    reference, decoder = model_pair(tmp_path, codes, tied)
    n = len(rows)
    assert (codes.codes.shape[1] > UNROLL_ALL) == (name == "long")
    rng = np.random.default_rng(0)
    seen = [np.sort(rng.choice(n, size, replace=False)).astype(np.int32) for size in (0, 1, 4, n - 1, n)]
    results = []
    for layout in ("dense", "csr", "bitmap", "compact") if name in ("variable with new rows", "long") else ("dense",):
        config = DecodeConfig(beam=n + 3, top_k=n, batch_users=8, layout=layout)
        recommender = Recommender(decoder, codes, config, make_mesh(MeshConfig()))
        assert layout == "compact" or set(recommender.index.kinds[1:]) <= {layout}
        results.append(recommender.rank_both(PROMPTS, seen, n))
    for result in results[1:]:
        for dense, other in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(dense.items, other.items)
            np.testing.assert_array_equal(dense.scores, other.scores)
    masked, unmasked = results[0]
    for user, prompt in enumerate(PROMPTS):
        scores = score(reference, prompt, rows)
        check_ranking(unmasked, user, scores, np.arange(n))
        check_ranking(masked, user, scores, np.setdiff1d(np.arange(n), seen[user]))


def search_by_hand(reference: LlamaForCausalLM, prompt: np.ndarray, rows: list[tuple[int, ...]], width: int) -> list[int]:
    """Beam search over Python tuples: the items found, best first."""
    beams: dict[tuple[int, ...], float] = {(): 0.0}
    while any(beam not in rows for beam in beams):
        grown = {beam for beam in beams if beam in rows}
        for beam in beams:
            grown |= {row[: len(beam) + 1] for row in rows if row[: len(beam)] == beam}
        ordered = sorted(grown)
        scores = score(reference, prompt, ordered)
        beams = {ordered[i]: scores[i] for i in np.argsort(-scores, kind="stable")[:width]}
    return [rows.index(beam) for beam in beams]


@pytest.mark.parametrize(("width", "name"), [(1, "fixed"), (3, "variable with new rows")])
def test_narrow_beam_equals_search_by_hand(tmp_path: Path, width: int, name: str) -> None:
    """One beam is greedy search. An item that was seen is found no more, as if the catalogue lacked it."""
    rows, new, _ = CATALOGUES[name]
    codes = item_codes(rows, new)
    reference, decoder = model_pair(tmp_path, codes, True)
    found = [search_by_hand(reference, prompt, rows, width) for prompt in PROMPTS]
    recommender = Recommender(decoder, codes, DecodeConfig(beam=width, top_k=width, batch_users=2), None)
    masked, unmasked = recommender.rank_both(PROMPTS, [np.asarray(f[:1]) for f in found], width)
    for user, prompt in enumerate(PROMPTS):
        assert unmasked.items[user].tolist() == found[user]
        expected = score(reference, prompt, [rows[i] for i in found[user]])
        np.testing.assert_allclose(unmasked.scores[user], expected, atol=1e-4)
        others = [row for i, row in enumerate(rows) if i != found[user][0]]
        assert [rows[i] for i in masked.items[user]] == [others[i] for i in search_by_hand(reference, prompt, others, width)]


def test_equals_generate_of_transformers(tmp_path: Path) -> None:
    rows = CATALOGUES["fixed"][0]
    codes = item_codes(rows, ())
    reference, decoder = model_pair(tmp_path, codes, True)
    width = 4
    ours = Recommender(decoder, codes, DecodeConfig(beam=width, top_k=width), None).rank(PROMPTS, None, width)
    for user, prompt in enumerate(PROMPTS):

        def allowed(_: int, so_far: torch.Tensor, start: int = len(prompt)) -> list[int]:
            written = tuple(so_far[start:].tolist())
            return sorted({row[len(written)] for row in rows if row[: len(written)] == written})

        with torch.no_grad():
            theirs = reference.generate(
                torch.tensor(prompt[None]).long(), attention_mask=torch.ones(1, len(prompt)), num_beams=width,
                num_return_sequences=width, max_new_tokens=3, prefix_allowed_tokens_fn=allowed, length_penalty=0.0,
                do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        found = [rows.index(tuple(s[len(prompt) :].tolist())) for s in theirs.sequences]
        assert ours.items[user].tolist() == found
        np.testing.assert_allclose(ours.scores[user], theirs.sequences_scores.numpy(), atol=1e-4)


@pytest.mark.parametrize("end", [None, 38])
def test_unconstrained_search_and_invalid_rate(tmp_path: Path, end: int | None) -> None:
    """All sequences of two tokens, or of one token that is the terminator, scored by hand."""
    codes = item_codes([(5, 38), (7, 38), (38,)] if end else [(5, 38), (7, 33), (39, 39)], NEW)
    reference, decoder = model_pair(tmp_path, codes, True)
    vocabulary = [*range(VOCAB), *NEW[1:]]
    sequences = [(a, b) for a, b in itertools.product(vocabulary, vocabulary) if a != end] + ([(end,)] if end else [])
    k = len(vocabulary)
    recommender = Recommender(decoder, codes, DecodeConfig(beam=k, top_k=k, batch_users=8), None)
    tokens, scores = recommender.generate(PROMPTS, k)
    valid = 0
    for user, prompt in enumerate(PROMPTS):
        reference_scores = score(reference, prompt, sequences)
        order = np.argsort(-reference_scores, kind="stable")[:k]
        np.testing.assert_allclose(scores[user], reference_scores[order], atol=1e-4)
        written = {tuple(t[t >= 0].tolist()) for t in tokens[user]}
        assert written == {sequences[i] for i in order}
        valid += len(written & {tuple(c[c >= 0].tolist()) for c in codes.codes})
    assert recommender.invalid_rate(PROMPTS, k) == pytest.approx(1 - valid / (k * len(PROMPTS)))


def test_odd_and_bad_requests(tmp_path: Path) -> None:
    codes = item_codes([(3, 4), (5, 6), (5, 7)], ())
    _, decoder = model_pair(tmp_path, codes, True)
    recommender = Recommender(decoder, codes, DecodeConfig(beam=2, top_k=2), None)
    single = Recommender(decoder, item_codes([(3, 4)], ()), DecodeConfig(), None).rank(PROMPTS[:1], None, 1)
    assert single.items.tolist() == [[0]] and single.scores[0, 0] < 0
    none = recommender.rank([], None, 2)
    assert none.items.shape == none.scores.shape == (0, 2) and none.items.dtype == np.int32
    assert np.isnan(recommender.invalid_rate([], 2))
    for prompts, k, said in [
        (PROMPTS, 4, "catalogue has 3"), (PROMPTS, 3, "raise decode.beam"), ([np.zeros(0, np.int32)], 2, "prompt 0 is empty"),
        ([PROMPTS[0], np.zeros(63, np.int32)], 2, "prompt 1 has 63 tokens"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            recommender.rank(prompts, None, k)
    with pytest.raises(UserError, match="item 1: its token 32"):
        Recommender(decoder, item_codes([(31,), (32,)], ()), DecodeConfig(), None)
    graphdef, state = nnx.split(decoder)
    recommender.update(nnx.merge(graphdef, jax.tree.map(lambda x: x * jnp.nan, state)))
    done: list[int] = []
    with pytest.raises(UserError, match="NaN"):
        recommender.rank(PROMPTS, None, 2, done.append)


def test_batches_hold_every_prompt_once() -> None:
    rng = np.random.default_rng(0)
    for users, size in [(0, 4), (1, 4), (5, 4), (610, 16)]:
        lengths = rng.integers(1, 102, users)
        batches = plan_batches(lengths, size)
        assert sorted(np.concatenate([np.zeros(0, int), *(rows for rows, _ in batches)]).tolist()) == list(range(users))
        assert all(len(rows) <= size and lengths[rows].max() <= width for rows, width in batches)
        assert len({width for _, width in batches}) <= 7
        assert users == 0 or batches[0][1] == -(-lengths.max() // 16) * 16


def test_order_and_progress_over_many_batches(tmp_path: Path) -> None:
    """Results stand in the order of the prompts, whatever order they were decoded in."""
    codes = item_codes(CATALOGUES["atomic"][0], NEW)
    reference, decoder = model_pair(tmp_path, codes, True)
    prompts = [np.roll(p, i) for i in range(4) for p in PROMPTS]
    config = dataclasses.replace(DecodeConfig(), batch_users=4)
    done: list[int] = []
    ranking = Recommender(decoder, codes, config, None).rank(prompts, None, 3, done.append)
    assert sum(done) == len(prompts)
    for user, prompt in enumerate(prompts):
        check_ranking(ranking, user, score(reference, prompt, CATALOGUES["atomic"][0]), np.arange(9))
