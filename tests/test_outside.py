"""Lists that another tool made, scored under the protocol of a run; and runs of which an evaluation could say nothing."""

import csv
import dataclasses
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_run import ITEMS, USERS, histories, trained, write_lines

from sftrec_jax.cli import main
from sftrec_jax.config import DataConfig, DecodeConfig, RunConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.checks import check_evaluable, check_targets
from sftrec_jax.evaluate.uncertainty import draw

ROWS = ("popularity", "recent_popularity", "markov", "item_item")
Row = dict[str, Any]


@functools.cache
def unrelated() -> dict[str, list[str]]:
    """Of each user twelve items outside of the history, in an order that follows no model; every fifth list has the target."""
    draws, out = np.random.default_rng(5), {}
    for at, (user, items) in enumerate(histories().items()):
        others = [i for i in ITEMS if i not in items[:-1] and i != items[-1]]
        listed = [others[i] for i in draws.permutation(len(others))[:12]]
        if at % 5 == 0 and items[-1] not in items[:-1]:
            listed[draws.integers(12)] = items[-1]
        out[user] = listed
    return out


def rows_of(lists: dict[str, list[str]]) -> list[Row]:
    return [{"user": u, "rank": r, "item_id": i} for u, items in lists.items() for r, i in enumerate(items, start=1)]


def write(path: Path, rows: list[Row]) -> Path:
    if path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif path.suffix == ".jsonl":
        write_lines(path, [json.dumps(row) for row in rows])
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def score(path: Path, *options: str) -> dict[str, Any]:
    """The JSON of `evaluate --lists` over the tiny run."""
    to = path.with_suffix(".json")
    assert main(["evaluate", str(trained()), "--lists", str(path), "--to", str(to), "--overwrite", *options]) == 0
    return json.loads(to.read_text(encoding="utf-8"))


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    return said


def by_hand(lists: dict[str, list[str]], users: list[str], ks: tuple[int, ...]) -> dict[str, float]:
    """Leave-one-out: the target is the last item of a history."""
    out = {}
    for k in ks:
        ranks = [lists[u][:k].index(histories()[u][-1]) + 1 if histories()[u][-1] in lists[u][:k] else 0 for u in users]
        out[f"recall@{k}"] = sum(r > 0 for r in ranks) / len(users)
        out[f"ndcg@{k}"] = sum(1 / math.log2(r + 1) for r in ranks if r) / len(users)
        out[f"mrr@{k}"] = sum(1 / r for r in ranks if r) / len(users)
    return out


