"""Prompts as templates: against plain Python that writes the same texts, and against examples one by one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_reference import one_by_one, seen
from tiny_tokenizers import byte_level

from sftrec_jax.config import PromptConfig
from sftrec_jax.data.dataset import Dataset, ItemText
from sftrec_jax.data.prompts import PromptBuilder, prompt_builder
from sftrec_jax.data.told import NOTHING
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.encode import TitleEncoder
from sftrec_jax.items.naming import atomic_codes, title_codes

PROMPTS = Path(__file__).parent.parent / "configs" / "prompts"
TITLES = ["Toy Story (1995)", "Héro \u202bשלום\u202c", "War of the Worlds 🎬", "Up", "R&amp;B &lt;3", "<|end|> of it"]
GENRES = ["Toys|Fun", "Drama", "War|Drama", "Fun", "Music", "Drama"]
LENGTHS = [6, 3, 5]
DAY = 86_400
TIMES = np.asarray([0, 10, 20 * 60, 5 * 3600, 3 * DAY, 70 * DAY, 5, 5, 900 * DAY, 0, 1, 2, 3, 4], np.int64)
RATINGS = np.asarray([4, 4.5, 1, 2, 3, 5, 0.5, 5, 5, 1, 2, 3, 4, np.nan], np.float32)
GAPS = [None, "moments", "19 minutes", "4 hours", "2 days", "2 months", None, "moments", "2 years", None, *["moments"] * 4]


def dataset() -> Dataset:
    offsets = np.cumsum([0, *LENGTHS])
    items = np.asarray([0, 1, 2, 3, 4, 5, 5, 4, 3, 0, 2, 4, 1, 0], np.int32)
    lengths = np.asarray(LENGTHS)
    return Dataset(
        user_ids=np.asarray(["a", "b", "c"], object),
        item_ids=np.asarray([str(i) for i in range(6)], object),
        titles=np.asarray(TITLES, object),
        offsets=offsets,
        items=items,
        timestamps=TIMES,
        train_end=lengths,
        valid_position=np.full(3, -1),
        test_position=np.full(3, -1),
        report={},
        text=ItemText(*(np.full(6, "", object) for _ in range(2)), np.arange(6), {"genres": np.asarray(GENRES, object)}),
        ratings=RATINGS,
        profiles={
            "favourites": np.asarray(["Drama, Fun", "", "War"], object),
            "tags": np.asarray(["", "", "loud, long"], object),
            "age": np.asarray(["25", "", "61"], object),
            "occupation": np.asarray(["baker", "", ""], object),
            "about": np.asarray(["", "", "Likes\nfilms {{ x }}."], object),
        },
    )


HEAD = "Items that the user took, oldest first:\n"
NEXT = "The next item:\n"
Text = str | int
"""Words, or the tokens of an item."""


def rating(at: int) -> str:
    return "" if np.isnan(RATINGS[at]) else f": {RATINGS[at]:g}"


def likes(user: int) -> str:
    data = dataset()
    likes, tags = data.profiles["favourites"][user], data.profiles["tags"][user]
    return (f"The user likes {likes}.\n" if likes else "") + (f"The user calls items {tags}.\n" if tags else "") + HEAD


def person(user: int) -> str:
    return ("Age 25. Works as baker. \n", "\n", "Age 61. Likes films {{ x }}.\n")[user] + HEAD


REFERENCE: dict[str, tuple[Callable[[int], str], Callable[[int, int, int], list[Text]], str]] = {
    # What stands before the history of a user, an item (place in the prompt from 1, in the data, item), what stands after.
    "titles": (lambda user: HEAD, lambda n, at, item: [f"{TITLES[item]}\n"], NEXT),
    "tokens": (lambda user: "The user took, oldest first:", lambda n, at, item: [" ", item, ""], f"\n{NEXT}"),
    "both": (lambda user: HEAD, lambda n, at, item: [f"{TITLES[item]} ", item, "\n"], NEXT),
    "numbered": (lambda user: HEAD, lambda n, at, item: [f"{n}. ", f"{TITLES[item]}\n"], NEXT),
    "rated": (
        lambda user: "Items that the user took, oldest first, with the user's rating:\n",
        lambda n, at, item: [f"{TITLES[item]}{rating(at)}\n"],
        NEXT,
    ),
    "timed": (lambda user: HEAD, lambda n, at, item: [(f"{GAPS[at]} later: " if GAPS[at] else "") + f"{TITLES[item]}\n"], NEXT),
    "profile": (likes, lambda n, at, item: [f"{TITLES[item]}\n"], NEXT),
    "people": (person, lambda n, at, item: [f"{TITLES[item]}\n"], NEXT),
}


def made(name: str | Path, most: int = 100, stride: int = 1, context: int = 1000, coding: str = "atomic") -> tuple[Any, ...]:
    tokenizer = byte_level()
    data = dataset()
    titles = np.asarray(TITLES, object)
    codes = atomic_codes(data.item_ids, titles, tokenizer) if coding == "atomic" else title_codes(titles, tokenizer)
    config = PromptConfig("instruct", most, stride=stride)
    template = name if isinstance(name, Path) else PROMPTS / f"{name}.j2"
    return prompt_builder(config, codes, tokenizer, context, data, str(template)), data, codes, tokenizer


def test_every_template_of_the_repository_is_tested() -> None:
    assert {path.stem for path in PROMPTS.glob("*.j2")} == set(REFERENCE)


def written(name: str, user: int, begin: int, end: int, data: Dataset, codes: ItemCodes, tokenizer: Any) -> list[int]:
    """The prompt for items begin to end of a user, in a plain loop."""
    encode = TitleEncoder(tokenizer, codes.new_tokens)
    head, entry, tail = REFERENCE[name]
    parts: list[Text] = [head(user)]
    for n, at in enumerate(range(begin, end), start=1):
        parts += entry(n, int(data.offsets[user]) + at, int(data.items[data.offsets[user] + at]))
    tokens = [tokenizer.bos_token_id]
    for part in [*parts, tail]:
        tokens += encode.texts([part])[0] if isinstance(part, str) else codes.codes[part][codes.codes[part] >= 0].tolist()
    return tokens


@pytest.mark.parametrize("name", list(REFERENCE))
def test_prompts_say_what_the_template_says(name: str) -> None:
    builder, data, codes, tokenizer = made(name, most=4)
    for user, length in enumerate(LENGTHS):
        for end in range(length + 1):
            prompt = builder.prompt(data.history(user)[:end], data.told(user, end))
            assert prompt.tolist() == written(name, user, max(0, end - 4), end, data, codes, tokenizer)
    assert builder.beginning.tolist() == prompt.tolist()[: len(builder.beginning)]


@pytest.mark.parametrize("coding", ["atomic", "titles"])
@pytest.mark.parametrize("limits", [(100, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("name", list(REFERENCE))
def test_training_asks_as_inference_does(name: str, limits: tuple[int, int], coding: str) -> None:
    """Every target of shared, divided and single segments sees the very prompt that recommending would write."""
    builder, data, codes, tokenizer = made(name, *limits, coding=coding)
    shared = builder.segments(data.items, data.training, data.told_in_training)
    pairs = []
    if limits[1] == 1:
        for user, length in enumerate(LENGTHS):
            for end in range(1, length):
                answer = codes.codes[data.history(user)[end]]
                prompt = builder.prompt(data.history(user)[:end], data.told(user, end))
                pairs.append((prompt.tolist(), answer[answer >= 0].tolist()))
    else:  # windows move by two items: as the single segments say, each the loop's prompt for its window
        w = shared.windows
        users = np.searchsorted(data.offsets, w.begin, side="right") - 1
        for begin, first, end, user in zip(*(x.tolist() for x in (w.begin, w.first, w.end, users)), strict=True):
            for at in range(first, end):
                own = data.offsets[user]
                prompt = written(name, user, begin - int(own), at - int(own), data, codes, tokenizer)
                answer = codes.codes[data.items[at]]
                pairs.append((prompt, answer[answer >= 0].tolist()))
    expected = one_by_one(pairs)
    alone = shared.apart()
    assert alone.lengths.tolist() == alone.lengths_apart.tolist()
    least = int(alone.lengths.max())
    parts = shared.within(least + 40, shared.longest)
    assert shared.lengths_apart.sum() == alone.lengths.sum() == parts.lengths_apart.sum()
    for form in (shared, alone, parts):
        batch = form.pack([np.asarray([i]) for i in range(len(form))], int(form.lengths.max()), 200)
        assert (batch.segments > 0).sum(1).tolist() == form.lengths.tolist()
        assert seen(batch) == expected
    if limits[0] == 100:
        assert len(shared) == 3 and shared.lengths.sum() < alone.lengths.sum()


@pytest.mark.parametrize("name", ["numbered", "people", "timed"])
def test_oldest_items_go_where_the_context_is_short(name: str) -> None:
    long, data, codes, tokenizer = made(name)
    lengths = [len(long.prompt(data.history(0)[6 - n :], data.told(0).last(n))) + 1 for n in range(1, 7)]
    # Numbers count with the longest (of 100 items), so a prompt may be shorter than it had to be.
    slack = len("100") - len("1") if name == "numbered" else 0
    for context in range(lengths[0] + slack, lengths[-1] + 1):
        builder = made(name, context=context)[0]
        prompt = builder.prompt(data.history(0), data.told(0)).tolist()
        kept = next(n for n in range(6, 0, -1) if prompt == written(name, 0, 6 - n, 6, data, codes, tokenizer))
        assert len(prompt) < context and builder.counts["items_cut_to_context"] == 6 - kept
        assert kept == 6 or lengths[kept] > context - slack * (kept + 1)


def test_what_is_not_told_is_left_out() -> None:
    builder, data, _, tokenizer = made("rated")
    assert "4.5" not in tokenizer.decode(builder.prompt(data.history(0), NOTHING))
    assert "4.5" in tokenizer.decode(builder.prompt(data.history(0), data.told(0)))
    assert builder.writer.told == ["rating"] and made("people")[0].writer.profile == ["about", "age", "occupation"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{{ title }}", "line 1: stands outside of the blocks head, number, entry, tail"),
        ("{% block head %}x{% endblock %}", "has no block entry"),
        ("{% block entries %}{{ title }}{% endblock %}", "there is no block 'entries'"),
        (
            "{% block entry %}{{ titel }}{% endblock %}",
            "there is no field 'titel'; it has title, item, genres, rating",
        ),
        ("{% block entry %}{{ age }}{% endblock %}", "there is no field 'age'"),
        ("{% block entry %}x{% endblock %}{% block head %}{{ agee }}{% endblock %}", "profile.columns, profile.favourites"),
        ("{% block entry %}x{% endblock %}{% block tail %}{{ title }}{% endblock %}", "there is no field 'title'; it has none"),
        ("{% block entry %}{{ title.__class__.__mro__ }}{% endblock %}", "SecurityError"),
        ("{% block entry %}{{ ''.__class__ }}{% endblock %}", "SecurityError"),
        ("{% block entry %}{{ cycler.__init__.__globals__.os.popen('id') }}{% endblock %}", "there is no field 'cycler'"),
        ("{% block entry %}{{ namespace.__init__.__globals__.os.popen('id') }}{% endblock %}", "SecurityError"),
        ("{% block entry %}{% include 'x' %}{% endblock %}", "line 1: a template stands by itself"),
        ("{% block entry %}{{ title | nosuch }}{% endblock %}", "No filter named 'nosuch'"),
        ("{% block entry %}{% endfor %}{% endblock %}", "line 1: Encountered unknown tag 'endfor'"),
        ("{% block entry %}{{ title * 1000000000 }}{% endblock %}", "SecurityError"),
        ("{% block entry %}{{ 10 ** 10 ** 10 }}{% endblock %}", "SecurityError"),
        ("{% block entry %}{% for i in range(1000000000) %}x{% endfor %}{% endblock %}", "OverflowError"),
    ],
)
def test_templates_that_cannot_be(text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "own.j2"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        builder, data, *_ = made(path)
        builder.prompt(data.history(0), data.told(0))
    assert str(path) in str(caught.value) and error in str(caught.value) and "\n" not in str(caught.value)


CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def test_chat(tmp_path: Path) -> None:
    tokenizer = byte_level()
    data = dataset()
    codes = title_codes(np.asarray(TITLES, object), tokenizer)
    config = PromptConfig("instruct", chat=True, system="Recommend.")
    with pytest.raises(UserError, match="prompt.chat: the tokenizer has no chat template"):
        prompt_builder(config, codes, tokenizer, 1000)
    tokenizer.chat_template = CHAT
    for template in (None, str(PROMPTS / "titles.j2")):
        builder: PromptBuilder = prompt_builder(config, codes, tokenizer, 1000, data, template)
        text = tokenizer.apply_chat_template(
            [{"role": "system", "content": "Recommend."}, {"role": "user", "content": f"{HEAD}Up\n{TITLES[0]}\n{NEXT}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        prompt = builder.prompt(np.asarray([3, 0]))
        assert tokenizer.decode(prompt, clean_up_tokenization_spaces=False) == text
        start, end = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
        assert prompt[0] == start and (prompt == start).sum() == 3 and (prompt == end).sum() == 2
        # A title's words are words, even if they spell a special token.
        assert (builder.prompt(np.asarray([5])) == end).sum() == 2
    tokenizer.chat_template = "{{ messages[0].content }}{{ messages[1].content | upper }}"
    with pytest.raises(UserError, match="does not write the user's words once|prompt.chat: false"):
        tokenizer.chat_template = "{{ messages[0].content }}"
        prompt_builder(config, codes, tokenizer, 1000)


@pytest.mark.parametrize("values", [{"chat": True}, {"templates": ("x.j2",)}])
def test_a_stream_has_no_words(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="prompt.format is stream, which has no words"):
        PromptConfig(**values)


@pytest.mark.parametrize("history", ["titles", "both"])
def test_history_without_a_template_is_the_template_of_that_name(history: Any) -> None:
    templated, data, codes, tokenizer = made(history, most=4)
    plain = prompt_builder(PromptConfig("instruct", 4, history=history), codes, tokenizer, 1000, data)
    for user in range(len(LENGTHS)):
        assert plain.prompt(data.history(user)).tolist() == templated.prompt(data.history(user)).tolist()
