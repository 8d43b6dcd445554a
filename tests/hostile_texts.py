"""Hostile item texts: titles and ids through everything that turns them into tokens; index.json; Jinja templates."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from hostile_bytes import TEXT, WORDS, cell, damaged, zipped
from tiny_tokenizers import byte_fallback, byte_level
from transformers import PreTrainedTokenizerFast

from sftrec_jax.config import PromptConfig
from sftrec_jax.data.dataset import Dataset, ItemText
from sftrec_jax.data.prompts import prompt_builder
from sftrec_jax.data.repair import repaired
from sftrec_jax.data.templates import PromptTemplate, item_mark, plain
from sftrec_jax.errors import UserError
from sftrec_jax.items.encode import TitleEncoder
from sftrec_jax.items.index_file import read_index
from sftrec_jax.items.naming import atomic_codes, item_token, title_codes
from sftrec_jax.items.paths import path_codes
from sftrec_jax.items.titles import TitleIndex, distinct_titles

IDS = [f"i{n}" for n in range(6)]
ENTRY = (
    "{% block head %}To choose: {% endblock %}{% block entry %}{{ title }} {{ genre }} {{ item }}; {% endblock %}"
    "{% block tail %}next:{% endblock %}"
)


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One of its own each time, as tokens are added to it."""
    return byte_level() if kind == "level" else byte_fallback()


def make_titles(rng: random.Random, folder: Path) -> list[list[str]]:
    """Ids, titles and genres; [n] each."""
    count = rng.choice([1, 3, 6])
    pools = [
        WORDS,
        WORDS,
        WORDS,
        [rng.choice(WORDS) + rng.choice(WORDS)],
        [chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))],
    ]
    texts = [[rng.choice(rng.choice(pools)) if rng.random() < 0.7 else f"Title {n}" for n in range(count)] for _ in range(3)]
    texts[0] = (
        [text or str(n) for n, text in enumerate(texts[0])]
        if rng.random() < 0.3
        else [f"{text}{n}" for n, text in enumerate(texts[0])]
    )
    (folder / "own.j2").write_text(ENTRY, encoding="utf-8")
    return texts


def read_titles(rng: random.Random, folder: Path, given: list[list[str]]) -> None:
    """Names items in one way, finds them by title again, and writes them into prompts."""
    raw, genres = repaired(pl.Series(given[1], dtype=pl.String))[0].to_list(), np.asarray(given[2], object)
    ids = np.asarray(given[0], object)
    titles = distinct_titles([title if title.strip() else name for title, name in zip(raw, given[0], strict=True)], ids)
    assert len(set(titles.tolist())) == len(titles), "titles are not distinct"
    index = TitleIndex(titles, ids)
    for place, title in enumerate(titles.tolist()):
        assert index.find(title) == place, f"{title!r} is not found"
    chosen = rng.choice(titles.tolist())
    assert list(titles).index(chosen) in index.split(chosen) or ";" in chosen or not chosen.strip()
    try:
        index.split(rng.choice(WORDS) + chosen)
    except UserError as error:
        assert str(error).isprintable()
    tokens = tokenizer(rng.choice(["level", "fallback"]))
    special = set(tokens.all_special_ids)
    for row in TitleEncoder(tokens)(titles.tolist()):
        assert not special & set(row) or tokens.unk_token_id in row, "a title gave a special token"
    way = rng.randrange(4)
    if way == 0:
        codes = title_codes(titles, tokens, rng.choice([2, 64]), ids)
    elif way == 1:
        codes = title_codes(titles, tokens, 64, ids, names=genres)
    elif way == 2:
        codes = atomic_codes(ids, titles, tokens, rng.choice(["text", "mean"]))
        for name, (code,) in zip(ids, codes.codes.tolist(), strict=True):
            assert tokens.convert_ids_to_tokens(code) == item_token(str(name))
    else:
        codes = path_codes([[f"<a_{n}>"] for n in range(len(ids))], titles, ids, tokens, "mean")
    template = rng.choice([None, str(folder / "own.j2")])
    history = rng.choice(["titles", "tokens", "both"])
    builder = prompt_builder(
        PromptConfig("instruct", 4, history=history), codes, tokens, 300, data_of(ids, titles, genres), template
    )
    prompt = builder.prompt(np.arange(len(ids)))
    assert len(prompt) <= 300


