"""Long jobs in shards: one that was stopped anywhere goes on, and gives what one that was never stopped gives."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_run import ITEMS, trained, write_lines

from sftrec_jax.cli import main
from sftrec_jax.console import progress
from sftrec_jax.errors import UserError
from sftrec_jax.run import asked as people
from sftrec_jax.run.evaluation import evaluate_stage
from sftrec_jax.run.history_files import Histories, count_rows, file_shards
from sftrec_jax.run.recommend import Ranker, typed_histories
from sftrec_jax.run.recommend_file import Asked, recommend_to
from sftrec_jax.run.session import Session, open_session

NOBODY = Histories([], [], [])
SIZE = 7
ROOT = Path(__file__).parent.parent


class Stopped(BaseException):
    """In place of a kill."""


class Counting(Ranker):
    """Knows how many histories it has ranked."""

    ranked = 0

    def frame(self, people: Histories, report: Any = None) -> tuple[pl.DataFrame, Counter[str]]:
        self.ranked += len(people.names)
        return super().frame(people, report)


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(trained())


@pytest.fixture(scope="module")
def ranker(session: Session) -> Counting:
    return Counting(session, 4, False)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Histories of different lengths, two of them empty; 25, which is no multiple of a shard."""
    draw = random.Random(1)
    lengths = [0, *(draw.randrange(1, 12) for _ in range(19)), 0, 20, 3, 1, 8]
    return [{"user": f"p{at}", "history": draw.choices(ITEMS, k=n)} for at, n in enumerate(lengths)]


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_lines(path, [json.dumps(row) for row in rows])


@contextmanager
def stopped(call: int, where: Any = os, name: str = "replace") -> Iterator[None]:
    """Stops before the call of this number, from 0, of a function that changes files."""
    calls, real = 0, getattr(where, name)

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > call:
            raise Stopped
        return real(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, counted)
        yield


def write(ranker: Counting, file: Path, out: Path, overwrite: bool = False, size: int = SIZE) -> int:
    """How many histories were ranked for it."""
    before = ranker.ranked
    try:
        recommend_to(ranker, Asked(ranker.session, NOBODY, file, size), out, overwrite)
    finally:
        done = ranker.ranked - before
    return done


