import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, byte_fallback, byte_level

from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.encode import TitleEncoder
from sftrec_jax.items.naming import atomic_codes, item_token, terminator, title_codes
from sftrec_jax.items.titles import TitleIndex, distinct_titles, match_title, split_history

HOSTILE = ["Heat", "</s>", "<|end|> of it", "<|item_1|>", "a\nb\r\nc", "\u2028x", "naïve 日本", "<|<|end|>end|>", "[2]", "x;y"]


def text(values: list[str]) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def same(a: str) -> str:
    return " ".join(a.casefold().split())


def test_second_title_gets_a_number() -> None:
    titles = ["War of the Worlds (2005)", "Heat", "War of the Worlds (2005)", "heat ", "Heat [2]"]
    found = distinct_titles(titles, ["64997", "10", "34048", "9", "1"])
    assert found.tolist() == ["War of the Worlds (2005) [2]", "Heat [3]", "War of the Worlds (2005)", "heat ", "Heat [2]"]


@given(st.lists(st.sampled_from(["a", "A", "a ", "a [2]", "a [3]", "b", "", "B [2]"]), min_size=1, max_size=14), st.randoms())
def test_titles_become_distinct_and_do_not_depend_on_order(titles: list[str], random) -> None:
    ids = [str(i) for i in range(len(titles))]
    found = distinct_titles(titles, ids)
    assert len({same(t) for t in found}) == len(titles)
    for old, new in zip(titles, found, strict=True):
        assert new == old or new.startswith(old.rstrip() + " [")
    for key in {same(t) for t in titles}:
        assert key in {same(t) for t in found}
    order = list(range(len(titles)))
    random.shuffle(order)
    again = distinct_titles([titles[i] for i in order], [ids[i] for i in order])
    assert again.tolist() == [found[i] for i in order]


def test_history_is_split_at_the_longest_titles() -> None:
    titles = ["A; B", "A", "B", "B; C", "Heat (1995)", "heat"]
    assert split_history("A; B; C", titles) == [1, 3]  # after "A; B" no item is called "C"
    assert split_history("A; B", titles) == [0]
    assert split_history("b ;a;;  HEAT (1995) ; ", titles) == [2, 1, 4]
    assert split_history("Heat;heat", titles) == [5, 5]
    assert split_history(" ", titles) == []


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["a", "a;b", "b", "c;;d", "Toy Story (1995)"]), max_size=6))
def test_joined_titles_are_read_back_as_the_same_text(history: list[str]) -> None:
    titles = ["a", "a;b", "b", "c;;d", "Toy Story (1995)"]
    found = TitleIndex(titles).split(";".join(history))
    assert ";".join(titles[i] for i in found) == ";".join(history)


def test_unknown_title_names_the_nearest() -> None:
    titles = ["Matrix, The (1999)", "The OA", "Toy Story (1995)", "Toy Story 2 (1999)", "Heat (1995)"]
    with pytest.raises(UserError, match=r"'Toy Stroy'; the nearest titles are 'Toy Story \(1995\)'; 'Toy Story 2") as caught:
        split_history("Heat (1995); Toy Stroy", titles)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"are 'Matrix, The \(1999\)'"):
        match_title("the matrix", titles)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["text", "mean"])
