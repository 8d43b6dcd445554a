import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, byte_level

from sftrec_jax.config import PromptConfig
from sftrec_jax.data.prompts import PromptBuilder, prompt_builder
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.naming import atomic_codes, title_codes

TITLES = ["Toy Story (1995)", "Heat (1995)", "War of the Worlds (2005)", "the quick brown fox", "<|item_1|>", "Toy"]
HISTORY = st.lists(st.integers(0, 5), max_size=9)


def make(config: PromptConfig, coding: str = "atomic", context: int = 1000, kind: str = "byte_level"):
    tokenizer = KINDS[kind]()
    titles = np.asarray(TITLES, object)
    if coding == "title":
        codes = title_codes(titles, tokenizer)
    else:
        codes = atomic_codes([str(i) for i in range(6)], titles, tokenizer)
    return prompt_builder(config, codes, tokenizer, context), codes, tokenizer


def code(codes: ItemCodes, items) -> list[int]:
    return [t for i in items for t in codes.codes[i].tolist() if t >= 0]


def as_array(history: list[int]) -> np.ndarray:
    return np.asarray(history, np.int32)


@pytest.mark.parametrize("coding", ["atomic", "title"])
@settings(max_examples=30, deadline=None)
@given(history=HISTORY, most=st.integers(1, 6), windows=st.sampled_from(["last", "all"]))
def test_stream_windows_make_every_item_a_target(coding, history, most, windows) -> None:
    builder, codes, tokenizer = make(PromptConfig("stream", most, windows), coding)
    expected = [history[max(0, e - most) : e] for e in range(len(history), 0, -most)][::-1]
    expected = expected[-1:] if windows == "last" else expected
    made = builder.examples(as_array(history))
    assert len(made) == len(expected)
    for example, window in zip(made, expected, strict=True):
        sequence = [tokenizer.bos_token_id, *code(codes, window)]
        assert example.tokens.tolist() == sequence[:-1] and example.labels.tolist() == sequence[1:]
        assert example.target_positions.tolist() == list(range(len(sequence) - 1))
        assert example.weights.tolist() == [1.0] * (len(sequence) - 1)
        assert {a.dtype for a in (example.tokens, example.labels, example.target_positions)} == {np.dtype(np.int32)}
    assert builder.counts["training_items_left_out"] == len(history) - sum(map(len, expected))
    assert builder.prompt(as_array(history)).tolist() == [tokenizer.bos_token_id, *code(codes, history[-most:])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shown", ["titles", "tokens"])
@pytest.mark.parametrize("coding", ["atomic", "title"])
@settings(max_examples=10, deadline=None)
@given(history=HISTORY, most=st.integers(1, 6), windows=st.sampled_from(["last", "all"]))
def test_instruct_is_prompt_then_one_target(kind, shown, coding, history, most, windows) -> None:
    config = PromptConfig("instruct", most, windows, shown, "User took:\n", " ;\n", "Next:\n")
    builder, codes, tokenizer = make(config, coding, kind=kind)

    def encode(text: str) -> list[int]:
        return KINDS[kind]().encode(text, add_special_tokens=False)

    def expected(items: list[int]) -> list[int]:
        tokens = [tokenizer.bos_token_id, *encode(config.prefix)]
        for i in items[-most:]:
            tokens += (encode(TITLES[i]) if shown == "titles" else code(codes, [i])) + encode(config.separator)
        return tokens + encode(config.suffix)

    assert builder.prompt(as_array(history)).tolist() == expected(history)
    first = 1 if windows == "all" else max(1, len(history) - most)
    made = builder.examples(as_array(history))
    assert len(made) == max(0, len(history) - first)
    for example, p in zip(made, range(first, len(history)), strict=True):
        answer = code(codes, [history[p]])
        assert example.tokens.tolist() == expected(history[:p]) + answer[:-1]
        assert example.labels.tolist() == answer
        fed = [*example.tokens.tolist(), answer[-1]]
        assert [fed[t + 1] for t in example.target_positions] == answer
    assert builder.counts["targets"] == sum(len(e.labels) for e in made)


@settings(max_examples=60, deadline=None)
@given(history=HISTORY, context=st.integers(14, 60), coding=st.sampled_from(["atomic", "title"]))
def test_items_are_dropped_whole_until_the_answer_fits(history, context, coding) -> None:
    instruct = PromptConfig("instruct", 6, prefix="A", separator=",", suffix="Z")
    config = PromptConfig("stream", 6) if coding == "title" else instruct
    builder, codes, _ = make(config, coding, context)
    free, _, _ = make(config, coding)
    longest = codes.codes.shape[1]
    prompts = [free.prompt(as_array(history[len(history) - n :])) for n in range(min(6, len(history)) + 1)]
    fitting = [n for n, prompt in enumerate(prompts) if len(prompt) + longest <= context]
    if history and max(fitting) == 0:
        with pytest.raises(UserError, match="do not fit into the context"):
            builder.prompt(as_array(history))
        return
    n = max(fitting)
    assert builder.prompt(as_array(history)).tolist() == prompts[n].tolist()
    assert builder.counts["items_cut_to_context"] == min(6, len(history)) - n


@settings(max_examples=60, deadline=None)
@given(history=HISTORY, context=st.integers(24, 60), stride=st.integers(1, 4))
def test_examples_cut_to_the_context_are_counted(history, context, stride) -> None:
    """By their tokens, against a context without end; what a stride leaves out is not cut."""
    config = PromptConfig("instruct", 4, prefix="A", separator=",", suffix="Z", stride=stride)
    builder, _, _ = make(config, "atomic", context)
    free, _, _ = make(config, "atomic")
    whole = free.examples(as_array(history))
    assert free.counts["examples_cut_to_context"] == 0
    made = builder.examples(as_array(history))
    shorter = sum(len(a.tokens) < len(b.tokens) for a, b in zip(made, whole, strict=True))
    assert builder.counts["examples_cut_to_context"] == shorter


@settings(max_examples=30, deadline=None)
@given(history=HISTORY, context=st.integers(14, 40))
def test_stream_windows_shrink_to_the_context(history, context) -> None:
    builder, codes, _ = make(PromptConfig("stream", 6), "title", context)
    made = builder.examples(as_array(history))
    assert [t for e in made for t in e.labels.tolist()] == code(codes, history)
    assert all(len(e.tokens) <= context for e in made)
    starts = {tuple(code(codes, [i])) for i in range(6)}
    for e in made:  # a window begins with a whole item
        assert any(tuple(e.labels[: len(item)].tolist()) == item for item in starts)


def test_cold_user_and_too_small_context() -> None:
    builder, _, tokenizer = make(PromptConfig("stream"))
    assert builder.prompt(as_array([])).tolist() == [tokenizer.bos_token_id] and builder.examples(as_array([])) == []
    with pytest.raises(UserError, match="'War of the Worlds .2005.' .row 2 of .*do not fit into the context of 9 tokens"):
        make(PromptConfig("stream"), "title", 9)[0].examples(as_array([2]))
    with pytest.raises(UserError, match="without any item and the answer take .* shorten prompt.prefix"):
        make(PromptConfig("instruct"), context=10)[0].prompt(as_array([]))


def test_stream_begins_with_eos_where_there_is_no_bos() -> None:
    tokenizer = byte_level()
    codes = title_codes(np.asarray(TITLES, object), tokenizer)
    tokenizer.bos_token = None
    builder: PromptBuilder = prompt_builder(PromptConfig("stream"), codes, tokenizer, 100)
    assert builder.prompt(as_array([])).tolist() == [tokenizer.eos_token_id]
    assert prompt_builder(PromptConfig("instruct", prefix=""), codes, tokenizer, 100).beginning.tolist() == []
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        prompt_builder(PromptConfig("stream"), codes, tokenizer, 100)
    with pytest.raises(dataclasses.FrozenInstanceError):
        builder.context = 5  # type: ignore[misc]
