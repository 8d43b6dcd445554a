"""Hostile logs and catalogues, and what reads them: as a log, as a catalogue, as profiles, as examples."""

import csv
import dataclasses
import io
import json
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from hostile_bytes import BINARY, TEXT, WORDS, cell, damaged, zipped

from sftrec_jax.config import DataConfig, ProfileConfig
from sftrec_jax.data.catalogue import read_catalogue
from sftrec_jax.data.columns import as_words, ratings, text_ids, times
from sftrec_jax.data.layouts import with_layout
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.data.readers import read_tables
from sftrec_jax.data.table import Column
from sftrec_jax.errors import UserError

NAMES = ("user_id", "item_id", "timestamp", "rating", "title", "history", "review")
ROLES = (("user", "user_id"), ("item", "item_id"), ("time", "timestamp"), ("rating", "rating"))


def rows(rng: random.Random) -> list[list[str]]:
    """Of a file that is a log, a catalogue and a list of examples at once."""
    out = []
    for number in range(rng.choice([0, 1, 3, 6, 6, 6, 12])):
        usual = [
            f"u{number % 3}",
            f"i{number}",
            str(1000 + number),
            str(1 + number % 5),
            f"Title {number}",
            "[1, 2]",
            "fine, thanks",
        ]
        out.append([cell(rng, text) for text in usual])
    return out


def delimited(rng: random.Random, separator: str) -> bytes:
    out = io.StringIO()
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    writer = csv.writer(out, delimiter=separator, quoting=quoting, lineterminator="\n")
    header = [cell(rng, name) if rng.random() < 0.2 else name for name in NAMES]
    writer.writerows([header, *rows(rng)])
    return out.getvalue().encode("utf-8")


def plain_lines(header: str, separator: str) -> Callable[[random.Random], bytes]:
    def made(rng: random.Random) -> bytes:
        lines = [separator.join(row) for row in rows(rng)]
        return "\n".join([*([header] if header else []), *lines]).encode("utf-8", "surrogatepass")

    return made


def value(rng: random.Random, text: str) -> Any:
    """A value of JSON, mostly the text."""
    if rng.random() > 0.08:
        return text
    return rng.choice(
        [
            None,
            True,
            7,
            -1,
            1.5,
            10**30,
            float("nan"),
            float("inf"),
            [],
            {},
            [text],
            {"a": text},
            [[text, None], 3],
            "\ud800",
            "a\udfff",
            "\0",
        ]
    )


def objects(rng: random.Random) -> list[dict[str, Any]]:
    out = []
    for row in rows(rng):
        entry = {name: value(rng, text) for name, text in zip(NAMES, row, strict=True)}
        if rng.random() < 0.1:
            entry.pop(rng.choice(NAMES))
        if rng.random() < 0.1:
            entry[rng.choice(WORDS)] = rng.choice(WORDS)
        out.append(entry)
    return out


def json_lines(rng: random.Random) -> bytes:
    return "\n".join(json.dumps(entry, ensure_ascii=rng.random() < 0.5) for entry in objects(rng)).encode(
        "utf-8", "surrogatepass"
    )


