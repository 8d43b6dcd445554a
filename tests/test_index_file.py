import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level

from sftrec_jax.data.known import data_root
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.index_file import read_index, write_index
from sftrec_jax.items.paths import codes_paths, path_codes

GOOD = {"0": ["<a_1>", "<b_2>"], "1": ["<a_1>", "<b_3>"], "2": ["<a_10>", "<b_2>"]}
IDS = ["0", "1", "2"]


def made(folder: Path, content: object, name: str = "index.json") -> Path:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def keyed(keys: list[str]) -> dict[str, list[str]]:
    return {key: [f"<a_{i}>"] for i, key in enumerate(keys)}


tokens = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Co", "Cn", "Zs", "Zl", "Zp"]), min_size=1, max_size=6)
item_ids = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(item_ids, st.lists(tokens, min_size=1, max_size=4), min_size=1, max_size=8), st.randoms())
def test_what_is_written_is_read_whatever_the_order(tmp_path_factory, table: dict[str, list[str]], order: random.Random) -> None:
    folder = tmp_path_factory.mktemp("index")
    ids = list(table)
    order.shuffle(ids)
    for name in ("a.index.json", "a.json.gz"):
        write_index(folder / name, [table[i] for i in ids], ids)
        raw = (folder / name).read_bytes()
        assert json.loads(gzip.decompress(raw) if name.endswith("gz") else raw) == table
        assert read_index(folder / name, list(table), "id") == list(table.values())
    rows = made(folder, {str(row): table[i] for row, i in enumerate(ids)})
    assert read_index(rows, ids, "row") == [table[i] for i in ids]


def test_the_same_codes_give_the_same_bytes_and_nothing_is_overwritten_by_chance(tmp_path: Path) -> None:
    path = tmp_path / "index.json.gz"
    write_index(path, list(GOOD.values()), IDS)
    before = path.read_bytes()
    assert before[4:8] == bytes(4)  # gzip's time stamp (RFC 1952)
    with pytest.raises(UserError, match="exists already; name another file or add --overwrite"):
        write_index(path, [["<x>"]] * 3, IDS)
    assert path.read_bytes() == before
    os.utime(path, (0, 0))
    write_index(path, list(GOOD.values()), IDS, overwrite=True)
    assert path.read_bytes() == before and path.stat().st_mtime > 0
    assert [p.name for p in tmp_path.iterdir()] == ["index.json.gz"]
    with pytest.raises(UserError, match="cannot be written"):
        write_index(tmp_path / "nowhere" / "index.json", list(GOOD.values()), IDS)
    with pytest.raises(UserError, match="the key '1' has an empty list"):
        write_index(tmp_path / "other.json", [["<x>"], [], ["<y>"]], IDS)
    with pytest.raises(ValueError, match="distinct"):
        write_index(tmp_path / "other.json", [["<x>"]] * 3, ["0", "1", "1"])
    assert [p.name for p in tmp_path.iterdir()] == ["index.json.gz"]


BROKEN = {
    "not JSON": ('{"0": ["<a_1>",', r"not JSON \(.+\); write it as"),
    "list": ([["<a_1>"]], "holds a list, not an object of lists"),
    "text": ('"<a_1>"', "holds a str, not an object"),
    "text for a list": ({**GOOD, "1": "<a_1><b_3>"}, r"the key '1' has \"<a_1><b_3>\", which is no list of texts"),
    "number": ({**GOOD, "2": [1, 2]}, r"the key '2' has \[1, 2\], which is no list"),
    "nested": ({**GOOD, "2": {"0": ["<a>"], "00": None}}, "the key '2' has"),
    "null": ({**GOOD, "0": None}, "the key '0' has null, which is no list"),
    "long": ({**GOOD, "0": "x" * 500}, r"the key '0' has \"x{56}\.\.\., which"),
    "empty": ({**GOOD, "1": []}, "the key '1' has an empty list; give the item at least one token"),
    "empty token": ({**GOOD, "1": ["<a_1>", ""]}, "the key '1' has the token ''; write tokens without white space"),
    "space": ({**GOOD, "1": ["<a 1>"]}, "the key '1' has the token '<a 1>'"),
    "newline": ({**GOOD, "1": ["<a_1>\n"]}, r"the key '1' has the token '<a_1>\\n'"),
    "wide space": ({**GOOD, "1": ["<a\u3000>"]}, "the key '1' has the token"),
    "half a character": ({**GOOD, "1": ["<a\ud800>"]}, r"the key '1' has the token '<a\\ud800>'"),
    "twice": ('{"0": ["<a>"], "1": ["<b>"], "1": ["<c>"], "2": ["<d>"]}', "the key '1' occurs twice; keep one list an item"),
    "two missing": ({"1": ["<a>"]}, r"no codes for item '0' \(2 of 3 items have none\); give every item"),
    "one too many": ({**GOOD, "x": ["<z>"]}, r"the key 'x' is no item of the catalogue \(1 of 4 keys\); take the keys out"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("name", ["index.json", "index.json.gz"])
def test_a_broken_file_gives_one_line(tmp_path: Path, case: str, name: str) -> None:
    content, message = BROKEN[case]
    path = made(tmp_path, content, name)
    with pytest.raises(UserError, match=message) as caught:
        read_index(path, IDS, "id")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")
    str(caught.value).encode("utf-8")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file; correct items.codes_file"):
        read_index(tmp_path / "none.json", IDS, "id")
    (tmp_path / "latin.json").write_bytes('{"0": ["é"]}'.encode("latin-1"))
    with pytest.raises(UserError, match="not JSON .*utf-8"):
        read_index(tmp_path / "latin.json", IDS, "id")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-9])
    with pytest.raises(UserError, match="not a complete gzip file"):
        read_index(tmp_path / "cut.json.gz", IDS, "id")
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_index(tmp_path / "bom.json", IDS, "id") == list(GOOD.values())