@pytest.fixture(scope="module")
def whole(ranker: Counting, rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A file of histories and what a run gives that is never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    file = write_json_lines(folder / "h.jsonl", rows)
    assert write(ranker, file, folder / "out.parquet") == len(rows)
    assert sorted(entry.name for entry in folder.iterdir()) == ["h.jsonl", "out.parquet"]
    return file, (folder / "out.parquet").read_bytes()


def test_shards_give_what_one_ranking_gives(ranker: Counting, rows: list[dict[str, Any]], whole: tuple[Path, bytes]):
    (shard,) = file_shards(ranker.session, whole[0], 100)
    frame, counts = ranker.frame(shard.read())
    found = pl.read_parquet(whole[1])
    assert found.drop("score").equals(frame.drop("score")) and (found["score"] - frame["score"]).abs().max() < 1e-4  # type: ignore[operator]
    assert found["user"].unique(maintain_order=True).to_list() == [row["user"] for row in rows]
    assert counts["histories"] == 25 and counts["cut"] == 1 and not counts["short"]


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 8, 9, 10])
def test_a_stopped_run_goes_on(stop: int, ranker: Counting, whole: tuple[Path, bytes], tmp_path: Path):
    """Files are renamed 11 times: the request, 4 parts with their JSON, the request with what they gave, and the result."""
    out = tmp_path / "out.parquet"
    with stopped(stop), pytest.raises(Stopped):
        write(ranker, whole[0], out)
    assert not out.exists()
    finished = min(4, max(0, stop - 1) // 2)
    assert write(ranker, whole[0], out) == max(0, 25 - SIZE * finished)
    assert out.read_bytes() == whole[1]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("stop", [0, 3, 8])
def test_a_run_stopped_while_it_cleans_up_is_done(stop: int, ranker: Counting, whole: tuple[Path, bytes], tmp_path: Path):
    out = tmp_path / "out.parquet"
    with stopped(stop, Path, "unlink"), pytest.raises(Stopped):
        write(ranker, whole[0], out)
    assert out.read_bytes() == whole[1]
    assert write(ranker, whole[0], out) == 0
    assert out.read_bytes() == whole[1] and list(tmp_path.iterdir()) == [out]
    with pytest.raises(UserError, match="exists already"):
        write(ranker, whole[0], out)


def test_json_lines_go_on_as_well(ranker: Counting, whole: tuple[Path, bytes], tmp_path: Path):
    out = tmp_path / "out.jsonl"
    with stopped(4), pytest.raises(Stopped):
        write(ranker, whole[0], out)
    assert write(ranker, whole[0], out) == 25 - SIZE
    assert pl.read_ndjson(out, schema=pl.read_parquet(whole[1]).schema).equals(pl.read_parquet(whole[1]))


def test_damaged_parts_are_made_again(ranker: Counting, whole: tuple[Path, bytes], tmp_path: Path):
    out, parts = tmp_path / "out.parquet", tmp_path / ".out.parquet.parts"
    with stopped(9), pytest.raises(Stopped):
        write(ranker, whole[0], out)
    (parts / "00000.parquet").write_bytes((parts / "00000.parquet").read_bytes()[:-9])
    shutil.copyfile(parts / "00000.parquet.json", parts / "00001.parquet.json")
    (parts / "00002.parquet.json").write_text("{", encoding="utf-8")
    assert write(ranker, whole[0], out) == 3 * SIZE
    assert out.read_bytes() == whole[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [("k", "k is 4 there and 3 here"), ("seen", "keep_seen is False"), ("size", "shard is 7"), ("file", "file is h.jsonl there")],
)
def test_parts_of_another_request_are_refused(
    change: str, says: str, session: Session, ranker: Counting, whole: tuple[Path, bytes], tmp_path: Path
):
    out, file = tmp_path / "out.parquet", whole[0]
    with stopped(4), pytest.raises(Stopped):
        write(ranker, file, out)
    other = Counting(session, 3 if change == "k" else 4, change == "seen") if change in ("k", "seen") else ranker
    if change == "file":
        file = tmp_path / "g.jsonl"
        shutil.copyfile(whole[0], file)
    size = 9 if change == "size" else SIZE
    with pytest.raises(UserError, match=says) as error:
        write(other, file, out, size=size)
    assert "--overwrite" in str(error.value) and "\n" not in str(error.value)
    if change == "k":
        assert write(other, file, out, overwrite=True) == 25
        assert pl.read_parquet(out)["rank"].max() == 3
    else:
        assert write(ranker, whole[0], out) == 25 - SIZE and out.read_bytes() == whole[1]


def test_overwriting_goes_on_too(ranker: Counting, whole: tuple[Path, bytes], tmp_path: Path):
    """The same command must go on where it replaces an earlier file, or it would never come to an end."""
    out = tmp_path / "out.parquet"
    out.write_bytes(b"earlier")
    with stopped(6), pytest.raises(Stopped):
        write(ranker, whole[0], out, overwrite=True)
    assert out.read_bytes() == b"earlier"
    assert write(ranker, whole[0], out, overwrite=True) == 25 - 2 * SIZE
    assert out.read_bytes() == whole[1]


def test_an_error_in_a_later_shard_leaves_the_others(ranker: Counting, rows: list[dict[str, Any]], tmp_path: Path):
    file, out = tmp_path / "h.jsonl", tmp_path / "out.parquet"
    write_json_lines(file, [*rows[:16], {"user": "x", "history": ["no such item"]}, *rows[17:]])
    with pytest.raises(UserError, match=r"h.jsonl: row 17: .*no such item"):
        write(ranker, file, out)
    assert not out.exists()
    write_json_lines(file, rows)
    assert write(ranker, file, out) == 25 - 2 * SIZE
    write_json_lines(file, [*rows[:8], {"user": "new", "history": ["i04"]}, *rows[9:]])
    with stopped(0, Path, "unlink"), pytest.raises(Stopped):  # with all its parts still there
        write(ranker, file, out, overwrite=True)
    write_json_lines(file, rows)
    assert write(ranker, file, out, overwrite=True) == SIZE


def test_formats_are_read_alike(session: Session, rows: list[dict[str, Any]], tmp_path: Path):
    write_json_lines(tmp_path / "h.jsonl", [{**row, "more": 1} for row in rows])
    (tmp_path / "h.jsonl").write_bytes((tmp_path / "h.jsonl").read_bytes().replace(b"\n", b"\r\n\n"))
    pl.DataFrame(rows).write_parquet(tmp_path / "h.parquet", row_group_size=5)
    titles = dict(zip(ITEMS, session.codes.titles, strict=True))
    write_lines(tmp_path / "h.txt", [";".join(titles[item] for item in row["history"]) for row in rows])
    wanted = [[ITEMS.index(item) for item in row["history"]] for row in rows]
    for name in ("h.jsonl", "h.parquet", "h.txt"):
        shards = list(file_shards(session, tmp_path / name, SIZE))
        assert [(shard.first, shard.size) for shard in shards] == [(1, 7), (8, 7), (15, 7), (22, 4)]
        read = [shard.read() for shard in shards]
        assert [items.tolist() for part in read for items in part.items] == wanted
        names = [n for part in read for n in part.names]
        assert names == ([str(at) for at in range(1, 26)] if name == "h.txt" else [row["user"] for row in rows])
        assert len({shard.source for shard in shards}) == 4
    assert [count_rows(tmp_path / name) for name in ("h.parquet", "h.txt")] == [25, 25]


def test_rows_that_cannot_be_read_are_named(session: Session, tmp_path: Path):
    for text, says in (
        (b'{"history": []}\n[1]\n', "row 2 is not a JSON object"),
        (b'{"history": []}\n{"history"\n', "row 2 is not a JSON object"),
        (b'{"history": []}\n{"history": ["\xff"]}\n', "row 2, byte 30 is not UTF-8"),
        (b'{"history": [], "user": "\\ud800"}\n', "row 1: user is"),
        (b'{"history": ["i01"], "timestamps": [1e400]}\n', "row 1: timestamps is"),
        (b"\n", "holds no history"),
    ):
        (tmp_path / "h.jsonl").write_bytes(text)
        with pytest.raises(UserError, match=says):
            for shard in file_shards(session, tmp_path / "h.jsonl", 5):
                shard.read()
    (tmp_path / "h.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read"):
        next(file_shards(session, tmp_path / "h.parquet", 5))


def test_typed_histories_come_first(ranker: Counting, whole: tuple[Path, bytes], tmp_path: Path):
    out = tmp_path / "out.parquet"
    typed = typed_histories(ranker.session, ["u03"], ["i01;i02"], [])
    recommend_to(ranker, asked := Asked(ranker.session, typed, whole[0], SIZE), out, False)
    found = pl.read_parquet(out)
    assert asked.total == 27 and found["user"].unique(maintain_order=True).to_list()[:3] == ["u03", "history 1", "p0"]
    assert found[8:].equals(pl.read_parquet(whole[1]))


def test_options_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for words in (["--user", "u03", "--shard", "5"], ["--file", "x.txt", "--shard", "0"]):
        capsys.readouterr()
        assert main(["recommend", str(trained()), *words]) == 2
        assert "--shard" in capsys.readouterr().err


def test_progress_says_how_long_it_takes():
    report = progress("ranking", 1000)
    report.passed(400)
    report(200)
    assert report.line(100.0) == "ranking: 600 of 1,000 users, 2.0 users/s, 3 min left"
    report(400)
    assert report.line(300.0) == "ranking: 1,000 of 1,000 users, 2.0 users/s"
    assert progress("reading", None, "rows").line(1.0) == "reading: 0 rows, 0.0 rows/s"


def results(session: Session) -> tuple[dict[str, Any], pl.DataFrame]:
    def timeless(value: Any) -> Any:
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k} if isinstance(value, dict) else value

    metrics = timeless(json.loads(session.folder.metrics.read_text(encoding="utf-8")))
    return metrics, pl.read_parquet(session.folder.recommendations)


