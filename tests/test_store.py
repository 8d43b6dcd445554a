"""Checkpoints elsewhere: on stores served on loopback they are what they are on a disk, and damage there is seen; refusals."""

import importlib.util
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from stores import Served, forget, served
from test_checkpoint import assert_same, tiny_state

from sftrec_jax.config import RunConfig, TrainConfig
from sftrec_jax.config_file import load_config
from sftrec_jax.errors import UserError
from sftrec_jax.overrides import overridden
from sftrec_jax.run.folder import new_run
from sftrec_jax.run.places import open_checkpoints
from sftrec_jax.train import manifest
from sftrec_jax.train.checkpoint import Checkpoints
from sftrec_jax.train.store import Store


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with served(request.param) as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def at(bucket: Served, folder: Path, writing: bool = True) -> Checkpoints:
    return Checkpoints(folder, 2, writing=writing, store=Store(bucket.url("a/run")))


def steps_of(bucket: Served) -> set[str]:
    return {name.split("/")[2] for name in bucket.names()}


def test_steps_are_kept_read_and_laid_aside_on_a_store(bucket: Served, tmp_path: Path) -> None:
    with closing(at(bucket, tmp_path / "here")) as checkpoints:
        assert checkpoints.newest() is None
        for step in range(1, 5):
            checkpoints.save(tiny_state(step))
            checkpoints.set_score(step, 1 / step)
        checkpoints.finish()
        assert checkpoints.steps() == [1, 3, 4] and steps_of(bucket) == {"1", "3", "4"}
        assert list((tmp_path / "here").iterdir()) == []
    with closing(at(bucket, tmp_path / "there", writing=False)) as reader:
        assert (reader.newest(), reader.best(), reader.score(4)) == (4, 1, 0.25)
        assert_same(reader.restore(4, tiny_state(9)), tiny_state(4))
    before = {name: bucket.read(name) for name in bucket.names()}
    damaged = bucket.flip("a/run/4")
    with closing(at(bucket, tmp_path / "more", writing=False)) as reader:
        assert reader.newest() == 3
    assert set(bucket.names()) == set(before)  # who only reads changes nothing
    with closing(at(bucket, tmp_path / "here")) as writer:
        assert writer.newest() == 3 and writer.steps() == [1, 3]
        assert steps_of(bucket) == {"1", "3", "damaged"}
        assert bucket.read(damaged.replace("a/run/4/", "a/run/damaged/4.0/")) != before[damaged]
        writer.save(tiny_state(4), 0.5)  # the step is written again
    with closing(at(bucket, tmp_path / "here")) as writer:
        assert writer.newest() == 4
        assert_same(writer.restore(4, tiny_state(9)), tiny_state(4))


def test_a_step_half_sent_is_sent_again_or_laid_aside(bucket: Served, tmp_path: Path) -> None:
    own, root = Checkpoints(tmp_path / "here", 5), bucket.url("a/run")
    for step in (1, 2):
        own.save(tiny_state(step))
    own.close()
    Store(root).send(1, tmp_path / "here" / "1")
    files = [path for path in (tmp_path / "here" / "2").rglob("*") if path.is_file() and path.name != manifest.NAME]
    for path in files[:2]:  # as a process leaves it that is killed while it sends
        for step in (2, 3):
            bucket.write(f"a/run/{step}/{path.relative_to(tmp_path / 'here' / '2').as_posix()}", path.read_bytes())
    with closing(at(bucket, tmp_path / "here")) as checkpoints:
        assert checkpoints.newest() == 2 and checkpoints.steps() == [1, 2]
        assert_same(checkpoints.restore(2, tiny_state(9)), tiny_state(2))
    assert steps_of(bucket) == {"1", "2", "damaged"}


def test_a_store_that_refuses_gives_one_line(bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no bucket none"):
        Store(f"{bucket.scheme}://none/run").steps()
    with closing(at(bucket, tmp_path / "here")) as checkpoints:
        checkpoints.save(tiny_state(1))
        checkpoints.finish()

        def broken(*_: object) -> None:
            raise RuntimeError("the network\nis gone")

        monkeypatch.setattr(checkpoints._store._files, "put", broken)  # pyright: ignore[reportOptionalMemberAccess]
        checkpoints.save(tiny_state(2))
        checkpoints.finish()
        assert checkpoints.steps() == [1]
        checkpoints.save(tiny_state(3))
        with pytest.raises(UserError, match="step 3 cannot be written .*the network is gone.*earlier ones are intact"):
            checkpoints.finish()
    monkeypatch.undo()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    with closing(at(bucket, tmp_path / "here")) as checkpoints:  # what could not be sent was kept here
        assert checkpoints.newest() == 3 and steps_of(bucket) == {"1", "2", "3"}


def test_a_bucket_without_credentials_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="s3://bucket/run: .*credentials"):
        Store("s3://bucket/run").steps()
    forget()


@pytest.mark.parametrize(("url", "library", "extra"), [("gs://b/run", "gcsfs", "gcs"), ("s3://b/run", "s3fs", "s3")])
def test_a_missing_library_is_named(url: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{library} is not installed.*pip install 'sftrec_jax\[{extra}\]'"):
        Store(url)


@pytest.mark.parametrize("place", ["", "http://b/run", "gs://", "gs://bucket", "s3://bucket/", "s3:///run"])
def test_places_that_are_none_are_refused(place: str) -> None:
    with pytest.raises(UserError, match="train.checkpoints"):
        TrainConfig(checkpoints=place)


def test_a_folder_is_named_from_the_config_or_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for given, wanted in (("far", str(tmp_path / "far")), ("gs://b/run", "gs://b/run"), ("/far", "/far")):
        (tmp_path / "run.yaml").write_text(f"train: {{checkpoints: '{given}'}}\n", encoding="utf-8")
        config = load_config(tmp_path / "run.yaml")
        assert config.train.checkpoints == wanted
        assert overridden(config, ["--train.epochs", "2"]).train.checkpoints == wanted
    assert overridden(config, ["--train.checkpoints", "far"]).train.checkpoints == str(tmp_path / "here" / "far")


def test_a_new_run_among_steps_of_another_is_refused_and_removes_nothing(tmp_path: Path) -> None:
    far, out = tmp_path / "far", tmp_path / "run"
    config = RunConfig(train=TrainConfig(checkpoints=str(far)))
    with new_run(out, config, False, False) as folder:
        with closing(open_checkpoints(folder, config.train)) as checkpoints:
            checkpoints.save(tiny_state(1))
    assert (far / "1" / "manifest.json").exists() and not (out / "checkpoints").exists()
    for where, overwrite in ((tmp_path / "other", False), (out, True)):
        with (
            pytest.raises(UserError, match="holds checkpoints already.*remove them yourself"),
            new_run(where, config, False, overwrite),
        ):
            pass
    assert not (tmp_path / "other").exists() and (out / "config.yaml").exists() and (far / "1" / "manifest.json").exists()
    moved = RunConfig(train=TrainConfig(checkpoints=str(far.rename(tmp_path / "farther"))))
    with new_run(out, moved, True, False) as folder, closing(open_checkpoints(folder, moved.train)) as checkpoints:
        assert checkpoints.newest() == 1
