"""Runs of several processes: what they give is what one process gives on as many devices."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import polars as pl
import pytest
from safetensors.numpy import load_file

from sftrec_jax import distributed
from sftrec_jax.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIG = f"""
data: {{source: log.csv, time_column: null, user_core: 0}}
items: {{tokenizer: atomic}}
prompt: {{format: instruct, history: tokens}}
model: {{base: {ROOT / "tests" / "fixtures" / "stories260k"}, compute_dtype: float32}}
train: {{row_length: 96, batch_rows: 8, max_steps: 6, epochs: 50.0, validate_every: 3, learning_rate: 0.003}}
mesh: {{data: 2, fsdp: 2}}
decode: {{beam: 12, top_k: 10, batch_users: 8}}
"""


def write_run(folder: Path) -> Path:
    rng = random.Random(0)
    lines = ["user_id,item_id"]
    for user in range(24):
        lines += [f"u{user},item {item}" for item in rng.sample(range(60), rng.randrange(5, 12))]
    (folder / "log.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "run.yaml").write_text(CONFIG, encoding="utf-8")
    return folder / "run.yaml"


def start(config: Path, out: Path, count: int, index: int, port: int, *words: str) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={4 // count} --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    if count > 1:
        environment |= {"SFTREC_COORDINATOR": f"localhost:{port}", "SFTREC_PROCESSES": str(count), "SFTREC_PROCESS": str(index)}
    command = [sys.executable, "-m", "sftrec_jax.cli", "run", str(config), "--out", str(out), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(config: Path, out: Path, count: int, *words: str, first: tuple[str, ...] = ()) -> list[tuple[int, str]]:
    """Exit status and standard error of each process; `first`: more options of the first one."""
    port = random.SystemRandom().randrange(20_000, 60_000)
    started = [start(config, out, count, i, port, *words, *(first if i == 0 else ())) for i in range(count)]
    return [(process.wait(timeout=400), said[1]) for process in started if (said := process.communicate(timeout=400))]


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def checkpoint(out: Path) -> dict[str, np.ndarray]:
    """The trained arrays of the last step, as they are stored."""
    path = (out / "checkpoints" / "6" / "default").resolve()
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(path).item_metadata.tree["trained"]
    args = {"trained": {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in tree}}
    item = {"trained": dict.fromkeys(tree, 0)}
    found = reader.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True))
    return dict(found["trained"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The config, and the run of one process with four devices."""
    folder = tmp_path_factory.mktemp("processes")
    config = write_run(folder)
    ((status, said),) = together(config, folder / "one", 1)
    assert status == 0, said[-2000:]
    return config, folder / "one"


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_what_one_gives(alone: tuple[Path, Path], count: int) -> None:
    config, one = alone
    out = one.with_name(f"of {count}")
    done = together(config, out, count)
    assert [status for status, _ in done] == [0] * count, done[0][1][-2000:]
    assert f"processes: {count}, {4 // count} of 4 devices here" in done[0][1]
    assert all("step" not in said and "error" not in said for _, said in done[1:])  # one speaks
    mine, theirs = records(out), records(one)
    assert len(mine) == len(theirs) == 6 + 2
    for a, b in zip(mine, theirs, strict=True):
        assert a["step"] == b["step"]
        for name in ("loss", "grad_norm", "targets", "tokens"):
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=1e-5)
        assert a.get("valid") == pytest.approx(b.get("valid"), abs=1e-6)
    stored, expected = (checkpoint(path) for path in (out, one))
    assert stored.keys() == expected.keys() and len(expected) > 14
    for name, value in expected.items():
        np.testing.assert_allclose(stored[name], value, atol=2e-4, err_msg=name)
    a, b = (json.loads((path / "metrics.json").read_text(encoding="utf-8")) for path in (out, one))
    for row in ("model", "popularity", "markov"):
        assert a[row] == pytest.approx(b[row], abs=1e-6)
    lists, expected_lists = (pl.read_parquet(path / "recommendations.parquet") for path in (out, one))
    assert lists["item_id"].to_list() == expected_lists["item_id"].to_list()
    np.testing.assert_allclose(lists["score"].to_numpy(), expected_lists["score"].to_numpy(), atol=1e-3)
    weights, expected_weights = (load_file(path / "export" / "model.safetensors") for path in (out, one))
    assert weights.keys() == expected_weights.keys()
    assert all(np.abs(weights[name] - value).max() < 1e-3 for name, value in expected_weights.items())
    assert (out / "export" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step_and_another_number_goes_on(tmp_path: Path) -> None:
    """Two processes, the second of which is told; then one process on as many devices."""
    config, words = write_run(tmp_path), ("--train.max-steps", "40", "--train.validate-every", "20")
    whole, out = tmp_path / "whole", tmp_path / "out"
    ((status, said),) = together(config, whole, 1, *words)
    assert status == 0, said[-2000:]
    port = random.SystemRandom().randrange(20_000, 60_000)
    both = [start(config, out, 2, index, port, *words) for index in range(2)]
    until = time.monotonic() + 240
    while not ((out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) > 5):
        assert time.monotonic() < until and all(process.poll() is None for process in both)
        time.sleep(0.01)
    (out / "save-now").touch()
    both[1].send_signal(signal.SIGTERM)
    done = [(process.wait(timeout=300), said[1]) for process in both if (said := process.communicate(timeout=300))]
    assert [status for status, _ in done] == [75, 75], [said[-2000:] for _, said in done]
    saved = max(int(path.parent.name) for path in (out / "checkpoints").glob("*/manifest.json"))
    assert 4 < saved < 40 and saved == max(record["step"] for record in records(out))
    ((status, said),) = together(config, out, 1, *words, "--resume")
    assert status == 0 and f"resumed from step {saved} of 40" in said, said[-2000:]
    mine, theirs = records(out), records(whole)
    assert [record["step"] for record in mine] == [record["step"] for record in theirs]
    for a, b in zip(mine, theirs, strict=True):
        if "loss" in b:
            assert (a["targets"], a["tokens"], a["pairs"]) == (b["targets"], b["tokens"], b["pairs"])
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_processes_with_different_configs_stop_with_one_line(tmp_path: Path) -> None:
    done = together(write_run(tmp_path), tmp_path / "differ", 2, first=("--train.learning-rate", "0.5"))
    wanted = (
        "error: the processes disagree on the configuration: train.learning_rate is 0.5 in process 0 and 0.003 in process 1; "
        "start all of them with the same command"
    )
    assert [status for status, _ in done] == [2, 2]
    assert all(said.strip().splitlines()[-1] == wanted or wanted in said for _, said in done)
    assert not (tmp_path / "differ").exists()


def test_an_error_of_the_first_process_ends_all(tmp_path: Path) -> None:
    done = together(write_run(tmp_path), tmp_path, 2)  # a folder that is not empty
    assert [status for status, _ in done] == [2, 2]
    assert "already exists" in done[0][1] and "process 0 stopped" in done[1][1]
    assert all("Traceback" not in said for _, said in done)


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"SFTREC_COORDINATOR": "localhost:1"}, "SFTREC_PROCESSES is '' beside SFTREC_COORDINATOR"),
        ({"SFTREC_COORDINATOR": "localhost:1", "SFTREC_PROCESSES": "2", "SFTREC_PROCESS": "2"}, "SFTREC_PROCESS is 2 and"),
        ({"SFTREC_DISTRIBUTED": "yes"}, "SFTREC_DISTRIBUTED is 'yes'; set SFTREC_DISTRIBUTED=auto"),
    ],
)
def test_settings_that_do_not_fit(environment: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SFTREC_COORDINATOR", "SFTREC_PROCESSES", "SFTREC_PROCESS", "SFTREC_DISTRIBUTED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as raised:
        distributed.join()
    assert text in str(raised.value)


def test_one_process_is_the_first_and_only() -> None:
    assert distributed.is_main() and distributed.process_count() == 1
    ran: list[int] = []
    distributed.on_main("alone", lambda: ran.append(1))
    assert ran == [1]
