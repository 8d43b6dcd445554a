"""Runs of the command line in processes of their own that are stopped at chosen or random moments, and what they leave behind.

Also imported by `benchmarks/faults.py`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parent.parent
TIMED = {"seconds", "tokens_per_s", "target_tokens_per_s", "examples_per_s", "mfu", "loader_wait_s", "peak_bytes"}
TIMES = {"seconds_evaluating"}
STEPS = 24
CONFIG = f"""
data: {{source: log.csv, time_column: null, user_core: 0}}
items: {{tokenizer: atomic}}
prompt: {{format: stream, max_history: 12}}
lora: {{r: 4, alpha: 8.0, dropout: 0.1}}
model: {{base: {ROOT / "tests" / "fixtures" / "stories260k"}}}
train: {{row_length: 48, batch_rows: 4, accumulate: 2, max_steps: 24, epochs: 50.0, validate_every: 8, save_every: 3,
  learning_rate: 0.003, validate_users: 16, rows_first: 0.2}}
decode: {{beam: 12, top_k: 10, batch_users: 8}}
evaluate: {{unconstrained_users: 0}}
"""
"""24 steps of two passes; an epoch has about five, token rows alone are trained in the first ones."""


def write_run(folder: Path, config: str = CONFIG) -> Path:
    """A log of 40 users and a config; returns the config."""
    draw = random.Random(0)
    lines = ["user_id,item_id"]
    for user in range(40):
        lines += [f"u{user},item {item}" for item in draw.sample(range(60), draw.randrange(5, 12))]
    (folder / "log.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "run.yaml").write_text(config, encoding="utf-8")
    return folder / "run.yaml"


def environment(cache: Path | None = None, devices: int = 1) -> dict[str, str]:
    """Of a run on the CPU. `cache`: of compiled programs, shared between starts."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    found = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    found.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache is not None:
        found |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return found


def start(*words: str, cache: Path | None = None, devices: int = 1, **more: str) -> subprocess.Popen[str]:
    """`sftrec WORDS...`, as leader of a process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "sftrec_jax.cli", *words], env=environment(cache, devices) | more,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str]:
    """Exit status, and what was said on standard error."""
    said = process.communicate(timeout=seconds)[1]
    return process.returncode, said


def when(process: subprocess.Popen[str], ready: Callable[[], bool], seconds: float = 240) -> bool:
    """Waits until `ready`, looking often; False where the process ended first."""
    until = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None:
            return False
        if time.monotonic() > until:
            process.kill()
            raise TimeoutError("nothing happened: " + finished(process)[1][-2000:])
        time.sleep(0.002)
    return True


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """Sends a signal to the process alone."""
    if process.poll() is None:
        os.kill(process.pid, number)


def at_step(out: Path, step: int) -> Callable[[], bool]:
    """When that step is recorded."""
    return lambda: any(record["step"] >= step for record in records(out))


def saving(out: Path) -> Callable[[], bool]:
    """When files of a checkpoint are being written."""
    folder = out / "checkpoints"
    return lambda: folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())


def unsealed(out: Path) -> Callable[[], bool]:
    """When a checkpoint lies there without its manifest."""
    folder = out / "checkpoints"
    return lambda: (
        folder.is_dir() and any(path.name.isdigit() and not (path / "manifest.json").exists() for path in folder.iterdir())
    )


def records(out: Path) -> list[dict[str, Any]]:
    """What `metrics.jsonl` says, times left out."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may not be written to its end
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def moments(run: Path, draw: random.Random) -> dict[str, Callable[[], bool]]:
    """When to kill a run, by what it does then. Of `draw` the step and the time."""
    begun = len(records(run))
    step = draw.randint(2, STEPS - 2)

    def validating() -> bool:
        seen = records(run)
        return len(seen) > begun and seen[-1]["step"] % 8 == 0 and "loss" in seen[-1]

    until = time.monotonic() + draw.uniform(1, 8)
    return {
        "compiling": (run / "metrics.jsonl").exists if not begun else at_step(run, begun + 1),
        "in a step": at_step(run, step),
        "validating": validating,
        "saving": saving(run),
        "between a checkpoint and its manifest": unsealed(run),
        "at an epoch's edge": at_step(run, 5),
        "at any time": lambda: time.monotonic() > until,
    }


def stored(out: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, as they are on disk: adapters, optimizer, health."""
    path = (out / "checkpoints" / str(step) / "default").resolve()
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(path).item_metadata.tree
    import jax

    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    found = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
    return {jax.tree_util.keystr(at): np.asarray(leaf) for at, leaf in jax.tree_util.tree_leaves_with_path(found)}


def differing(one: Path, other: Path, step: int, whole: bool = False) -> list[str]:
    """Names of what two trained runs do not have in common, bit for bit; `whole`: of what evaluating left, too."""
    first, second = stored(one, step), stored(other, step)
    names = sorted(first.keys() ^ second.keys())
    names += [n for n in first.keys() & second.keys() if first[n].tobytes() != second[n].tobytes()]
    if records(one) != records(other):
        names.append("metrics.jsonl")
    if whole:
        mine, theirs = (json.loads((path / "metrics.json").read_text(encoding="utf-8")) for path in (one, other))
        names += [name for name in mine.keys() | theirs.keys() if name not in TIMES and mine.get(name) != theirs.get(name)]
        if (one / "recommendations.parquet").read_bytes() != (other / "recommendations.parquet").read_bytes():
            names.append("recommendations.parquet")
    return names
