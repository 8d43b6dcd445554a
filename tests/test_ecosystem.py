"""The export recommends without this package: docs/recommend_with_transformers.py against `sftrec recommend`."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from tiny_run import SHORT, histories, trained, write_inputs

from sftrec_jax.cli import main

SCRIPT = Path(__file__).parent.parent / "docs" / "recommend_with_transformers.py"
TITLES = ["--items.tokenizer", "title", "--prompt.format", "instruct", "--train.row-length", "128", "--train.max-steps", "2"]
FEW = ["--train.validate-users", "6", "--evaluate.users", "6", "--evaluate.unconstrained-users", "2"]


@pytest.mark.parametrize("options", [None, pytest.param(TITLES, marks=pytest.mark.slow)], ids=["atomic stream", "titles, worded"])
def test_the_script_recommends_the_same(options: list[str] | None, tmp_path: Path) -> None:
    run = trained()
    if options is not None:
        run = tmp_path / "run"
        assert main(["run", str(write_inputs(tmp_path, SHORT)), "--out", str(run), *FEW, *options]) == 0
    history = histories()["u03"]
    to = tmp_path / "ours.parquet"
    ask = ["recommend", str(run), "--history", "; ".join(history), "--k", "5", "--to", str(to), "--decode.beam", "40"]
    assert main(ask) == 0
    command = [sys.executable, str(SCRIPT), str(run / "export"), "--k", "5", "--beam", "40", "--history", *history]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    ours = pl.read_parquet(to)
    assert [row[1] for row in theirs] == ours["item_id"].to_list() and len(theirs) == 5
    assert [float(row[0]) for row in theirs] == pytest.approx(ours["score"].to_list(), abs=2e-4)
