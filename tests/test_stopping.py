"""Signals, in small programs of their own: noted, acted upon, or ending a program that is busy elsewhere."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BEGIN = """
import hashlib, sys, threading, time
from sftrec_jax import stopping
stopping.GRACE = 0.3
stopping.install()
def busy():  # does not come back to Python for long, as a compilation; says so from within
    threading.Timer(0.3, lambda: print("busy", flush=True)).start()
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 400_000_000)
def ready():
    print("ready", flush=True)
"""


def program(text: str, word: str = "ready") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == f"{word}\n"
    return process


def ending(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, said = process.communicate(timeout=60)
    return process.returncode, out, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_stops_what_holds_nothing(number: signal.Signals) -> None:
    process = program(
        "try:\n    ready()\n    while True: time.sleep(0.01)\n"
        "except stopping.Stopped:\n    print('saved')\n    sys.exit(stopping.leave())\n"
    )
    process.send_signal(number)
    assert ending(process)[:2] == (75, "saved\n")


def test_what_holds_something_is_not_interrupted_and_looks_by_itself() -> None:
    process = program(
        "with stopping.holding():\n"
        "    ready()\n"
        "    while not stopping.agreed(): time.sleep(0.01)\n"
        "    time.sleep(0.9)  # longer than the grace\n"
        "    print('saved')\n"
        "try:\n    stopping.pause()\nexcept stopping.Stopped:\n    sys.exit(stopping.leave())\n"
    )
    process.send_signal(signal.SIGTERM)
    status, out, _ = ending(process)
    assert (status, out) == (75, "saved\n")


def test_a_part_is_released_within_what_holds() -> None:
    process = program(
        "try:\n"
        "    with stopping.holding():\n"
        "        with stopping.released():\n"
        "            ready()\n"
        "            while True: time.sleep(0.01)\n"
        "except stopping.Stopped:\n    sys.exit(stopping.leave())\n"
    )
    process.send_signal(signal.SIGTERM)
    assert ending(process)[0] == 75


def test_a_program_that_is_busy_elsewhere_is_ended_once_what_is_being_written_is_whole() -> None:
    process = program("with stopping.saving(lambda: print('whole', flush=True)):\n    busy()\n", "busy")
    process.send_signal(signal.SIGTERM)
    status, out, said = ending(process)
    assert (status, out) == (75, "whole\n") and "start again with --resume" in said


def test_a_second_signal_leaves_at_once_and_its_echo_does_not() -> None:
    process = program("with stopping.holding():\n    busy()\n", "busy")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # as a service manager and a script that passes it on send it
    time.sleep(1.4)
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ending(process)[0] == 128 + signal.SIGTERM


def test_what_was_ignored_stays_ignored() -> None:
    """As `nohup` starts it."""
    text = "ready()\ntime.sleep(0.5)\nprint('done')\n"
    process = subprocess.Popen(
        ["bash", "-c", 'trap "" HUP; exec "$@"', "bash", sys.executable, "-c", BEGIN + text], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[0] == "done\n" and process.returncode == 0
