"""Sources as others write them: dumps of Amazon reviews, layouts of peers, folders of Hugging Face, shards of big-data tools."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftrec_jax.config import DataConfig
from sftrec_jax.data import arrow_files, textfile
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.errors import UserError

EVENTS = [(f"U{u}", f"B{(3 * u + 2 * i) % 7}", 1_400_000_000 + 86_400 * ((i * 5 + u) % 11)) for u in range(4) for i in range(5)]
"""User, item and time; no two of a user at one time."""
ITEMS = sorted({item for _, item, _ in EVENTS})
EXPECTED: dict[str, list[str]] = {}
for _user, _item, _ in sorted(EVENTS, key=lambda event: event[2]):
    EXPECTED.setdefault(_user, []).append(_item)


def told(dataset: Dataset) -> dict[str, list[str]]:
    return {user: dataset.item_ids[dataset.history(i)].tolist() for i, user in enumerate(dataset.user_ids)}


def prepared(source: Path, **settings: Any) -> Dataset:
    return prepare_dataset(DataConfig(source=str(source), **settings))


def frame(events: list[tuple[str, str, int]] = EVENTS) -> pl.DataFrame:
    return pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row")


def zipped(path: Path, lines: list[str]) -> Path:
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of tests take many blocks, too."""
    monkeypatch.setattr(textfile.text_blocks, "__defaults__", (None, 300))
    monkeypatch.setattr(arrow_files, "ROWS", 3)


def amazon2014(folder: Path) -> tuple[Path, Path]:
    """Reviews are JSON; metadata are dictionaries in Python's notation, most without a brand."""
    reviews = [
        json.dumps({"reviewerID": u, "asin": i, "helpful": [0], "reviewText": "It's so-so", "overall": 4.0, "unixReviewTime": t})
        for u, i, t in EVENTS
    ]
    entries = [
        {"asin": i, "title": f"Bob's {i}", "price": 9.99, "categories": [["Beauty", "Hair Care"]], "related": {"bought": ["B9"]}}
        for i in ITEMS
    ]
    entries[-1]["brand"] = "Bob"
    return zipped(folder / "reviews_Beauty_5.json.gz", reviews), zipped(
        folder / "meta_Beauty.json.gz", [repr(e) for e in entries]
    )


def amazon2018(folder: Path) -> tuple[Path, Path]:
    reviews = [
        json.dumps({"overall": 5.0, "verified": True, "reviewerID": u, "asin": i, "unixReviewTime": t, "style": {"Size:": " 1"}})
        for u, i, t in EVENTS
    ]
    entries = [
        json.dumps({"category": ["Beauty", "Hair Care"], "title": f"Bob's {i}", "brand": "B&amp;B", "also_buy": [], "asin": i})
        for i in ITEMS
    ]
    return zipped(folder / "Beauty.json.gz", reviews), zipped(folder / "meta_Beauty.json.gz", entries)


def amazon2023(folder: Path) -> tuple[Path, Path]:
    """Times in milliseconds, items by their parent."""
    reviews = [
        json.dumps({"rating": 5.0, "title": "Good", "asin": f"{i}X", "parent_asin": i, "user_id": u, "timestamp": 1000 * t + 123})
        for u, i, t in EVENTS
    ]
    entries = [
        json.dumps({"title": f"Bob's {i}", "store": None, "categories": ["Beauty", "Hair Care"], "parent_asin": i}) for i in ITEMS
    ]
    return zipped(folder / "All_Beauty.jsonl.gz", reviews), zipped(folder / "meta_All_Beauty.jsonl.gz", entries)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (amazon2014, "Bob's {}. Beauty, Hair Care"),
        (amazon2018, "Bob's {}. B&B. Beauty, Hair Care"),
        (amazon2023, "Bob's {}. Beauty, Hair Care"),
    ],
)
def test_amazon_dumps(tmp_path: Path, write: Callable[[Path], tuple[Path, Path]], says: str) -> None:
    reviews, metadata = write(tmp_path)
    dataset = prepared(reviews, catalogue=str(metadata), layout=write.__name__)
    assert told(dataset) == EXPECTED
    assert dataset.titles.tolist() == [f"Bob's {i}" for i in ITEMS]
    assert dataset.text is not None and dataset.text.texts.tolist()[:-1] == [says.format(i) for i in ITEMS[:-1]]
    assert sorted(dataset.timestamps.tolist()) == sorted(t for _, _, t in EVENTS)
    # Metadata lack some items that have reviews: these rows are left out, and counted.
    fewer = gzip.decompress(metadata.read_bytes()).decode().splitlines()[1:]
    zipped(metadata, fewer)
    dataset = prepared(reviews, catalogue=str(metadata), layout=write.__name__)
    gone = [e for e in EVENTS if e[1] == ITEMS[0]]
    assert told(dataset) == {user: [item for item in items if item != ITEMS[0]] for user, items in EXPECTED.items()}
    assert dataset.report["items_not_in_catalogue"] == 1
    assert dataset.report["interactions_of_items_not_in_catalogue"] == len(gone) > 0
    with pytest.raises(UserError, match=rf"item '{ITEMS[0]}' in row \d+ is not in the catalogue .*missing_items: drop"):
        prepared(reviews, **{**settings_of(write.__name__), "catalogue": str(metadata), "missing_items": "error"})


