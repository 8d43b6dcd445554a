"""Where text for people goes: standard error, through rich."""

import time
from collections.abc import Callable

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)

PROGRESS_SECONDS = 15.0


def progress(what: str, total: int | None, unit: str = "users") -> Callable[[int], None]:
    """A function that is told how many units were just finished, and now and then prints how far and how fast it goes.

    `total`: how many there are; None where that is not known.
    """
    of = "" if total is None else f" of {total:,}"
    begin = shown = time.monotonic()
    done = 0

    def report(finished: int) -> None:
        nonlocal done, shown
        done += finished
        if (now := time.monotonic()) - shown > PROGRESS_SECONDS:
            shown = now
            console.print(f"{what}: {done:,}{of} {unit}, {done / (now - begin):,.1f} {unit}/s")

    return report