HINTS = {
    "rows for ids": (["0", "1", "2"], ["1", "2", "3"], "id", "the keys run from 0 to 2: set items.codes_keys: row"),
    "rows for names": (["0", "1", "2"], ["B1", "A7", "C3"], "id", "set items.codes_keys: row"),
    "rows, text order": ([str(i) for i in range(12)], sorted(map(str, range(1, 13))), "id", "not in the order of their ids"),
    "ids less 1": (["6", "7", "8"], ["7", "8", "9"], "id", "the keys are the item ids less 1: add 1 to every key"),
    "ids plus 1": (["8", "9", "10"], ["7", "8", "9"], "id", "the keys are the item ids plus 1: take 1 off every key"),
    "ids for rows": (["7", "8", "9"], ["7", "8", "9"], "row", "the keys are the item ids: set items.codes_keys: id"),
    "rows from 1": (["1", "2", "3"], ["7", "8", "9"], "row", "the keys run from 1 to 3, rows count from 0"),
    "rows with zeros": (["00", "01", "02"], ["7", "8", "9"], "row", r"no codes for item '7' \(row 0\) \(3 of 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", HINTS)
def test_shifted_keys_get_a_hint(tmp_path: Path, case: str) -> None:
    found, ids, keys, hint = HINTS[case]
    with pytest.raises(UserError, match=hint) as caught:
        read_index(made(tmp_path, keyed(found)), ids, keys)  # pyright: ignore[reportArgumentType]
    assert "no codes for item" in str(caught.value) and "is no" in str(caught.value) and "\n" not in str(caught.value)


def read_plainly(path: Path) -> dict[str, list[str]]:
    return json.loads(gzip.decompress(path.read_bytes()))


def round_trip(folder: Path, path: Path, ids: list[str], keys: str, key_of: Callable[[str], str]) -> ItemCodes:
    """From the published file to codes and back: each item has what the file says of it."""
    published = read_plainly(path)
    paths = read_index(path, ids, keys)  # pyright: ignore[reportArgumentType]
    assert paths == [published[key_of(i)] for i in ids]
    titles = np.array([f"Title of {i}" for i in ids], object)
    tokenizer = byte_level()
    codes = path_codes(paths, titles, ids, tokenizer)
    assert codes_paths(codes) == paths
    assert len(codes.new_tokens) == len({token for path in published.values() for token in path})
    for row in (0, 1, len(ids) // 2, len(ids) - 1):
        ids_of_row = [t for t in codes.codes[row].tolist() if t >= 0]
        assert tokenizer.convert_ids_to_tokens(ids_of_row) == paths[row]
        assert tokenizer.encode("".join(paths[row]), add_special_tokens=False) == ids_of_row
    write_index(folder / "again.json.gz", codes_paths(codes), ids)
    assert read_plainly(folder / "again.json.gz") == {i: published[key_of(i)] for i in ids}
    return codes


def data_file(name: str) -> Path:
    path = data_root() / name
    if not path.is_file():
        pytest.skip(f"{name} is not below $SFTREC_DATA")
    return path


def test_letter_beauty(tmp_path: Path) -> None:
    path = data_file("amazon-beauty/semantic_ids_letter.json.gz")
    ids = [str(i) for i in range(1, 12_102)]
    with pytest.raises(UserError, match="set items.codes_keys: row"):
        read_index(path, ids, "id")
    codes = round_trip(tmp_path, path, ids, "row", lambda i: str(int(i) - 1))
    assert codes.codes.shape == (12_101, 4) and len(np.unique(codes.codes, axis=0)) == 12_088
    assert [sum(t.startswith(f"<{x}_") for t in codes.new_tokens) for x in "abcd"] == [197, 256, 256, 256]


def test_minionerec_industrial(tmp_path: Path) -> None:
    path = data_file("amazon-industrial/index.json.gz")
    codes = round_trip(tmp_path, path, [str(i) for i in range(3_686)], "id", str)
    assert codes.codes.shape == (3_686, 3) and len(np.unique(codes.codes, axis=0)) == 3_670


def test_a_generated_catalogue(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = {f"B{i:04d}": [f"<{x}_{c}>" for x, c in zip("abc", rng.integers(0, 9, 3), strict=True)] for i in range(500)}
    path = made(tmp_path, table, "index.json.gz")
    ids = list(table)
    rng.shuffle(ids)
    codes = round_trip(tmp_path, path, ids, "id", str)
    assert len(np.unique(codes.codes, axis=0)) == len({tuple(v) for v in table.values()}) < 500
