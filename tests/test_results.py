"""Published results: what is written follows from lists and data, and whatever is tampered with is found."""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from published_run import RUNS, SEEDS, copied, edit_json, inside, nested, project, record
from scipy import integrate, special
from tiny_run import histories

from sftrec_jax.cli import main
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.uncertainty import intervals
from sftrec_jax.results.differences import check_alike, differing
from sftrec_jax.results.record import read_published
from sftrec_jax.results.summary import prediction_range, ranges, summarise

BASELINES = ("popularity", "recent_popularity", "markov", "item_item")


def lists(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "docs/results/tiny.top10.parquet")


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = record(folder)
    edit(values)
    (folder / "docs/results/tiny.json").write_text(json.dumps(values), encoding="utf-8")


def verify(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    capsys.readouterr()
    with inside(folder):
        code = main(["verify-results", "docs/results/tiny.json", *options])
    said = capsys.readouterr()
    return code, said.out + said.err


def targets(seed: int) -> dict[str, str]:
    """The last item of each user, as the run of this seed ordered them."""
    prepared = project() / RUNS / f"seed-{seed}" / "prepared"
    users, items = pl.read_parquet(prepared / "users.parquet"), pl.read_parquet(prepared / "catalogue.parquet")
    last = pl.read_parquet(prepared / "interactions.parquet").sort("user", "position").group_by("user").last()
    return {users["user_id"][r["user"]]: items["item_id"][r["item"]] for r in last.to_dicts()}


@pytest.mark.slow
def test_published_numbers_counted_again_in_plain_python() -> None:
    values, frame = record(project()), lists(project())
    assert frame.schema == {"seed": pl.Int32, "user": pl.String, "rank": pl.Int32, "item_id": pl.String}
    assert [(one["seed"], one["tie_seed"]) for one in values["seeds"]] == [(3, 3), (8, 8)]
    assert targets(3) != targets(8)
    means: dict[str, list[float]] = {}
    for one in values["seeds"]:
        wanted = targets(one["seed"])
        rows = frame.filter(seed=one["seed"]).to_dicts()
        for user in wanted:
            assert sorted(r["rank"] for r in rows if r["user"] == user) == list(range(1, 11))
        hits = [r["rank"] for r in rows if wanted[r["user"]] == r["item_id"]]
        for k in (1, 5, 10):
            found = {
                f"recall@{k}": sum(rank <= k for rank in hits) / len(wanted),
                f"ndcg@{k}": sum(1 / math.log2(rank + 1) for rank in hits if rank <= k) / len(wanted),
                f"mrr@{k}": sum(1 / rank for rank in hits if rank <= k) / len(wanted),
            }
            for name, value in found.items():
                assert one["metrics"]["model"][name] == pytest.approx(value)
                means.setdefault(name, []).append(value)
    assert max(means["recall@10"]) > 0
    for name, both in means.items():
        assert values["metrics"]["model"][name] == pytest.approx(statistics.mean(both))
        assert values["spread"][name] == pytest.approx(statistics.stdev(both))
        assert values["ci"]["model"][name][0] <= values["metrics"]["model"][name] <= values["ci"]["model"][name][1]
        for row in BASELINES:
            difference = values["metrics"]["model"][name] - values["metrics"][row][name]
            assert values["paired"][row][name]["difference"] == pytest.approx(difference)
    assert values["below_counter"] == (values["metrics"]["model"]["ndcg@10"] < values["metrics"]["item_item"]["ndcg@10"])


def test_what_the_file_says_of_itself() -> None:
    values, text = record(project()), (project() / "docs/results/tiny.json").read_text(encoding="utf-8")
    assert (values["name"], values["title"], values["command"]) == ("tiny", "tiny | one", "sftrec reproduce tiny")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", values["date"])
    assert (
        values["minutes"] == pytest.approx(statistics.mean(one["minutes"] for one in values["seeds"])) and values["minutes"] > 0
    )
    assert set(values["metrics"]) == {"model", *BASELINES} and {"recall@20", "mrr"} <= set(values["metrics"]["model"])
    first = json.loads((project() / RUNS / "seed-3" / "metrics.json").read_text(encoding="utf-8"))
    assert values["protocol"] == first["protocol"]
    assert "/" not in re.sub(r'"(\.\./)+[\w./]+"|[\w-]+/[\w.]*', "", text) and str(project()) not in text
    assert values["config"]["data"]["source"] == "../../log.csv" and values["config"]["model"]["base"] == "../../base"
    assert not re.search(r'"/|:/', text)
    assert sorted(p.name for p in (project() / "docs/results").iterdir()) == ["tiny.json", "tiny.top10.parquet"]


def test_verifies_anywhere_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = verify(copied(tmp_path), capsys)
    assert code == 0 and "verified: docs/results/tiny.json (2 seed(s), 40 users" in said
    with inside(tmp_path):
        assert main(["verify-results", "tiny"]) == 0


@pytest.mark.parametrize(
    "path",
    [
        "metrics/model/recall@10",
        "metrics/model/recall@20",
        "metrics/model/mrr",
        "metrics/markov/ndcg@5",
        "seeds/1/metrics/model/ndcg@10",
        "seeds/0/metrics/item_item/recall@20",
        "seeds/0/minutes",
        "minutes",
        "ci/model/ndcg@10/0",
        "ci/popularity/recall@1/1",
        "paired/item_item/ndcg@10/p",
        "spread/mrr@5",
        "range/recall@10/1",
        "protocol/users_evaluated",
        "protocol/decode/beam",
        "protocol/order/tie_seed",
    ],
)
def test_a_changed_number_is_found(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(copied(tmp_path), lambda values: nested(values, path, 7 if path.startswith("protocol") else 0.4321))
    code, said = verify(tmp_path, capsys)
    assert code == 1 and "verified" not in said
    named = path.split("/")[0] if path != "seeds/0/minutes" else "minutes"
    assert f"tiny.json: {named}" in said, said


@pytest.mark.parametrize(
    ("path", "to"),
    [
        ("below_counter", None),
        ("seeds/1/histories_sha256", "0" * 64),
        ("seeds/0/split_sha256", "0" * 64),
        ("protocol/data/histories_sha256", "0" * 64),
        ("protocol/candidates", "ten items"),
        ("top10/sha256", "0" * 64),
        ("config/evaluate/counter_decay", 0.5),
        ("config/prompt/max_history", 7),
    ],
)
def test_a_changed_word_is_found(path: str, to: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(copied(tmp_path), lambda values: nested(values, path, not values["below_counter"] if to is None else to))
    code, said = verify(tmp_path, capsys)
    assert code == 1 and "verified" not in said
    assert path.split("/")[0].replace("top10", "tiny.top10.parquet").replace("config", "") in said


def test_an_option_newer_than_the_card_was_at_its_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what a card lacks, an option at its default is not missed; one that is not, is."""
    folder = copied(tmp_path)
    change(folder, lambda values: values["protocol"]["prompt"].pop("stride"))
    assert verify(folder, capsys)[0] == 0
    change(folder, lambda values: values["protocol"]["prompt"].pop("max_history"))
    code, said = verify(folder, capsys)
    assert code == 1 and "protocol.prompt.max_history: 100 is published" in said


def rewritten(folder: Path, frame: pl.DataFrame, seal: bool = True) -> None:
    """The lists replaced; with `seal` the JSON has their hash, so that only their content can tell."""
    file = folder / "docs/results/tiny.top10.parquet"
    frame.write_parquet(file)
    if seal:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        change(folder, lambda values: values["top10"].update(sha256=digest))


def seen_item(row: dict[str, Any]) -> str:
    return histories()[row["user"]][0]


ROW = 57
TAMPERED: dict[str, tuple[Callable[[pl.DataFrame], pl.DataFrame], str]] = {
    "hit": (lambda f: put(f, at_hit(f), "item_id", other_item(f)), "seeds[0].metrics.model.recall@10"),
    "twice": (lambda f: put(f, ROW, "item_id", f["item_id"][ROW - 1]), "has an item twice (1 of 40"),
    "seen": (lambda f: put(f, ROW, "item_id", seen_item(f.row(ROW, named=True))), "has an item of the history (1 of 40"),
    "rank": (lambda f: put(f, ROW, "rank", 3), "each once (1 of 40"),
    "rank 11": (lambda f: put(f, 9, "rank", 11), "each once (1 of 40"),
    "gap": (lambda f: pl.concat([f[:ROW], f[ROW + 1 :]]), "each once (1 of 40"),
    "row twice": (lambda f: pl.concat([f, f[:1]]), "each once (1 of 40"),
    "user": (lambda f: f.filter(~((pl.col("user") == "u05") & (pl.col("seed") == 8))), "seed 8: user 'u05' has no list (1 of"),
}


def put(frame: pl.DataFrame, row: int, column: str, value: Any) -> pl.DataFrame:
    values = frame[column].to_list()
    values[row] = value
    return frame.with_columns(pl.Series(column, values, dtype=frame[column].dtype))


def at_hit(frame: pl.DataFrame) -> int:
    """The place of the first hit of the first seed."""
    wanted = targets(SEEDS[0])
    return next(i for i, r in enumerate(frame.to_dicts()) if r["seed"] == SEEDS[0] and wanted[r["user"]] == r["item_id"])


def other_item(frame: pl.DataFrame) -> str:
    """An item that neither the list nor the history has."""
    user = frame["user"][at_hit(frame)]
    taken = {*histories()[user], *frame.filter(seed=SEEDS[0], user=user)["item_id"]}
    return next(item for items in histories().values() for item in items if item not in taken)


@pytest.mark.parametrize("case", TAMPERED)
def test_a_changed_row_of_the_lists_is_found(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, expected = TAMPERED[case]
    rewritten(copied(tmp_path), edit(lists(project())))
    code, said = verify(tmp_path, capsys)
    assert code == 1 and expected in said, said
    assert "SHA-256" not in said


def test_a_lost_byte_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(copied(tmp_path), lists(project()).rechunk().sort("rank", maintain_order=True), seal=False)
    code, said = verify(tmp_path, capsys)
    assert code == 1 and "tiny.top10.parquet: SHA-256 is" in said and "metrics" not in said


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda f: f.filter(seed=3), "mixed runs: has the seeds [3], tiny.json [3, 8]"),
        (lambda f: put(f, ROW, "item_id", "i99"), "item_id 'i99' is no item of this data"),
        (lambda f: put(f, ROW, "user", "nobody"), "user 'nobody' is no user with a test target of this data"),
        (lambda f: f.drop("rank"), "lacks the column rank"),
        (lambda f: f.with_columns(pl.col("rank").cast(pl.String)), "column rank holds String, not Int32"),
        (lambda f: put(f, ROW, "item_id", None), f"row {ROW} has no item_id"),
    ],
)
def test_unusable_lists_are_refused(edit: Any, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(copied(tmp_path), edit(lists(project())))
    code, said = verify(tmp_path, capsys)
    assert code == 2 and expected in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda v: v.pop("ci"), "lacks ci;"),
        (lambda v: v["metrics"].pop("markov"), "lacks metrics.markov;"),
        (lambda v: v["seeds"][1].pop("tie_seed"), "lacks seeds[1].tie_seed;"),
        (lambda v: v["metrics"]["model"].update({"recall@5": "high"}), "metrics.model.recall@5 is 'high'; expected a number"),
        (lambda v: v.update(seeds=[]), "seeds is empty"),
        (lambda v: v["seeds"].append(v["seeds"][0]), "mixed runs: a seed is there twice"),
        (lambda v: v.update(name="other"), "mixed runs: name is 'other', expected 'tiny'"),
        (lambda v: v["range"].update({"ndcg@10": [0]}), "range.ndcg@10 is [0]; expected [low, high]"),
        (lambda v: v["config"]["train"].update(epoch=1), "unknown key train.epoch; the nearest known key is train.epochs"),
        (lambda v: v["config"]["data"].update(source="$SFTREC_DATA/amazon-beauty/sequences.txt.gz"), "it is S3-Rec's Beauty.txt"),
    ],
)
def test_unusable_json_is_refused(
    edit: Any, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTREC_DATA", str(tmp_path / "none"))
    change(copied(tmp_path), edit)
    code, said = verify(tmp_path, capsys)
    assert code == 2 and expected in said and said.count("\n") == 1


def test_files_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied(tmp_path)
    file = tmp_path / "docs/results/tiny.json"
    (tmp_path / "docs/results/tiny.top10.parquet").write_bytes(b"no")
    assert "tiny.top10.parquet: not a Parquet file" in verify(tmp_path, capsys)[1]
    (tmp_path / "docs/results/tiny.top10.parquet").unlink()
    assert "tiny.top10.parquet: cannot be read (No such file" in verify(tmp_path, capsys)[1]
    for text, expected in (("{", "not JSON"), ("[]", "the file is no object"), (None, "cannot be read (No such file")):
        file.unlink() if text is None else file.write_text(text, encoding="utf-8")
        code, said = verify(tmp_path, capsys)
        assert code == 2 and expected in said
    with inside(tmp_path):
        assert main(["verify-results"]) == 2 and "nothing to verify" in capsys.readouterr().err
        assert main(["verify-results", "tony"]) == 2 and "no result of that name" in capsys.readouterr().err
        assert main(["verify-results", "tiny", "--write"]) == 2 and "--write needs --readme" in capsys.readouterr().err


def test_lists_of_another_result_are_mixed_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied(tmp_path)
    folder = tmp_path / "docs/results"
    values = record(tmp_path)
    values |= {"name": "other", "top10": {"file": "other.top10.parquet", "sha256": values["top10"]["sha256"]}}
    (folder / "other.json").write_text(json.dumps(values), encoding="utf-8")
    change(tmp_path, lambda v: v["top10"].update(sha256="0" * 64))
    code, said = verify(tmp_path, capsys)
    assert code == 2 and "mixed runs: these are the lists of other.json" in said


def test_the_range_by_hand() -> None:
    """The quantile by bisecting the integral of Student's density."""
    seeds, new = [0.101, 0.104, 0.0985, 0.1031], 2
    n, freedom = len(seeds), len(seeds) - 1

    def density(x: float) -> float:
        scale = special.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * special.gamma(freedom / 2))
        return scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)

    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + integrate.quad(density, 0, middle)[0] < 0.995 else (low, middle)
    mean = sum(seeds) / n
    deviation = math.sqrt(sum((x - mean) ** 2 for x in seeds) / (n - 1))
    width = low * deviation * math.sqrt(1 / n + 1 / new)
    assert prediction_range(seeds, new) == pytest.approx((mean - width, mean + width), rel=1e-6)
    assert prediction_range([0.0, 0.9], 1) == (0.0, 1.0) and prediction_range([0.25, 0.25], 5) == (0.25, 0.25)
    rows = [{"recall@10": value} for value in seeds]
    assert ranges(rows, {}, new)["recall@10"] == pytest.approx([mean - width, mean + width], rel=1e-6)
    assert ranges(rows[:1], {"recall@10": (0.05, 0.09)}, new)["recall@10"] == pytest.approx([0.081, 0.121])
    for values, further in (([0.1], 1), ([0.1, 0.2], 0)):
        with pytest.raises(ValueError, match="a range needs two"):
            prediction_range(values, further)


def test_users_are_drawn_with_all_their_seeds() -> None:
    """Two seeds that say the same of every user leave the interval as wide as one seed does."""
    rng = np.random.default_rng(0)
    rows: dict[str, Any] = {
        row: {"recall@10": rng.integers(0, 2, 50) * 1.0, "ndcg@10": rng.random(50)} for row in ("model", *BASELINES)
    }
    metrics = {row: {name: float(v.mean()) for name, v in values.items()} | {"mrr": 0.1} for row, values in rows.items()}
    one, two = summarise([metrics], [rows], 5), summarise([metrics, metrics], [rows, rows], 5)
    assert one["ci"] == two["ci"] and one["paired"] == two["paired"] and one["spread"] is None
    assert set(two["spread"].values()) == {0.0} and set(two["range"]) == {"recall@10", "ndcg@10", "mrr"}
    expected = intervals(rows["model"], 5)["ndcg@10"]
    assert one["ci"]["model"]["ndcg@10"] == pytest.approx(expected)
    mean = metrics["model"]["ndcg@10"]
    assert one["range"]["ndcg@10"] == pytest.approx(
        [mean - (expected[1] - expected[0]) / 2, mean + (expected[1] - expected[0]) / 2]
    )


def test_cards_may_differ_in_seeds_alone() -> None:
    card = {
        "data": {"histories_sha256": "a", "items": 3},
        "seeds": {"train": 0},
        "leaks": {"found": [{"name": "x", "message": "1"}]},
    }
    other = {
        "data": {"histories_sha256": "b", "items": 3},
        "seeds": {"train": 1},
        "leaks": {"found": [{"name": "x", "message": "2"}]},
    }
    check_alike(["one", "two"], [card, other], "protocol", True)
    with pytest.raises(UserError, match="mixed runs: one and two differ in protocol.data.histories_sha256: 'a' and 'b'"):
        check_alike(["one", "two"], [card, other], "protocol", False)
    with pytest.raises(UserError, match="differ in protocol.leaks.found"):
        check_alike(["one", "two"], [card, {**other, "leaks": {"found": [{"name": "y"}]}}], "protocol", True)
    found = differing({"a": {"b": 1, "c": [1.0, 2]}, "d": True}, {"a": {"b": float("nan"), "c": [1, 2 + 1e-12]}, "d": 1})
    assert [path for path, _, _ in found] == ["a.b", "d"]


README = "# Here\n\n<!-- results tiny -->\n<!-- /results -->\n\nafter\n"


def test_tables_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = copied(tmp_path) / "README.md"
    readme.write_text(README, encoding="utf-8")
    assert verify(tmp_path, capsys, "--readme", "README.md")[0] == 1
    assert readme.read_text(encoding="utf-8") == README
    assert verify(tmp_path, capsys, "--readme", "README.md", "--write")[0] == 0
    text, values = readme.read_text(encoding="utf-8"), record(tmp_path)
    assert text.startswith("# Here\n\n<!-- results tiny -->\n| | R@5 |") and text.endswith("<!-- /results -->\n\nafter\n")
    rows = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line.startswith("|")]
    names = ["recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@20", "ndcg@20", "mrr"]
    for cells, row in zip(rows[2:], ("model", *BASELINES), strict=True):
        assert [cell.split(" [")[0] for cell in cells[1:]] == [f"{values['metrics'][row][name]:.4f}" for name in names]
    low, high = values["ci"]["model"]["ndcg@10"]
    assert rows[2][4].endswith(f" [{low:.4f}, {high:.4f}]")
    below = " (below item-item)" if values["below_counter"] else ""
    assert rows[2][0] == f"`sftrec reproduce tiny` (tiny \\| one): {values['minutes']:.1f} min each, 2 seeds{below}"
    assert "40 test users, 30 items, split leave_one_out, seen items masked" in text and "seeds 3 8, tie seeds the same" in text
    assert verify(tmp_path, capsys, "--readme", "README.md")[0] == 0
    with inside(tmp_path):
        assert main(["verify-results", "--readme", "README.md"]) == 0  # no data needed
    cell = f"{values['metrics']['markov']['mrr']:.4f}"
    for new in (text.replace(cell, "0.9999"), text.replace("seeds 3 8", "seeds 0 1")):
        assert new != text
        readme.write_text(new, encoding="utf-8")
        code, said = verify(tmp_path, capsys, "--readme", "README.md")
        assert code == 1 and "README.md: +" in said and "add --write" in said
    assert verify(tmp_path, capsys, "--readme", "README.md", "--write")[0] == 0 and readme.read_text(encoding="utf-8") == text


