"""Faults injected into real runs: killed processes, flipped bits, hostile files. What survives, and what does not.

    python benchmarks/faults.py --quick        4 minutes
    python benchmarks/faults.py                half an hour: 24 kills, 400 flips, 1,000 hostile inputs a reader, all other faults

A small run (stories260K, 24 steps of two passes) is trained once without a stop. Then copies of it are killed with SIGKILL and
stopped with SIGTERM at moments chosen by what they do or at random, gone on with, and compared bit for bit: adapters, optimizer,
the data's order by its losses, validation. Bits of files of its checkpoints are flipped one by one. The hostile inputs are those
of `tests/hostile.py`. The last line is JSON:

    kills           processes that were ended by SIGKILL
    identical       whether every run that was gone on with ended as the one that was never stopped
    bit_flips       bits flipped in checkpoints, one at a time
    detected        of them, how many were seen before anything was restored
    hostile_inputs  files and texts that were read
    crashes         of them, how many gave anything but a result or an error of one line
    lost            checkpoints that were whole before a fault and not after it, and runs that could not be gone on with
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from command import run_main
from etils import epath
from faulty import on_a_full_disk, on_a_slow_disk, with_a_jumping_clock, with_nobody_reading
from hostile import feed
from hostile_readers import READERS
from killing import STEPS, at_step, differing, finished, kill, moments, records, start, when, write_run

from sftrec_jax.errors import UserError
from sftrec_jax.train import manifest
from sftrec_jax.train.manifest import Damaged


class Trial:
    """The runs and what is counted of them."""

    def __init__(self, folder: Path):
        self.folder, self.cache, self.number = folder, folder / "cache", 0
        self.counts = dict.fromkeys(("kills", "stops", "bit_flips", "detected", "hostile_inputs", "crashes", "lost"), 0)
        self.identical = True
        self.rows: list[tuple[str, int, str]] = []
        config = write_run(folder)
        self.call("prepare", str(config), "--out", str(folder / "prepared"))
        self.whole = self.fresh()
        self.call("train", str(self.whole))

    def call(self, *words: str) -> str:
        """Runs a command that must succeed."""
        status, said = finished(start(*words, cache=self.cache))
        if status:
            raise UserError(f"sftrec {words[0]} ended with {status}: {' '.join(said.split())[-500:]}")
        return said

    def fresh(self) -> Path:
        """A prepared run that has not begun."""
        self.number += 1
        return Path(shutil.copytree(self.folder / "prepared", self.folder / f"run {self.number}"))

    def intact(self, run: Path) -> set[int]:
        """Steps whose files are what was written."""
        found = set()
        for path in (run / "checkpoints").glob("*/manifest.json"):
            if path.parent.name.isdigit():
                try:
                    manifest.verify(epath.Path(path.parent))
                    found.add(int(path.parent.name))
                except (Damaged, OSError):
                    continue
        return found

    def compare(self, run: Path) -> bool:
        """Goes on with a run to its end, and compares it with the one that was never stopped."""
        status, said = finished(start("train", str(run), "--resume", cache=self.cache))
        if status:
            self.counts["lost"] += 1
            self.identical = False
            print(f"{run.name}: could not be gone on with: {' '.join(said.split())[-500:]}", flush=True)
            return False
        names = differing(run, self.whole, STEPS)
        self.identical &= not names
        if names:
            print(f"{run.name}: differs in {', '.join(names[:5])}", flush=True)
        return not names

    def row(self, what: str, tries: int, outcome: str) -> None:
        """One of the table."""
        self.rows.append((what, tries, outcome))
        print(f"{what}: {tries} tries, {outcome}", flush=True)

    def kill_at(self, run: Path, moment: Callable[[], bool], number: int = signal.SIGKILL) -> bool:
        """Starts a run, or goes on with it, and ends it at a moment; False where it was done before."""
        before = self.intact(run)
        process = start("train", str(run), "--resume", cache=self.cache)
        if not when(process, moment):
            finished(process)
            return False
        kill(process, number)
        status = finished(process)[0]
        wanted = -signal.SIGKILL if number == signal.SIGKILL else 75
        if status == wanted:
            self.counts["kills" if number == signal.SIGKILL else "stops"] += 1
        newest = self.intact(run)
        self.counts["lost"] += bool(before) and max(newest, default=0) < max(before)
        return status == wanted


def kills(trial: Trial, wanted: int, draw: random.Random) -> None:
    """Chains of kills, each gone on with to the end."""
    names = list(moments(trial.whole, draw))
    tries = same = asked = 0
    while trial.counts["kills"] < wanted:
        run, chain = trial.fresh(), 0
        while chain < 4 and trial.counts["kills"] < wanted:
            name, asked = names[asked % len(names)], asked + 1
            if not trial.kill_at(run, moments(run, draw)[name]):
                break
            chain += 1
            print(f"killed {name}", flush=True)
        tries += 1
        same += trial.compare(run)
    trial.row("SIGKILL", trial.counts["kills"], f"{same} of {tries} runs, killed up to four times each, ended identical")


def stops(trial: Trial, steps: list[int]) -> None:
    """SIGTERM, which saves: no step that was made is made again."""
    run, kept = trial.fresh(), 0
    for step in steps:
        if trial.kill_at(run, at_step(run, step), signal.SIGTERM):
            kept += max(trial.intact(run), default=0) == max(record["step"] for record in records(run))
    same = trial.compare(run)
    trial.row("SIGTERM", trial.counts["stops"], f"exit code 75, {kept} times every step made was saved, identical: {same}")


def flips(trial: Trial, wanted: int, draw: random.Random) -> None:
    """One bit at a time, in every file in turn."""
    step = trial.whole / "checkpoints" / str(STEPS)
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    for number in range(wanted):
        path = files[number % len(files)]
        raw = path.read_bytes()
        at, bit = draw.randrange(len(raw)), draw.randrange(8)
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
        trial.counts["bit_flips"] += 1
        try:
            manifest.verify(epath.Path(step))
            print(f"not seen: bit {bit} of byte {at} of {path.relative_to(step)}", flush=True)
        except Damaged:
            trial.counts["detected"] += 1
        path.write_bytes(raw)
    trial.row("bit flips", wanted, f"{trial.counts['detected']} seen before anything was restored, in {len(files)} files")


def damaged(trial: Trial, draw: random.Random) -> None:
    """The newest checkpoint of a killed run is damaged: the one before it is used."""
    run = trial.fresh()
    if not trial.kill_at(run, at_step(run, 14)):
        return
    newest = max(trial.intact(run))
    files = [path for path in (run / "checkpoints" / str(newest)).rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[draw.randrange(len(raw))] ^= 4
    path.write_bytes(raw)
    trial.row("damaged newest checkpoint", 1, f"fell back to the one before, identical: {trial.compare(run)}")


def surroundings(trial: Trial) -> None:
    """Disks, clocks, and nobody who reads."""
    run = trial.fresh()
    trial.kill_at(run, at_step(run, 10))
    before = trial.intact(run)
    status, said = on_a_full_disk(run, trial.cache)
    lines = sum(line.startswith("error:") for line in said.splitlines())
    trial.counts["lost"] += not max(before) <= max(trial.intact(run), default=0)
    trial.row("full disk (RLIMIT_FSIZE)", 1, f"exit code {status}, {lines} line, then identical: {trial.compare(run)}")
    run = trial.fresh()
    status, _ = with_a_jumping_clock(run, trial.cache, trial.folder / "clock")
    trial.row("clock up to a year off", 1, f"exit code {status}, identical: {trial.compare(run)}")
    run = trial.fresh()
    status, _ = on_a_slow_disk(run, trial.cache, trial.folder / "slow")
    trial.row("20 ms more for each file operation", 1, f"exit code {status}, identical: {trial.compare(run)}")
    run = trial.fresh()
    status = with_nobody_reading(run, trial.cache)
    trial.row("messages that nobody reads", 1, f"exit code {status}, identical: {trial.compare(run)}")


def hostile(trial: Trial, each: int) -> None:
    """Inputs of all readers."""
    for reader in READERS:
        found = feed(reader, each, 0)
        trial.counts["hostile_inputs"] += found.inputs
        trial.counts["crashes"] += len(found.crashes)
        outcome = f"{found.refused} refused in one line, {found.accepted} read, {len(found.crashes)} crashes"
        trial.row(f"hostile {reader}", found.inputs, outcome)
        for line in found.crashes[:3]:
            print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sample")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, draw, begin = Path(tempfile.mkdtemp(prefix="faults-")), random.Random(args.seed), time.monotonic()
    try:
        trial = Trial(folder)
        flips(trial, 60 if args.quick else 400, draw)
        kills(trial, 6 if args.quick else 24, draw)
        stops(trial, [9] if args.quick else [3, 8, 16, 20])
        if not args.quick:
            damaged(trial, draw)
            surroundings(trial)
        hostile(trial, 90 if args.quick else 1000)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{'fault':40} tries  outcome")
    for what, tries, outcome in trial.rows:
        print(f"{what:40} {tries:5}  {outcome}")
    print(f"{time.monotonic() - begin:.0f} s")
    print(json.dumps({**trial.counts, "identical": trial.identical}))


if __name__ == "__main__":
    run_main(main)
