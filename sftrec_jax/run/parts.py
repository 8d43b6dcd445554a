"""Results of a long job in parts, in a hidden folder: a job that was killed goes on after those that are whole.

A part is a file beside a small JSON file with its SHA-256 and what was counted; both are written under another name and then
renamed, the JSON last. `request.json` holds what decides the result, so that parts of another job are never mixed in.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sftrec_jax.errors import UserError

REQUEST = "request.json"
DIGEST = 64
"""Characters of a SHA-256, which nobody wants to read in a message."""


class Parts:
    """Parts of one request. `folder` is made with the first thing that is written into it."""

    def __init__(self, folder: Path, request: dict[str, Any]):
        self.folder = folder
        self._request = json.loads(json.dumps(request))

    def differences(self) -> str:
        """What the request that left the folder has otherwise, in a few words; "" where nothing, or where there is no folder."""
        if not self.folder.exists():
            return ""
        there = self._read(REQUEST)
        if there is None:  # stopped before there was any part, or damaged: then no part is believed
            return "what they are of cannot be read" if any(self.folder.glob("*.json")) else ""
        return _difference(there.get("request"), self._request)

    def begin(self) -> None:
        """Makes the folder, or takes it over from an earlier run of the same request."""
        if self._read(REQUEST) is None:
            self._json(REQUEST, {"request": self._request})

    def drop(self) -> None:
        """Removes every part, the request last: until then the folder is known for what it is."""
        if not self.folder.exists():
            return
        try:
            for entry in sorted(self.folder.iterdir(), key=lambda entry: entry.name == REQUEST):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
            self.folder.rmdir()
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be removed ({error.strerror or error}); remove it by hand") from None

    def path(self, name: str) -> Path:
        """Where the part of this name lies, whole or not."""
        return self.folder / name

    def finished(self, name: str, source: str) -> dict[str, Any] | None:
        """What was counted for a part that is whole and was made of `source` (a digest); None where it has to be made."""
        record = self._read(f"{name}.json")
        if record is None or record.get("source") != source or not isinstance(record.get("counts"), dict):
            return None
        try:
            return record["counts"] if sha256_of(self.path(name)) == record.get("sha256") else None
        except OSError:
            return None

    def write(self, name: str, source: str, counts: dict[str, int], write: Callable[[Path], Any]) -> None:
        """Keeps a part: `write` gets the path to write it to."""
        try:
            self.folder.mkdir(exist_ok=True)
            temporary = self.path(f".{name}.{os.getpid()}")
            write(temporary)
            digest = sha256_of(temporary)
            os.replace(temporary, self.path(name))
        except OSError as error:
            raise UserError(f"{self.path(name)}: cannot be written ({error.strerror or error}); free space and go on") from None
        self._json(f"{name}.json", {"source": source, "sha256": digest, "counts": counts})

    def conclude(self, joined: dict[str, str]) -> None:
        """Notes what all parts were joined to, before it gets its name."""
        self._json(REQUEST, {"request": self._request, "joined": joined})

    @property
    def joined(self) -> dict[str, str] | None:
        """What `conclude` noted."""
        return (self._read(REQUEST) or {}).get("joined")

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            value = json.loads(self.path(name).read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _json(self, name: str, value: dict[str, Any]) -> None:
        temporary = self.path(f".{name}.{os.getpid()}")
        try:
            self.folder.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self.path(name))
        except OSError as error:
            raise UserError(f"{self.path(name)}: cannot be written ({error.strerror or error}); free space and go on") from None


def sha256_of(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(there: Any, here: Any, name: str = "") -> str:
    """The first field that two requests do not share: `decode.beam is 50 there and 20 here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys((*here, *there)):
            found = _difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return ""
    if there == here:
        return ""
    if any(isinstance(value, str) and len(value) == DIGEST for value in (there, here)):
        return f"{name} is another"
    return f"{name or 'the request'} is {there} there and {here} here"
