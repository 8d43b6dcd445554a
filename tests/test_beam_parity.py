"""Lists against those of transformers' `generate` on torch: base models, adapters, item-token rows, narrow to wide beams."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from sftrec_jax.config import DecodeConfig, MeshConfig
from sftrec_jax.decode.recommender import Recommender
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.adapters import PROJECTIONS, AdapterSpec
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.hub import BaseSource
from sftrec_jax.model.load import Build, load_decoder, source_architecture
from sftrec_jax.model.mesh import make_mesh

# peft 0.21 asks transformers 5.23 for a name that it renamed; this can go once peft asks for the new one.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

VOCAB, N_ITEMS, LENGTH, HIDDEN = 64, 300, 4, 24
NEW = (9, *range(64, 75))  # one new row replaces a row of the table, the rest lie past it
END = 3
"""Ends the items of three tokens and fills them up in torch's search, at log-probability 0."""
RANK, ALPHA = 3, 7
WIDTHS = (1, 10, 50)
PROMPTS = [np.random.default_rng(n).integers(0, VOCAB, n).astype(np.int32) for n in (14, 2, 21)]


def random_items(tokens: list[int]) -> list[tuple[int, ...]]:
    """Distinct items of four tokens, a third of three; their last comes from a set of its own, so that none begins another."""
    rng = np.random.default_rng(0)
    mixed = rng.permutation(tokens).tolist()
    last, inner = mixed[:6], mixed[6:]
    found: dict[tuple[int, ...], None] = {}
    while len(found) < N_ITEMS:
        body = rng.choice(inner, LENGTH).tolist()
        found[(*body[:2], int(rng.choice(last))) if rng.random() < 1 / 3 else tuple(body)] = None
    return list(found)


def item_codes(rows: list[tuple[int, ...]], new: tuple[int, ...]) -> ItemCodes:
    codes = np.asarray([[*row, *[-1] * (LENGTH - len(row))] for row in rows], np.int32)
    titles = np.asarray([f"item {i}" for i in range(len(rows))], object)
    return ItemCodes(codes, tuple(f"<{i}>" for i in new), np.asarray(new, np.int32), ((),) * len(new), titles)


@dataclass
class Pair:
    """The same model in torch and here, and a catalogue."""

    reference: Any
    decoder: Decoder
    rows: list[tuple[int, ...]]
    codes: ItemCodes

    def rank(self, prompts: list[np.ndarray], beam: int, k: int | None = None, batch: int = 4) -> tuple[np.ndarray, np.ndarray]:
        config = DecodeConfig(beam=beam, top_k=k or beam, batch_users=batch)
        ranking = Recommender(self.decoder, self.codes, config, None).rank(prompts, None, k or beam)
        return ranking.items, ranking.scores


def load_ours(folder: Path, codes: ItemCodes, adapters: AdapterSpec | None) -> Decoder:
    source = BaseSource(folder=folder, gguf=None, tokenizer=folder, label=str(folder))
    float32 = jnp.dtype(jnp.float32)
    build = Build(source_architecture(source), adapters, tuple(codes.new_token_ids.tolist()), float32, float32, "none")
    return load_decoder(build, source, codes, make_mesh(MeshConfig()), 0, False)


