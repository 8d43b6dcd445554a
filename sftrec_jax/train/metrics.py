"""Metrics of a run: one JSON line a record in `metrics.jsonl`, and the progress that a person sees."""

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sftrec_jax.console import console
from sftrec_jax.distributed import is_main
from sftrec_jax.errors import UserError


class JsonLines:
    """Appends records to a JSON-lines file, one a step and one a validation.

    A file that cannot be written to never ends a run: it is said once, and what was not written is tried again with the next
    record.

    Args:
        keep_until: on resuming, what goes beyond this step is dropped first; None: everything,
        keep_valid: and the validation of that very step stays.
    """

    def __init__(self, path: Path, keep_until: int | None, keep_valid: bool = True):
        self._path, self._file, self._unwritten, self._told = path, None, "", False
        if not is_main():
            return
        kept = ""
        if keep_until is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                record = _parsed(line)
                if record is None or record["step"] > keep_until:
                    continue
                if keep_valid or record["step"] < keep_until or "valid" not in record:
                    kept += f"{line}\n"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(kept, encoding="utf-8")
            os.replace(temporary, path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"{path}: cannot be written ({error.strerror}); free space or choose another --out") from None

    def write(self, record: dict[str, Any]) -> None:
        """One line; visible to readers at once."""
        if self._file is None:
            return
        self._unwritten += json.dumps(record) + "\n"
        try:
            # At once and below Python's buffers, which would keep a line that failed and write it again at the end.
            done = os.write(self._file.fileno(), self._unwritten.encode())
            self._unwritten = self._unwritten.encode()[done:].decode()
        except (OSError, ValueError) as error:
            if not self._told:
                why = getattr(error, "strerror", None) or error
                console.print(f"{self._path}: cannot be written ({why}); training goes on, and tries again with every record")
            self._told = True

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _parsed(line: str) -> dict[str, Any] | None:
    """A record; None for a line that was cut off when a run was killed, or is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


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