@pytest.mark.parametrize(
    "ending", [pytest.param(".csv", marks=pytest.mark.slow), pytest.param(".jsonl", marks=pytest.mark.slow), ".parquet"]
)
def test_metrics_are_those_of_counting_by_hand(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows in any order; columns that say nothing are passed over; cut-offs end with the shortest list."""
    rows = [row | {"title": "x"} for row in rows_of(unrelated())]
    np.random.default_rng(0).shuffle(rows)  # pyright: ignore[reportArgumentType]
    path = write(tmp_path / f"theirs{ending}", rows)
    result = score(path)
    expected = by_hand(unrelated(), USERS, (1, 5, 10))
    assert 0 < expected["ndcg@5"] < expected["recall@10"] < 1
    assert result["lists"] == pytest.approx(expected) and set(result["item_item"]) == set(expected)
    assert result["users"] == len(USERS) and result["items"] == len(ITEMS) and result["mask_seen"] is True
    own, other = result["lists"]["ndcg@10"], result["item_item"]["ndcg@10"]
    assert result["paired"]["item_item"]["ndcg@10"]["difference"] == pytest.approx(own - other)
    assert result["below_counter"] == (own < other)
    assert result["ci"]["lists"]["ndcg@10"][0] <= own <= result["ci"]["lists"]["ndcg@10"][1]
    assert result["protocol"]["lists"] == {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert not {"model", "decode"} & set(result["protocol"]) and result["protocol"]["users_evaluated"] == len(USERS)
    said = capsys.readouterr().err
    assert "metrics end at 10: the shortest list" in said and "12 items" in said and f"{own:.4f}" in said
    assert ("lists (below)" in said) == result["below_counter"] == ("BELOW" in said)


def test_own_recommendations_have_the_metrics_of_the_run() -> None:
    """Metrics, baselines, intervals and tests of `metrics.json`, as far as ten items tell."""
    run = trained()
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    path = run.parent / "own.parquet"
    shutil.copy(run / "recommendations.parquet", path)
    result = score(path)
    for ours, theirs in (("lists", "model"), *((name, name) for name in ROWS)):
        assert result[ours] and result[ours] == pytest.approx({name: metrics[theirs][name] for name in result[ours]})
        assert set(result[ours]) == {f"{m}@{k}" for m in ("recall", "ndcg", "mrr") for k in (1, 5, 10)}
        for name, interval in result["ci"][ours].items():
            assert interval == pytest.approx(metrics["ci"][theirs][name])
    for name in ROWS:
        for metric, found in result["paired"][name].items():
            assert found == pytest.approx(metrics["paired"][name][metric])
    assert result["below_counter"] == metrics["below_counter"]
    for part in ("data", "split", "order", "candidates", "users_evaluated", "baselines"):
        assert result["protocol"][part] == metrics["protocol"][part]


def test_a_prepared_run_is_enough_and_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No base model, no codes, no checkpoint; without `--to` nothing is written; `add-items` may have been stopped."""
    run = tmp_path / "run"
    (run / "prepared").mkdir(parents=True)
    config = (trained() / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config.replace("stories260k", "gone"), encoding="utf-8")
    for name in ("dataset.json", "interactions.parquet", "users.parquet", "catalogue.parquet"):
        shutil.copy(trained() / "prepared" / name, run / "prepared" / name)
    path = write(tmp_path / "theirs.csv", rows_of(unrelated()))
    for _ in range(2):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        assert main(["evaluate", str(run), "--lists", str(path)]) == 0
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        (run / "prepared").rename(run / ".prepared.old") if (run / "prepared").exists() else None
    said = capsys.readouterr().err
    assert "R@10" in said and "item item" in said and "95 % interval" in said and "p = " in said
    shutil.rmtree(run / ".prepared.old")
    assert "prepare" in refused(capsys, ["evaluate", str(run), "--lists", str(path)])


def test_users_that_are_drawn_are_those_of_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Dataset.load(trained() / "prepared")
    session: Any = type("Session", (), {"config": RunConfig()})
    drawn = [str(dataset.user_ids[u]) for u in draw(np.flatnonzero(dataset.test_position >= 0), 7, session.config.train.seed)]
    result = score(write(tmp_path / "theirs.csv", rows_of(unrelated())), "--evaluate.users", "7")
    assert result["users"] == 7 and result["lists"] == pytest.approx(by_hand(unrelated(), drawn, (1, 5, 10)))
    assert f"{len(USERS) - 7} users of the file are not among those that evaluate.users drew" in capsys.readouterr().err
    # Lists of these alone are enough.
    assert score(write(tmp_path / "few.csv", rows_of({u: unrelated()[u] for u in drawn})), "--evaluate.users", "7")["users"] == 7


def test_seen_items_and_users_without_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where seen items are allowed they are ranked as they stand; nobody looks at lists of users without a test target."""
    run = tmp_path / "run"
    shutil.copytree(trained() / "prepared", run / "prepared")
    shutil.copy(trained() / "config.yaml", run)
    dataset = Dataset.load(run / "prepared")
    some = np.where(np.arange(len(USERS)) < 3, -1, dataset.test_position)
    dataclasses.replace(dataset, test_position=some).save(run / "prepared")
    seen = {u: [*dict.fromkeys(histories()[u][:-1])][:4] + unrelated()[u][:6] for u in USERS}
    seen |= {u: ["no item", "no item"] for u in USERS[:3]}
    path, to = write(tmp_path / "theirs.csv", rows_of(seen)), tmp_path / "out.json"
    argv = ["evaluate", str(run), "--lists", str(path), "--to", str(to)]
    words = [USERS[3], histories()[USERS[3]][0], "row 8", "rank 1", "--evaluate.no-mask-seen"]
    assert all(word in refused(capsys, argv) for word in words) and not to.exists()
    assert main([*argv, "--evaluate.no-mask-seen"]) == 0
    result = json.loads(to.read_text(encoding="utf-8"))
    assert result["users"] == len(USERS) - 3 and result["lists"] == pytest.approx(by_hand(seen, USERS[3:], (1, 5, 10)))
    assert result["protocol"]["candidates"] == "all items of the catalogue"
    assert "3 users of the file have no test target" in capsys.readouterr().err
    assert "exists already" in refused(capsys, [*argv, "--evaluate.no-mask-seen"])


def at(n: int, **changes: Any) -> Callable[[list[Row]], list[Row]]:
    """Changes the row with index `n`; row `n + 1` of Parquet and JSON lines."""
    return lambda rows: [row | changes if i == n else row for i, row in enumerate(rows)]


def without(n: int) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [row for i, row in enumerate(rows) if i != n]


def each(**values: Callable[[int], Any]) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [row | {name: value(i) for name, value in values.items()} for i, row in enumerate(rows)]


def renamed(old: str, new: str) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [{new if name == old else name: value for name, value in row.items()} for row in rows]


BAD: dict[str, tuple[Callable[[list[Row]], list[Row]], list[str]]] = {
    "unknown user": (at(14, user="u007"), ["row 15", "'u007'", "40", "nearest: 'u07'"]),
    "no user": (at(14, user=None), ["row 15", "no user id"]),
    "unknown item": (at(14, item_id="i99"), ["row 15", "'i99'", "30", "nearest: 'i29'"]),
    "nothing near": (at(14, item_id="?"), ["row 15", "'?'", "such as 'i00'"]),
    "no item": (at(14, item_id=None), ["row 15", "no item id"]),
    "no rank": (at(14, rank=None), ["row 15", "no rank", "from 1"]),
    "rank in words": (each(rank=lambda i: "first" if i == 14 else str(i % 12 + 1)), ["row 15", "'first'", "whole numbers"]),
    "half a rank": (each(rank=lambda i: 2.5 if i == 14 else i % 12 + 1.0), ["row 15", "'2.5'", "whole numbers"]),
    "ranks from 0": (each(rank=lambda i: i % 12), ["row 1 ", "'0'", "from 1"]),
    "ranks from 2": (each(rank=lambda i: i % 12 + 2), ["row 1:", "'u00'", "rank 2 but no rank 1"]),
    "rank twice": (at(14, rank=2), ["row 15", "'u01'", "rank 2 a second time", "row 14"]),
    "gap": (without(14), ["row 15", "'u01'", "rank 4 but no rank 3"]),
    "items twice": (
        lambda rows: at(15, item_id=rows[12]["item_id"])(at(30, item_id=rows[26]["item_id"])(rows)),
        ["row 16", "'u01'", "rank 4", "row 13", "rank 1"],
    ),
    "user without a list": (lambda rows: rows[24:], ["2 of the 40 users", "'u00'", "of popular items"]),
    "several seeds": (each(seed=lambda i: 8 if i % 2 else 3), ["mixed runs", "column seed holds 3, 8"]),
    "several runs": (each(run=lambda i: "ab"[i % 2]), ["mixed runs", "column run holds a, b"]),
    "several normalisers": (each(normaliser=lambda i: "items" if i % 2 else None), ["mixed runs", "holds items, none"]),
    "missing column": (renamed("rank", "ranking"), ["no column 'rank'", "user, ranking, item_id", "nearest: 'ranking'"]),
    "no such column": (renamed("user", "who"), ["no column 'user'", "who, rank, item_id", "rename the one that is meant"]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".csv"])
def test_bad_lists_are_refused(tmp_path: Path, ending: str, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = BAD[case]
    rows = change(rows_of(unrelated()))
    path, to = write(tmp_path / f"theirs{ending}", rows), tmp_path / "out.json"
    said = refused(capsys, ["evaluate", str(trained()), "--lists", str(path), "--to", str(to)])
    if ending == ".csv":  # its header is row 1
        words = [f"row {int(w[4:].strip(' :')) + 1}" + w[len(w.rstrip(" :")) :] if w.startswith("row ") else w for w in words]
    assert all(word in said for word in [str(path), *words]), said
    assert not to.exists()


def test_one_seed_is_no_mixture(tmp_path: Path) -> None:
    for ending in (".parquet", ".csv"):
        rows = each(seed=lambda i: 3, normaliser=lambda i: "items")(rows_of(unrelated()))
        assert score(write(tmp_path / f"theirs{ending}", rows))["users"] == len(USERS)


FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "no bytes": ("a.csv", b"", ["is empty", "user, rank, item_id"]),
    "no bytes of Parquet": ("a.parquet", b"", ["is empty", "user, rank, item_id"]),
    "white space": ("a.jsonl", b"\n \n", ["is empty"]),
    "header alone": ("a.csv", b"user,rank,item_id\n", ["is empty"]),
    "unknown ending": ("a.txt", b"u00", ["'.txt'", ".parquet, .jsonl or .csv"]),
    "no Parquet": ("a.parquet", b"PAR2", ["Parquet"]),
    "no JSON": ("a.jsonl", b'{"user": "u00", "rank": 1, "item_id": "i01"}\nu00\n', ["row 2", "not a JSON object"]),
    "a JSON list": ("a.jsonl", b'["u00", 1]\n', ["row 1", "not a JSON object"]),
    "too many fields": ("a.csv", b"user,rank,item_id\nu00,1,i01,i02\n", ["row 2", "4 fields"]),
    "latin-1": ("a.csv", b"user,rank,item_id\nu\xe9,1,i01\n", ["row 2", "UTF-8"]),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_hold_no_lists(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, data, words = FILES[case]
    (tmp_path / name).write_bytes(data)
    said = refused(capsys, ["evaluate", str(trained()), "--lists", str(tmp_path / name)])
    assert all(word in said for word in [name, *words]), said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lists", "nowhere.csv"], ["nowhere.csv", "no such file"]),
        (["--lists", "theirs.csv", "--to", "out.txt"], ["--to", "'.txt'", ".json"]),
        (["--lists", "theirs.csv", "--to", "there/out.json"], ["--to", "no folder there"]),
        (["--lists", "theirs.csv", "--overwrite"], ["--overwrite needs --to"]),
        (["--lists", "theirs.csv", "--exact"], ["--exact", "--lists"]),
        (["--lists", "theirs.csv", "--decode.beam", "30"], ["--decode.beam", "--lists"]),
        (["--lists", "theirs.csv", "--train.epochs", "2"], ["--train.epochs"]),
        (["--to", "out.json"], ["--to needs --lists"]),
        (["--overwrite"], ["--overwrite needs --lists"]),
    ],
)
def test_options(
    tmp_path: Path, options: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("theirs.csv"), rows_of(unrelated()))
    said = refused(capsys, ["evaluate", str(trained()), *options])
    assert all(word in said for word in words), said
    assert [p.name for p in tmp_path.iterdir()] == ["theirs.csv"]


def test_help_shows_lists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "sftrec evaluate runs/quick --lists theirs.csv" in capsys.readouterr().out


def dataset_of(lengths: list[int], targets: list[int], n_items: int, **report: Any) -> Dataset:
    count, some = sum(lengths), np.zeros(len(lengths), np.int64)
    return Dataset(
        user_ids=np.array([f"u{u}" for u in range(len(lengths))], object),
        item_ids=np.array([f"i{i}" for i in range(n_items)], object),
        titles=np.array([f"t{i}" for i in range(n_items)], object),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=(np.arange(count) % n_items).astype(np.int32),
        timestamps=np.arange(count),
        train_end=some,
        valid_position=some - 1,
        test_position=np.asarray(targets, np.int64),
        report=report,
    )


@pytest.mark.parametrize(
    ("data", "report", "words"),
    [
        (
            DataConfig(user_core=2),
            {},
            ["split leave_one_out, 2 users, longest history 2", "data.user_core (2)", "data.split: temporal"],
        ),
        (
            DataConfig(user_core=0, item_core=4, rating_column="rating", min_rating=3.5),
            {},
            ["lower data.item_core (4) or data.min_rating (3.5)"],
        ),
        (DataConfig(split="temporal"), {}, ["split temporal", "data.test_fraction"]),
        (DataConfig(), {"split": "given"}, ["split given", "data.test_source"]),
    ],
)
def test_no_test_target(data: DataConfig, report: dict[str, Any], words: list[str]) -> None:
    config = RunConfig(data=data)
    with pytest.raises(UserError) as caught:
        check_targets(Path("runs/x"), config, dataset_of([2, 1], [-1, -1], 40, **report))
    assert all(word in str(caught.value) for word in ["runs/x: no user has a test target", *words])
    check_targets(Path("runs/x"), config, dataset_of([2, 1], [1, -1], 1, **report))


def test_more_items_asked_for_than_there_are() -> None:
    message = r"decode.top_k is 20 but the catalogue has 7 items; set decode.top_k \(and decode.beam\) to at most 7"
    with pytest.raises(UserError, match=message):
        check_evaluable(Path("x"), RunConfig(), dataset_of([3], [2], 7))
    check_evaluable(Path("x"), RunConfig(), dataset_of([3], [2], 20))
    check_evaluable(Path("x"), RunConfig(decode=DecodeConfig(top_k=7, beam=7)), dataset_of([3], [2], 7))


def test_evaluate_refuses_what_it_cannot_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained folders whose data were changed; results that are there stay."""
    run = tmp_path / "run"
    shutil.copytree(trained(), run)
    kept = (run / "metrics.json").read_bytes()
    assert "decode.top_k is 31 but the catalogue has 30" in refused(
        capsys, ["evaluate", str(run), "--decode.top-k", "31", "--decode.beam", "31"]
    )
    dataset = Dataset.load(run / "prepared")
    dataclasses.replace(dataset, test_position=np.full(len(USERS), -1)).save(run / "prepared")
    lists = write(tmp_path / "theirs.csv", rows_of(unrelated()))
    for options in ([], ["--lists", str(lists)]):
        said = refused(capsys, ["evaluate", str(run), *options])
        assert f"{run}: no user has a test target" in said
    assert (run / "metrics.json").read_bytes() == kept