def settings_of(layout: str) -> dict[str, Any]:
    from sftrec_jax.data.layouts import LAYOUTS

    return dict(LAYOUTS[layout])


def test_an_amazon_line_that_is_neither_json_nor_python(tmp_path: Path) -> None:
    reviews, metadata = amazon2014(tmp_path)
    lines = gzip.decompress(metadata.read_bytes()).decode().splitlines()
    marker = tmp_path / "ran"
    zipped(metadata, [*lines[:2], f"{{'asin': open({str(marker)!r}, 'w')}}", *lines[3:]])
    with pytest.raises(UserError, match=r"meta_Beauty.json.gz: row 3 is not a JSON object"):
        prepared(reviews, catalogue=str(metadata), layout="amazon2014")
    assert not marker.exists()


def test_recbole(tmp_path: Path) -> None:
    lines = [f"{u}\t{i}\t5\t{t}" for u, i, t in EVENTS]
    (tmp_path / "a.inter").write_text("\n".join(["user_id:token\titem_id:token\trating:float\ttimestamp:float", *lines]))
    items = [f'{i}\tThe "{i}"\ta b' for i in ITEMS]
    (tmp_path / "a.item").write_text("\n".join(["item_id:token\tmovie_title:token_seq\tgenre:token_seq", *items]))
    dataset = prepared(tmp_path / "a.inter", catalogue=str(tmp_path / "a.item"), layout="recbole", title_column="movie_title")
    assert told(dataset) == EXPECTED
    assert dataset.titles.tolist() == [f'The "{i}"' for i in ITEMS]


def test_lcrec(tmp_path: Path) -> None:
    numbers = {item: n for n, item in enumerate(ITEMS)}
    sequences = {str(n): [numbers[item] for item in EXPECTED[user]] for n, user in enumerate(sorted(EXPECTED))}
    (tmp_path / "Games.inter.json").write_text(json.dumps(sequences))
    entries = {str(n): {"title": f"T {i}", "description": "d", "brand": "", "categories": "c"} for i, n in numbers.items()}
    (tmp_path / "Games.item.json").write_text(json.dumps(entries, indent=2))
    dataset = prepared(tmp_path / "Games.inter.json", catalogue=str(tmp_path / "Games.item.json"), layout="lcrec")
    assert told(dataset) == {user: list(map(str, items)) for user, items in sequences.items()}
    assert dataset.titles.tolist() == [f"T {i}" for i in ITEMS]
    assert dataset.text is not None and dataset.text.texts[0] == f"T {ITEMS[0]}. d. c"


@pytest.mark.parametrize(("layout", "shown"), [("d3", repr), ("minionerec", json.dumps)])
def test_examples_of_d3_and_minionerec(tmp_path: Path, layout: str, shown: Callable[[list[str]], str]) -> None:
    """Columns as these write them; histories as a Python or JSON list."""
    files = {}
    for name, back in (("train", 3), ("valid", 2), ("test", 1)):
        rows = [
            {"user_id": user, "history_item_title": shown(["x"]), "item_title": "x", "history_item_id": shown(items[:-back]),
             "item_id": items[-back]}
            for user, items in EXPECTED.items()
        ]  # fmt: skip
        files[name] = tmp_path / f"{name}.csv"
        pl.DataFrame(rows).write_csv(files[name])
    catalogue = tmp_path / "item.json"
    catalogue.write_text(json.dumps({i: {"title": f"T {i}", "description": "d", "brand": "b"} for i in ITEMS}))
    dataset = prepared(files["train"], valid_source=str(files["valid"]), test_source=str(files["test"]), layout=layout,
                       catalogue=str(catalogue))  # fmt: skip
    ends = sorted(tuple(dataset.item_ids[dataset.history(u)].tolist()) for u in range(len(dataset.user_ids)))
    assert ends == sorted(tuple(items[: len(items) - back]) for items in EXPECTED.values() for back in (2, 1, 0))
    assert dataset.given and dataset.report["test_targets"] == len(EXPECTED)


def test_s3rec_sequences(tmp_path: Path) -> None:
    path = zipped(tmp_path / "Beauty.txt.gz", [" ".join([user, *items]) for user, items in EXPECTED.items()])
    assert told(prepared(path)) == EXPECTED


