"""`sftrec reproduce`: a repetition falls into its range, a changed number does not, and what was interrupted goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
from published_run import RUNS, SEEDS, inside, nested, project, record

from sftrec_jax import stopping
from sftrec_jax.cli import main
from sftrec_jax.run import evaluation, stages


@pytest.fixture(autouse=True, scope="module")
def published() -> None:
    """The project stands before any test takes a stage away."""
    project()


def reproduced(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    capsys.readouterr()
    with inside(project()):
        code = main(["reproduce", *options])
    return code, capsys.readouterr().err


def changed(name: str, path: str, to: Any) -> str:
    """The published JSON with another number, two folders below the project, as its paths need."""
    values = record(project())
    nested(values, path, to)
    folder = project() / "docs" / name
    folder.mkdir(exist_ok=True)
    (folder / "tiny.json").write_text(json.dumps(values), encoding="utf-8")
    return f"docs/{name}/tiny.json"


def test_an_interrupted_repetition_goes_on_and_is_within(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise stopping.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate_stage", stop)
        code, said = reproduced(capsys, "tiny", "--out", "again")
    first = project() / "again/tiny/seed-3"
    assert code == stopping.EXIT_CODE and "the same command goes on" in said
    assert (first / "checkpoints").exists() and not (first / "metrics.json").exists()
    trained = (first / "metrics.jsonl").read_text(encoding="utf-8")
    minutes = json.loads((first / "minutes.json").read_text(encoding="utf-8"))["minutes"]
    code, said = reproduced(capsys, "tiny", "--out", "again")
    assert code == 0, said
    assert "resumed from step 4 of 4" in said and (first / "metrics.jsonl").read_text(encoding="utf-8") == trained
    assert json.loads((first / "minutes.json").read_text(encoding="utf-8"))["minutes"] > minutes
    assert "the model must fall within (99 % prediction interval of the mean of 2 further seed(s)): R@10 [" in said
    assert said.splitlines()[-1].endswith("; baselines equal") and "OUTSIDE" not in said
    for seed in SEEDS:
        runs = [project() / folder / f"seed-{seed}" / "metrics.json" for folder in (RUNS, Path("again/tiny"))]
        old, new = (json.loads(run.read_text(encoding="utf-8")) for run in runs)
        # The same seed on the same machine is the same run.
        assert new["model"] == pytest.approx(old["model"], abs=1e-9) and new["protocol"]["seeds"]["tie"] == seed


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished seed was trained again")

    monkeypatch.setattr(stages, "train_stage", fail)


@pytest.mark.usefixtures("no_training")
def test_other_published_numbers_are_not_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    finished = ("--out", str(RUNS.parent))
    code, said = reproduced(capsys, "tiny", *finished)
    assert code == 0 and said.count("is finished, taken as it is") == 2
    # One seed: as wide as the interval over users; four steps over two seeds tell of no range below 1.
    values = record(project())
    values["seeds"] = values["seeds"][:1]
    values["seeds"][0]["metrics"]["model"]["ndcg@10"] += 0.5
    (project() / "docs/one").mkdir(exist_ok=True)
    (project() / "docs/one/tiny.json").write_text(json.dumps(values), encoding="utf-8")
    code, said = reproduced(capsys, "docs/one/tiny.json", *finished)
    assert code == 1 and "N@10" in said and "OUTSIDE" in said and said.splitlines()[-1].endswith("NOT reproduced")
    mrr = record(project())["seeds"][1]["metrics"]["item_item"]["mrr"]
    code, said = reproduced(capsys, changed("counter", "seeds/1/metrics/item_item/mrr", mrr + 1e-5), *finished)
    assert code == 1 and "seed 8: item item MRR is" in said and "baselines DIFFER" in said
    assert reproduced(capsys, changed("rounded", "seeds/1/metrics/item_item/mrr", mrr + 1e-8), *finished)[0] == 0


@pytest.mark.usefixtures("no_training")
def test_a_subset_of_the_seeds_has_a_range_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = reproduced(capsys, "tiny", "--seeds", "8", "--out", str(RUNS.parent))
    assert code == 0 and "seeds 8 of" in said and "the mean of 1 further seed(s)" in said


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["tony"], "tony: no result of that name in docs/results; the nearest is tiny"),
        (["tony", "--publish"], "there is no configs/tony.yaml; the nearest is tiny"),
        (["tiny", "--publish"], "tiny.json: is published already; add --overwrite"),
        (["a b", "--publish", "--from-runs", "x"], "'a b' is no name of a result"),
        (["tiny", "--title", "t"], "--title needs --publish"),
        (["tiny", "--from-runs", "x"], "--from-runs needs --publish"),
        (["tiny", "--publish", "--from-runs", "x", "--seeds", "1", "--overwrite"], "--seeds and --from-runs: choose one"),
        (["new", "--publish", "--from-runs", "nothing"], "nothing: holds no run"),
        (["tiny", "--seeds", "1", "1"], "--seeds 1 1: give different numbers, 0 or more"),
        (["tiny", "--seeds", "x"], "invalid int value: 'x'"),
        (["tiny", "--train.epochs", "2"], "unknown option --train.epochs"),
    ],
)
def test_wrong_use_is_one_line(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = reproduced(capsys, *options)
    assert code == 2 and expected in said and said.count("\n") == 1, said


@pytest.mark.usefixtures("no_training")
def test_what_stands_in_the_way_is_said_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = reproduced(capsys, changed("data", "seeds/0/histories_sha256", "0" * 64), "--out", "elsewhere")
    assert code == 2 and "histories_sha256 is" in said and "other data" in said
    code, said = reproduced(capsys, changed("epochs", "config/train/epochs", 2), "--out", str(RUNS.parent))
    assert code == 2 and "holds another run (train.epochs differ)" in said
    config = (project() / "configs/tiny.yaml").read_text(encoding="utf-8")
    (project() / "configs/few.yaml").write_text(config + "decode: {top_k: 5}\n", encoding="utf-8")
    code, said = reproduced(capsys, "few", "--publish")
    assert code == 2 and "published lists have 10 items" in said
    assert not (project() / "elsewhere").exists() and not (project() / RUNS.parent / "few").exists()