def make_pair(folder: Path, tied: bool, lora: bool, rows: bool) -> Pair:
    """A random model; adapters and rows are drawn on torch's side and copied to ours."""
    torch.manual_seed(4 * tied + 2 * lora + rows)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    reference: Any = LlamaForCausalLM(config).eval()
    reference.save_pretrained(folder)
    new = NEW if rows else ()
    items = random_items([*new, *range(10, 28 - len(new))])
    codes = item_codes(items, new)
    spec = AdapterSpec(RANK, float(ALPHA), 0.0, PROJECTIONS) if lora else None
    decoder = load_ours(folder, codes, spec)
    with torch.no_grad():
        if rows:
            reference.resize_token_embeddings(max(NEW) + 1, mean_resizing=False)
            tables = [(reference.get_input_embeddings(), decoder.embed_tokens)]
            tables += [] if tied else [(reference.get_output_embeddings(), decoder.lm_head)]
            for theirs, ours in tables:
                theirs.weight[list(NEW)] = 0.3 * torch.randn(len(NEW), HIDDEN)
                ours.rows[...] = jnp.asarray(theirs.weight[list(NEW)].numpy())
        if lora:
            wrapped = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
            reference = get_peft_model(reference, wrapped).eval()
            for name in PROJECTIONS:
                layers = [getattr(block, name) for layer in reference.get_base_model().model.layers
                          for block in (layer.self_attn, layer.mlp) if hasattr(block, name)]  # fmt: skip
                for layer in layers:
                    for matrix in (layer.lora_A.default, layer.lora_B.default):
                        matrix.weight.normal_(0, 0.2)
                for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                    stacked = np.stack([getattr(layer, theirs).default.weight.numpy().T for layer in layers])
                    getattr(getattr(decoder.layers, name), ours)[...] = jnp.asarray(stacked)
    return Pair(reference, decoder, items, codes)


class Stay(LogitsProcessor):
    """An item that has ended stays as it is: END follows at log-probability 0 (what processors of a beam search see)."""

    def __init__(self, rows: list[tuple[int, ...]], start: int):
        self.rows, self.start = set(rows), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ended = [tuple(written) in self.rows for written in input_ids[:, self.start :].tolist()]
        scores[ended, END] = 0.0
        return scores


def generate(pair: Pair, prompt: np.ndarray, width: int) -> tuple[list[int], np.ndarray]:
    """Items (-1: no item) and scores that `generate` finds under a trie keyed by the generated tokens alone."""
    following: dict[tuple[int, ...], set[int]] = {}
    item_of: dict[tuple[int, ...], int] = {}
    for item, row in enumerate(pair.rows):
        filled = (*row, *[END] * (LENGTH - len(row)))
        item_of[filled] = item
        for at, token in enumerate(filled):
            following.setdefault(filled[:at], set()).add(token)
    start = len(prompt)
    with torch.no_grad():
        found = pair.reference.generate(
            input_ids=torch.tensor(prompt[None]).long(), attention_mask=torch.ones(1, start), num_beams=width,
            num_return_sequences=width, max_new_tokens=LENGTH,
            prefix_allowed_tokens_fn=lambda _, tokens: sorted(following[tuple(tokens[start:].tolist())]),
            logits_processor=LogitsProcessorList([Stay(pair.rows, start)]), length_penalty=0.0, do_sample=False,
            eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_scores=True, output_logits=True,
        )  # fmt: skip
    items = [item_of.get(tuple(written), -1) for written in found.sequences[:, start:].tolist()]
    if width > 1:
        return items, found.sequences_scores.numpy()
    # One beam is greedy search to `generate`, which gives no score of the sequence.
    steps = [float(torch.log_softmax(z[0], -1)[t]) for z, t in zip(found.logits, pair.rows[items[0]], strict=False)]
    return items, np.asarray([sum(steps)])


def score_items(pair: Pair, prompt: np.ndarray) -> np.ndarray:
    """Log-probability of every item after the prompt, by one plain forward pass over all of them."""
    tokens = torch.tensor([[*prompt.tolist(), *row, *[0] * (LENGTH - len(row))] for row in pair.rows])
    with torch.no_grad():
        log_prob = torch.log_softmax(pair.reference(input_ids=tokens).logits.double(), -1)
    at = len(prompt) - 1
    return np.asarray([sum(float(log_prob[i, at + j, t]) for j, t in enumerate(row)) for i, row in enumerate(pair.rows)])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, bool, bool], Pair]:
    return cache(lambda tied, lora, rows: make_pair(tmp_path_factory.mktemp("model"), tied, lora, rows))


