"""Where text for people goes: standard error, through rich."""

import sys
import time
from typing import Any

from rich.console import Console


class _Lasting:
    """Standard error, whatever that is at the moment; that nobody reads it any more, or its disk is full, ends nothing."""

    def write(self, text: str) -> int:
        try:
            return sys.stderr.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        try:
            sys.stderr.flush()
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


lasting: Any = _Lasting()
console = Console(file=lasting, highlight=False, soft_wrap=True)

PROGRESS_SECONDS = 15.0


class Progress:
    """Made by `progress`. Called with the number of units just finished."""

    def __init__(self, what: str, total: int | None, unit: str):
        self.what, self.total, self.unit = what, total, unit
        self._begin = self._shown = time.monotonic()
        self._done = self._passed = 0

    def __call__(self, finished: int) -> None:
        self._done += finished
        if (now := time.monotonic()) - self._shown > PROGRESS_SECONDS:
            self._shown = now
            console.print(self.line(now - self._begin))

    def passed(self, earlier: int) -> None:
        """Units that an earlier run finished: they count as done but not as work of this one."""
        self._passed += earlier

    def line(self, seconds: float) -> str:
        """How far it is after so many seconds, how fast it went, and how long the rest takes at that speed."""
        done, rate = self._done + self._passed, self._done / max(seconds, 1e-9)
        said = f"{self.what}: {done:,}" + ("" if self.total is None else f" of {self.total:,}")
        said += f" {self.unit}, {rate:,.1f} {self.unit}/s"
        if self.total is None or not self._done or done >= self.total:
            return said
        return f"{said}, {_duration((self.total - done) / rate)} left"


def progress(what: str, total: int | None, unit: str = "users") -> Progress:
    """A function that is told how many units were just finished, and now and then prints how far and how fast it goes.

    `total`: how many there are; None where that is not known.
    """
    return Progress(what, total, unit)


def _duration(seconds: float) -> str:
    """Of two figures or three, in the unit that suits: `40 s`, `12 min`, `7.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
