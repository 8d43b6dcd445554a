"""Readers: every format gives the same histories, and every mistake a line that says where it is."""

import dataclasses
import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sftrec_jax.config import DataConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.errors import UserError

ROWS = [  # user, item, time, rating; the later rows stand first
    ("7", "b c", 30, 4.0),
    ("7", "ä", 20, 3.5),
    ("7", "11", 10, 5.0),
    ("8", "11", 99, 1.0),
    ("8", "ä", 98, 2.0),
    ("8", "11", 97, 2.5),
]
EXPECTED = {"7": ["11", "ä", "b c"], "8": ["11", "ä", "11"]}
TITLES = {"b c": "The B, and C", "ä": 'An "Ä"', "11": "Eleven", "x": "Nobody's"}
NAMES = ("user_id", "item_id", "timestamp", "rating")
CONFIG = DataConfig(rating_column="rating")


def histories(dataset: Dataset) -> dict[str, list[str]]:
    return {u: dataset.item_ids[dataset.history(i)].tolist() for i, u in enumerate(dataset.user_ids)}


def prepared(path: Path, **settings: object) -> Dataset:
    return prepare_dataset(DataConfig(**({"source": str(path), "rating_column": "rating"} | settings)))  # pyright: ignore


def frame() -> pl.DataFrame:
    return pl.DataFrame(ROWS, schema=NAMES, orient="row")


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def log_csv(tmp_path: Path, *lines: str, name: str = "log.csv") -> Path:
    return write(tmp_path / name, "\n".join(["user_id,item_id,timestamp,rating", *lines]) + "\n")


def log_text(name: str) -> str | bytes:
    kind = name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "csv":
        return "\ufeff" + frame().write_csv().replace("\n", "\r\n") + "\r\n"
    if kind == "tsv":
        return frame().write_csv(separator="\t")
    if kind == "jsonl":
        objects = [json.dumps(dict(zip(NAMES, row, strict=True)) | {"more": [1]}) for row in ROWS]
        return "\n\n".join(objects)
    if kind == "inter":
        header = "user_id:token\titem_id:token\ttimestamp:float\trating:float\n"
        return header + "".join("\t".join(map(str, row)) + "\n" for row in ROWS)
    path = Path(name)
    frame().write_parquet(path)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.jsonl", "a.jsonl.gz", "a.inter", "a.inter.gz", "a.parquet"])
def test_every_format_gives_the_same_histories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = prepared(write(tmp_path / name, log_text(name)))
    assert histories(dataset) == EXPECTED
    assert dataset.titles.tolist() == dataset.item_ids.tolist() == sorted(dataset.item_ids)
    assert dataset.timestamps.tolist() == [10, 20, 30, 97, 98, 99]
    assert dataset.report["interactions_read"] == 6
    assert (dataset.items.dtype, dataset.timestamps.dtype, dataset.offsets.dtype) == (np.int32, np.int64, np.int64)


def test_sequence_file_keeps_its_order(tmp_path: Path) -> None:
    dataset = prepared(write(tmp_path / "s.txt.gz", "10 5 4 5\n\n9\t3 5 4\n"), rating_column=None)
    assert histories(dataset) == {"10": ["5", "4", "5"], "9": ["3", "5", "4"]}
    assert dataset.timestamps.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.report["tied_timestamp_share"] is None


def test_without_time_the_file_order_counts(tmp_path: Path) -> None:
    dataset = prepared(write(tmp_path / "a.csv", log_text("a.csv")), time_column=None)
    assert histories(dataset) == {user: items[::-1] for user, items in EXPECTED.items()}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "item"])