def test_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.layout is 'amazon2022'; the nearest is 'amazon2023', all are amazon2014, "):
        prepared(tmp_path, layout="amazon2022")


def test_hugging_face_folder(tmp_path: Path) -> None:
    made = datasets.Dataset.from_polars(frame())
    made.save_to_disk(str(tmp_path / "log"), num_shards=3)
    assert told(prepared(tmp_path / "log")) == EXPECTED
    datasets.DatasetDict(train=made, more=made).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(UserError, match=r"holds the splits train, more; name one, such as .*dict/train"):
        prepared(tmp_path / "dict")
    assert told(prepared(tmp_path / "dict" / "train")) == EXPECTED
    items = datasets.Dataset.from_dict({"item_id": ITEMS, "title": [f"T {i}" for i in ITEMS]})
    items.save_to_disk(str(tmp_path / "items"))
    assert prepared(tmp_path / "log", catalogue=str(tmp_path / "items")).titles.tolist() == [f"T {i}" for i in ITEMS]
    with pytest.raises(UserError, match=r"no column 'when'; it has user_id, item_id, timestamp"):
        prepared(tmp_path / "log", time_column="when")
    with (tmp_path / "log" / "state.json").open("w") as file:
        json.dump({"_data_files": [{"filename": "../items/data-00000-of-00001.arrow"}]}, file)
    with pytest.raises(UserError, match="names files outside"):
        prepared(tmp_path / "log")


def spark(folder: Path) -> None:
    """Snappy shards, their checksums in hidden files, and a mark of success."""
    for number in range(3):
        name = f"part-{number:05d}-9a7f-c000.snappy.parquet"
        frame(EVENTS[number::3]).write_parquet(folder / name, compression="snappy")
        (folder / f".{name}.crc").write_bytes(b"crc")
    (folder / "_SUCCESS").touch()


def spark_by_day(folder: Path) -> None:
    """Partitioned by a column, which the files lack."""
    for user in EXPECTED:
        below = folder / f"user_id={user}"
        below.mkdir()
        frame([e for e in EVENTS if e[0] == user]).drop("user_id").write_parquet(below / "part-00000.parquet")


def beam(folder: Path) -> None:
    for number in range(3):
        pq.write_table(frame(EVENTS[number::3]).to_arrow(), folder / f"log-{number:05d}-of-00003.parquet")


def beam_lines(folder: Path) -> None:
    """Shards of JSON lines, the number behind the name's end."""
    for number in range(3):
        frame(EVENTS[number::3]).write_ndjson(folder / f"log.jsonl-{number:05d}-of-00003")


def bigquery(folder: Path) -> None:
    """Columns of BigQuery: INT64, STRING and TIMESTAMP in microseconds."""
    for number in range(2):
        some = frame(EVENTS[number::2]).with_columns(
            pl.from_epoch("timestamp", "s").dt.cast_time_unit("us").dt.replace_time_zone("UTC")
        )
        pq.write_table(some.to_arrow(), folder / f"{number:012d}.parquet")


def bigquery_csv(folder: Path) -> None:
    """Each shard with its header."""
    for number in range(2):
        (folder / f"{number:012d}.csv.gz").write_bytes(gzip.compress(frame(EVENTS[number::2]).write_csv().encode()))


@pytest.mark.parametrize("write", [spark, spark_by_day, beam, beam_lines, bigquery, bigquery_csv])
def test_shards(tmp_path: Path, write: Callable[[Path], None]) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    write(folder)
    dataset = prepared(folder)
    assert told(dataset) == EXPECTED
    assert sorted(dataset.timestamps.tolist()) == sorted(t for _, _, t in EVENTS)


def test_mistakes_in_shards(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    with pytest.raises(UserError, match="holds no data file"):
        prepared(folder)
    spark(folder)
    odd = folder / "part-00009.snappy.parquet"
    frame().rename({"item_id": "sku"}).write_parquet(odd)
    with pytest.raises(UserError, match=r"part-00009.snappy.parquet: no column 'item_id'; it has user_id, sku, timestamp"):
        prepared(folder)
    odd.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"part-00009.snappy.parquet: not a readable Parquet file"):
        prepared(folder)
    pq.write_table(pa.table({"user_id": ["U0", None], "item_id": ["B1", "B1"], "timestamp": [1, 2]}), odd)
    with pytest.raises(UserError, match=r"part-00009.snappy.parquet: row 2 has no user id"):
        prepared(folder)
    odd.rename(folder / "more.csv")
    with pytest.raises(UserError, match=r"holds files of several kinds \(.csv, .parquet\)"):
        prepared(folder)
