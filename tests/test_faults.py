"""Faults around a run: it ends as if there were none, or stops with one line, and nothing already saved is lost."""

import random
import shutil
from pathlib import Path

import pytest
from etils import epath
from faulty import on_a_full_disk, on_a_slow_disk, with_a_jumping_clock, with_nobody_reading
from killing import STEPS, at_step, differing, finished, kill, records, start, when
from test_kill import home  # noqa: F401  (a fixture)
from test_manifest import flip

from sftrec_jax.cli import main
from sftrec_jax.train import manifest
from sftrec_jax.train.metrics import JsonLines


def prepared(home: Path, tmp_path: Path) -> Path:  # noqa: F811
    return Path(shutil.copytree(home / "prepared", tmp_path / "run"))


def half_way(home: Path, tmp_path: Path) -> tuple[Path, int]:  # noqa: F811
    """A run that was killed after its ninth step, and its newest checkpoint."""
    run = prepared(home, tmp_path)
    process = start("train", str(run), cache=home / "cache")
    assert when(process, at_step(run, 10))
    kill(process)
    finished(process)
    return run, max(int(path.parent.name) for path in (run / "checkpoints").glob("*/manifest.json"))


@pytest.mark.slow
def test_a_full_disk_stops_with_one_line_and_what_was_saved_stays(home: Path, tmp_path: Path) -> None:  # noqa: F811
    run, newest = half_way(home, tmp_path)
    status, said = on_a_full_disk(run, home / "cache")
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert status == 2 and len(errors) == 1 and "cannot be written" in errors[0], said[-3000:]
    assert "earlier ones are intact" in errors[0] and "Traceback" not in said, said[-3000:]
    manifest.verify(epath.Path(run / "checkpoints" / str(newest)))
    status, said = finished(start("train", str(run), "--resume", cache=home / "cache"))
    assert status == 0, said[-2000:]
    assert f"resumed from step {newest}" in said and differing(run, home / "whole", STEPS) == []


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_aside_and_the_run_ends_the_same(home: Path, tmp_path: Path) -> None:  # noqa: F811
    run, newest = half_way(home, tmp_path)
    files = [path for path in (run / "checkpoints" / str(newest)).rglob("*") if path.is_file()]
    flip(max(files, key=lambda path: path.stat().st_size), random.Random(0))
    status, said = finished(start("train", str(run), "--resume", cache=home / "cache"))
    assert status == 0 and f"step {newest} is damaged" in said, said[-2000:]
    assert (run / "checkpoints" / "damaged" / f"{newest}.0").is_dir() and differing(run, home / "whole", STEPS) == []


@pytest.mark.slow
def test_a_jumping_clock_changes_nothing(home: Path, tmp_path: Path) -> None:  # noqa: F811
    run = prepared(home, tmp_path)
    status, said = with_a_jumping_clock(run, home / "cache", tmp_path / "scratch")
    assert status == 0 and differing(run, home / "whole", STEPS) == [], said[-2000:]


@pytest.mark.slow
def test_a_slow_disk_changes_nothing(home: Path, tmp_path: Path) -> None:  # noqa: F811
    run = prepared(home, tmp_path)
    status, said = on_a_slow_disk(run, home / "cache", tmp_path / "scratch")
    assert status == 0 and differing(run, home / "whole", STEPS) == [], said[-2000:]


@pytest.mark.slow
def test_that_nobody_reads_the_messages_changes_nothing(home: Path, tmp_path: Path) -> None:  # noqa: F811
    run = prepared(home, tmp_path)
    assert with_nobody_reading(run, home / "cache") == 0
    assert differing(run, home / "whole", STEPS) == []


def test_a_log_that_cannot_be_written_is_written_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, None)
    log.write({"step": 1, "loss": 0.5})
    true = log._file
    log._file = open("/dev/full", "a")  # noqa: SIM115
    for step in (2, 3):
        log.write({"step": step})
    log._file.close()
    log.write({"step": 4})  # of a file that is closed
    log._file = true
    log.write({"step": 5})
    log.close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5]
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1 and "training goes on" in said


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "lo\n\xff\xfe\nnull\n{"step": 4}')
    JsonLines(path, 3).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("out", ["/sys/kernel/run", "/proc/run"])
def test_where_nothing_can_be_written_one_line_says_so(tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("data: {source: log.csv}\n")
    assert main(["run", str(tmp_path / "run.yaml"), "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and out in said and "choose another --out" in said