def test_catalogue_gives_titles_and_items_nobody_took(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"items.{kind}"
    table = pl.DataFrame({"item_id": list(TITLES), "title": list(TITLES.values()), "genre": "g"})
    if kind == "csv":
        table.write_csv(path)
    elif kind == "jsonl":
        table.write_ndjson(path)
    elif kind == "parquet":
        table.write_parquet(path)
    else:
        lines = [f"{i}\t{t}\tg" for i, t in TITLES.items()]
        write(path, "\n".join(["item_id:token\ttitle:token_seq\tgenre:token", *lines]))
    dataset = prepared(write(tmp_path / "a.csv", log_text("a.csv")), catalogue=str(path))
    assert histories(dataset) == EXPECTED
    assert dict(zip(dataset.item_ids, dataset.titles, strict=True)) == TITLES
    assert dataset.item_ids.tolist() == list(TITLES)
    assert dataset.report["items_without_interactions"] == 1


def test_numeric_ids_become_plain_text(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1.0, 1.0, 2.0], "item_id": [3, 4, 3], "timestamp": [1, 2, 3]}).write_parquet(tmp_path / "a.parquet")
    dataset = prepared(tmp_path / "a.parquet", rating_column=None, user_core=0)
    assert histories(dataset) == {"1": ["3", "4"], "2": ["3"]}
    write(tmp_path / "a.csv", "user_id,item_id,timestamp\n1,007,1\n2,7,2\n")
    assert prepared(tmp_path / "a.csv", rating_column=None, user_core=0).item_ids.tolist() == ["007", "7"]


MOMENTS = [datetime(2015, 3, 1, 12, 0, 0, tzinfo=UTC), datetime(1969, 12, 31, 23, 59, 58, 500_000, tzinfo=UTC)]


@pytest.mark.parametrize(
    "column",
    [
        [m.isoformat() for m in MOMENTS],
        ["2015-03-01T14:00:00+02:00", "1969-12-31 23:59:58.5"],
        [f"{m.timestamp()}" for m in MOMENTS],
        [m.timestamp() for m in MOMENTS],
        [m.replace(tzinfo=None) for m in MOMENTS],
        MOMENTS,
    ],
)
def test_times_become_seconds(tmp_path: Path, column: list) -> None:
    table = pl.DataFrame({"user_id": ["a", "b"] * 2, "item_id": list("wxyz"), "timestamp": pl.Series(column * 2)})
    table.write_parquet(tmp_path / "a.parquet")
    dataset = prepared(tmp_path / "a.parquet", rating_column=None, user_core=0)
    assert dataset.timestamps.tolist() == [1425211200] * 2 + [-2] * 2


def test_fractions_of_a_second_order_and_do_not_tie(tmp_path: Path) -> None:
    lines = [f"{u},{i:02d},5.{90 - i},1" for u in "ab" for i in range(40)]
    dataset = prepared(log_csv(tmp_path, *lines))
    assert histories(dataset)["a"] == [f"{i:02d}" for i in reversed(range(40))]
    assert dataset.report["tied_timestamp_share"] == 0
    assert set(dataset.timestamps) == {5}


def test_embedded_movielens() -> None:
    dataset = prepare_dataset(DataConfig())
    assert (len(dataset.items), len(dataset.user_ids), len(dataset.item_ids)) == (100_836, 610, 9_742)
    assert dataset.titles[dataset.item_ids == "1"] == ["Toy Story (1995)"]
    assert dataset.report["tied_timestamp_share"] == pytest.approx(0.23, abs=0.005)
    assert dataset.report["users_read"] == 610
    same = np.flatnonzero(np.diff(dataset.timestamps) == 0)
    ids = dataset.item_ids.astype(int)[dataset.items]
    assert np.mean(ids[same + 1] > ids[same]) == pytest.approx(0.5, abs=0.02)


