import hashlib
import random
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, byte_level

from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.naming import (
    atomic_codes,
    extend_title_codes,
    item_token,
    numeric_codes,
    terminator,
    title_codes,
)
from sftrec_jax.items.paths import cluster_tokens, codes_paths, extend_paths_codes, level_tokens, path_codes
from sftrec_jax.items.titles import distinct_titles

PATHS = [["<a_2>", "<b_10>"], ["<a_2>", "<b_2>", "<a_10>"], ["<a_10>", "<b_2>"], ["<a_10>", "<b_2>"], ["<c_0>"]]


def text(values: list[str]) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def names(n: int) -> np.ndarray:
    return text([f"Toy {i} of the world" for i in range(n)])


def rows(codes: ItemCodes) -> list[tuple[int, ...]]:
    return [tuple(t for t in row if t >= 0) for row in codes.codes.tolist()]


def prefix_clash(codes: list[tuple[int, ...]]) -> bool:
    return any(a != b and b[: len(a)] == a for a in codes for b in codes)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_new_ordered_and_read_as_one(kind: str) -> None:
    tokenizer, base = KINDS[kind](), KINDS[kind]()
    codes = path_codes(PATHS, names(5), list("54321"), tokenizer, "text", spare=["<b_11>", "<b_2>", "<b_3>", "<b_11>"])
    # by level of first use (of <a_10> it is 0, though its first item has it on 2), then 2 before 10; spare ones last
    assert codes.new_tokens == ("<a_2>", "<a_10>", "<c_0>", "<b_2>", "<b_10>", "<b_3>", "<b_11>")
    assert codes.new_token_ids.tolist() == list(range(len(base), len(base) + 7)) and len(tokenizer) == len(base) + 7
    assert codes.codes.dtype == np.int32 and codes.codes.shape == (5, 3)
    for path, row in zip(PATHS, rows(codes), strict=True):
        assert tokenizer.convert_ids_to_tokens(list(row)) == path
        assert tokenizer.encode("".join(path), add_special_tokens=False) == list(row)
        assert tokenizer.decode(row, skip_special_tokens=True).replace(" ", "") == "".join(path)
    assert codes_paths(codes) == PATHS
    encode = {i: base.encode(f"Toy {i} of the world", add_special_tokens=False) for i in range(5)}
    carriers = {"<a_2>": {0, 1}, "<a_10>": {1, 2, 3}, "<c_0>": {4}, "<b_2>": {1, 2, 3}, "<b_10>": {0}, "<b_3>": (), "<b_11>": ()}
    for token, start in zip(codes.new_tokens, codes.init_tokens, strict=True):
        assert sorted(start) == sorted(t for item in carriers[token] for t in encode[item])
    again = path_codes(PATHS, names(5), list("54321"), KINDS[kind](), "mean")
    assert again.init_tokens == ((),) * 5 and again.new_tokens == codes.new_tokens[:5]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 11), min_size=3, max_size=3), min_size=1, max_size=12), st.randoms())
def test_nothing_depends_on_the_order_of_the_catalogue(levels: list[list[int]], shuffle: random.Random) -> None:
    paths, n = level_tokens(np.asarray(levels, np.int32)), len(levels)
    ids = [f"B{i}" for i in range(n)]
    codes = path_codes(paths, names(n), ids, byte_level())
    order = list(range(n))
    shuffle.shuffle(order)
    moved = path_codes([paths[i] for i in order], names(n)[order], [ids[i] for i in order], byte_level())
    assert moved.new_tokens == codes.new_tokens and moved.init_tokens == codes.init_tokens
    assert moved.codes.tolist() == codes.codes[order].tolist()


