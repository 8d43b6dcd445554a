"""A run is gone on with, and read, as what it was: other settings are named, mixed files refused."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from etils import epath
from tiny_run import trained
from tiny_training import ExampleList, stories, stream_plan

from sftrec_jax.cli import main
from sftrec_jax.config import TrainConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model.hub import BaseSource
from sftrec_jax.run.fingerprint import SAMPLE_BYTES, SAMPLES, check_same, weights_sha256
from sftrec_jax.train import manifest
from sftrec_jax.train.batches import BatchPlan


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained(), tmp_path / "run"))


def change(run: Path, section: str, **fields: object) -> None:
    path = run / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values[section] |= fields
    path.write_text(yaml.safe_dump(values))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")][-1]


def test_a_checkpoint_says_what_it_belongs_to() -> None:
    steps = [path for path in (trained() / "checkpoints").iterdir() if path.name.isdigit()]
    for step in steps:
        found = manifest.verify(epath.Path(step)).fingerprint
        assert found["train.learning_rate"] == "0.003" and found["lora.r"] == "4" and found["model.compute_dtype"] == "'float32'"
        for name in ("model.weights", "tokenizer", "items.codes", "items.ids", "data.histories", "data.split", "packing"):
            assert len(found[name].split()[-1]) == 64, name
        assert str(trained()) not in str(found)  # a run may be moved


@pytest.mark.parametrize(
    ("section", "fields", "names"),
    [
        ("train", {"learning_rate": 0.5}, ["train.learning_rate 0.003, now 0.5"]),
        ("train", {"seed": 3, "batch_rows": 2}, ["train.batch_rows 4, now 2", "train.seed 0, now 3", "packing"]),
        ("lora", {"alpha": 2.0}, ["lora.alpha 8.0, now 2.0"]),
        ("prompt", {"max_history": 5}, ["prompt.max_history 16, now 5", "packing"]),
    ],
)
def test_other_settings_are_named(
    run: Path, section: str, fields: dict[str, object], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    change(run, section, **fields)
    assert main(["train", str(run), "--resume"]) == 2
    line = said(capsys)
    assert all(name in line for name in names) and "--accept-changes" in line
    assert line.count(", now ") == len(fields)


def test_changes_can_be_accepted_and_what_changes_nothing_needs_no_asking(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run, "train", keep_checkpoints=7, save_minutes=3.0)
    assert main(["train", str(run), "--resume"]) == 0
    change(run, "train", learning_rate=0.001)
    assert main(["train", str(run), "--resume", "--accept-changes"]) == 0
    assert "accepted: step 4 was written with other settings (train.learning_rate 0.003, now 0.001)" in capsys.readouterr().err


def test_prepared_files_of_another_run_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Titles swapped between two items: same shapes, other items."""
    config = run.parent / "run.yaml"
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["items"]["order"] = "random"
    config.write_text(yaml.safe_dump(values))
    assert main(["prepare", str(config), "--out", str(tmp_path / "other")]) == 0
    shutil.rmtree(run / "prepared")
    shutil.copytree(tmp_path / "other" / "prepared", run / "prepared")
    for words in (
        ["evaluate", str(run)],
        ["recommend", str(run), "--user", "u00"],
        ["export", str(run), "--to", str(tmp_path / "e")],
    ):
        assert main(words) == 2
        line = said(capsys)
        assert "belongs to another run than" in line and "items.codes" in line and "put back what was replaced" in line
    assert not (tmp_path / "e").exists()


def test_another_base_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    base = Path(shutil.copytree(values["model"]["base"], tmp_path / "base"))
    change(run, "model", base=str(base))
    assert main(["recommend", str(run), "--user", "u00"]) == 0  # moved, but the same
    raw = bytearray((base / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (base / "model.safetensors").write_bytes(raw)
    assert main(["recommend", str(run), "--user", "u00"]) == 2
    assert "model.weights differ" in said(capsys)


def test_large_weights_are_hashed_by_pieces_that_reach_from_end_to_end(tmp_path: Path) -> None:
    size = SAMPLES * SAMPLE_BYTES + 5_000_000
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    source = BaseSource(tmp_path, None, tmp_path, "base")
    before = weights_sha256(source)
    for at in (0, size - 1):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"x")
        assert weights_sha256(source) != before
        before = weights_sha256(source)
    path.write_bytes(bytes(size + 1))
    assert weights_sha256(source) != before


def test_only_what_differs_is_named() -> None:
    with pytest.raises(UserError, match=r"\(a 1, now 2, b, c\)"):
        check_same("run", 3, {"a": "1", "b": "x" * 64, "d": "4"}, {"a": "2", "b": "y" * 64, "c": "5", "d": "4"}, False)
    check_same("run", 3, {"a": "1"}, {"a": "1"}, False)


def test_examples_without_a_target_never_reach_a_step() -> None:
    config = TrainConfig(row_length=24, batch_rows=2, max_steps=6)
    plan = stream_plan(stories().case, config)
    made = list(plan.examples.examples)  # type: ignore[attr-defined]
    nothing = dataclasses.replace(
        made[0], target_positions=made[0].target_positions[:0], labels=made[0].labels[:0], weights=made[0].weights[:0]
    )
    mixed = BatchPlan(ExampleList([nothing, *made[:9], nothing, *made[9:]]), config)
    assert mixed.without_target == 2
    seen = np.concatenate([np.concatenate(list(mixed.rows(epoch))) for epoch in range(3)])
    assert not np.isin([0, 10], seen).any() and len(np.unique(seen)) == len(made)
    assert all((mixed.batch(step).weights.sum(axis=(1, 2)) > 0).all() for step in range(mixed.steps))
    with pytest.raises(UserError, match="none of the 2 training examples has a target"):
        BatchPlan(ExampleList([nothing, nothing]), config)
