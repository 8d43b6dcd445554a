"""Segments of packed rows against prompts written one by one in plain Python: what every target sees, and how rows are cut."""

import functools
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_reference import one_by_one, seen
from tiny_tokenizers import byte_level
from tiny_training import pack_rows

from sftrec_jax.config import PromptConfig
from sftrec_jax.data.prompts import PromptBuilder, prompt_builder
from sftrec_jax.data.segments import Segments
from sftrec_jax.data.windows import Windows
from sftrec_jax.data.writers import PlainWriter
from sftrec_jax.items.naming import atomic_codes, numeric_codes, title_codes

TITLES = np.asarray(["Toy Story (1995)", "Heat (1995)", "War of the Worlds (2005)", "the quick brown fox", "Toy", "Heat"], object)
CODINGS = {
    "atomic": lambda tokenizer: atomic_codes([str(i) for i in range(6)], TITLES, tokenizer),
    "titles": lambda tokenizer: title_codes(TITLES, tokenizer),
    "titles cut short": lambda tokenizer: title_codes(TITLES, tokenizer, 6),
    "numbers": lambda tokenizer: numeric_codes(np.asarray([0, 7, 11, 12, 100, 101]), TITLES, tokenizer),
}
FRAMES = {"text after": ("Took:\n", " ;\n", "Next:\n"), "no suffix": ("Took:\n", "\n", ""), "bare": ("", "", "")}


@functools.cache
def builder(coding: str, history: str, frame: str, most: int, stride: int, windows: str, context: int) -> PromptBuilder:
    tokenizer = byte_level()
    config = PromptConfig("instruct", most, windows, history, *FRAMES[frame], stride)  # type: ignore[arg-type]
    return prompt_builder(config, CODINGS[coding](tokenizer), tokenizer, context)


def segments(made: PromptBuilder, histories: list[list[int]], begins: list[int]) -> Segments:
    edges = np.cumsum([0, *map(len, histories)])
    firsts = edges[:-1] + np.asarray(begins)
    items = np.asarray([i for h in histories for i in h], np.int32)
    return made.segments(items, Windows(edges[:-1], firsts, edges[1:]))


@functools.cache
def title_tokens() -> list[list[int]]:
    tokenizer = byte_level()
    return [tokenizer.encode(str(title), add_special_tokens=False) for title in TITLES]