def test_an_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a damaged part, and beside what is left of another evaluation; 40 users in shards of 16."""
    shutil.copytree(trained(), tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    one = open_session(tmp_path / "run")
    before = results(one)
    monkeypatch.setattr(people, "SHARD", 16)
    decoder, step = one.trained_decoder()
    asked_of: list[int] = []
    real = people.Asked.prompts

    def prompts(self: people.Asked, rows: Any = None, builder: Any = None) -> Any:
        asked_of.append(len(self.users) if rows is None else len(rows))
        return real(self, rows, builder)

    monkeypatch.setattr(people.Asked, "prompts", prompts)
    evaluate_stage(one, decoder, step)
    whole = results(one)
    assert asked_of == [16, 16, 8, 4]  # the last: those of the check without the constraint
    assert whole[1].drop("score").equals(before[1].drop("score")) and whole[0]["model"] == before[0]["model"]

    folder = one.folder.evaluating
    assert not folder.exists()
    one.folder.metrics.unlink()
    with stopped(6), pytest.raises(Stopped):  # the request, two shards, and the third without its JSON
        evaluate_stage(one, decoder, step)
    assert not one.folder.metrics.exists()
    (folder / "model-00000.npz").write_bytes(b"")
    asked_of.clear()
    evaluate_stage(one, decoder, step)
    assert asked_of == [16, 8, 4]
    again = results(one)
    assert again[0] == whole[0] and again[1].equals(whole[1])

    folder.mkdir()
    (folder / "request.json").write_text(json.dumps({"request": {"users": "others"}}), encoding="utf-8")
    asked_of.clear()
    evaluate_stage(one, decoder, step)
    assert asked_of == [16, 16, 8, 4] and results(one)[0] == whole[0] and not folder.exists()


def test_parts_of_another_evaluation_are_removed(tmp_path: Path):
    shutil.copytree(trained(), tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    one = open_session(tmp_path / "run")
    template = write_lines(tmp_path / "other.j2", ["x"])
    step = max(int(entry.name) for entry in one.folder.checkpoints.iterdir() if entry.name.isdigit())

    def kept(session: Session, users: int = 40) -> bool:
        """Whether what was written last is kept; writes something."""
        parts = people.kept_parts(people.Asked(session, np.arange(users), session.dataset.test_position), step)
        assert parts is not None
        there = parts.finished("part", "") is not None
        parts.write("part", "", {}, lambda path: path.write_text("", encoding="utf-8"))
        return there

    assert not kept(one) and kept(one) and not kept(one, 39) and not kept(one)
    for change in ({"mask_seen": False}, {"templates": (str(template),)}):
        config = dataclasses.replace(one.config, evaluate=dataclasses.replace(one.config.evaluate, **change))
        assert not kept(other := dataclasses.replace(one, config=config)) and kept(other)
    write_lines(template, ["y"])
    assert not kept(other)
    assert kept(other)
    (one.folder.checkpoints / str(step) / "more").write_text("", encoding="utf-8")
    assert not kept(other)


@pytest.mark.slow
def test_killed_processes_go_on(rows: list[dict[str, Any]], tmp_path: Path):
    """Killed three times, each time some milliseconds after another shard was begun, then left alone."""
    file = write_json_lines(tmp_path / "h.jsonl", rows * 8)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    draw = random.Random(2)

    def start(out: Path) -> subprocess.Popen[bytes]:
        words = ["recommend", str(trained()), "--file", str(file), "--shard", "8", "--k", "4", "--to", str(out)]
        return subprocess.Popen([sys.executable, "-m", "sftrec_jax.cli", *words], env=environment, stderr=subprocess.PIPE)

    alone, out = tmp_path / "alone.parquet", tmp_path / "out.parquet"
    first = start(alone)
    assert b"wrote" in first.communicate(timeout=400)[1] and first.returncode == 0
    kills = 0
    for target in (1, 6, 14):
        process = start(out)
        while len(list((tmp_path / ".out.parquet.parts").glob("*.parquet"))) < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() / 20)
        process.kill()
        process.communicate(timeout=400)
        kills += process.returncode == -9
    last = start(out)
    said = last.communicate(timeout=400)[1]
    assert last.returncode == 0 and b"had been ranked by an earlier run" in said and kills >= 2
    assert out.read_bytes() == alone.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["alone.parquet", "h.jsonl", "out.parquet"]