def test_atomic_tokens_are_read_and_written_as_one(kind: str, init) -> None:
    tokenizer, base = KINDS[kind](), KINDS[kind]()
    ids, titles = ["10", "1", "B00 x", "1|><|item_1"], ["Toy Story", "the <|item_10|>", "Heat\n", "</s> <|end|>"]
    codes = atomic_codes(ids, text(titles), tokenizer, init)
    assert codes.codes.shape == (4, 1) and codes.new_token_ids.tolist() == list(range(len(base), len(base) + 4))
    assert len(tokenizer) == len(base) + 4
    for item, token in zip(ids, codes.codes[:, 0].tolist(), strict=True):
        name = item_token(item)
        assert tokenizer.encode(f"{name}{name} ", add_special_tokens=False)[:2] == [token, token]
        assert tokenizer.decode([token], skip_special_tokens=True) == name
        assert tokenizer.convert_ids_to_tokens(token) == codes.new_tokens[codes.new_token_ids.tolist().index(token)]
    if init == "text":
        expected = [base.encode(t.replace("\n", " "), add_special_tokens=False) for t in titles]
        assert list(codes.init_tokens[:3]) == [tuple(e) for e in expected[:3]]
        assert not set(codes.init_tokens[3]) & set(base.all_special_ids) and codes.init_tokens[3]
    else:
        assert codes.init_tokens == ((),) * 4


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1, max_size=6, unique=True))
def test_any_item_id_has_a_token_that_survives(ids: list[str]) -> None:
    assert item_token("B00-x_7") == "<|item_B00-x_7|>" and item_token("é%") == "<|item_%C3%A9%25|>"
    tokenizer = byte_level()
    codes = atomic_codes(ids, text([str(i) for i in range(len(ids))]), tokenizer)
    sequence = codes.codes[:, 0].tolist()
    shown = "".join(map(item_token, ids))
    assert tokenizer.encode(shown, add_special_tokens=False) == sequence
    assert tokenizer.decode(sequence).replace(" ", "") == shown


def test_atomic_errors() -> None:
    tokenizer = byte_level()
    with pytest.raises(UserError, match="'2': the title ' ' has no tokens; give it a title, or set items.init: mean"):
        atomic_codes(["1", "2"], text(["a", " "]), tokenizer)
    with pytest.raises(UserError, match="1 item ids occur more than once"):
        atomic_codes(["1", "1"], text(["a", "b"]), tokenizer)
    atomic_codes(["1"], text(["a"]), tokenizer)
    with pytest.raises(UserError, match=r"'1': the tokenizer has a token <\|item_1\|> already"):
        atomic_codes(["1"], text(["a"]), tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_title_codes_are_the_titles_alone_and_a_terminator(kind: str) -> None:
    tokenizer = KINDS[kind]()
    titles = ["Toy Story (1995)", "Toy", "Toy Story", "Heat  ", "\nHeat", "日本"]
    codes = title_codes(text(titles), tokenizer)
    end = tokenizer.encode("\n", add_special_tokens=False)[0] if kind == "byte_level" else tokenizer.eos_token_id
    for title, row in zip(titles, codes.codes.tolist(), strict=True):
        row = [t for t in row if t >= 0]
        assert row == [*tokenizer.encode(title.replace("\n", " "), add_special_tokens=False), end]
    assert codes.new_tokens == () and codes.titles.tolist() == titles


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=12)), min_size=1, max_size=12, unique_by=same),
    st.integers(8, 20),
)
def test_title_codes_name_one_item_each(kind: str, titles: list[str], limit: int) -> None:
    titles = [t for t in titles if t.strip()] or ["x"]
    tokenizer = KINDS[kind]()
    codes = title_codes(text(titles), tokenizer, limit)
    rows = [tuple(t for t in row if t >= 0) for row in codes.codes.tolist()]
    assert all(len(r) <= limit + 1 and r[-1] == terminator(tokenizer) and terminator(tokenizer) not in r[:-1] for r in rows)
    for i, a in enumerate(rows):
        assert not any(b[: len(a)] == a for j, b in enumerate(rows) if i != j)


def test_cut_titles_keep_their_number() -> None:
    tokenizer = byte_level()
    titles = ["the quick brown fox zzz", "the quick brown fox xxx", "the quick brown fox yyy"]
    codes = title_codes(text(titles), tokenizer, len(tokenizer.encode(titles[0])) - 3)
    shown = [tokenizer.decode([t for t in row if t >= 0]) for row in codes.codes.tolist()]
    assert shown == ["the quick brown [3]\n", "the quick brown fox \n", "the quick brown [2]\n"]
    with pytest.raises(UserError, match="after the cut to 1 tokens; raise items.max_title_tokens"):
        title_codes(text(["the quick", "the brown"]), tokenizer, 1)


