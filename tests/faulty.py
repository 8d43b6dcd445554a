"""What goes wrong around a run: disks that are full, slow or read-only, clocks that jump, a reader of messages that is gone.

Each fault is a way to start `sftrec train RUN --resume`; also imported by `benchmarks/faults.py`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from killing import environment, finished, start

SMALL = 58 * 1024
"""Bytes that a file may have on a full disk: less than a checkpoint needs, more than what else a run writes."""
JUMPS = """
import random, time
true, draw = time.time, random.Random(0)
time.time = lambda: true() + draw.choice((-1, 0, 1)) * draw.uniform(0, 400 * 86400)
"""


def on_a_full_disk(run: Path, cache: Path) -> tuple[int, str]:
    """No file may grow beyond `SMALL`."""
    limited = ["bash", "-c", f'ulimit -f {SMALL // 1024}; exec "$@"', "bash"]
    command = [*limited, sys.executable, "-m", "sftrec_jax.cli", "train", str(run), "--resume"]
    process = subprocess.Popen(
        command, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    return finished(process)


def with_a_jumping_clock(run: Path, cache: Path, scratch: Path) -> tuple[int, str]:
    """`time.time` is up to a year off, now this way and now that."""
    scratch.mkdir(exist_ok=True)
    (scratch / "sitecustomize.py").write_text(JUMPS, encoding="utf-8")
    path = os.pathsep.join([str(scratch), environment(cache)["PYTHONPATH"]])
    return finished(start("train", str(run), "--resume", cache=cache, PYTHONPATH=path))


def on_a_slow_disk(run: Path, cache: Path, scratch: Path, microseconds: int = 20_000) -> tuple[int, str]:
    """Every file operation in the folder of the run takes so much longer."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "needs a C compiler"
    scratch.mkdir(exist_ok=True)
    library, source = scratch / "slow_files.so", Path(__file__).with_name("slow_files.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    more = {"LD_PRELOAD": str(library), "SLOW_FOLDER": str(run), "SLOW_MICROSECONDS": str(microseconds)}
    return finished(start("train", str(run), "--resume", cache=cache, **more))


def with_nobody_reading(run: Path, cache: Path) -> int:
    """Standard error is a pipe whose other end is closed."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "sftrec_jax.cli", "train", str(run), "--resume"]
    process = subprocess.Popen(command, env=environment(cache), stdout=subprocess.DEVNULL, stderr=writing)
    os.close(writing)
    os.close(reading)
    return process.wait(timeout=300)
