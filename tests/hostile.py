"""Hostile inputs for every reader of outside files: made from a seed, read in a process of its own, and counted.

    python tests/hostile.py                        10,000 inputs for each reader
    python tests/hostile.py csv yaml --count 500   some readers
    python tests/hostile.py csv --only 123         one input again, with its stack trace; its files stay

A reader may give a result, or a UserError of one line. Everything else is a crash: another exception, a dead process, more than
`SECONDS` for an input, more than `ROOM` bytes of memory beyond what the process had before, a file that an input made.
"""

import argparse
import atexit
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 20
"""Of the processors, most for one input; of the wall, six times as many."""
ROOM = 1 << 30
"""Bytes of address space that inputs may take."""
LONGEST_MESSAGE = 5_000
ALIVE = "alive"


@dataclass
class Outcome:
    """What became of the inputs of one reader."""

    inputs: int = 0
    refused: int = 0
    """With a UserError."""
    accepted: int = 0
    crashes: list[str] = field(default_factory=list)
    """One line each, with the number of the input."""
    seconds: float = 0.0
    """Of the wall."""


class Worker:
    """A process that reads inputs, started again when an input ends it. A context."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hostile-"))
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process and removes its files."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def feed(self, reader: str, count: int, seed: int = 0) -> Outcome:
        """Inputs 0 to count - 1 of a seed."""
        total, begin, started = Outcome(), 0, time.monotonic()
        while begin < count:
            outcome, dead = self._some(reader, begin, count, seed)
            total.inputs += outcome.inputs
            total.refused += outcome.refused
            total.accepted += outcome.accepted
            total.crashes += outcome.crashes
            if not dead:
                break
            begin += outcome.inputs
        total.seconds = time.monotonic() - started
        return total

    def _some(self, reader: str, begin: int, count: int, seed: int) -> tuple[Outcome, bool]:
        """Inputs from `begin` until the process ends; whether it did."""
        if self._process is None:
            command = [sys.executable, __file__, "--serve", str(self.folder)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"reader": reader, "begin": begin, "count": count, "seed": seed}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if answer:
            return Outcome(**json.loads(answer)), False
        code, self._process = self._process.wait(), None
        so_far = (self.folder / ALIVE).read_text(encoding="utf-8") if (self.folder / ALIVE).exists() else ""
        if not so_far:
            raise RuntimeError(f"the reader of hostile inputs did not start (exit code {code})")
        outcome = Outcome(**json.loads(so_far))
        how = f"more than {SECONDS} s" if -code in (signal.SIGALRM, signal.SIGPROF) else f"exit code {code}"
        outcome.crashes.append(f"{reader} seed {seed} input {begin + outcome.inputs}: the process ended ({how})")
        outcome.inputs += 1
        return outcome, True


_WORKERS: list[Worker] = []


def feed(reader: str, count: int, seed: int = 0) -> Outcome:
    """Feeds a reader `count` inputs of a seed, in a process that all calls share. `reader`: one of `hostile_readers.READERS`."""
    if not _WORKERS:
        _WORKERS.append(Worker())
        atexit.register(_WORKERS[0].close)
    return _WORKERS[0].feed(reader, count, seed)


def serve(folder: Path) -> None:
    """Reads a request a line from standard input, answers with a line each."""
    import hostile_readers

    sink = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    hostile_readers.prepare()
    for line in sys.stdin:
        request = json.loads(line)
        os.write(sink, (json.dumps(asdict(_read_all(folder, **request))) + "\n").encode())


def _limit_memory(room: int | None) -> None:
    """Bytes beyond what the process has now; None: no limit."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = resource.RLIM_INFINITY if room is None else pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def _read_all(folder: Path, reader: str, begin: int, count: int, seed: int) -> Outcome:
    outcome, parent = Outcome(), os.getppid()
    for index in range(begin, count):
        if os.getppid() != parent:  # nobody waits for the answer
            sys.exit(1)
        _write(folder / ALIVE, json.dumps(asdict(outcome)))
        # The default action of these signals ends the process, whatever that is busy with.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
        found = read_one(folder / "input", reader, index, seed)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        outcome.inputs += 1
        outcome.refused += found == "refused"
        outcome.accepted += found == "accepted"
        if found not in ("refused", "accepted"):
            outcome.crashes.append(f"{reader} seed {seed} input {index}: {found}")
    _write(folder / ALIVE, "")
    return outcome


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_one(folder: Path, reader: str, index: int, seed: int, show: bool = False, room: int | None = ROOM) -> str:
    """Makes and reads one input: `refused`, `accepted`, or what went wrong in one line. `room`: see `_limit_memory`."""
    import hostile_readers

    from sftrec_jax.errors import UserError

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(f"{reader} {seed} {index}")
    made = hostile_readers.READERS[reader]
    before: set[Path] = set()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            given = made.make(rng, folder)
            before = _around(folder)
            _limit_memory(room)
            made.read(rng, folder, given)
        found = "accepted"
    except UserError as error:
        text = str(error)
        found = "refused"
        if not text.isprintable():
            found = f"a message that is not one printable line: {text[:300]!r}"
        elif len(text) > LONGEST_MESSAGE:
            found = f"a message of {len(text)} characters: {text[:300]!r}"
        if show:
            print(text)
    except BaseException as error:  # panics of polars are no Exception
        if show:
            traceback.print_exc()
        found = f"{type(error).__name__}: {_where(error)}: {str(error)[:300]!r}"
    finally:
        _limit_memory(None)
    more = sorted(str(path) for path in _around(folder) - before)
    return f"made the file {more[0]}" if more and before else found


def _around(folder: Path) -> set[Path]:
    return {*folder.rglob("*"), *folder.parent.glob("*"), *Path.cwd().glob("*")}


def _where(error: BaseException) -> str:
    """The last line of the package in the stack trace."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "sftrec_jax" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"


def main() -> int:
    """The command of the module's docstring; exit code 1 for a crash."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    import hostile_readers

    names = args.readers or list(hostile_readers.READERS)
    unknown = [name for name in names if name not in hostile_readers.READERS]
    if unknown:
        parser.error(f"no reader {unknown[0]!r}; use {', '.join(hostile_readers.READERS)}")
    if args.only is not None:
        folder = Path(tempfile.mkdtemp(prefix="hostile-")) / "input"
        hostile_readers.prepare()
        print(read_one(folder, names[0], args.only, args.seed, show=True), folder)
        return 0
    return _report(names, args.count, args.seed)


def _report(names: list[str], count: int, seed: int) -> int:
    results: dict[str, Any] = {}
    with Worker() as worker:
        for name in names:
            outcome = worker.feed(name, count, seed)
            results[name] = outcome
            numbers = f"{outcome.inputs:7,} inputs {outcome.refused:7,} refused {outcome.accepted:7,} accepted"
            print(f"{name:14s} {numbers} {len(outcome.crashes):5,} crashes {outcome.seconds:7.1f} s", flush=True)
            for crash in outcome.crashes[:40]:
                print(f"  {crash}", flush=True)
    return int(any(outcome.crashes for outcome in results.values()))


if __name__ == "__main__":
    sys.exit(main())