def data_of(ids: np.ndarray, titles: np.ndarray, genres: np.ndarray) -> Dataset:
    nothing, count = np.asarray([""] * len(ids), object), len(ids)
    return Dataset(
        user_ids=np.asarray(["u"], object), item_ids=ids, titles=titles, offsets=np.asarray([0, count]),
        items=np.arange(count, dtype=np.int32), timestamps=np.arange(count), train_end=np.asarray([count]),
        valid_position=np.asarray([-1]), test_position=np.asarray([-1]), report={},
        text=ItemText(nothing, nothing, np.arange(count), {"genre": genres}),
    )  # fmt: skip


def make_index(rng: random.Random, folder: Path) -> Path:
    table: Any = {}
    for n, name in enumerate(IDS):
        tokens: Any = [f"<a_{n % 2}>", f"<b_{n % 3}>"]
        if rng.random() < 0.1:
            tokens = rng.choice([[], None, "a", [1], [[]], {"a": 1}, [rng.choice(WORDS)], ["\ud800"], tokens * 1000, [name]])
        table[cell(rng, name if rng.random() < 0.98 else str(n))] = tokens
    if rng.random() < 0.1:
        table = rng.choice([[], None, 1, [table], {"a": table}, list(table.values())])
    data = damaged(rng, json.dumps(table, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"), TEXT, 0.5)
    packed = rng.random() < 0.1
    path = folder / ("i.json.gz" if packed else "i.json")
    path.write_bytes(zipped(rng, data) if packed else data)
    return path


def read_codes(rng: random.Random, folder: Path, path: Path) -> None:
    paths = read_index(path, IDS, rng.choice(["id", "id", "row"]))
    titles = np.asarray([f"Title {n}" for n in range(len(IDS))], object)
    path_codes(paths, titles, IDS, tokenizer("level"), rng.choice(["text", "mean"]))


BODIES = [
    "{{ title }}",
    "{{ item }}",
    "{{ title | upper | truncate(9) }}",
    "{% for h in history %}{{ loop.index }} {{ h }}\n{% endfor %}",
    "{{ rating + 1 }}",
    "{{ title.__class__ }}",
    "{{ title['__class__'] }}",
    "{{ title|attr('__class__') }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('escaped') }}",
    "{{ lipsum.__globals__['os'].mkdir('escaped') }}",
    "{{ self.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__ }}",
    "{{ range(10).__class__ }}",
    "{{ title.format.__self__ }}",
    "{{ '{0.__class__}'.format(title) }}",
    "{{ '{0.__class__.__mro__}'.format_map({'0': title}) }}",
    "{{ title|map(attribute='__class__')|list }}",
    "{{ (title|map('attr', '__class__'))|list }}",
    "{{ dict.__mro__ }}",
    "{{ 'a' * 999999999 }}",
    "{{ 'a' * 99999 * 99999 }}",
    "{{ [1] * 999999999 }}",
    "{{ 2 ** 99999999 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 'a'.center(999999999) }}",
    "{{ 'a'.ljust(999999999) }}",
    "{{ 'a'|center(999999999) }}",
    "{{ 'a'|indent(999999999) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%0*d' % (999999999, 1) }}",
    "{{ '%999999999s'|format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ 1|string|zfill }}",
    "{{ '1'.zfill(999999999) }}",
    "{{ '\t'.expandtabs(999999999) }}",
    "{{ lipsum(n=9999999) }}",
    "{{ lipsum(n=3, max=99999999) }}",
    "{{ range(999999999)|list }}",
    "{{ range(99999)|sum }}",
    "{{ range(99999)|join('a' * 99) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1, 2]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x.join(ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x|join(ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x|map('upper')|list|string %}{% endfor %}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{{ 'x'|tojson }}",
    "{{ (1, 2)|pprint }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for i in [[1]] recursive %}{{ loop(i) }}{% endfor %}",
    "{% for a in title %}{% for b in title %}{% for c in title %}x{% endfor %}{% endfor %}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% from 'a' import b %}",
    "{% do 1 %}",
    "{% debug %}",
    "{% call f() %}{% endcall %}",
    "{% filter upper %}{{ item }}{% endfilter %}",
    "{{ item[0] }}",
    "{{ item|reverse }}",
    "{{ item ~ item }}",
    "{{ 1 / 0 }}",
    "{{ 1 // 0 }}",
    "{{ 1 % 0 }}",
    "{{ title + 1 }}",
    "{{ title.x.y }}",
    "{{ title() }}",
    "{{ none.x }}",
    "{{ [].pop() }}",
    "{{ [].append(1) }}",
    "{{ title|nosuch }}",
    "{{ title is nosuch }}",
    "{{ title|batch(3)|list }}",
    "{{ title|int(base=99) }}",
    "{{ title|slice(0)|list }}",
    "{{ title|batch(0)|list }}",
    "{{ title|slice(999999999)|list }}",
    "{{ title|wordwrap(0) }}",
    "{{ title|round(999999999) }}",
    "{{ 1.5|round(400) }}",
    "{{ title|urlize }}",
    "{{ title|xmlattr }}",
    "{{ {'a': 1}|xmlattr }}",
    "{{ title|sort|first }}",
    "{{ []|first }}",
    "{{ []|max }}",
    "{{ title|groupby('x') }}",
    "{{ title|filesizeformat }}",
    "{{ title|striptags|e }}",
    "{{ 1 < 'a' }}",
    "{{ [1, 'a']|sort }}",
    "{{ title[99] }}",
    "{{ title[::0] }}",
    "{{ not }}",
    "{{",
    "{%",
    "{#",
    "{% raw %}",
    "{% block x %}{% endblock %}",
    "{% block head %}{% endblock %}{% block head %}{% endblock %}",
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{{ " + "not " * 5000 + "1 }}",
    "{{ " + "1 + " * 5000 + "1 }}",
    "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "{{ " + "9" * 5000 + " }}",
    "{{ '\\ud800' }}",
    "{{ '\\N{BULLET}' }}",
    "{{ '\ue0001\ue001' }}",
    "{{ a }}{{ b }}",
]


def make_template(rng: random.Random, folder: Path) -> Path:
    body = rng.choice(BODIES) + (rng.choice(BODIES) if rng.random() < 0.2 else "")
    blocks = rng.random() < 0.5
    text = f"{{% block entry %}}{body}{{% endblock %}}" if blocks else body
    path = folder / ("entry.j2" if blocks else "own.j2")
    path.write_bytes(damaged(rng, text.encode("utf-8"), TEXT, 0.6))
    return path


def read_template(rng: random.Random, folder: Path, path: Path) -> None:
    if path.name == "own.j2":
        fields = {
            "title": "A title",
            "item": item_mark(3),
            "rating": 4,
            "history": [{"title": "T", "item": item_mark(1)}] * 3,
            "genre": None,
        }
        template = PromptTemplate(path, tuple(fields))
        text = cell(rng, "A title")
        parts = template.render({**fields, "title": plain(text)})
        assert all(isinstance(part, str) or part in (1, 3) for part in parts)
        return
    ids = np.asarray(IDS, object)
    tokens = tokenizer("level")
    titles = np.asarray([f"Title {n}" for n in range(len(IDS))], object)
    codes = atomic_codes(ids, titles, tokens)
    builder = prompt_builder(PromptConfig("instruct", 4), codes, tokens, 300, data_of(ids, titles, titles), str(path))
    builder.prompt(np.arange(len(ids)))
