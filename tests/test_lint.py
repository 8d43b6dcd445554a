"""The leak linter of whole runs: what it refuses, what is accepted and recorded, and what it cannot check."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from test_leaks import found, made, random_histories, reading_order, titles
from tiny_run import CONFIG, write_inputs, write_lines

from sftrec_jax.cli import main
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.errors import LeakError, UserError
from sftrec_jax.evaluate import leaks
from sftrec_jax.evaluate.leaks import HeldOut
from sftrec_jax.items.embed.collaborative import ppmi_vectors
from sftrec_jax.run.lint import FITTED, KEY, check_leaks, code_numbers, findings, record_fit, training_hash
from sftrec_jax.run.session import Session, open_session


def write_large(folder: Path) -> Path:
    """A log of 300 users whose items are numbered as they are read, and its config."""
    folder.mkdir(parents=True)
    config = write_inputs(folder)
    dataset = made(random_histories(16, 300), 600)
    numbers = reading_order(dataset)
    owner = np.repeat(np.arange(300), 7)
    rows = [f"u{u:03d},{numbers[i]},{n},3" for n, (u, i) in enumerate(zip(owner, dataset.items, strict=True))]
    write_lines(folder / "log.csv", ["user_id,item_id,timestamp,rating", *rows])
    names = titles(600)
    lines = [f"{numbers[i]},{names[i]}" for i in np.argsort(numbers)]
    write_lines(folder / "items.csv", ["item_id,title", *lines])
    return config


NUMERIC = ("--items.tokenizer", "numeric", "--train.row-length", "96")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that `prepare` refused until the numbering was accepted."""
    folder = tmp_path_factory.mktemp("lint") / "large"
    config = write_large(folder)
    argv = ["prepare", str(config), "--out", str(folder / "run"), *NUMERIC]
    assert main([*argv, "--evaluate.accept-leaks", "numbering"]) == 0
    return folder


def with_config(session: Session, section: str, **change: object) -> Session:
    config = session.config
    part = dataclasses.replace(getattr(config, section), **change)
    return dataclasses.replace(session, config=dataclasses.replace(config, **{section: part}))


