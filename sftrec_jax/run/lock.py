"""One writer in the folder of a run: a lock that goes with its process, however that ends."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sftrec_jax.console import console
from sftrec_jax.distributed import is_main
from sftrec_jax.errors import UserError

NAME = ".lock"


@contextmanager
def locked(folder: Path, what: str = "") -> Iterator[None]:
    """Within it no other process works in an existing folder. UserError, with who does, where one is at work there already.

    `what`: a part of the work that may go beside others, such as an evaluation beside training.
    Of several processes of a run the first holds the lock. A file system that knows no locks is said to, and gone on with.
    """
    if not is_main():
        yield
        return
    path = folder / f"{NAME}{what and '-'}{what}"
    file = _open(folder, path)
    try:
        try:
            os.truncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError:
            pass  # who holds it is a comfort; on a full disk the lock itself still holds
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held
    finally:
        os.close(file)


def _open(folder: Path, path: Path) -> int:
    """The lock file, open and held."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = os.read(file, 200).decode(errors="replace").strip() or "another process"
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(file)
                raise UserError(
                    f"{folder}: {who} is at work there; wait until it is done, stop it, or choose another --out"
                ) from None
            console.print(f"{folder}: no lock can be had here ({error.strerror}); start no second run in it", markup=False)
            return file
        try:
            if os.fstat(file).st_ino == path.stat().st_ino:
                return file
        except FileNotFoundError:
            pass
        os.close(file)  # its holder has just removed it