def expected(made: PromptBuilder, history: list[int], begin: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of each target, by the rules of PromptConfig in a plain loop."""
    writer = made.writer
    assert isinstance(writer, PlainWriter)

    def answer(item: int) -> list[int]:
        return [t for t in made.codes.codes[item].tolist() if t >= 0]

    def shown(item: int) -> list[int]:
        return (answer(item) if writer.shown == "tokens" else title_tokens()[item]) + writer.separator.tolist()

    head, suffix = made.beginning.tolist(), made.suffix.tolist()
    room = made.context - len(head) - len(suffix) - made.codes.codes.shape[1]
    kept = made.max_history + 1 - made.stride
    first = max(begin, 1 if made.windows == "all" else max(1, len(history) - made.max_history))
    start, found = 0, []

    def fits(s: int, p: int, items: int, tokens: int) -> bool:
        return p - s <= items and sum(len(shown(i)) for i in history[s:p]) <= tokens

    for p in range(first, len(history)):
        if not fits(start, p, made.max_history, room):
            least = next(s for s in range(p) if fits(s, p, made.max_history, room))
            wanted = next((s for s in range(p) if fits(s, p, kept, room * kept // made.max_history)), p - 1)
            start = max(start, least, wanted)
        prompt = head + [t for i in history[start:p] for t in shown(i)] + suffix
        found.append((prompt, answer(history[p])))
    return found


HISTORIES = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=4)
LIMITS = st.sampled_from([(3, 1), (3, 2), (4, 2), (4, 4), (6, 3), (100, 1), (100, 50)])


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("coding", CODINGS)
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["titles", "tokens"]), HISTORIES, LIMITS, st.sampled_from(["all", "last"]),
       st.sampled_from([60, 80, 1000]), st.integers(0, 3), st.integers(0, 4))  # fmt: skip
def test_targets_see_what_they_would_see_alone(coding, frame, history, histories, limits, windows, context, begin, row) -> None:
    made = builder(coding, history, frame, *limits, windows, context)
    begins = [min(begin, len(h)) for h in histories]
    wanted = [expected(made, h, b) for h, b in zip(histories, begins, strict=True)]
    flat = [pair for pairs in wanted for pair in pairs]
    shared = segments(made, histories, begins)
    assert int(shared.target_items.sum()) == len(flat) and int(shared.targets.sum()) == sum(len(a) for _, a in flat)
    alone = shared.apart()
    assert alone.lengths.tolist() == [len(p) + len(a) - 1 for p, a in flat] == alone.lengths_apart.tolist()
    of_each = np.split(alone.lengths, np.cumsum(shared.target_items))[: len(shared)]
    assert shared.lengths_apart.tolist() == [part.sum() for part in of_each]
    # In rows as small as the largest target allows, and in larger ones.
    least = int(alone.lengths.max(initial=1))
    length, targets = least + row * 17, shared.longest + row * 3
    parts = shared.within(length, max(targets, 1))
    assert parts.lengths_apart.sum() == alone.lengths.sum()
    assert (parts.lengths <= length).all() and (parts.targets <= max(targets, 1)).all()
    for form, size, room in (
        (parts, length, max(targets, 1)),
        (shared, int(shared.lengths.max(initial=1)), 200),
        (alone, least, 20),
    ):
        batch = form.pack([np.asarray([i]) for i in range(len(form))], size, room)
        assert (batch.segments > 0).sum(axis=1).tolist() == form.lengths.tolist()
        assert (batch.weights > 0).sum(axis=1).tolist() == form.targets.tolist()
        assert seen(batch) == one_by_one(flat)
    if limits[0] == 100 and context == 1000 and len(flat) > len(histories):
        assert len(shared) < len(alone) and shared.lengths.sum() < alone.lengths.sum()


@pytest.mark.parametrize("coding", CODINGS)
def test_a_branch_that_is_the_trunk_takes_no_tokens(coding: str) -> None:
    """Without text between history and target a history costs what its longest prompt does."""
    made = builder(coding, "tokens", "bare", 100, 1, "all", 1000)
    history = [0, 1, 2, 3, 4, 5, 1, 2]
    shared = segments(made, [history], [0])
    assert shared.lengths.tolist() == [shared.apart().lengths[-1]]
    branches = shared.pack([np.asarray([0])], int(shared.lengths[0]), 200).branches
    assert not branches.any()


@functools.cache
def plain(form: Literal["stream", "instruct"]) -> PromptBuilder:
    tokenizer = byte_level()
    return prompt_builder(PromptConfig(form, 4), CODINGS["titles"](tokenizer), tokenizer, 1000)


@settings(max_examples=30, deadline=None)
@given(HISTORIES, st.integers(0, 9), st.integers(0, 20), st.sampled_from(["stream", "instruct"]))
def test_rows_equal_those_written_in_a_loop(histories: list[list[int]], seed: int, more: int, form) -> None:
    """Several examples a row, empty rows, targets at their places: every array, against the reference writer."""
    made = plain(form)
    parts = segments(made, histories, [0] * len(histories))
    parts = parts if form == "stream" else parts.apart()
    examples = parts.examples()
    order = np.random.default_rng(seed).permutation(len(examples))
    rows = np.array_split(order, 3)
    lengths, targets = (max(int(x[row].sum()) for row in rows) + more + 1 for x in (parts.lengths, parts.targets))
    ours, reference = parts.pack(rows, lengths, targets), pack_rows(examples, rows, lengths, targets)
    for name, value in vars(reference).items():
        array = getattr(ours, name)
        assert array.dtype == value.dtype and array.shape == value.shape
        np.testing.assert_array_equal(array, value, err_msg=name)


def test_overfull_row_is_refused() -> None:
    parts = segments(builder("atomic", "tokens", "bare", 100, 1, "all", 1000), [[0, 1, 2], [3, 4]], [0, 0])
    assert parts.lengths.tolist() == [3, 2]
    with pytest.raises(ValueError, match="row 0 needs 5 tokens, 3 targets; it has 4, 8"):
        parts.pack([np.asarray([0, 1])], 4, 8)
    with pytest.raises(ValueError, match="row 1 needs 3 tokens, 2 targets; it has 4, 1"):
        parts.pack([np.asarray([], np.int64), np.asarray([0])], 4, 1)