def test_title_without_tokens() -> None:
    with pytest.raises(
        UserError, match="'i7': the title ' \\\\n' has no tokens; give it a title, or use items.tokenizer: atomic"
    ):
        title_codes(text(["a", " \n"]), byte_level(), 8, ["i3", "i7"])


@pytest.mark.parametrize("kind", KINDS)
def test_titles_never_become_special_or_item_tokens(kind: str) -> None:
    tokenizer = KINDS[kind]()
    codes = atomic_codes(["1"], text(["x"]), tokenizer)
    rows = TitleEncoder(tokenizer, codes.new_tokens)(HOSTILE)
    special = {*tokenizer.all_special_ids, *codes.new_token_ids.tolist()} - {tokenizer.unk_token_id}
    assert all(row and not special & set(row) for row in rows)
    plain = ["Heat", "naïve 日本", "[2]", "x;y"]
    base = KINDS[kind]()
    assert [rows[HOSTILE.index(t)] for t in plain] == [base.encode(t, add_special_tokens=False) for t in plain]
    assert rows[3] == base.encode("<|item_1|>", add_special_tokens=False)
    assert tokenizer.decode(rows[1]) == "</s>"


def valid_codes(codes: np.ndarray) -> bool:
    rows = []
    for row in codes.tolist():
        length = row.index(-1) if -1 in row else len(row)
        if length == 0 or any(v != -1 for v in row[length:]) or min(row) < -1:
            return False
        rows.append(row[:length])
    return not any(len(a) < len(b) and b[: len(a)] == a for a in rows for b in rows)  # equal codes are allowed


@given(st.lists(st.lists(st.integers(-1, 2), min_size=3, max_size=3), min_size=1, max_size=6))
def test_validation_agrees_with_all_pairs(rows: list[list[int]]) -> None:
    codes = np.asarray(rows, np.int32)
    arguments = (codes, (), np.zeros(0, np.int32), (), text([str(i) for i in range(len(rows))]))
    if valid_codes(codes):
        ItemCodes(*arguments)
    else:
        with pytest.raises(ValueError):
            ItemCodes(*arguments)


def test_codes_are_saved_and_damage_is_noticed(tmp_path) -> None:
    codes = atomic_codes(["2", "1"], text(["Toy Story", "é \u2028"]), byte_fallback())
    codes.save(tmp_path / "items")
    again = ItemCodes.load(tmp_path / "items")
    assert again.codes.dtype == np.int32 and (again.codes == codes.codes).all()
    assert (again.new_token_ids == codes.new_token_ids).all() and again.new_tokens == codes.new_tokens
    assert again.init_tokens == codes.init_tokens and again.titles.tolist() == codes.titles.tolist()
    assert sorted(p.name for p in (tmp_path / "items").iterdir()) == ["item_codes.json", "item_codes.npy"]
    path = tmp_path / "items" / "item_codes.json"
    good = path.read_text()
    for bad, message in [
        (good[:-5], "not valid JSON"),
        ("[]", "format None"),
        (json.dumps({**json.loads(good), "titles": ["a"]}), "titles has shape"),
        (json.dumps({k: v for k, v in json.loads(good).items() if k != "titles"}), "KeyError"),
    ]:
        path.write_text(bad)
        with pytest.raises(UserError, match=message):
            ItemCodes.load(tmp_path / "items")
    path.write_text(good)
    raw = (tmp_path / "items" / "item_codes.npy").read_bytes()
    (tmp_path / "items" / "item_codes.npy").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(UserError, match="damaged"):
        ItemCodes.load(tmp_path / "items")
    with pytest.raises(UserError, match="cannot be read"):
        ItemCodes.load(tmp_path / "nowhere")