def python_lines(rng: random.Random) -> bytes:
    """As Amazon's metadata of 2014."""
    lines = [repr(entry) for entry in objects(rng)]
    evil = [
        "__import__('os').mkdir('escaped')",
        "{'item_id': open('escaped', 'w')}",
        "{1: 2} if 1 else 3",
        "{'a': 1} | {'b': 2}",
        "{**{}}",
        "{'item_id': 'a' * 999999999}",
        "{'item_id': 9**9**9}",
        "{1, 2}",
        "{'item_id': 1+2j}",
        "{'item_id': b'a'}",
        "{'item_id': ...}",
        "{'item_id': {1}}",
        "{'item_id': (1,)}",
        "{[]: 1}",
        "{'item_id': f'{1}'}",
        "lambda: 1",
    ]
    if rng.random() < 0.3:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(evil))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def json_object(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        table: Any = {cell(rng, f"i{n}"): value(rng, "") or entry for n, entry in enumerate(objects(rng))}
    else:
        table = {cell(rng, f"u{n}"): [value(rng, cell(rng, str(i))) for i in range(rng.choice([0, 1, 4]))] for n in range(4)}
    if rng.random() < 0.05:
        table = rng.choice([[], [table], None, 1, "a", {"a": table}])
    return json.dumps(table, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def sequences(rng: random.Random) -> bytes:
    lines = []
    for n in range(rng.choice([0, 1, 3, 5])):
        fields = [f"u{n}", *(str(rng.randrange(9)) for _ in range(rng.choice([0, 1, 3, 6])))]
        lines.append(rng.choice([" ", " ", "\t", "  ", "\u00a0"]).join(cell(rng, field) for field in fields))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


TYPES = [
    pa.int8(),
    pa.int64(),
    pa.uint64(),
    pa.float16(),
    pa.float32(),
    pa.float64(),
    pa.bool_(),
    pa.string(),
    pa.large_string(),
    pa.binary(),
    pa.large_binary(),
    pa.binary(3),
    pa.date32(),
    pa.date64(),
    pa.time32("s"),
    pa.time64("ns"),
    pa.timestamp("s"),
    pa.timestamp("ns"),
    pa.timestamp("us", "UTC"),
    pa.timestamp("ms", "+14:00"),
    pa.duration("us"),
    pa.decimal128(38, 10),
    pa.decimal256(76, 5),
    pa.null(),
    pa.list_(pa.int64()),
    pa.large_list(pa.string()),
    pa.list_(pa.int32(), 2),
    pa.list_(pa.list_(pa.string())),
    pa.struct([("a", pa.int64())]),
    pa.map_(pa.string(), pa.int64()),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.int64()),
    pa.string_view(),
    pa.list_(pa.struct([("a", pa.string())])),
    pa.month_day_nano_interval(),
]


def column(rng: random.Random, kind: pa.DataType, count: int) -> pa.Array:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = column(rng, kind.value_type, count)
        return pa.array([inner.to_pylist()[: rng.randrange(3)] if rng.random() < 0.8 else None for _ in range(count)], kind)
    if pa.types.is_fixed_size_list(kind):
        return pa.array([[1, None]] * count, kind)
    if pa.types.is_struct(kind):
        return pa.array([{"a": None}] * count, kind)
    if pa.types.is_map(kind):
        return pa.array([[("a", 1)]] * count, kind)
    if pa.types.is_dictionary(kind):
        return column(rng, kind.value_type, count).dictionary_encode().cast(kind)
    if pa.types.is_decimal(kind):
        return pa.array([rng.choice([Decimal(1), Decimal("1.5"), Decimal("-99999"), None]) for _ in range(count)], kind)
    if pa.types.is_floating(kind):
        return pa.array(
            [np.float16(rng.choice([1.0, 1.5, float("nan"), float("inf"), -0.0, 60000.0])) for _ in range(count)], kind
        )
    if pa.types.is_integer(kind):
        return pa.array([rng.choice([0, 1, 2, 127]) for _ in range(count)], kind)
    if pa.types.is_boolean(kind):
        return pa.array([rng.random() < 0.5 for _ in range(count)], kind)
    if pa.types.is_fixed_size_binary(kind):
        return pa.array([rng.choice([b"abc", b"\xff\xff\xff"]) for _ in range(count)], kind)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.array([rng.choice([b"u1", b"", b"\xff", None]) for _ in range(count)], kind)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view():
        return pa.array([cell(rng, f"t{n % 3}") for n in range(count)], pa.string()).cast(kind)
    if pa.types.is_null(kind) or not (pa.types.is_temporal(kind)) or kind == pa.month_day_nano_interval():
        return pa.nulls(count, kind)
    width = 32 if kind.bit_width == 32 else 64
    numbers = [rng.choice([0, 86_400, 43_200, 2**31 - 1 if width == 32 else 2**62]) for _ in range(count)]
    return pa.array(numbers, pa.int32() if width == 32 else pa.int64()).view(kind)


def arrow_table(rng: random.Random) -> pa.Table:
    count = rng.choice([0, 1, 6, 6, 50])
    usual = {
        "user_id": pa.string(),
        "item_id": pa.int64(),
        "timestamp": pa.int64(),
        "rating": pa.float32(),
        "title": pa.string(),
        "history": pa.list_(pa.int64()),
        "review": pa.string(),
    }
    kinds = {name: rng.choice(TYPES) if rng.random() < 0.15 else kind for name, kind in usual.items()}
    table = pa.table({name: column(rng, kind, count) for name, kind in kinds.items()})
    if rng.random() < 0.05:
        table = table.rename_columns(["user_id", *table.column_names[1:-1], rng.choice(["user_id", "\0", "\n", ""])])
    return table


def parquet(rng: random.Random) -> bytes:
    table, out = arrow_table(rng), io.BytesIO()
    settings = {
        "compression": rng.choice(["none", "snappy", "gzip", "zstd", "lz4", "brotli"]),
        "use_dictionary": rng.random() < 0.7,
        "row_group_size": rng.choice([1, 3, 100]),
        "data_page_version": rng.choice(["1.0", "2.0"]),
        "store_schema": rng.random() < 0.7,
        "write_statistics": rng.random() < 0.5,
    }
    try:
        pq.write_table(table, out, **settings)
    except (pa.ArrowException, NotImplementedError):
        pq.write_table(pa.table({"user_id": ["a", "b"]}), out)
    return out.getvalue()


def file(name: str, make: Callable[[random.Random], bytes], binary: bool = False) -> Callable[[random.Random, Path], Path]:
    def made(rng: random.Random, folder: Path) -> Path:
        data = damaged(rng, make(rng), BINARY if binary else TEXT, 0.3)
        if rng.random() < 0.1:
            (path := folder / f"{name}.gz").write_bytes(zipped(rng, data))
        else:
            (path := folder / name).write_bytes(data)
        # What else a reading needs is sound, and here before anything is read.
        write_sound(folder)
        return path

    return made


def arrow_folder(rng: random.Random, folder: Path) -> Path:
    """As `Dataset.save_to_disk` leaves it."""
    data = arrow_table(rng)
    out = io.BytesIO()
    with pa.ipc.new_stream(out, data.schema) as writer:
        writer.write_table(data)
    (made := folder / "saved").mkdir()
    names = rng.choice(
        [["data.arrow"], ["data.arrow"] * 3, ["../data.arrow"], [".."], [""], ["a\0b"], ["/etc/passwd"], ["a" * 5000], [1], None]
    )
    names = ["data.arrow"] if rng.random() < 0.7 else names
    state = json.dumps({"_data_files": names and [{"filename": name} for name in names]}).encode()
    sound = 0.7
    (made / "data.arrow").write_bytes(damaged(rng, out.getvalue(), BINARY, 0.3))
    (made / "state.json").write_bytes(damaged(rng, state, TEXT, sound))
    (made / "dataset_info.json").write_bytes(b"{}")
    if rng.random() < 0.1:
        (made / "dataset_dict.json").write_bytes(
            damaged(rng, rng.choice([b'{"splits": ["train"]}', b"[]", b'{"splits": [1]}', b"1"]), TEXT)
        )
    write_sound(folder)
    return made


def write_sound(folder: Path) -> None:
    lines = [f"u{n % 3},i{n % 6},{1000 + n},{1 + n % 5}" for n in range(12)]
    (folder / "sound.csv").write_text("\n".join(["user_id,item_id,timestamp,rating", *lines]), encoding="utf-8")


def read_file(rng: random.Random, folder: Path, path: Path) -> None:
    """In one of the ways in which the program reads it."""
    sound = DataConfig(source=str(folder / "sound.csv"), rating_column="rating", user_core=0)
    config = dataclasses.replace(
        sound,
        source=str(path),
        time_column=rng.choice(["timestamp", "timestamp", "timestamp", None]),
        time_unit=rng.choice(["s", "s", "ms", "us", "ns"]),
        rating_column=None if path.name.startswith("a.txt") else rng.choice(["rating", "rating", None]),
        review_column=None if path.name.startswith("a.txt") and rng.random() < 0.9 else rng.choice(["review", None]),
        text_columns=rng.choice([(), ("title", "review"), ("history",)]),
        keyphrase_column=rng.choice(["rating", None, None]),
        split=rng.choice(["leave_one_out", "leave_one_out", "temporal"]),
    )
    config = dataclasses.replace(config, user_core=rng.choice([0, 0, 3]))
    way = rng.randrange(20)
    if path.name.startswith("a.txt"):
        prepare_dataset(config)
    elif way < 12:
        wanted = [Column(role, name, f"data.{role}_column") for role, name in ROLES if role != "time" or config.time_column]
        wanted += [Column("review", "review", "data.review_column", sparse=True)]
        for table in read_tables(path, wanted):
            steps: list[Callable[[], Any]] = [
                lambda t=table: text_ids(t, "user"),
                lambda t=table: text_ids(t, "item"),
                lambda t=table: ratings(t),
                lambda t=table: as_words(t, "review"),
            ]
            steps += [lambda t=table: times(t, config.time_unit)] if config.time_column else []
            refused = []
            for step in steps:
                try:
                    step()
                except UserError as error:
                    refused.append(error)
            if refused:
                raise refused[0]
    elif way < 16:
        read_catalogue(path, config)
    elif way == 16:
        profile = ProfileConfig(source=str(path), columns=("title", "review"))
        prepare_dataset(sound, profile)
    elif way == 17:
        layout = rng.choice(["amazon2014", "amazon2018", "amazon2023", "recbole", "lcrec"])
        prepare_dataset(with_layout(dataclasses.replace(config, layout=layout)))
    elif way == 18:
        prepare_dataset(DataConfig(source=str(path), history_column="history", test_source=str(path)))
    else:
        prepare_dataset(dataclasses.replace(config, catalogue=rng.choice([None, str(path)])))


INTER = "user_id:token\titem_id:token\ttimestamp:float\trating:float\ttitle:token_seq\thistory:token_seq\treview:token_seq"
MAKERS: dict[str, Callable[[random.Random, Path], Path]] = {
    "csv": file("a.csv", lambda rng: delimited(rng, ",")),
    "tsv": file("a.tsv", lambda rng: delimited(rng, "\t")),
    "inter": file("a.inter", plain_lines(INTER, "\t")),
    "jsonl": file("a.jsonl", json_lines),
    "amazon2014": file("a.json", python_lines),
    "json": file("a.json", json_object),
    "sequences": file("a.txt", sequences),
    "parquet": file("a.parquet", parquet, binary=True),
    "arrow": arrow_folder,
}
_ = pl  # imported before memory is limited
