"""What proves that a checkpoint is whole: the SHA-256 of each of its files, written last, with what the checkpoint belongs to.

A step without its manifest was stopped half-way. The manifest guards itself by the SHA-256 of the rest of it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from etils import epath

NAME = "manifest.json"
FORMAT = 1
CHUNK = 1 << 20
"""Bytes that are read at once."""
MOST = 1 << 24
"""Bytes of a manifest that are read at all."""


@dataclass(frozen=True)
class Manifest:
    """Of one step."""

    step: int
    files: dict[str, tuple[int, str]]
    """Path below the step's folder: bytes, SHA-256."""
    fingerprint: dict[str, str] = field(default_factory=dict)
    """What the run trains on and how, by name; see `run/fingerprint.py`."""
    score: float | None = None
    """The validation metric that chooses the best; None where the step was not validated."""


class Damaged(Exception):
    """What is wrong with a checkpoint, in a few words."""


def file_sha256(path: epath.Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file, local or remote."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
            size += len(part)
    return size, digest.hexdigest()


def describe(folder: epath.Path, step: int, fingerprint: dict[str, str], score: float | None) -> Manifest:
    """The manifest of a step that lies in `folder`, by reading all of it."""
    return Manifest(step, {name: file_sha256(path) for name, path in _files(folder)}, fingerprint, score)


def write(folder: epath.Path, manifest: Manifest) -> None:
    """Puts the manifest into the step's folder, whole or not at all."""
    temporary = folder / f".{NAME}"
    temporary.write_text(text(manifest))
    temporary.replace(folder / NAME)


def text(manifest: Manifest) -> str:
    """What its file holds."""
    body = asdict(manifest)
    return json.dumps({"format": FORMAT, "sha256": _own_hash(body), **body}, indent=1, ensure_ascii=False)


def read(folder: epath.Path) -> Manifest:
    """The manifest of a step. Raises Damaged where it is missing or not what was written."""
    path = folder / NAME
    try:
        with path.open("rb") as file:
            raw = file.read(MOST + 1)
    except FileNotFoundError:
        raise Damaged(f"has no {NAME}: its writing was stopped half-way") from None
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read ({error.strerror or error})") from None
    return parse(raw)


def parse(raw: bytes) -> Manifest:
    """The manifest in the bytes of its file. Raises Damaged where they are not what was written."""
    try:
        body = json.loads(raw)
        version, own = body.pop("format"), body.pop("sha256")
        if version != FORMAT:
            raise Damaged(f"{NAME} has format {version!r}, this version reads {FORMAT}")
        if own != _own_hash(body):
            raise Damaged(f"{NAME} is not what was written (its SHA-256 differs)")
        return Manifest(**{**body, "files": {name: (int(size), str(sha)) for name, (size, sha) in body["files"].items()}})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{NAME} is not what was written (it cannot be parsed)") from None


def verify(folder: epath.Path) -> Manifest:
    """The manifest of a step all of whose files are what was written. Raises Damaged with the first that is not."""
    manifest = read(folder)
    try:
        found = dict(_files(folder))
        for name in sorted(found.keys() | manifest.files.keys()):
            if name not in found:
                raise Damaged(f"{name} is missing")
            if name not in manifest.files:
                raise Damaged(f"{name} does not belong to it")
            size, digest = file_sha256(found[name])
            wanted, expected = manifest.files[name]
            if size != wanted:
                raise Damaged(f"{name} has {size:,} bytes of {wanted:,}")
            if digest != expected:
                raise Damaged(f"{name} is not what was written (its SHA-256 differs)")
    except OSError as error:
        raise Damaged(f"{error.filename or folder} cannot be read ({error.strerror or error})") from None
    return manifest


def _files(folder: epath.Path, below: str = "") -> Iterator[tuple[str, epath.Path]]:
    for path in sorted(folder.iterdir()):
        name = f"{below}{path.name}"
        if name in (NAME, f".{NAME}"):
            continue
        if path.is_dir():
            yield from _files(path, f"{name}/")
        else:
            yield name, path


def _own_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