def test_a_run_with_numbers_in_reading_order(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = open_session(large / "run")
    assert code_numbers(session).tolist() == list(range(600))  # type: ignore[union-attr]
    assert [f.name for f in findings(session)] == ["numbering"]
    capsys.readouterr()
    record = check_leaks(session)
    assert record["checked"] == list(leaks.NAMES) and record["not_checked"] == {}
    assert [(f["name"], f["accepted"]) for f in record["found"]] == [("numbering", True)]
    assert json.loads(json.dumps(record)) == record
    printed = capsys.readouterr().err
    assert printed.startswith("leaks: numbering accepted (") and printed.count("\n") == 1
    with pytest.raises(LeakError, match="^numbering: .*--evaluate.accept-leaks numbering$"):
        check_leaks(with_config(session, "evaluate", accept_leaks=("tie_order",)))
    with pytest.raises(UserError, match="no check 'numberings'; the nearest is numbering ") as caught:
        check_leaks(with_config(session, "evaluate", accept_leaks=("numberings",)))
    assert not isinstance(caught.value, LeakError)


def test_each_finding_is_a_line(large: Path) -> None:
    session = open_session(large / "run")
    dataset = session.dataset
    cut = dataclasses.replace(dataset, train_end=dataset.train_end + 2)
    last = dataset.item_ids[dataset.items[dataset.offsets[1:] - 1]]
    named = np.asarray([f"{user}:{item}" for user, item in zip(dataset.user_ids, last, strict=True)], object)
    cut = dataclasses.replace(cut, user_ids=named)
    with pytest.raises(LeakError) as caught:
        check_leaks(dataclasses.replace(session, dataset=cut))
    names = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert names == ["target_in_user_id", "fitted_on_held_out", "duplicate_rows", "test_answer_in_training"]


def test_a_record_of_the_training_interactions(large: Path, tmp_path: Path) -> None:
    session = open_session(large / "run")
    dataset = session.dataset
    assert json.loads((session.folder.prepared / FITTED).read_text()) == {KEY: training_hash(dataset)}
    items = dataset.items.copy()
    held = HeldOut.of(dataset).at
    items[held] = items[held[::-1]]
    same = [dataclasses.replace(dataset, items=items), reordered(dataset), grown(dataset)]
    assert {training_hash(other) for other in same} == {training_hash(dataset)}
    swapped = dataset.items.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    others = [
        dataclasses.replace(dataset, items=swapped),
        dataclasses.replace(dataset, train_end=dataset.train_end - 1),
        dataclasses.replace(dataset, train_begin=np.ones(300, np.int64)),
        dataclasses.replace(dataset, user_ids=np.asarray([f"{u}x" for u in dataset.user_ids], object)),
    ]
    assert len({training_hash(other) for other in [dataset, *others]}) == 5
    moved = dataclasses.replace(session, dataset=others[0])
    assert "codes and vectors were fitted on other interactions" in found(findings(moved)[1], "fitted_on_held_out")
    record_fit(others[0], tmp_path)
    assert json.loads((tmp_path / FITTED).read_text()) == {KEY: training_hash(others[0])}


def reordered(dataset: Dataset) -> Dataset:
    """The same histories with the catalogue the other way round."""
    last = len(dataset.item_ids) - 1
    return dataclasses.replace(dataset, items=(last - dataset.items).astype(np.int32), item_ids=dataset.item_ids[::-1].copy())


def grown(dataset: Dataset) -> Dataset:
    """The same histories and an item more, as after `add-items`."""
    return dataclasses.replace(dataset, item_ids=np.append(dataset.item_ids, "0000"))


def test_a_run_without_a_record(large: Path, tmp_path: Path) -> None:
    session = open_session(large / "run")
    elsewhere = dataclasses.replace(session, folder=dataclasses.replace(session.folder, path=tmp_path))
    record = check_leaks(elsewhere)
    assert list(record["not_checked"]) == ["fitted_on_held_out"] and "fitted_on_held_out" not in record["checked"]


def test_codes_of_a_file(large: Path, tmp_path: Path) -> None:
    """Three tokens an item that spell its place in reading order, and what a record beside the file says of it."""
    table = {str(i): [f"<a_{i // 64}>", f"<b_{i // 8 % 8}>", f"<c_{i % 8}>"] for i in range(600)}
    file = tmp_path / "index.json"
    file.write_text(json.dumps(table))
    argv = [
        "prepare",
        str(large / "tiny.yaml"),
        "--items.tokenizer",
        "file",
        "--items.codes-file",
        str(file),
        "--items.codes-keys",
        "row",
    ]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 3
    assert not (tmp_path / "run").exists()
    # Reading order also puts a held-out item near the one before it, which the membership test sees.
    both = ("numbering", "fitted_on_held_out")
    assert main([*argv, "--out", str(tmp_path / "run"), "--evaluate.accept-leaks", *both]) == 0
    session = open_session(tmp_path / "run")
    assert code_numbers(session).tolist() == list(range(600))  # type: ignore[union-attr]
    assert f"{file}: its codes put the target near" in found(findings(session)[1], "fitted_on_held_out")
    sidecar = tmp_path / "index.json.fitted.json"
    sidecar.write_text(json.dumps({KEY: training_hash(session.dataset)}))
    assert [f.name for f in findings(session)] == ["numbering"]
    sidecar.write_text(json.dumps({KEY: "0" * 64}))
    assert "codes were fitted on other interactions" in found(findings(session)[1], "fitted_on_held_out")
    sidecar.write_text("[]")
    with pytest.raises(UserError, match="index.json.fitted.json: no record of a fit"):
        findings(session)


def test_vectors_of_a_file(large: Path, tmp_path: Path) -> None:
    session, file = open_session(large / "run"), tmp_path / "vectors.npy"
    dataset = session.dataset
    session = with_config(with_config(session, "embedding", file=str(file)), "items", tokenizer="atomic", init="codebook")
    everything = dataclasses.replace(dataset, train_end=np.diff(dataset.offsets))
    for fitted_on, expected in ((dataset, []), (everything, ["fitted_on_held_out"])):
        np.save(file, ppmi_vectors(fitted_on, 32, 5, 0))
        assert [f.name for f in findings(session) if f.name != "numbering"] == expected
    assert f"{file}: its vectors put the target near" in found(findings(session)[-1], "fitted_on_held_out")
    assert dataset.text is not None
    silent = dataclasses.replace(dataset, text=dataclasses.replace(dataset.text, texts=np.full(600, "", object)))
    record = check_leaks(with_config(dataclasses.replace(session, dataset=silent), "evaluate", accept_leaks=("numbering",)))
    assert "items have no text" in record["not_checked"]["fitted_on_held_out"]
    (tmp_path / "vectors.npy.fitted.json").write_text(json.dumps({KEY: training_hash(dataset)}))
    assert "fitted_on_held_out" not in [f.name for f in findings(session)]  # the record is believed


def test_the_tiny_run_is_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert CONFIG.get("evaluate", {}).get("accept_leaks") is None
    assert main(["prepare", str(write_inputs(tmp_path)), "--out", str(tmp_path / "run")]) == 0
    assert "leaks: none found (6 checks); numbering not checked (one token an item" in capsys.readouterr().err
