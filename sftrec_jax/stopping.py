"""Being asked to stop: SIGTERM of a machine that goes away, Ctrl-C, a terminal that closes, seen in whatever a run is doing.

The first signal stops the run at the next place where nothing is lost; the program then leaves with exit code 75 (EX_TEMPFAIL of
sysexits.h), which says: start me again with --resume. A second one leaves at once, with 128 plus its number.

Python runs a signal handler between two of its own instructions, so a compilation of minutes would delay it. Therefore a thread
reads the signals from a pipe as they come; where all is saved and the program does not react within `GRACE` seconds, it ends it.
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

EXIT_CODE = 75
GRACE = 10.0
"""Seconds that a run has to react to a signal while nothing is unsaved; machines that are taken away leave 30."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TOGETHER = 1.0
"""Signals within so many seconds of the first are the same request: an init system tells all processes of a group, and the script
that started them passes it on."""


class Stopped(BaseException):
    """A run was asked to stop, and what it has is saved. Not an Exception: nothing but the command line ends it."""


class _Stop:
    """The state of this process: there is one."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.seen = threading.Event()
        self.holding = 0
        self.savers: list[Callable[[], None]] = []
        self.installed = False
        self.others: list[Any] = []
        self.together = False
        self.asked = 0


_stop = _Stop()


def install() -> None:
    """Takes the signals over; in the main thread, once, before other processes are joined."""
    if _stop.installed or threading.current_thread() is not threading.main_thread():
        return
    _stop.installed = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, _handle)
    threading.Thread(target=_watch, args=(reading,), daemon=True, name="signals").start()


def install_again() -> None:
    """After `jax.distributed.initialize`, which takes SIGTERM for itself: it is told of what comes (see `requested`)."""
    if not _stop.installed:
        return
    _stop.together = True
    # Its handler only sets a flag; both must see the signal.
    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    theirs = library.signal(signal.SIGTERM, None)
    if theirs not in (None, 0, 1, ctypes.c_void_p(-1).value):
        _stop.others.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs))
    signal.signal(signal.SIGTERM, _handle)


def requested() -> int | None:
    """The signal that asked this process to stop; None while none did."""
    return _stop.signal


def agreed() -> bool:
    """Whether to stop now. Of several processes all say so at the same call, whichever of them was told, so all must ask equally
    often (jax.distributed's preemption sync)."""
    if not _stop.together:
        return _stop.signal is not None
    from jax.experimental import multihost_utils

    _stop.asked += 1
    return multihost_utils.reached_preemption_sync_point(_stop.asked)


def pause() -> None:
    """Between two pieces of work: raises Stopped where to stop is agreed and nothing is held."""
    if agreed() and (_stop.together or not _stop.holding):
        _stop.seen.set()
        raise Stopped


@contextmanager
def holding() -> Iterator[None]:
    """Within it a signal is only noted: something is unsaved, and the code looks at `requested` by itself."""
    _stop.holding += 1
    try:
        yield
    finally:
        _stop.holding -= 1


@contextmanager
def released() -> Iterator[None]:
    """Within `holding`: a part in which all is saved, or will be by the savers, so that a signal stops it at once."""
    held = _stop.holding
    if not _stop.together:
        _stop.holding = 0
    try:
        if not _stop.together:
            pause()
        yield
    finally:
        _stop.holding = held


@contextmanager
def saving(saver: Callable[[], None]) -> Iterator[None]:
    """Within it `saver` is called before the program is ended from the outside: it waits for what is being written."""
    _stop.savers.append(saver)
    try:
        yield
    finally:
        _stop.savers.remove(saver)


def leave() -> int:
    """The exit code, when all is saved: what comes while the program ends must not end it with another one."""
    if _stop.installed:
        # At the very end and not now: whoever called `main` may go on, and what it starts would inherit what is ignored.
        atexit.register(_ignore)
    return EXIT_CODE


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame: FrameType | None) -> None:
    _stop.signal = _stop.signal or number
    if not _stop.together and not _stop.holding and not _stop.seen.is_set():
        _stop.seen.set()
        raise Stopped


def _watch(reading: int) -> NoReturn:
    first: float | None = None
    while True:
        for number in os.read(reading, 64):
            if number not in SIGNALS:
                continue
            if first is not None:
                if number != signal.SIGHUP and time.monotonic() - first > TOGETHER:
                    os._exit(128 + number)
                continue
            first = time.monotonic()
            _stop.signal = _stop.signal or number
            _say(f"{signal.Signals(number).name}: stopping where nothing is lost; once more leaves at once\n")
            for other in _stop.others:
                other(signal.SIGTERM)
            threading.Thread(target=_end, daemon=True).start()


def _end() -> None:
    """Ends the process where the main thread does not, but not while something is unsaved."""
    while not _stop.seen.wait(GRACE):
        if not _stop.holding and not _stop.together:
            for saver in list(_stop.savers):
                saver()
            _say("stopped; start again with --resume\n")
            os._exit(EXIT_CODE)


def _say(text: str) -> None:
    # Not through a stream of Python, whose lock the main thread may hold.
    sys.stderr.flush()
    os.write(2, text.encode())
