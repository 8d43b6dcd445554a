"""Why a run saves between two steps: the file `save-now`, or minutes that have passed. All processes do the same."""

import time
from pathlib import Path

from sftrec_jax.distributed import announce, announced, is_main, process_count

TOUCH = "save-now"
"""A file of this name in the folder of a run asks for a checkpoint; it is removed when that is written."""
LOOK_SECONDS = 1.0
"""Between two looks for the file: a file system may be slow."""
AHEAD = 4
"""Steps before processes do what the first announced. Each fetches the numbers of the step before last, so none is more than two
ahead of another."""


class Requests:
    """Asked between two steps with the number of steps that are done, in every process the same numbers in the same order."""

    def __init__(self, folder: Path, minutes: float):
        self._file, self._seconds = folder / TOUCH, minutes * 60
        self._saved = self._looked = time.monotonic()
        self._number, self._at = 0, -1

    def save(self, done: int) -> bool:
        """Whether to save and go on."""
        if process_count() == 1:
            return self._wanted()
        if is_main() and self._at < 0 and self._wanted():
            announce(f"save {self._number}", str(done + AHEAD))
        if self._at < 0 and (said := announced(f"save {self._number}")) is not None:
            self._at = int(said)
        if done != self._at:
            return False
        self._number, self._at = self._number + 1, -1
        return True

    def saved(self) -> None:
        """A checkpoint was begun, for whatever reason."""
        self._saved = time.monotonic()
        if is_main() and self._file.exists():
            self._file.unlink(missing_ok=True)

    def _wanted(self) -> bool:
        now = time.monotonic()
        if self._seconds and now - self._saved > self._seconds:
            return True
        if now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        return self._file.exists()