def test_first_rows_draw_evenly_from_many_items() -> None:
    n = 1000
    paths = [["<x>", f"<y_{i}>"] for i in range(n)]
    titles = text([f"number {i} " + "of the world " * (i % 7) for i in range(n)])
    ids = [f"id {i}" for i in range(n)]
    tokenizer = byte_level()
    codes = path_codes(paths, titles, ids, tokenizer)
    start = codes.init_tokens[codes.new_tokens.index("<x>")]
    assert len(start) == 256
    # the same draw in plain Python: 64 items by their hash, then every len / 256-th of their tokens
    key = {i: hashlib.blake2b(i.encode(), digest_size=8, key=b"0:first rows").digest()[::-1] for i in ids}
    drawn = sorted(range(n), key=lambda item: key[ids[item]])[:64]
    joined = [t for item in drawn for t in byte_level().encode(titles[item], add_special_tokens=False)]
    assert start == tuple(joined[i * len(joined) // 256] for i in range(256))
    assert min(drawn) < 50 and max(drawn) > 950
    own = codes.init_tokens[codes.new_tokens.index("<y_8>")]
    assert own == tuple(byte_level().encode(titles[8], add_special_tokens=False))


def test_a_token_twice_in_a_path_counts_its_item_once() -> None:
    codes = path_codes([["<x>", "<x>", "<y>"]], text(["Toy"]), ["1"], byte_level())
    assert codes.init_tokens == (tuple(byte_level().encode("Toy", add_special_tokens=False)),) * 2
    assert rows(codes)[0] == (codes.new_token_ids[0], codes.new_token_ids[0], codes.new_token_ids[1])


def test_titles_that_spell_a_token_out_do_not_become_it() -> None:
    codes = path_codes([["<a_1>"], ["<a_2>"]], text(["the <a_2>", "<a_1>"]), ["1", "2"], byte_level())
    assert not {t for start in codes.init_tokens for t in start} & set(codes.new_token_ids.tolist())


def test_path_errors() -> None:
    def build(paths: list[list[str]], titles: list[str] | None = None, spare: tuple[str, ...] = ()) -> ItemCodes:
        known = names(len(paths)) if titles is None else text(titles)
        return path_codes(paths, known, [f"i{k}" for k in range(len(paths))], byte_level(), "text", spare)

    with pytest.raises(UserError, match="^item 'i2' has the code <a><b>, which begins <a><b><c> of item 'i0'; lengthen"):
        build([["<a>", "<b>", "<c>"], ["<a>", "<d>"], ["<a>", "<b>"]])
    with pytest.raises(UserError, match="path of 'i1': the tokenizer has a token T already"):
        build([["<a>"], ["<b>", "T"]])
    with pytest.raises(UserError, match=r"spare tokens: the tokenizer has a token <\|end\|> already"):
        build([["<a>"]], spare=("<|end|>",))
    with pytest.raises(UserError, match="catalogue, item 'i1': the title ' ' has no tokens; .* or set items.init: mean"):
        build([["<a>"], ["<b>"]], ["x", " "])
    for wrong in ([[]], []):
        with pytest.raises(ValueError):
            path_codes(wrong, names(1), ["1"], byte_level())
    with pytest.raises(UserError, match="'Toy': is written in tokens of the base model"):
        codes_paths(title_codes(text(["Toy"]), byte_level()))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["<a>", "<b>"]), min_size=1, max_size=3), min_size=1, max_size=5))
def test_a_path_that_begins_another_is_found(paths: list[list[str]]) -> None:
    ids = [str(i) for i in range(len(paths))]
    if prefix_clash([tuple(p) for p in paths]):
        with pytest.raises(UserError, match="begins"):
            path_codes(paths, names(len(paths)), ids, byte_level())
    else:
        assert codes_paths(path_codes(paths, names(len(paths)), ids, byte_level())) == paths


def test_level_tokens() -> None:
    assert level_tokens(np.array([[183, 70, 232, 6], [0, 1, -1, -1]], np.int32)) == [
        ["<a_183>", "<b_70>", "<c_232>", "<d_6>"],
        ["<a_0>", "<b_1>"],
    ]
    deep = level_tokens(np.arange(702, dtype=np.int32)[None])[0]
    assert deep[25:28] == ["<z_25>", "<aa_26>", "<ab_27>"] and deep[-1] == "<zz_701>" and len({*deep}) == 702
    assert deep == sorted(deep, key=lambda token: (len(token.split("_")[0]), token.split("_")[0]))
    for wrong in ([[-1, 0]], [[0, -1, 0]], [[0, -2]]):
        with pytest.raises(ValueError, match="levels must be"):
            level_tokens(np.array(wrong, np.int32))
    with pytest.raises(ValueError, match="702 has no name"):
        level_tokens(np.zeros((1, 703), np.int32))


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=30).flatmap(lambda c: st.tuples(st.just(c), st.integers(0, 9))), max_size=12)
)
def test_cluster_tokens_name_paths_one_to_one(made: list[tuple[list[int], int]]) -> None:
    paths = list(dict.fromkeys((*clusters, leaf) for clusters, leaf in made))
    spelt = [tuple(p) for p in cluster_tokens(paths)]
    assert len(set(spelt)) == len(paths) and not prefix_clash(spelt)  # pyright: ignore[reportArgumentType]
    leaves, clusters = {p[-1] for p in spelt}, {t for p in spelt for t in p[:-1]}
    assert not leaves & clusters and all(re.fullmatch(r"<item_\d>", leaf) for leaf in leaves)
    assert [[int(t[t.index("_") + 1 : -1]) for t in p] for p in spelt] == [list(p) for p in paths]


