"""The command line from a log to recommendations, by the files and numbers that scripts rely on."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml
from safetensors import safe_open
from tiny_run import ITEMS, SHORT, TITLES, USERS, histories, trained, write_inputs, write_lines

from sftrec_jax.cli import main

METRICS = [f"{metric}@{k}" for metric in ("recall", "ndcg", "mrr") for k in (1, 5, 10, 20)] + ["mrr"]
COLUMNS = ["user", "rank", "item_id", "title", "score"]


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def check_lists(frame: pl.DataFrame, seen: dict[str, list[str]], k: int) -> None:
    """`k` rows a user by rank, scores falling, every item real, none twice, none seen."""
    assert frame.columns == COLUMNS
    for (user,), rows in frame.group_by("user"):
        rows = rows.sort("rank")
        assert rows["rank"].to_list() == list(range(1, k + 1))
        assert rows["score"].is_sorted(descending=True) and (rows["score"] <= 0).all()
        assert rows["item_id"].n_unique() == k
        assert set(rows["item_id"]) <= set(ITEMS) - set(seen[str(user)])


def test_run_leaves_every_file():
    run = trained()
    names = {p.name for p in run.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "metrics.json", "recommendations.parquet", "checkpoints", "export", "prepared"}
    assert names == expected
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {
        p.name for p in (run / "export").iterdir()
    }
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (run / "export" / "adapter").iterdir()}
    saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert saved["data"]["source"] == str((run.parent / "log.csv").resolve()) and saved["lora"]["r"] == 4
    records = json_lines((run / "metrics.jsonl").read_text(encoding="utf-8"))
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "valid" in r] == [2, 4]


def test_metrics_are_plain_numbers():
    metrics = json.loads((trained() / "metrics.json").read_text(encoding="utf-8"))
    for row in ("model", "popularity", "recent_popularity", "markov", "item_item"):
        assert set(metrics[row]) == {*METRICS, *(f"{name}_unmasked" for name in METRICS)}
        assert all(isinstance(v, float) and 0 <= v <= 1 for v in metrics[row].values())
    assert metrics["protocol"]["users_evaluated"] == len(USERS) and metrics["protocol"]["decode"]["normaliser"] == "full"
    assert metrics["users"] == len(USERS) and 0 <= metrics["invalid_rate_unconstrained"] <= 1


def test_intervals_and_parts_agree_with_the_means():
    metrics = json.loads((trained() / "metrics.json").read_text(encoding="utf-8"))
    model = metrics["model"]
    for name in METRICS:
        low, high = metrics["ci"]["model"][name]
        assert low <= model[name] <= high
        for baseline in ("popularity", "recent_popularity", "markov", "item_item"):
            one = metrics["paired"][baseline][name]
            assert one["difference"] == pytest.approx(model[name] - metrics[baseline][name])
            assert one["low"] <= one["difference"] <= one["high"] and 0 < one["p"] <= 1
        for parts in (metrics["by_target"]["model"], metrics["by_history"]["model"]):
            assert sum(part["users"] for part in parts.values()) == metrics["users"]
            total = sum(part["users"] * part[name] for part in parts.values() if part["users"])
            assert total / metrics["users"] == pytest.approx(model[name])
    assert metrics["below_counter"] == (model["ndcg@10"] < metrics["item_item"]["ndcg@10"])
    # Atomic ids: a code is an item.
    assert metrics["codes"]["code_recall@10"] == pytest.approx(model["recall@10"])
    assert metrics["codes"]["level_accuracy"] == [pytest.approx(model["recall@1"])]


def test_recall_agrees_with_recommendations():
    """recall@k counted again from the recommendations and the log, whose last item of each user is the target."""
    frame = pl.read_parquet(trained() / "recommendations.parquet")
    metrics = json.loads((trained() / "metrics.json").read_text(encoding="utf-8"))["model"]
    targets = {user: items[-1] for user, items in histories().items()}
    assert set(frame["user"]) == set(USERS)
    check_lists(frame, {user: items[:-1] for user, items in histories().items()}, 10)
    for k in (1, 5, 10):
        hits = [targets[r["user"]] == r["item_id"] for r in frame.to_dicts() if r["rank"] <= k]
        assert sum(hits) / len(USERS) == pytest.approx(metrics[f"recall@{k}"])
    twice = set(frame.filter(pl.col("item_id").is_in(["i07", "i08"]))["title"])
    assert twice <= {"Twice; said", "Twice; said [2]"}


def test_evaluate_again_gives_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    shutil.copytree(trained(), run)
    for name in ("metrics.json", "recommendations.parquet"):
        (run / name).unlink()
    assert main(["evaluate", str(run)]) == 0
    first, again = (json.loads((r / "metrics.json").read_text(encoding="utf-8")) for r in (trained(), run))
    assert {**first, "seconds_evaluating": 0} == {**again, "seconds_evaluating": 0}
    capsys.readouterr()
    assert pl.read_parquet(run / "recommendations.parquet").equals(pl.read_parquet(trained() / "recommendations.parquet"))
    assert main(["evaluate", str(run), "--decode.normaliser", "items"]) == 0
    said = capsys.readouterr()
    assert "replaced the earlier results in metrics.json" in said.out + said.err
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["normaliser"] == "items"
    assert set(pl.read_parquet(run / "recommendations.parquet")["normaliser"]) == {"items"}


def test_recommend_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, seen = trained(), histories()
    typed = "; ".join(TITLES[item] for item in ("i03", "i07", "i06"))
    lists = tmp_path / "lists.jsonl"
    lists.write_text(
        json.dumps({"user": "a", "history": ["i03", TITLES["i07"], "i06"]}) + "\n"
        + json.dumps({"user": "b", "history": ["i01"]}) + "\n",
        encoding="utf-8",
    )  # fmt: skip
    lines = write_lines(tmp_path / "lists.txt", [f"i03; {TITLES['i07']};i06", TITLES["i01"]])
    capsys.readouterr()
    assert main(["recommend", str(run), "--user", "u03", "--history", typed, "--file", str(lists), "--json"]) == 0
    printed = pl.DataFrame(json_lines(capsys.readouterr().out))
    same = ["i03", "i07", "i06"]
    check_lists(printed, {"u03": seen["u03"], "history 1": same, "a": same, "b": ["i01"]}, 10)
    by_user = {user: rows.drop("user") for (user,), rows in printed.group_by("user", maintain_order=True)}
    assert by_user["history 1"]["item_id"].equals(by_user["a"]["item_id"])  # ids and titles name the same items

    for name in ("out.parquet", "out.jsonl"):
        target = tmp_path / name
        assert main(["recommend", str(run), "--file", str(lines), "--k", "4", "--to", str(target)]) == 0
        read = pl.read_parquet(target) if target.suffix == ".parquet" else pl.read_ndjson(target)
        check_lists(read, {"1": same, "2": ["i01"]}, 4)
        before = target.read_bytes()
        assert main(["recommend", str(run), "--user", "u03", "--to", str(target)]) == 2 and target.read_bytes() == before
        assert "exists already" in capsys.readouterr().err
        assert read.filter(pl.col("user") == "1")["item_id"].to_list() == by_user["a"]["item_id"].to_list()[:4]
    capsys.readouterr()
    assert main(["recommend", str(run), "--user", "u03", "--k", "3"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "u03" and [line.split()[0] for line in shown[1:]] == ["1", "2", "3"]
    assert shown[1].endswith(by_user["u03"]["title"][0])


def test_scores_of_another_normaliser_are_named(capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    # A beam below --k is widened.
    for more, named in (([], set()), (["--decode.normaliser", "items", "--decode.beam", "2"], {"normaliser"})):
        assert main(["recommend", str(trained()), "--history", "i03; i07", "--json", *more]) == 0
        rows = json_lines(capsys.readouterr().out)
        assert len(rows) == 10 and set(rows[0]) == {"user", "rank", "item_id", "title", "score"} | named


def test_histories_beyond_the_prompt_are_named(capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    many = ";".join([*ITEMS, *ITEMS, *ITEMS])
    assert main(["recommend", str(trained()), "--history", many, "--history", "i03", "--keep-seen", "--json"]) == 0
    assert "1 of 2 histories are longer than a prompt (prompt.max_history is 16" in " ".join(capsys.readouterr().err.split())


def test_keep_seen_may_name_seen_items(capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert main(["recommend", str(trained()), "--user", "u03", "--k", "30", "--keep-seen", "--json"]) == 0
    assert {r["item_id"] for r in json_lines(capsys.readouterr().out)} == set(ITEMS)
    assert main(["recommend", str(trained()), "--user", "u03", "--k", "30", "--json"]) == 0
    assert {r["item_id"] for r in json_lines(capsys.readouterr().out)} == set(ITEMS) - set(histories()["u03"])


def test_export_verb_writes_what_run_left(tmp_path: Path):
    for form, file, reference in (
        ("merged", "model.safetensors", trained() / "export"),
        ("adapter", "adapter_model.safetensors", trained() / "export" / "adapter"),
    ):
        out = tmp_path / form
        assert main(["export", str(trained()), "--to", str(out), "--format", form]) == 0
        with safe_open(out / file, "numpy") as ours, safe_open(reference / file, "numpy") as theirs:
            assert set(ours.keys()) == set(theirs.keys())
            assert all((ours.get_tensor(name) == theirs.get_tensor(name)).all() for name in ours.keys())
    assert main(["export", str(trained()), "--to", str(tmp_path / "merged")]) == 2
    assert main(["export", str(trained()), "--to", str(tmp_path / "merged"), "--dtype", "bfloat16", "--overwrite"]) == 0


def test_a_folder_in_use_is_refused_or_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = str(write_inputs(tmp_path))
    out = tmp_path / "run"
    prepare = ["prepare", config, "--out", str(out)]
    assert main(prepare) == 0
    (out / "mine.txt").write_text("kept", encoding="utf-8")
    capsys.readouterr()
    assert main(prepare) == 2
    assert "--resume" in (message := capsys.readouterr().err) and "--overwrite" in message
    assert main(["run", config, "--out", str(out), "--resume", "--lora.r", "8"]) == 2
    assert "lora.r differ" in capsys.readouterr().err
    assert main([*prepare, "--overwrite"]) == 0
    assert (out / "mine.txt").read_text(encoding="utf-8") == "kept"

    assert main(["evaluate", str(out)]) == 2
    assert "sftrec train" in capsys.readouterr().err
    assert main(["train", str(out)]) == 0
    assert (out / "checkpoints" / "4").is_dir()
    assert main(["train", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["run", "--out", str(out), "--resume"]) == 0  # trained already: evaluates and exports, by the run's own config
    first, later = (json.loads((r / "metrics.json").read_text(encoding="utf-8"))["model"] for r in (trained(), out))
    assert first == later  # verb by verb gives what `run` gives

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.txt").write_text("mine", encoding="utf-8")
    for option in ("--overwrite", "--resume"):
        assert main(["run", config, "--out", str(foreign), option]) == 2
        assert "holds no run" in capsys.readouterr().err
    assert [p.name for p in foreign.iterdir()] == ["a.txt"]


def test_overrides_with_paths_are_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = write_inputs(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "log.csv", tmp_path / "elsewhere" / "other.csv")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["prepare", str(config), "--out", "deep/run", "--data.source", "other.csv"]) == 0
    saved = yaml.safe_load(Path("deep/run/config.yaml").read_text(encoding="utf-8"))
    assert saved["data"]["source"] == str(tmp_path / "elsewhere" / "other.csv")
    assert saved["data"]["catalogue"] == str(tmp_path / "items.csv")


@pytest.mark.parametrize(
    "changes",
    [
        ["--items.tokenizer", "title", "--prompt.format", "instruct", "--prompt.max-history", "2", "--train.row-length", "96"],
        pytest.param(
            ["--data.split", "temporal", "--prompt.max-history", "40", "--train.row-length", "4"], marks=pytest.mark.slow
        ),
    ],
    ids=["titles", "temporal"],
)
def test_other_formats_reach_recommendations(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str]):
    config, out = write_inputs(tmp_path, SHORT), tmp_path / "run"
    options = ["--train.max-steps", "2", "--decode.beam", "10", "--decode.top-k", "10", "--train.validate-users", "6"]
    options += ["--evaluate.users", "6", "--evaluate.unconstrained-users", "2"]
    assert main(["run", str(config), "--out", str(out), *options, *changes]) == 0
    frame = pl.read_parquet(out / "recommendations.parquet")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert frame["user"].n_unique() == metrics["users"] == 6
    check_lists(frame, dict.fromkeys(USERS, []), 10)
    assert all(SHORT[item] == title for item, title in frame.select("item_id", "title").iter_rows())
    if "temporal" in changes:  # histories longer than a context of four tokens: cut, and said so
        assert "examples are cut to their newest items, since train.row_length is 4; raise it" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["run", "prepare", "train", "evaluate", "recommend", "export"])
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0 and f"Example: sftrec {verb} " in capsys.readouterr().out


def test_help_config_lists_fields(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help-config"])
    assert stop.value.code == 0 and "--lora.r" in capsys.readouterr().out
