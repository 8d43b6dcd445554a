"""Time and peak memory of `sftrec prepare` on a large generated log, and of the same by whole tables on a part of it.

    python benchmarks/prepare_log.py --interactions 100000000      (--quick: 2 million)

Writes the log as Spark would, into shards of Parquet with ids as text, rows in no order: users with log-normal activity, items
with Zipf popularity, times over ten years; and a catalogue with a title for each item. Takes 14 bytes an interaction for the log,
32 for temporary files and 9 for the result, below --folder. Then, in processes of their own:

- `sftrec prepare` on all shards: all it does, from reading to the last check for leaks.
- the peer, on the first tenth of the shards: what a script does that holds the whole table, with Polars (read, order by user and
  time, drop repeated rows, filter users and items until stable, number, write); and `sftrec prepare` on these shards.

The last line is JSON: `interactions`, `users`, `items`, `log_bytes`, `seconds`, `interactions_per_second`, `peak_gb` (10^9 bytes,
of the process, by the kernel's count); and for the tenth `part_interactions`, `part_seconds`, `part_peak_gb`,
`whole_table_seconds`, `whole_table_peak_gb`, and `kept_equal`, whether both keep as many interactions.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from command import run_main

SHARD = 1_000_000
CORE = 5
BASE = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "stories260k"


def write_log(folder: Path, interactions: int, users: int, items: int) -> int:
    """The shards and the catalogue; gives the bytes of the log."""
    rng = np.random.default_rng(0)
    activity = np.cumsum(rng.lognormal(0.0, 1.0, users))
    popularity = np.cumsum(1.0 / (np.arange(items) + 50.0))
    user_ids = pl.Series([f"A{number:012X}" for number in rng.permutation(users).tolist()])
    item_ids = pl.Series([f"B{number:09d}" for number in rng.permutation(items).tolist()])
    pl.DataFrame({"item_id": item_ids, "title": [f"Thing number {n}" for n in range(items)]}).write_parquet(
        folder / "items.parquet"
    )
    log = folder / "log"
    log.mkdir()
    shards = -(-interactions // SHARD)
    for number in range(shards):
        count = min(SHARD, interactions - number * SHARD)
        user = np.searchsorted(activity, rng.random(count) * activity[-1])
        item = np.searchsorted(popularity, rng.random(count) * popularity[-1])
        moment = rng.integers(1_400_000_000, 1_715_360_000, count)
        frame = pl.DataFrame({"user_id": user_ids.gather(user), "item_id": item_ids.gather(item), "timestamp": moment})
        frame.write_parquet(log / f"part-{number:05d}-of-{shards:05d}.snappy.parquet", compression="snappy")
    (log / "_SUCCESS").touch()
    return sum(file.stat().st_size for file in log.iterdir())


def write_config(folder: Path, log: Path) -> Path:
    """A run of atomic tokens over the smallest base."""
    settings = {
        "data": {"source": str(log), "catalogue": str(folder / "items.parquet"), "user_core": CORE, "item_core": CORE},
        "items": {"tokenizer": "atomic"},
        "model": {"base": str(BASE), "remat": "none"},
        "prompt": {"format": "stream", "max_history": 32},
        "train": {"row_length": 64, "batch_rows": 8},
    }
    path = folder / f"{log.name}.yaml"
    path.write_text(json.dumps(settings))
    return path


def whole_table(log: Path, out: Path) -> None:
    """The peer, in a process of its own; prints how many interactions it keeps."""
    table = pl.read_parquet(log / "*.parquet")
    table = table.unique(["user_id", "item_id", "timestamp"]).sort("user_id", "timestamp")
    before = None
    while before != table.height:
        before = table.height
        table = table.filter((pl.len().over("user_id") >= CORE) & (pl.len().over("item_id") >= CORE))
    numbered = table.select(
        *((pl.col(name).rank("dense") - 1).cast(pl.Int32).alias(name) for name in ("user_id", "item_id")), "timestamp"
    )
    numbered.write_parquet(out)
    print(numbered.height)


def measured(command: list[str], folder: Path) -> tuple[float, float, str]:
    """Seconds, peak memory in 10^9 bytes, and standard output of a command."""
    begin = time.perf_counter()
    settings = os.environ | {"JAX_PLATFORMS": "cpu", "TMPDIR": str(folder)}
    child = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e9, said


def prepared(folder: Path, log: Path) -> tuple[float, float, dict[str, Any]]:
    """Seconds, peak memory and the report of `sftrec prepare`."""
    out = folder / f"run-{log.name}"
    command = [sys.executable, "-m", "sftrec_jax.cli", "prepare", str(write_config(folder, log)), "--out", str(out)]
    seconds, peak, _ = measured(command, folder)
    return seconds, peak, json.loads((out / "prepared" / "dataset.json").read_text())["report"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=int, default=100_000_000, help="rows of the log (default: %(default)s)")
    parser.add_argument("--users", type=int, help="default: one for 50 rows")
    parser.add_argument("--items", type=int, help="default: one for 200 rows")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="2 million rows")
    args = parser.parse_args()
    rows = 2_000_000 if args.quick else args.interactions
    users, items = args.users or max(100, rows // 50), args.items or max(100, rows // 200)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        print(f"writing {rows:,} interactions of {users:,} users and {items:,} items", flush=True)
        size = write_log(folder, rows, users, items)
        seconds, peak, report = prepared(folder, folder / "log")
        found = {
            "interactions": rows, "users": report["users_read"], "items": items, "log_bytes": size,
            "kept": report["interactions"], "seconds": round(seconds, 1), "interactions_per_second": round(rows / seconds),
            "peak_gb": round(peak, 2),
        }  # fmt: skip
        print(found, flush=True)
        part = folder / "part"
        part.mkdir()
        shards = sorted((folder / "log").glob("*.parquet"))
        for file in shards[: max(1, len(shards) // 10)]:
            (part / file.name).hardlink_to(file)
        # Two of each, in turns: the machine's noise falls on both.
        ours, theirs = [], []
        for turn in range(2):
            seconds, peak, report = prepared(folder, part)
            ours.append((seconds, peak))
            command = [sys.executable, __file__, "--whole-table", str(part), str(folder / f"whole-{turn}.parquet")]
            seconds, peak, said = measured(command, folder)
            theirs.append((seconds, peak))
            (folder / "run-part").rename(folder / f"run-part-{turn}")
        found |= {
            "part_interactions": report["interactions_read"],
            "part_seconds": round(min(t for t, _ in ours), 1), "part_peak_gb": round(max(p for _, p in ours), 2),
            "whole_table_seconds": round(min(t for t, _ in theirs), 1),
            "whole_table_peak_gb": round(max(p for _, p in theirs), 2),
            "kept_equal": int(said) == report["interactions"],
        }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--whole-table"]:
        whole_table(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        run_main(main)
