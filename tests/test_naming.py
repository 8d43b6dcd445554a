"""Every way to name an item, from the command line: what `prepare` leaves, what it refuses, and new items without training."""

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tiny_run import ITEMS, STORIES, TITLES, histories, write_inputs, write_lines
from transformers import AutoTokenizer

from sftrec_jax.cli import main
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.paths import codes_paths

SMALL = ["--semantic.levels", "2", "--semantic.codes", "5", "--semantic.epochs", "10", "--items.cluster-leaf", "6"]


def prepare(folder: Path, *options: str) -> tuple[int, Path]:
    config = folder / "tiny.yaml" if (folder / "tiny.yaml").exists() else write_inputs(folder)
    out = folder / "run"
    return main(["prepare", str(config), "--out", str(out), "--overwrite", *SMALL, *options]), out


def codes_of(out: Path) -> ItemCodes:
    return ItemCodes.load(out / "prepared")


def write_index(folder: Path, codes: dict[str, list[str]]) -> str:
    (folder / "index.json").write_text(json.dumps(codes), encoding="utf-8")
    return str(folder / "index.json")


def distinct(codes: ItemCodes) -> int:
    return len(np.unique(codes.codes, axis=0))


SHAPES = {
    "rqkmeans item": 3, "rqkmeans extra": 3, "rqvae extra": 3, "opq extra": 3,
    "pq nearest": 2, "rqkmeans nearest": 2, "rqvae nearest": 2, "rqvae lists": 2,
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_semantic_ids(tmp_path: Path, case: str) -> None:
    tokenizer, collisions = case.split()
    # 7 codes at 2 levels give room for 49 codes, more than the 30 items.
    more = ["--semantic.codes", "7", "--semantic.collisions", collisions, "--items.init", "codebook"]
    status, out = prepare(tmp_path, "--items.tokenizer", tokenizer, *more)
    assert status == 0
    codes, report = codes_of(out), json.loads((out / "prepared" / "codebook.json").read_text())
    assert codes.codes.shape == (30, SHAPES[case]) and (codes.codes >= 512).all()
    first_two = np.unique(codes.codes[:, :2], axis=0)
    assert len(report["levels"]) == 2 and report["items"] == 30
    # The report counts codes before collisions were resolved.
    if collisions == "nearest":
        assert distinct(codes) == 30 and report["moved_to_a_free_code"] == 30 - report["distinct"]
    else:
        assert len(first_two) == report["distinct"]
        assert distinct(codes) == (30 if collisions in ("extra", "item") else report["distinct"])
    if collisions == "item":
        assert len(set(codes.codes[:, 2].tolist())) == 30
    rows = np.load(out / "prepared" / "item_vectors.npy")
    assert len(rows) == len(codes.new_tokens)
    main(["export", str(out), "--to", str(tmp_path / "out.json"), "--format", "index", "--overwrite"])
    written = json.loads((tmp_path / "out.json").read_text())
    names = dict(zip(codes.new_token_ids.tolist(), codes.new_tokens, strict=True))
    assert written == {item: [names[t] for t in row] for item, row in zip(ITEMS, codes.codes.tolist(), strict=True)}


@pytest.mark.parametrize("order", ["catalogue", "random", "sequential", "collaborative"])
def test_atomic_ids_are_numbered_as_asked(tmp_path: Path, order: str) -> None:
    status, out = prepare(tmp_path, "--items.order", order)
    assert status == 0
    ids = codes_of(out).codes[:, 0]
    assert sorted(ids) == list(range(512, 542))
    if order == "catalogue":
        assert ids.tolist() == sorted(ids)
    if order == "sequential":
        met = list(dict.fromkeys(item for items in histories().values() for item in items[:-2]))
        assert [ITEMS[i] for i in np.argsort(ids)][: len(met)] == met
    if order in ("random", "collaborative"):
        assert ids.tolist() != sorted(ids)


def test_numbers_and_keyphrases_are_the_models_own_tokens(tmp_path: Path) -> None:
    status, out = prepare(tmp_path, "--items.tokenizer", "numeric", "--items.order", "sequential")
    assert status == 0
    codes, tokenizer = codes_of(out), AutoTokenizer.from_pretrained(STORIES)
    assert not codes.new_tokens and distinct(codes) == 30
    texts = [tokenizer.decode([t for t in row if t >= 0], skip_special_tokens=True).strip() for row in codes.codes]
    assert sorted(map(int, texts)) == list(range(30))

    rows = [f"{item},{title},{'' if item == 'i03' else 'key ' + title.split()[1]}" for item, title in TITLES.items()]
    write_lines(tmp_path / "items.csv", ["item_id,title,key", *rows])
    status, out = prepare(tmp_path, "--items.tokenizer", "keyphrase", "--data.keyphrase-column", "key")
    assert status == 0
    codes = codes_of(out)
    texts = [tokenizer.decode([t for t in row if t >= 0], skip_special_tokens=True).strip() for row in codes.codes]
    assert distinct(codes) == 30 and len(set(texts)) == 30
    assert texts[0].startswith("key") and texts[3] == TITLES["i03"]
    assert codes.titles.tolist()[0] == TITLES["i00"]


def test_clusters_make_paths(tmp_path: Path) -> None:
    status, out = prepare(tmp_path, "--items.tokenizer", "cid", "--items.cluster-branches", "3", "--items.init", "collaborative")
    assert status == 0
    codes = codes_of(out)
    assert distinct(codes) == 30 and codes.codes.shape[1] >= 2
    assert all(path[-1].startswith("<item_") for path in codes_paths(codes))
    assert np.load(out / "prepared" / "item_vectors.npy").any(axis=1).sum() == len(codes.new_tokens)


def test_imported_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = {str(i): [f"<a_{i % 5}>", f"<b_{i // 10}>"] for i in range(30)}
    path = write_index(tmp_path, table)
    options = ["--items.tokenizer", "file", "--items.codes-file", path, "--items.codes-keys", "row"]
    status, out = prepare(tmp_path, *options, "--semantic.collisions", "lists")
    assert status == 0
    assert codes_paths(codes_of(out)) == list(table.values())
    assert "30 items shared a code with another" in capsys.readouterr().err
    status, again = prepare(tmp_path, *options)
    assert status == 0
    told_apart = codes_paths(codes_of(again))
    assert [path[:2] for path in told_apart] == list(table.values())
    assert {path[2] for path in told_apart} == {"<c_0>", "<c_1>"} and len({tuple(p) for p in told_apart}) == 30
    # Exported and imported again, nothing collides and nothing is added.
    assert main(["export", str(again), "--to", str(tmp_path / "index2.json"), "--format", "index"]) == 0
    status, third = prepare(tmp_path, "--items.tokenizer", "file", "--items.codes-file", str(tmp_path / "index2.json"))
    assert status == 0 and codes_paths(codes_of(third)) == told_apart


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on standard error, the only one that is an error; lines before it tell of the work so far."""
    *before, last = capsys.readouterr().err.rstrip("\n").split("\n")
    assert last.startswith("error: ") and not any(
        "error" in line or "Traceback" in line for line in before if "codes" not in line
    )
    return last


def npy(folder: Path, values: np.ndarray) -> str:
    np.save(folder / "v.npy", values)
    return str(folder / "v.npy")


def vectors(rows: int = 30) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, 6)).astype(np.float32)


def with_nan() -> np.ndarray:
    values = vectors()
    values[4, 2] = np.nan
    return values


FROM_FILE = ("--items.tokenizer", "rqkmeans", "--embedding.text", "none", "--embedding.file")
MISTAKES = {
    "fewer items than codes": (("--items.tokenizer", "rqvae", "--semantic.codes", "31"), None, "semantic.codes is 31.*30"),
    "no room": (("--items.tokenizer", "rqkmeans", "--semantic.collisions", "nearest"), None, "30.*25"),
    "nan": (FROM_FILE, with_nan, "file.*i04"),
    "constant": (FROM_FILE, lambda: np.ones((30, 6), np.float32), "file"),
    "rows": (FROM_FILE, lambda: vectors(29), "29.*30"),
    "no file": (("--items.tokenizer", "file"), None, "codes_file"),
    "no codebook": (("--items.tokenizer", "cid", "--items.init", "codebook"), None, "codebook.*cid"),
    "no keyphrase": (("--items.tokenizer", "keyphrase"), None, "keyphrase_column"),
    "lm from scratch": (("--items.tokenizer", "pq", "--embedding.text", "lm", "--model.from-scratch"), None, "from_scratch"),
    "data not there": (("--data.source", "$SFTREC_DATA/amazon-beauty/sequences.txt.gz"), None, "SHA-256.*SFTREC_DATA"),
    "nothing to embed": (("--embedding.text", "none"), None, "embedding"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_cost_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTREC_DATA", str(tmp_path / "nowhere"))
    options, values, expected = MISTAKES[name]
    more = [] if values is None else [npy(tmp_path, values())]
    status, out = prepare(tmp_path, *options, *more)
    said = error_line(capsys)
    assert status == 2 and re.search(expected, said), said
    assert not (out / "prepared").exists()


IMPORTS = {
    "for other items": ({f"x{i}": ["<a_0>", f"<b_{i}>"] for i in range(30)}, "i00.*30"),
    "one missing": ({item: ["<a_0>", f"<b_{i}>"] for i, item in enumerate(ITEMS) if item != "i07"}, "i07"),
    "colliding": ({item: ["<a_0>", f"<b_{i // 2}>"] for i, item in enumerate(ITEMS)}, "30 items share a code.*extra or lists"),
    "one begins another": ({item: ["<a_0>"] if i == 3 else ["<a_0>", f"<b_{i}>"] for i, item in enumerate(ITEMS)}, "i03"),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_imported_codes_that_do_not_fit(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table, expected = IMPORTS[name]
    path = write_index(tmp_path, table)
    mode = "nearest" if name == "colliding" else "lists"
    status, _ = prepare(tmp_path, "--items.tokenizer", "file", "--items.codes-file", path, "--semantic.collisions", mode)
    said = error_line(capsys)
    assert status == 2 and re.search(expected, said), said


def recommended(run: Path, k: int, capsys: pytest.CaptureFixture[str]) -> pl.DataFrame:
    capsys.readouterr()
    to = run.parent / "ranked.jsonl"
    assert main(["recommend", str(run), "--user", "u00", "--k", str(k), "--keep-seen", "--to", str(to), "--overwrite"]) == 0
    return pl.read_ndjson(to)


@pytest.mark.slow
def test_new_items_are_named_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_inputs(tmp_path)
    run = tmp_path / "run"
    few = [
        "--evaluate.unconstrained-users",
        "0",
        "--decode.beam",
        "20",  # recommend widens it
        "--train.max-steps",
        "2",
        "--items.tokenizer",
        "rqkmeans",
    ]
    assert main(["run", str(config), "--out", str(run), *SMALL, *few]) == 0
    before, codes = recommended(run, 30, capsys), codes_of(run)
    export = (run / "export" / "model.safetensors").read_bytes()

    new = {"n1": TITLES["i05"], "n2": "The red moon 2001", "n3": "", "i00": "known already"}
    write_lines(tmp_path / "new.csv", ["item_id,title", *(f"{item},{title}" for item, title in new.items())])
    assert main(["add-items", str(run), "--catalogue", str(tmp_path / "new.csv")]) == 0
    after, extended = recommended(run, 33, capsys), codes_of(run)
    np.testing.assert_array_equal(extended.codes[:30], codes.codes)
    assert extended.new_tokens == codes.new_tokens and distinct(extended) == 33
    assert set(after["item_id"]) - set(before["item_id"]) == {"n1", "n2", "n3"}
    assert "The Twice" not in after["title"] and f"{TITLES['i05']} [2]" in after["title"].to_list()
    check_code(extended.codes[30], np.delete(extended.codes, 30, axis=0), like=5)
    scores = dict(after.select("item_id", "score").iter_rows())
    for item, score in before.select("item_id", "score").iter_rows():
        assert scores[item] == pytest.approx(score, abs=1e-4)
    assert (run / "export" / "model.safetensors").read_bytes() == export

    assert main(["add-items", str(run), "--catalogue", str(tmp_path / "new.csv")]) == 2
    assert "all 4 items are in the run already" in capsys.readouterr().err
    assert codes_of(run).codes.shape == extended.codes.shape


def check_code(new: np.ndarray, codes: np.ndarray, like: int) -> None:
    """An item of the same text: the same code and a free number, unless all others have used up its group's trained numbers."""
    group = codes[(codes[:, :-1] == codes[like, :-1]).all(1)]
    assert set(new[-1:]) <= set(codes[:, -1])
    assert (new[:-1] == codes[like, :-1]).all() == (len(group) < len(set(codes[:, -1].tolist())))


@pytest.mark.parametrize("kind", ["title", "lm", "file and co-occurrence", "lists"])
def test_new_items_of_a_prepared_run(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = vectors()
    options = {
        "title": ["--items.tokenizer", "title"],
        "lm": ["--items.tokenizer", "rqvae", "--embedding.text", "lm"],
        "file and co-occurrence": [
            *FROM_FILE, npy(tmp_path, given), "--embedding.collaborative", "ppmi", "--embedding.collaborative-weight", "1e-3",
        ],
        "lists": ["--items.tokenizer", "opq", "--semantic.collisions", "lists"],
    }[kind]  # fmt: skip
    status, out = prepare(tmp_path, *options)
    assert status == 0
    before = codes_of(out)
    write_lines(tmp_path / "new.csv", ["item_id,title", f"i02,{TITLES['i02']}", f"n1,{TITLES['i04']}", "n2,A ship"])
    add = ["add-items", str(out), "--catalogue", str(tmp_path / "new.csv")]
    if kind.startswith("file"):
        assert main(add) == 2 and "--vectors" in error_line(capsys)
        np.save(tmp_path / "more.npy", np.stack([given[2], given[4], -given[4]]))
        add += ["--vectors", str(tmp_path / "more.npy")]
    assert main(add) == 0
    after = codes_of(out)
    assert len(after.codes) == 32 and after.new_tokens == before.new_tokens
    width = before.codes.shape[1]
    np.testing.assert_array_equal(after.codes[:30, :width], before.codes)
    assert after.titles[30] == f"{TITLES['i04']} [2]" and after.titles[31] == "A ship"
    if kind == "lists":  # the same text, the same code
        np.testing.assert_array_equal(after.codes[30], before.codes[4])
    else:
        assert distinct(after) == 32
    if kind in ("lm", "file and co-occurrence"):
        check_code(after.codes[30], np.delete(after.codes, 30, axis=0), like=4)
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "prepared"]
    if kind == "title":  # a stop between the two renames leaves the old folder, and the next command puts it back
        (out / "prepared").rename(out / ".prepared.old")
        assert main(["export", str(out), "--to", str(tmp_path / "i.json"), "--format", "index"]) == 2
        assert "tokens of the base model" in error_line(capsys)
        assert len(codes_of(out).codes) == 32


def test_atomic_ids_cannot_name_new_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = prepare(tmp_path)
    assert status == 0
    write_lines(tmp_path / "new.csv", ["item_id,title", "n1,New"])
    capsys.readouterr()
    assert main(["add-items", str(out), "--catalogue", str(tmp_path / "new.csv")]) == 2
    assert "items.tokenizer is atomic" in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "prepared"]
