"""Metrics of a run: one JSON line a record in `metrics.jsonl`, and the progress that a person sees."""

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sftrec_jax.console import console
from sftrec_jax.distributed import is_main


class JsonLines:
    """Appends records to a JSON-lines file. On resuming, records of steps after `keep_until` are dropped first."""

    def __init__(self, path: Path, keep_until: int | None):
        kept = ""
        if keep_until is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = "".join(f"{line}\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= keep_until)
        self._file = None
        if is_main():
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_text(kept, encoding="utf-8")
            os.replace(temporary, path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """One line; visible to readers at once."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class TrainProgress:
    """A live bar on a terminal; elsewhere a plain line about every half minute."""

    LINE_SECONDS = 30.0

    def __init__(self, steps: int, first: int):
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=steps, completed=first, text="compiling")
        self._steps, self._first, self._shown, self._begin = steps, first, 0.0, time.monotonic()

    def __enter__(self) -> "TrainProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, record: dict[str, float]) -> None:
        """Shows the numbers of a finished step (counted from 1)."""
        text = (
            f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tokens/s  {record['examples_per_s']:,.1f} targets/s "
            f"({record['target_tokens_per_s']:,.0f} tokens)  MFU {record['mfu']:.1%}  {record['positions_used']:.0%} full  "
            f"{record['saved_by_sharing']:.1f}x by sharing  {record['peak_bytes'] / 1e9:.1f} GB"
        )
        self._bar.update(self._task, completed=step, text=text)
        now = time.monotonic()
        if not console.is_terminal and (now - self._shown > self.LINE_SECONDS or step == self._steps):
            self._shown = now
            left = (now - self._begin) / max(step - self._first, 1) * (self._steps - step)
            console.print(f"step {step}/{self._steps}  {text}  ETA {left / 60:.1f} min")
