"""Real processes whose checkpoints lie on a store: killed, damaged and gone on with, they end as a run on a disk does."""

import shutil
from pathlib import Path

import pytest
import yaml
from killing import at_step, differing, finished, kill, start, when
from stores import served
from test_kill import STEPS, home  # noqa: F401  (a fixture)

from sftrec_jax.train.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:  # noqa: F811
    """The run on a disk, evaluated."""
    status, said = finished(start("evaluate", str(home / "whole"), cache=home / "cache"))
    assert status == 0, said[-2000:]
    return home / "whole"


def place(run: Path, url: str) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config["train"]["checkpoints"] = url
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_killed_and_damaged_on_a_store_it_ends_as_on_a_disk(
    home: Path,  # noqa: F811
    whole: Path,
    tmp_path: Path,
    scheme: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Path(shutil.copytree(home / "prepared", tmp_path / "run"))
    with served(scheme) as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        place(run, bucket.url("runs/one"))

        def sent() -> list[int]:
            return sorted(int(name.split("/")[2]) for name in bucket.names() if name.endswith("/manifest.json"))

        for step in (5, 10, 17):
            process = start("train", str(run), "--resume", cache=home / "cache")
            assert when(process, at_step(run, step))
            kill(process)
            finished(process)
        newest = max(sent())
        shutil.rmtree(run / "checkpoints")  # what was on its way; a machine that is gone leaves none
        bucket.flip(f"runs/one/{newest}")
        process = start("train", str(run), cache=home / "cache")
        status, said = finished(process)
        assert status == 2 and "is trained already" in said and "Traceback" not in said, said[-2000:]
        status, said = finished(start("train", str(run), "--resume", cache=home / "cache"))
        assert status == 0 and f"step {newest} is damaged" in said and "kept aside in" in said, said[-2000:]
        assert any(name.startswith(f"runs/one/damaged/{newest}.0/") for name in bucket.names())
        status, said = finished(start("evaluate", str(run), cache=home / "cache"))
        assert status == 0, said[-2000:]
        shutil.rmtree(run / "checkpoints")
        Store(bucket.url("runs/one")).fetch(STEPS, run / "checkpoints" / str(STEPS))
    assert differing(run, whole, STEPS, whole=True) == []


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_that_is_not_there_gives_one_line(home: Path, tmp_path: Path, scheme: str) -> None:  # noqa: F811
    run = Path(shutil.copytree(home / "prepared", tmp_path / "run"))
    place(run, f"{scheme}://bucket/run")
    nobody = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1", "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9",
    }  # fmt: skip
    status, said = finished(start("train", str(run), "--resume", cache=home / "cache", **nobody))
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert status == 2 and len(errors) == 1 and "check the bucket" in errors[0] and "Traceback" not in said, said[-3000:]