def test_results_of_one_table_were_measured_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = copied(tmp_path) / "README.md"
    values = record(tmp_path) | {"name": "other", "command": "sftrec reproduce other", "minutes": None, "title": None}
    values["top10"]["file"] = "other.top10.parquet"
    values["below_counter"] = not values["below_counter"]
    other = tmp_path / "docs/results/other.json"
    other.write_text(json.dumps(values), encoding="utf-8")
    readme.write_text(README.replace("tiny", "tiny other"), encoding="utf-8")
    with inside(tmp_path):
        assert main(["verify-results", "--readme", "README.md", "--write"]) == 0
        text = readme.read_text(encoding="utf-8")
        assert "| `sftrec reproduce other`: 2 seeds" in text and text.count("(below item-item)") == 1
        for path, to, expected in (
            ("protocol/data/items", 31, "protocol.data.items: 30 and 31; they belong in tables"),
            ("metrics/item_item/mrr", 0.9, "differ in the baseline item_item.mrr"),
        ):
            other.write_text(json.dumps(values), encoding="utf-8")
            edit_json(other, path, to)
            capsys.readouterr()
            assert main(["verify-results", "--readme", "README.md"]) == 2
            said = capsys.readouterr().err
            assert "mixed runs: tiny and other" in said and expected in said
    for text, expected in (
        ("nothing", "has no table of results"),
        ("a\n<!-- results tiny -->\n", "line 2 opens a table of results that no"),
        ("<!-- results tiny -->\n<!-- results tiny -->\n<!-- /results -->", "line 1 opens a table"),
        ("<!-- results  -->\n<!-- /results -->", "line 1 names no result"),
        ("<!-- results tony -->\n<!-- /results -->", "tony: no result of that name in docs/results; the nearest is tiny"),
    ):
        readme.write_text(text, encoding="utf-8")
        with inside(tmp_path):
            assert main(["verify-results", "--readme", "README.md", "--write"]) == 2
        assert expected in capsys.readouterr().err and readme.read_text(encoding="utf-8") == text


def test_a_published_result_is_read_as_written() -> None:
    published = read_published(project() / "docs/results/tiny.json")
    assert published.config.train.seed == SEEDS[0] and published.seeds == list(SEEDS) and published.tied
    assert published.tie_seed(8) == 8 and published.tie_seed(11) == 11
