"""Damage of checkpoints is seen, named, kept aside, and the newest whole one is used: every file, by flips, cuts, loss."""

import random
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from etils import epath
from test_checkpoint import assert_same, tiny_state

from sftrec_jax.errors import UserError
from sftrec_jax.train import manifest
from sftrec_jax.train.checkpoint import Checkpoints
from sftrec_jax.train.manifest import Damaged


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoints = Checkpoints(folder, 5, fingerprint={"train.seed": "0"})
    for step, score in ((1, 0.5), (2, 0.25)):
        checkpoints.save(tiny_state(step), score)
    checkpoints.close()
    return folder


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(path: Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    at = draw.randrange(len(raw))
    raw[at] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def cut(path: Path, draw: random.Random) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: draw.randrange(len(raw))])


def lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 9)))


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def swap(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(path.stat().st_size))


def test_a_whole_step_verifies(whole: Path) -> None:
    for step, score in ((1, 0.5), (2, 0.25)):
        found = manifest.verify(epath.Path(whole / str(step)))
        assert (found.step, found.score, found.fingerprint) == (step, score, {"train.seed": "0"})
        assert found.files.keys() == {
            str(path.relative_to(whole / str(step))) for path in files_of(whole / str(step)) if path.name != manifest.NAME
        }


@pytest.mark.parametrize("damage", [flip, cut, lengthen, remove, swap], ids=lambda f: f.__name__)
def test_damage_to_any_file_is_seen(whole: Path, tmp_path: Path, damage: object) -> None:
    draw = random.Random(damage.__name__)  # type: ignore[attr-defined]
    files = files_of(whole / "2")
    assert len(files) > 10
    for path in files:
        for _ in range(8 if damage is flip else 2):
            if not path.stat().st_size and damage in (flip, cut, swap):
                continue
            step = tmp_path / "2"
            shutil.copytree(whole / "2", step)
            damage(step / path.relative_to(whole / "2"), draw)  # type: ignore[operator]
            with pytest.raises(Damaged) as caught:
                manifest.verify(epath.Path(step))
            assert path.name in str(caught.value) or path.name == manifest.NAME
            shutil.rmtree(step)


def test_a_file_that_does_not_belong_is_seen(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "2", tmp_path / "2")
    (tmp_path / "2" / "default" / "more").write_text("x")
    with pytest.raises(Damaged, match="default/more does not belong"):
        manifest.verify(epath.Path(tmp_path / "2"))


@pytest.mark.parametrize("damage", [flip, cut, remove], ids=lambda f: f.__name__)
def test_the_newest_whole_step_is_used_and_the_damaged_kept_aside(
    whole: Path, tmp_path: Path, damage: object, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    largest = max(files_of(folder / "2"), key=lambda path: path.stat().st_size)
    damage(largest, random.Random(3))  # type: ignore[operator]
    reading = Checkpoints(folder, 5, writing=False)
    assert reading.newest() == 1 and (folder / "2").exists()  # who only reads moves nothing
    reading.close()
    capsys.readouterr()
    with closing(Checkpoints(folder, 5)) as checkpoints:
        assert checkpoints.newest() == 1 and checkpoints.steps() == [1] and checkpoints.best() == 1
        assert_same(checkpoints.restore(1, tiny_state(9)), tiny_state(1))
        said = capsys.readouterr().err
        assert "step 2 is damaged" in said and largest.name in said and "kept aside in" in said and "using step 1" in said
        checkpoints.save(tiny_state(2), 0.75)  # the step is written again
    again = Checkpoints(folder, 5)
    assert again.newest() == 2 and again.best() == 2
    assert_same(again.restore(2, tiny_state(9)), tiny_state(2))
    again.close()
    assert [path.name for path in (folder / "damaged").iterdir()] == ["2.0"]


def test_a_step_that_was_written_half_way_is_none(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    (folder / "2" / manifest.NAME).unlink()
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    with closing(Checkpoints(folder, 5)) as checkpoints:
        assert checkpoints.steps() == [1] and checkpoints.newest() == 1
        assert "step 2 is damaged: has no manifest.json: its writing was stopped half-way" in capsys.readouterr().err
    assert not (folder / "3.orbax-checkpoint-tmp").exists()


def test_where_nothing_is_whole_there_is_no_step(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "all")
    for step in ("1", "2"):
        flip(tmp_path / "all" / step / manifest.NAME, random.Random(1))
    with closing(Checkpoints(tmp_path / "all", 5)) as checkpoints:
        assert checkpoints.newest() is None and checkpoints.best() is None
    with closing(Checkpoints(tmp_path / "all", 5)) as checkpoints, pytest.raises(UserError, match="damaged"):
        checkpoints.manifest_of(1)


def test_manifests_of_anything_are_refused(tmp_path: Path) -> None:
    draw = random.Random(0)
    for raw in (
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"format": 2, "sha256": ""}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        draw.randbytes(500),
    ):
        (tmp_path / manifest.NAME).write_bytes(raw)
        with pytest.raises(Damaged):
            manifest.read(epath.Path(tmp_path))