def message(path: Path | str, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        prepared(Path(path), **settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


GOOD = ("1,a,1,1", "1,b,2,2", "2,a,3,3")


@pytest.mark.parametrize(
    ("lines", "settings", "parts"),
    [
        (GOOD, {"item_column": "itemid"}, ["'itemid'", "user_id, item_id, timestamp, rating", "nearest: 'item_id'"]),
        (GOOD, {"time_column": "TIMESTAMPS"}, ["nearest: 'timestamp'", "null"]),
        ((), {}, ["no interactions"]),
        (("1,a,1,1", "1,b,2,2"), {}, ["only one user", "'1'"]),
        ((*GOOD, "2,b,4,"), {"min_rating": 1.0}, ["row 5", "no rating", "data.min_rating"]),
        ((*GOOD, "2,b,4,NaN"), {}, ["row 5", "'NaN'"]),
        (("2,b,4,-inf", *GOOD), {}, ["row 2", "'-inf'"]),
        ((*GOOD, "2,b,4,good"), {}, ["row 5", "'good'"]),
        ((*GOOD, "2,b,soon,1"), {}, ["row 5", "'soon'"]),
        ((*GOOD, "2,b,,1"), {}, ["row 5", "time None"]),
        (("1,a,2015-01-01,1", "2,b,2015-13-01,1"), {}, ["row 3", "'2015-13-01'", "ISO"]),
        ((*GOOD, ",b,4,1"), {}, ["row 5", "user id"]),
        ((*GOOD, '2,"",4,1'), {}, ["row 5", "item id"]),
        ((*GOOD, "2,b,4,1,9"), {}, ["row 5", "5 fields"]),
        ((*GOOD, '2,"b,4,1'), {}, ["row 5", "quotation mark"]),
        (GOOD, {"user_core": 3}, ["data.user_core (3)", "3 interactions"]),
        (GOOD, {"user_core": 0, "min_rating": 9.0}, ["data.min_rating (9.0)"]),
        (GOOD, {"catalogue": "no.csv"}, ["no.csv", "No such file"]),
    ],
)
def test_mistakes_in_a_log(tmp_path: Path, lines: tuple[str, ...], settings: dict, parts: list[str]) -> None:
    text = message(log_csv(tmp_path, *lines), **settings)
    assert all(part in text for part in parts), text
    assert "log.csv" in text or "no.csv" in text


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", b"user_id,item_id,timestamp,rating\n1,a,1,1\n2,caf\xe9,1,1\n", ["row 3", "byte 46", "iconv"]),
        ("a.csv", b"", ["empty"]),
        ("a.jsonl", b"\n", ["empty"]),
        ("a.jsonl", b'{"user_id": 1}\n\n{"user_id": \n', ["row 3", "JSON"]),
        ("a.jsonl", b'{"user_id": 1, "rating": NaN}\n', ["row 1", "NaN"]),
        ("a.jsonl", b'{"user_id": 1, "item": 2}\n', ["'item_id'", "user_id, item", "nearest: 'item'"]),
        ("a.jsonl", b'{"user_id": 1, "item_id": 2, "timestamp": 1, "rating": 1}\n\n{"user_id": 1}\n', ["row 3", "item id"]),
        ("a.parquet", b"PAR1 broken", ["Parquet"]),
        ("a.dat", b"1::2::3", ["'.dat'", ".csv"]),
        ("a", b"1::2::3", ["extension"]),
        ("a.inter", b"user_id\titem_id\n1\t2\n", ["'user_id'", "name:type"]),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    text = message(write(tmp_path / name, content))
    assert all(part in text for part in [*parts, name]), text


def test_mistakes_of_files_and_sequences(tmp_path: Path) -> None:
    assert "cannot read" in message(tmp_path / "none.csv")
    broken = write(tmp_path / "a.csv.gz", log_text("a.csv"))
    broken.write_bytes(broken.read_bytes()[:-20])
    assert "gzip" in message(broken)
    (tmp_path / "b.csv.gz").write_bytes(b"plain")
    assert "gzip" in message(tmp_path / "b.csv.gz")
    assert "rows 1 and 3" in message(write(tmp_path / "s.txt", "1 2\n2 3\n1 4\n"), rating_column=None)
    assert "row 2" in message(write(tmp_path / "s.txt", "1 2\n2\n"), rating_column=None)
    assert "no ratings" in message(write(tmp_path / "s.txt", "1 2\n2 3\n"))
    assert "no interactions" in message(write(tmp_path / "s.txt", ""), rating_column=None)
    assert "no time" in message(write(tmp_path / "s.txt", "1 2\n2 3\n"), rating_column=None, split="temporal")


def test_mistakes_in_a_catalogue(tmp_path: Path) -> None:
    log = log_csv(tmp_path, "1,a,1,1", "1,zz,2,2", "2,zz,3,3", "2,y,4,4")
    items = write(tmp_path / "i.csv", "item_id,title\na,A\n")
    text = message(log, catalogue=str(items))
    assert all(part in text for part in ["'zz'", "row 3", "2 such items in 3 rows", "i.csv", "log.csv"]), text
    write(items, "item_id,title\na,A\nb,B\na,C\n")
    assert "'a' stands in rows 2 and 4" in message(log, catalogue=str(items))
    write(items, "item_id,movie_title\na,A\n")
    assert "data.title_column (nearest: 'movie_title')" in message(log, catalogue=str(items))
    write(items, "item_id,title\n")
    assert "no item" in message(log, catalogue=str(items))
    assert ".txt" in message(log, catalogue=str(write(tmp_path / "i.txt", "a b")))


def test_a_missing_title_becomes_the_id(tmp_path: Path) -> None:
    log = log_csv(tmp_path, "1,a,1,1", "1,b,2,2", "2,c,3,3")
    items = write(tmp_path / "i.csv", 'item_id,title\na,A\nb,\nc,"  "\n')
    dataset = prepared(log, catalogue=str(items), user_core=0)
    assert dataset.titles.tolist() == ["A", "b", "c"]
    assert dataset.report["missing_titles"] == 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_text_of_an_item_joins_columns_and_lists(tmp_path: Path, kind: str) -> None:
    rows = [
        {
            "item_id": "a",
            "title": "Red ball",
            "brand": "Acme",
            "tags": ["toy", "round"],
            "key": "ball",
            "paths": [["p", "q"], ["r"]],
        },
        {"item_id": "b", "title": "[1] or not", "brand": None, "tags": [], "key": None, "paths": [[]]},
        {"item_id": "c", "title": "", "brand": " ", "tags": None, "key": "", "paths": None},
    ]
    path = tmp_path / f"items.{kind}"
    frame = pl.DataFrame(rows)
    frame.write_parquet(path) if kind == "parquet" else path.write_text("\n".join(json.dumps(r) for r in rows))
    log = tmp_path / "log.txt"
    log.write_text("u a b a\nv b a b\n")
    config = DataConfig(source=str(log), catalogue=str(path), text_columns=("title", "brand", "tags"), keyphrase_column="key")
    dataset = prepare_dataset(config)
    dataset.save(tmp_path / "saved")
    for each in (dataset, Dataset.load(tmp_path / "saved")):
        assert each.text is not None
        assert each.text.texts.tolist() == ["Red ball. Acme. toy, round", "[1] or not", ""]
        assert each.text.keyphrases.tolist() == ["ball", "", ""]
        assert each.text.rows.tolist() == [0, 1, 2]
    assert dataset.report["missing_texts"] == 1
    nested = prepare_dataset(dataclasses.replace(config, text_columns=("paths",)))
    assert nested.text is not None and nested.text.texts.tolist() == ["p, q, r", "", ""]
    only = prepare_dataset(dataclasses.replace(config, text_columns=(), item_core=1))
    assert only.text is not None and only.text.texts.tolist() == ["Red ball", "[1] or not"]
    with pytest.raises(UserError, match=r"no column 'colour'.*data\.text_columns"):
        prepare_dataset(dataclasses.replace(config, text_columns=("title", "colour")))