def test_cluster_tokens_as_spelt() -> None:
    assert cluster_tokens([(3, 7, 5), (0, 1)]) == [["<a_3>", "<b_7>", "<item_5>"], ["<a_0>", "<item_1>"]]
    assert cluster_tokens([(4,)]) == [["<item_4>"]] and cluster_tokens([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_numeric_codes_spell_the_number(kind: str) -> None:
    tokenizer = KINDS[kind]()
    numbers = np.random.default_rng(0).permutation(120)
    codes = numeric_codes(numbers, names(120), tokenizer)
    end = terminator(tokenizer)
    assert rows(codes) == [(*tokenizer.encode(str(n), add_special_tokens=False), end) for n in numbers.tolist()]
    assert [tokenizer.decode(r[:-1]).strip() for r in rows(codes)] == [str(n) for n in numbers]
    assert not prefix_clash(rows(codes)) and len(set(rows(codes))) == 120 and codes.new_tokens == ()
    for wrong in (np.array([1, 1]), np.array([-1, 0]), np.array([0.0, 1.0]), np.array([0])):
        with pytest.raises(ValueError, match="numbers must be"):
            numeric_codes(wrong, names(2), tokenizer)


def test_a_tokenizer_without_digits_is_refused() -> None:
    tokenizer = KINDS["byte_fallback"]()
    state = tokenizer.backend_tokenizer.to_str()
    for digit in "123456789":
        state = state.replace(f'"{digit}":', f'"d{digit}":').replace(f"<0x{ord(digit):02X}>", f"<byte {digit}>")
    blind = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer.from_str(state), eos_token="</s>", unk_token="<unk>")
    with pytest.raises(UserError, match="does not tell the numbers 1 and 2 apart; use items.tokenizer: atomic"):
        numeric_codes(np.array([0, 1, 2]), names(3), blind)


@pytest.mark.parametrize("kind", KINDS)
def test_atomic_ids_follow_the_numbers(kind: str) -> None:
    ids, numbers = ["10", "2", "7", "5"], np.array([30, 0, 20, 10])
    base, tokenizer = len(KINDS[kind]()), KINDS[kind]()
    codes = atomic_codes(ids, names(4), tokenizer, "text", numbers)
    assert (codes.codes[:, 0] - base).tolist() == [3, 0, 2, 1]
    assert codes.new_tokens == tuple(item_token(i) for i in ("2", "5", "7", "10"))
    for row, item in enumerate(ids):
        assert tokenizer.convert_ids_to_tokens(int(codes.codes[row, 0])) == item_token(item)
    plain = atomic_codes(ids, names(4), KINDS[kind]())
    by_token = dict(zip(plain.new_tokens, plain.init_tokens, strict=True))
    assert dict(zip(codes.new_tokens, codes.init_tokens, strict=True)) == by_token
    same = atomic_codes(ids, names(4), KINDS[kind](), "text", np.arange(4))
    assert same.codes.tolist() == plain.codes.tolist() and same.init_tokens == plain.init_tokens
    with pytest.raises(ValueError, match="4 distinct integers"):
        atomic_codes(ids, names(4), KINDS[kind](), "text", np.array([0, 1, 1, 2]))


# Limits are 7 or more below: the mark of a tenth equal one takes 6 tokens.
PHRASES = ["red polish", "red polish", "red polish for nails", "Toy", "the quick brown fox", "the quick brown bear"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(PHRASES), min_size=1, max_size=14), st.integers(7, 20), st.randoms())
@example([PHRASES[2], PHRASES[0], PHRASES[2], PHRASES[0]], 12, random.Random(1))  # after the cut and the mark all are equal
def test_keyphrases_name_one_item_each(kind: str, phrases: list[str], limit: int, shuffle: random.Random) -> None:
    tokenizer = KINDS[kind]()
    titles, n, end = names(len(phrases)), len(phrases), terminator(tokenizer)
    codes = title_codes(titles, tokenizer, limit, None, phrases)
    assert codes.titles.tolist() == titles.tolist()
    assert len(set(rows(codes))) == n and not prefix_clash(rows(codes))
    assert all(len(r) <= limit + 1 and r[-1] == end and end not in r[:-1] for r in rows(codes))
    cuts = [tuple(tokenizer.encode(p, add_special_tokens=False)[:limit]) for p in phrases]
    for cut in set(cuts):  # one item keeps the phrase as it is
        assert sum(r == (*cut, end) for r in rows(codes)) == 1
    order = list(range(n))
    shuffle.shuffle(order)
    moved = title_codes(titles[order], tokenizer, limit, None, [phrases[i] for i in order])
    assert rows(moved) == [rows(codes)[i] for i in order]


