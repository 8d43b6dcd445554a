"""Finished runs are published together where they were made alike, and without a path of the machine."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from published_run import RUNS, SEEDS, copied, edit_json, inside, nested, project, record

from sftrec_jax.cli import main
from sftrec_jax.config import DataConfig, ModelConfig, RunConfig
from sftrec_jax.errors import UserError
from sftrec_jax.results.hardware import described, hardware
from sftrec_jax.results.portable import configured, portable_config
from sftrec_jax.results.publish import training_minutes
from sftrec_jax.run.folder import RunFolder


def published_from(folder: Path, runs: list[Path], capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    capsys.readouterr()
    with inside(folder):
        code = main(["reproduce", "both", "--publish", *options, "--from-runs", *map(str, runs)])
    return code, capsys.readouterr().err


def two_runs(tmp_path: Path) -> list[Path]:
    """Copies of both runs and of the inputs, paths set to the copies."""
    runs = []
    copied(tmp_path)
    shutil.copytree(project() / "base", tmp_path / "base")
    for seed in SEEDS:
        runs.append(tmp_path / f"run-{seed}")
        shutil.copytree(
            project() / RUNS / f"seed-{seed}", runs[-1], ignore=shutil.ignore_patterns("checkpoints", "prepared", "minutes.json")
        )
        text = (runs[-1] / "config.yaml").read_text(encoding="utf-8").replace(str(project().resolve()), str(tmp_path))
        (runs[-1] / "config.yaml").write_text(text, encoding="utf-8")
    return runs


def edit_yaml(file: Path, path: str, to: Any) -> None:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    nested(values, path, to)
    file.write_text(yaml.safe_dump(values), encoding="utf-8")


def test_finished_runs_are_published_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = two_runs(tmp_path)
    assert published_from(tmp_path, runs, capsys)[0] == 0
    values, before = json.loads((tmp_path / "docs/results/both.json").read_text(encoding="utf-8")), record(project())
    same = ("metrics", "spread", "ci", "paired", "below_counter", "range", "range_is", "protocol", "config")
    assert {name: values[name] for name in same} == {name: before[name] for name in same}
    assert values["minutes_are"] == "of training and evaluation" and values["title"] is None
    seconds = [json.loads((run / "metrics.json").read_text(encoding="utf-8"))["seconds_evaluating"] for run in runs]
    seconds += [json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["seconds"] for run in runs]
    assert values["minutes"] == pytest.approx(sum(seconds) / 2 / 60)
    code, said = published_from(tmp_path, runs, capsys)
    assert code == 2 and "both.json: is published already; add --overwrite" in said
    assert published_from(tmp_path, runs[1:], capsys, "--overwrite", "--title", "new")[0] == 0
    (tmp_path / "docs/results/both.top10.parquet").unlink()
    assert published_from(tmp_path, runs[1:], capsys, "--overwrite")[0] == 0
    one = json.loads((tmp_path / "docs/results/both.json").read_text(encoding="utf-8"))
    result = json.loads((runs[1] / "metrics.json").read_text(encoding="utf-8"))
    assert one["spread"] is None and one["seeds"][0]["seed"] == 8 and one["title"] == "new", "the title stays"
    for name in ("recall@10", "ndcg@5", "mrr@1"):
        # One seed: what the evaluation of the run wrote.
        assert one["ci"]["model"][name] == pytest.approx(result["ci"]["model"][name])
        assert one["paired"]["markov"][name] == pytest.approx(result["paired"]["markov"][name])
        half = (one["ci"]["model"][name][1] - one["ci"]["model"][name][0]) / 2
        value = one["metrics"]["model"][name]
        assert one["range"][name] == pytest.approx([max(0, value - half), value + half])


MIXED: dict[str, tuple[Callable[[list[Path]], Any], str]] = {
    "beam": (lambda r: edit_both(r[1], "decode/beam", 20), "differ in config.decode.beam: 50 and 20"),
    "evaluated otherwise": (
        lambda r: edit_json(r[1] / "metrics.json", "protocol/decode/normaliser", "items"),
        "config.yaml says decode.normaliser 'full', but it was evaluated with 'items'",
    ),
    "epochs": (lambda r: edit_yaml(r[1] / "config.yaml", "train/epochs", 2), "differ in config.train.epochs: 50 and 2"),
    "code": (lambda r: edit_json(r[1] / "metrics.json", "protocol/code/jax", "0.1"), "differ in protocol.code.jax: "),
    "seed": (lambda r: edit_yaml(r[1] / "config.yaml", "train/seed", 3), "train.seed [3, 3]; each must have its own"),
    "metrics": (
        lambda r: edit_json(r[1] / "metrics.json", "model/recall@10", 0.5),
        "run-8/metrics.json: model.recall@10 is 0.5, but recommendations.parquet give",
    ),
    "baseline": (lambda r: edit_json(r[0] / "metrics.json", "markov/mrr", 0.5), "markov.mrr is 0.5, but the data give"),
    "lists": (
        lambda r: shutil.copy(r[0] / "recommendations.parquet", r[1] / "recommendations.parquet"),
        "mixed runs, evaluate this one again",
    ),
    "tie seed": (lambda r: edit_yaml(r[1] / "config.yaml", "data/tie_seed", 9), "protocol.data.histories_sha256 is"),
    "shared codes": (lambda r: edit_json(r[1] / "metrics.json", "items_sharing_a_code", 4), "set semantic.collisions to extra"),
    "no card": (lambda r: edit_json(r[1] / "metrics.json", "protocol", None), "lacks metrics or the protocol card"),
    "unfinished": (lambda r: (r[1] / "recommendations.parquet").unlink(), "is not finished (no recommendations.parquet)"),
    "few items": (lambda r: edit_yaml(r[1] / "config.yaml", "decode/top_k", 5), "published lists have 10 items"),
    "few users": (lambda r: edit_yaml(r[1] / "config.yaml", "evaluate/users", 5), "published results are of all test users"),
}


def edit_both(run: Path, path: str, to: Any) -> None:
    edit_json(run / "metrics.json", f"protocol/{path}", to)
    edit_yaml(run / "config.yaml", path, to)


@pytest.mark.parametrize("case", MIXED)
def test_mixed_runs_are_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, expected = MIXED[case]
    runs = two_runs(tmp_path)
    edit(runs)
    code, said = published_from(tmp_path, runs, capsys)
    assert code == 2 and expected in said and said.count("\n") == 1, said
    assert not (tmp_path / "docs/results/both.json").exists() and not (tmp_path / "docs/results/both.top10.parquet").exists()


def test_a_base_elsewhere_is_not_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = published_from(tmp_path, [project() / RUNS / "seed-3"], capsys)
    assert code == 2 and re.search(r"data.source: .* is a path of this machine; put it below", said)
    assert not (tmp_path / "docs").exists()


def test_paths_leave_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, home = tmp_path / "sets", tmp_path / "project"
    results = home / "docs" / "results"
    for file in (data / "a" / "log.csv", home / "items.csv", home / "tokens" / "tokenizer.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    results.mkdir(parents=True)
    monkeypatch.setenv("SFTREC_DATA", str(data))
    config = RunConfig(
        data=DataConfig(source=str(data / "a" / "log.csv"), catalogue=str(home / "items.csv")),
        model=ModelConfig(base="smollm2-135m", tokenizer=str(home / "tokens")),
    )
    values = portable_config(config, results)
    assert values["data"]["source"] == "$SFTREC_DATA/a/log.csv" and values["data"]["catalogue"] == "../../items.csv"
    assert values["model"]["base"] == "smollm2-135m" and values["model"]["tokenizer"] == "../../tokens"
    assert configured(json.loads(json.dumps(values)), results / "x.json") == config
    (tmp_path / "link").symlink_to(data)
    monkeypatch.setenv("SFTREC_DATA", str(tmp_path / "link"))
    assert portable_config(config, results) == values
    monkeypatch.setenv("SFTREC_DATA", str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"^data.source: .* is a path of this machine; put it below .*project or \$SFTREC_DATA"):
        portable_config(config, results)


def test_resumed_minutes_are_summed(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "seconds": 10.0},
        {"step": 2, "seconds": 30.0},
        {"step": 3, "seconds": 6.0},
        {"step": 3, "seconds": 12.0},
    ]
    folder = RunFolder(tmp_path)
    assert training_minutes(folder, 18.0) is None
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    assert training_minutes(folder, 18.0) == pytest.approx(1.0) and training_minutes(folder, None) is None


def test_hardware_has_no_name_of_the_machine() -> None:
    import platform

    found = hardware()
    assert set(found) == {"cpu", "cores", "devices", "platform"} and found["cores"] >= 1
    assert len(platform.node()) < 4 or platform.node() not in json.dumps(found)
    assert described({"cpu": "Fast 1", "cores": 2, "devices": ["cpu"]}) == "2 cores of Fast 1, CPU only"
    gpus = {"cpu": None, "platform": "Linux x86_64", "cores": 16, "devices": ["NVIDIA H100"] * 8}
    assert described(gpus) == "16 cores of Linux x86_64, 8 x NVIDIA H100"
