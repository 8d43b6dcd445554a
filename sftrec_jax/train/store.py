"""Steps of checkpoints on an object store (Google Cloud Storage, S3), through fsspec, as Orbax itself reaches remote paths.

Orbax writes to `gs://` but not to `s3://`, and a store renames nothing at once. So a step is written, and proved whole, in a
local folder and then sent, its manifest last: without one a step is not whole. A step that is read is fetched and checked before.
"""

import importlib.util
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sftrec_jax.errors import UserError
from sftrec_jax.train import manifest
from sftrec_jax.train.manifest import Damaged, Manifest

SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
"""What is imported for each, and the extra that brings it."""
SECONDS = 60.0
"""A store that says nothing for so long when it is first asked is taken for absent."""
SETTINGS: dict[str, dict[str, Any]] = {
    "gs": {"requests_timeout": SECONDS},
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": SECONDS, "retries": {"max_attempts": 4}}},
}
"""Against waiting without end; the user's own settings of fsspec (`~/.config/fsspec`) come first."""


def is_remote(place: str) -> bool:
    """Whether a folder is named by scheme and bucket."""
    return "://" in place


class Store:
    """A folder on a store.

    Args:
        url: `gs://BUCKET/PATH` or `s3://BUCKET/PATH`.

    Raises:
        UserError: here where a library is missing, later where the store cannot be reached, or refuses; FileNotFoundError where
            something is not there.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        scheme, rest = self.url.split("://", 1)
        library, extra = SCHEMES[scheme]
        if importlib.util.find_spec(library) is None:
            raise UserError(f"{url}: {library} is not installed, which reads {scheme}://; run pip install 'sftrec_jax[{extra}]'")
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for the kind of bucket by gRPC, with warnings
        for name in ("gcsfs", "google.auth"):  # they print what they raise, too, with its stack
            logging.getLogger(name).setLevel(logging.CRITICAL)
        import fsspec
        from fsspec.config import conf

        self._root = rest
        mine = {key: value for key, value in SETTINGS[scheme].items() if key not in conf.get(scheme, {})}
        with self._told():
            # Folders of a store are seen anew each time: other processes write there.
            self._files: Any = fsspec.filesystem(scheme, use_listings_cache=False, **mine)
        self._reached = False

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever a library says is wrong, as one line."""
        try:
            yield
        except (FileNotFoundError, UserError, Damaged):
            raise
        except Exception as error:  # each library has kinds of its own, for the network, for credentials, for permissions
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"{self.url}: {why}; check the bucket, the credentials and the network") from None

    def _at(self, *names: object) -> str:
        return "/".join((self._root, *map(str, names)))

    def _listed(self, *names: object) -> list[str]:
        """Names in a folder, which need not exist."""
        with self._told():
            try:
                found = self._files.ls(self._at(*names), detail=False, refresh=True)
            except FileNotFoundError:
                return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def _below(self, *names: object) -> list[str]:
        """Paths of all files below a folder, relative to it."""
        root = self._at(*names) + "/"
        with self._told():
            return sorted(path.removeprefix(root) for path in self._files.find(root) if path.startswith(root))

    def steps(self) -> list[int]:
        """Numbers under which anything lies, rising."""
        if not self._reached:
            self._files.invalidate_cache()
            with self._told():
                _within(SECONDS, self._bucket, self.url)
            self._reached = True
        return sorted(int(name) for name in self._listed() if name.isdigit())

    def _bucket(self) -> None:
        # To a listing a folder that is not there looks like a bucket that is not there.
        bucket = self._root.split("/", 1)[0]
        try:
            self._files.ls(self._root, refresh=True)
            return
        except FileNotFoundError:
            pass
        try:
            self._files.info(bucket)
        except FileNotFoundError:
            raise UserError(f"{self.url}: there is no bucket {bucket}; make it, or name another") from None
        except OSError:
            pass  # credentials that see this folder alone

    def manifest(self, step: int) -> Manifest:
        """What a step says of itself. Raises Damaged."""
        with self._told():
            try:
                return manifest.parse(self._files.cat_file(self._at(step, manifest.NAME)))
            except FileNotFoundError:
                raise Damaged(f"has no {manifest.NAME}: its writing was stopped half-way") from None

    def put_manifest(self, step: int, made: Manifest) -> None:
        """Replaces the manifest of a step: an object is put whole or not at all."""
        with self._told():
            self._files.pipe_file(self._at(step, manifest.NAME), manifest.text(made).encode())

    def send(self, step: int, folder: Path) -> None:
        """Copies a step, with its manifest last, over what half-sent files may lie there."""
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        files = [name for name in names if name not in (manifest.NAME, f".{manifest.NAME}")]
        with self._told():
            self.remove(step)
            self._files.put([str(folder / name) for name in files], [self._at(step, name) for name in files])
            self._files.pipe_file(self._at(step, manifest.NAME), (folder / manifest.NAME).read_bytes())

    def fetch(self, step: int, folder: Path) -> None:
        """Makes `folder` the copy of a step, whatever was there. Raises Damaged where the step is not there (any more)."""
        temporary = folder.with_name(f".fetching.{step}.{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        names = self._below(step)
        if not names:
            raise Damaged("was removed")
        try:
            for name in names:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            with self._told():
                self._files.get([self._at(step, name) for name in names], [str(temporary / name) for name in names])
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        except FileNotFoundError:
            raise Damaged("was removed") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def remove(self, step: int) -> None:
        """Removes a step, its manifest first."""
        names = self._below(step)
        with self._told():
            for name in sorted(names, key=lambda name: name != manifest.NAME):
                with suppress(FileNotFoundError):
                    self._files.rm_file(self._at(step, name))

    def lay_aside(self, step: int, aside: str) -> None:
        """Moves what lies under a step to `aside/STEP.N`. Stopped half-way, it can be done again."""
        number = 0
        while self._below(aside, f"{step}.{number}"):
            number += 1
        with self._told():
            for name in self._below(step):
                self._files.cp_file(self._at(step, name), self._at(aside, f"{step}.{number}", name))
        self.remove(step)


def _within(seconds: float, action: Callable[[], None], url: str) -> None:
    """Runs `action`, and gives up on it after so long."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise UserError(f"{url}: does not answer within {seconds:g} s; check the bucket, the credentials and the network")
    if raised:
        raise raised[0]