def test_keyphrase_errors() -> None:
    for missing in (None, "", " \n"):
        with pytest.raises(
            UserError,
            match=r"^catalogue, item 'i2': has no keyphrase \(1 of 2 items have none\); fill it in, or use .*: title$",
        ):
            title_codes(names(2), byte_level(), 8, ["i1", "i2"], ["red", missing])
    with pytest.raises(UserError, match="equals another after the cut to 1 tokens; raise items.max_title_tokens"):
        title_codes(names(2), byte_level(), 1, None, ["red", "red"])
    with pytest.raises(ValueError, match="2 titles but 1 names"):
        title_codes(names(2), byte_level(), 8, None, ["red"])


def test_new_items_get_paths_of_known_tokens() -> None:
    ids = list("12345")
    codes = path_codes(PATHS, names(5), ids, byte_level(), spare=["<d_1>"])
    new = [["<a_2>", "<b_10>"], ["<a_10>", "<b_10>", "<b_2>", "<d_1>"]]
    more = extend_paths_codes(codes, new, text(["x", "y"]), ["6", "7"])
    assert codes_paths(more) == PATHS + new and rows(more)[:5] == rows(codes) and more.codes.shape == (7, 4)
    assert more.titles.tolist() == [*codes.titles, "x", "y"] and more.new_tokens == codes.new_tokens
    assert more.new_token_ids.tolist() == codes.new_token_ids.tolist() and more.init_tokens == codes.init_tokens
    assert codes_paths(extend_paths_codes(codes, [], text([]), [])) == PATHS
    with pytest.raises(UserError, match="new item '6': the run has no token <a_3>"):
        extend_paths_codes(codes, [["<a_3>", "<b_2>"]], text(["x"]), ["6"])
    with pytest.raises(UserError, match="new item '6' has the code <a_2>, which begins <a_2><b_10> of item 'Toy 0 of the world'"):
        extend_paths_codes(codes, [["<a_2>"]], text(["x"]), ["6"])
    with pytest.raises(UserError, match="item 'Toy 4 of the world' has the code <c_0>, which begins <c_0><b_2> of new item '6'"):
        extend_paths_codes(codes, [["<c_0>", "<b_2>"]], text(["x"]), ["6"])
    with pytest.raises(ValueError, match="titles must be distinct"):
        extend_paths_codes(codes, [["<a_2>", "<b_10>"]], names(1), ["6"])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(PHRASES), min_size=1, max_size=8), st.lists(st.sampled_from(PHRASES), max_size=8), st.integers(7, 20)
)
def test_new_items_get_titles_that_old_ones_lack(kind: str, old: list[str], new: list[str], limit: int) -> None:
    tokenizer = KINDS[kind]()
    before = title_codes(names(len(old)), tokenizer, limit, None, old)
    titles = text([f"New {i}" for i in range(len(new))])
    after = extend_title_codes(before, titles, tokenizer, limit, None, new)
    assert rows(after)[: len(old)] == rows(before) and after.titles.tolist() == [*before.titles, *titles]
    assert len(set(rows(after))) == len(old) + len(new) and not prefix_clash(rows(after))
    for phrase, row in zip(new, rows(after)[len(old) :], strict=True):
        cut = tuple(tokenizer.encode(phrase, add_special_tokens=False)[:limit])
        assert row[:-1] == cut or re.search(r" \[\d+\]\s*$", tokenizer.decode(row[:-1]))
        assert len(row) <= limit + 1


def test_titles_without_keyphrases_are_extended_too() -> None:
    tokenizer = byte_level()
    before = title_codes(text(["Toy", "the quick brown fox"]), tokenizer, 5)
    after = extend_title_codes(before, text(["Toy Story", "the quick brown bear"]), tokenizer, 5, ["8", "9"])
    shown = [tokenizer.decode(r) for r in rows(after)]
    assert shown[0] == "Toy\n" and shown[2] == "Toy Story\n" and len(set(rows(after))) == 4
    with pytest.raises(ValueError, match="do not end with the terminator"):
        extend_title_codes(atomic_codes(["1"], text(["Toy"]), byte_level()), text(["x"]), tokenizer)


def test_titles_of_new_items_leave_old_ones_alone() -> None:
    found = distinct_titles(["heat", "Heat ", "Toy", "Heat [2]"], ["9", "10", "1", "2"], ["Heat", "Toy [2]"])
    assert found.tolist() == ["heat [3]", "Heat [4]", "Toy", "Heat [2]"]
    assert distinct_titles(["Toy"], ["1"], ["toy", "Toy [2]"]).tolist() == ["Toy [3]"]
