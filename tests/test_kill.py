"""Real processes, killed and stopped at any moment: what is resumed ends bit for bit where it would have ended."""

import random
import shutil
import signal
from pathlib import Path

import pytest
from killing import STEPS, at_step, differing, finished, kill, moments, records, start, stored, when, write_run

pytestmark = pytest.mark.slow
KILLS = 20


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `prepared`, a run to copy, `whole`, the same trained without a stop, and `cache`."""
    folder = tmp_path_factory.mktemp("kill")
    config = write_run(folder)
    status, said = finished(start("prepare", str(config), "--out", str(folder / "prepared"), cache=folder / "cache"))
    assert status == 0, said[-2000:]
    shutil.copytree(folder / "prepared", folder / "whole")
    status, said = finished(start("train", str(folder / "whole"), cache=folder / "cache"))
    assert status == 0, said[-2000:]
    assert [r["step"] for r in records(folder / "whole") if "loss" in r] == list(range(1, STEPS + 1))
    return folder


def test_killed_at_any_moment_it_ends_where_it_would_have_ended(home: Path, tmp_path: Path) -> None:
    """While it compiles, steps, validates and saves, at an epoch's edge, whenever the clock says: up to four times a run."""
    draw, kills, chains, tries = random.Random(7), 0, 0, 0
    names = list(moments(home / "whole", draw))
    while kills < KILLS:
        out = Path(shutil.copytree(home / "prepared", tmp_path / f"chain {chains}"))
        for _ in range(4):
            process = start("train", str(out), "--resume", cache=home / "cache")
            when(process, moments(out, draw)[names[tries % len(names)]])
            tries += 1
            kill(process)
            status, said = finished(process)
            assert status in (0, -signal.SIGKILL), said[-2000:]
            kills += status != 0
            if status == 0:  # done before the moment came
                break
        status, said = finished(start("train", str(out), "--resume", cache=home / "cache"))
        assert status == 0, said[-2000:]
        assert differing(out, home / "whole", STEPS) == []
        chains += 1
    assert chains > 1


@pytest.mark.parametrize("file", ["dataset.json", "item_codes.json", "fitted.json"])
def test_killed_while_it_prepares_it_prepares_again(home: Path, tmp_path: Path, file: str) -> None:
    out = tmp_path / "run"
    words = ("run", str(home / "run.yaml"), "--out", str(out), "--train.max-steps", "3")
    process = start(*words, cache=home / "cache")
    when(process, (out / "prepared" / file).exists)
    kill(process)
    assert finished(process)[0] == -signal.SIGKILL
    begun = (out / "prepared" / "whole").exists()  # the kill may come too late
    status, said = finished(start(*words, "--resume", cache=home / "cache"))
    assert status == 0 and ("what became of" in said) != begun, said[-2000:]
    for name in ("item_codes.npy", "fitted.json", "dataset.json"):
        assert (out / "prepared" / name).read_bytes() == (home / "prepared" / "prepared" / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_and_leaves_with_75_in_training_and_in_validation(home: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    shutil.copytree(home / "prepared", out)
    for step in (7, 16):
        process = start("train", str(out), "--resume", cache=home / "cache")
        assert when(process, at_step(out, step))
        kill(process, number)
        status, said = finished(process)
        assert status == 75, said[-2000:]
        assert "stopping where nothing is lost" in said and "--resume goes on" in said and "Traceback" not in said
        newest = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
        assert newest == max(r["step"] for r in records(out))  # no step that was made is lost
    status, said = finished(start("train", str(out), "--resume", cache=home / "cache"))
    assert status == 0, said[-2000:]
    assert differing(out, home / "whole", STEPS) == []


def test_a_signal_is_seen_while_the_step_compiles_and_before(home: Path, tmp_path: Path) -> None:
    """Without a cache compiling takes seconds."""
    out = tmp_path / "run"
    shutil.copytree(home / "prepared", out)
    process = start("train", str(out))
    assert when(process, (out / "metrics.jsonl").exists)
    kill(process, signal.SIGTERM)
    status, said = finished(process)
    assert status == 75 and not records(out), said[-2000:]
    early = start("run", str(home / "run.yaml"), "--out", str(tmp_path / "new"), cache=home / "cache")
    assert when(early, (tmp_path / "new" / "config.yaml").exists)
    kill(early, signal.SIGTERM)
    assert finished(early)[0] == 75
    status, said = finished(start("train", str(out), "--resume", cache=home / "cache"))
    assert status == 0 and differing(out, home / "whole", STEPS) == [], said[-2000:]


def test_a_file_asks_for_a_checkpoint_without_stopping(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(home / "prepared", out)
    (out / "save-now").touch()
    process = start("train", str(out), cache=home / "cache")
    status, said = finished(process)
    assert status == 0, said[-2000:]
    assert not (out / "save-now").exists()
    assert differing(out, home / "whole", STEPS) == []


def test_two_runs_in_one_folder_are_refused(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(home / "prepared", out)
    first = start("train", str(out))
    assert when(first, (out / ".lock").exists)
    status, said = finished(start("train", str(out), "--resume", cache=home / "cache"))
    assert status == 2 and f"process {first.pid} on" in said and "is at work there" in said
    kill(first)  # the lock goes with its holder, however that ends
    finished(first)
    status, said = finished(start("train", str(out), "--resume", cache=home / "cache"))
    assert status == 0, said[-2000:]


def test_on_another_mesh_the_same_examples_come_in_the_same_order(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(home / "prepared", out)
    process = start("train", str(out), cache=home / "cache")
    assert when(process, at_step(out, 10))
    kill(process)
    finished(process)
    words = ("run", str(home / "run.yaml"), "--out", str(out), "--resume", "--mesh.data", "2", "--mesh.fsdp", "2")
    status, said = finished(start(*words, devices=4))
    assert status == 0, said[-2000:]
    mine, theirs = ([r for r in records(path) if "loss" in r] for path in (out, home / "whole"))
    for a, b in zip(mine, theirs, strict=True):
        assert all(a[name] == b[name] for name in ("step", "targets", "tokens", "pairs", "positions_used"))
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    first, second = stored(out, STEPS), stored(home / "whole", STEPS)
    assert first.keys() == second.keys()