def cases() -> list[Any]:
    """(tied, lora, rows, widths). Each width is compiled anew, so the whole grid is left to `-m slow`."""
    few = {
        "base": (False, False, False, WIDTHS), "adapter": (True, True, False, (10,)), "rows": (False, False, True, (50,)),
        "both": (True, True, True, (10,)), "both, untied": (False, True, True, (50,)),
    }  # fmt: skip
    every = [(*parts, WIDTHS) for parts in itertools.product((True, False), repeat=3)]
    return [*(pytest.param(*few[n], id=n) for n in few), *(pytest.param(*case, marks=pytest.mark.slow) for case in every)]


@pytest.mark.parametrize(("tied", "lora", "rows", "widths"), cases())
def test_lists_equal_those_of_transformers(
    pairs: Callable[..., Pair], tied: bool, lora: bool, rows: bool, widths: tuple[int, ...]
) -> None:
    """Items, order and scores. The first level has fewer tokens than the widest beam, the later ones far more prefixes."""
    pair = pairs(tied, lora, rows)
    for width in widths:
        items, scores = pair.rank(PROMPTS, width)
        largest = 0.0
        for user, prompt in enumerate(PROMPTS):
            expected, log_prob = generate(pair, prompt, width)
            assert len(set(expected)) == width
            assert items[user].tolist() == expected
            largest = max(largest, float(np.abs(scores[user] - log_prob).max()))
        print(f"{tied=} {lora=} {rows=}: width {width}, same items in the same order, scores within {largest:.1e}")
        assert largest < 1e-4


def test_widest_beam_ranks_every_item(pairs: Callable[..., Pair]) -> None:
    """With adapters and rows; as many beams as there are items."""
    pair = pairs(False, True, True)
    items, scores = pair.rank(PROMPTS, N_ITEMS)
    for user, prompt in enumerate(PROMPTS):
        expected = score_items(pair, prompt)
        assert sorted(items[user].tolist()) == list(range(N_ITEMS))
        np.testing.assert_allclose(scores[user], expected[items[user]], atol=1e-4)
        # Of 300 items some two are closer than rounding: places may differ where the scores do not.
        np.testing.assert_allclose(expected[items[user]], np.sort(expected)[::-1], atol=2e-5)


def test_each_prompt_as_if_alone(pairs: Callable[..., Pair]) -> None:
    """Padding and neighbours change nothing: prompts of 14, 2 and 21 tokens in one batch, and each in its own."""
    pair = pairs(True, True, True)
    items, scores = pair.rank(PROMPTS, 10)
    for user, prompt in enumerate(PROMPTS):
        alone = pair.rank([prompt], 10)
        np.testing.assert_array_equal(items[user], alone[0][0])
        np.testing.assert_allclose(scores[user], alone[1][0], atol=1e-5)


def test_generation_config_of_the_model_changes_nothing(tmp_path: Path) -> None:
    """Instruct checkpoints carry one; transformers obeys it, a ranking must not (30,119 invalid items: MiniOneRec#49)."""
    pair = make_pair(tmp_path, False, False, False)
    items, scores = pair.rank(PROMPTS, 10)
    best = items[0, 0]
    written = {
        "num_beams": 3, "top_k": 5, "temperature": 0.3, "do_sample": True, "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2, "bad_words_ids": [[pair.rows[best][0]]], "max_new_tokens": 2,
    }  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    again = Pair(AutoModelForCausalLM.from_pretrained(tmp_path), load_ours(tmp_path, pair.codes, None), pair.rows, pair.codes)
    theirs, their_scores = generate(again, PROMPTS[0], 10)
    assert best not in theirs and not np.isclose(their_scores[0], scores[0, 0], atol=0.1)
    for kept, found in zip((items, scores), again.rank(PROMPTS, 10), strict=True):
        np.testing.assert_array_equal(kept, found)
