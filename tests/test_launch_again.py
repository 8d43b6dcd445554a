"""Exit code 75, "start me again", and signals: launch/train.sh and processes.sh with a stand-in for sftrec."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_launch import BASH, Machine

pytestmark = pytest.mark.skipif(BASH is None or os.name == "nt", reason="the scripts need bash")

# Each start does the next word of PLAN (the last one again): leave with a status, `+` after having begun the run, or hold
# until a signal comes, save (0.3 s) and leave with 75; a second signal ends it at once. As sftrec does, it joins the other
# processes before it writes anything.
SFTREC = f"""#!{sys.executable} -S
import os, signal, sys, time
log = os.environ["RECORD"] + os.environ.get("SFTREC_PROCESS", "")
def say(text):
    with open(log, "a") as file:
        file.write(text + "\\n")
def caught(number, frame):
    say(signal.Signals(number).name)
    if heard:
        os._exit(128 + number)
    heard.append(number)
heard = []
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), caught)
def started(log):
    return sum(line.startswith("start") for line in open(log)) if os.path.exists(log) else 0
starts = started(log)
plan = os.environ["PLAN"].split()
step = plan[min(starts, len(plan) - 1)]
say("start " + " ".join(sys.argv[5:]))
until = time.monotonic() + 60
for other in range(int(os.environ.get("SFTREC_PROCESSES", "0"))):
    while started(os.environ["RECORD"] + str(other)) <= starts and time.monotonic() < until:
        time.sleep(0.02)
if step.endswith("+") or step == "hold":
    os.makedirs(sys.argv[4], exist_ok=True)
    open(sys.argv[4] + "/config.yaml", "w").close()
if step == "hold":
    say(f"ready {{os.getpid()}}")
    while not heard and time.monotonic() < until:
        time.sleep(0.02)
    saved = time.monotonic() + float(os.environ.get("SAVING", "0.3"))
    while time.monotonic() < saved:
        time.sleep(0.02)
    sys.exit(75)
sys.exit(int(step.rstrip("+")))
"""
SLEEP = '#!/usr/bin/env bash\necho "sleep $1" >>"$RECORD"\n'
# Runs a command on a pseudo-terminal of its own; what comes on standard input is typed there.
TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
QUICK = ("configs/quick.yaml", "--out", "run")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.add("sftrec", SFTREC)
    made.add("sleep", SLEEP)
    assert made.run("train.sh", "--install-only").returncode == 0
    made.recorded()
    return made


def starts(lines: list[str]) -> list[str]:
    return [line.removeprefix("start").strip() for line in lines if line.startswith("start")]


def signals(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("SIG")]


def until(record: Path, word: str, times: int = 1) -> str:
    """The last line that begins with `word`, once there are `times` of them."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        found = [x for x in record.read_text().splitlines() if x.startswith(word)] if record.exists() else []
        if len(found) >= times:
            return found[-1]
        time.sleep(0.02)
    raise AssertionError(f"no {word} in {record}")


@contextmanager
def started(
    machine: Machine, script: str, *words: str, terminal: bool = False, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The script in a session of its own, or on a terminal of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SFTREC_", "TPU_", "JAX_"))}
    environment = kept | {"PATH": f"{machine.bin}:/usr/bin:/bin", "RECORD": str(machine.record)} | variables
    command = [str(BASH), str(machine.checkout / "launch" / script), *words]
    if terminal:
        command = [sys.executable, "-c", TERMINAL, *command]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        command, cwd=machine.home, env=environment, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def type_interrupt(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\x03")
    process.stdin.flush()


def test_75_starts_again_until_it_is_done(machine: Machine) -> None:
    done = machine.run("train.sh", *QUICK, "--train.epochs", "2", PLAN="75+ 75 0")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "exit code 75" in line]
    assert len(said) == 2 and "in 1 s, restart 1 of at most 100" in said[0] and "in 2 s, restart 2" in said[1]
    words = "--train.epochs 2"
    assert starts(machine.recorded()) == [words, f"{words} --resume", f"{words} --resume"]


@pytest.mark.parametrize(
    ("option", "plan", "expected"),
    [
        ("", "75 75+ 0", ["", "", "--resume"]),  # what was not begun has nothing to go on with
        ("--resume", "75+ 0", ["--resume", "--resume"]),
        ("--overwrite", "75+ 75 0", ["--overwrite", "--resume", "--resume"]),
        ("--overwrite", "75 75+ 0", ["--overwrite", "--overwrite", "--resume"]),  # the earlier run was still there
    ],
)
def test_a_restart_goes_on_and_overwrites_nothing(machine: Machine, option: str, plan: str, expected: list[str]) -> None:
    if option:
        earlier = machine.home / "run" / "config.yaml"
        earlier.parent.mkdir()
        earlier.touch()
        os.utime(earlier, (1_000_000_000, 1_000_000_000))
    assert machine.run("train.sh", *QUICK, *([option] if option else []), PLAN=plan).returncode == 0
    assert starts(machine.recorded()) == expected


def test_several_processes_see_the_same(machine: Machine) -> None:
    (machine.home / "run").mkdir()
    (machine.home / "run" / "config.yaml").touch()
    done = machine.run("train.sh", *QUICK, PLAN="75 0", SFTREC_DISTRIBUTED="auto")
    assert done.returncode == 0 and starts(machine.recorded()) == ["--resume", "--resume"]


def test_any_other_status_is_passed_on(machine: Machine) -> None:
    for status in (0, 1, 2, 3, 130, 137):
        done = machine.run("train.sh", *QUICK, PLAN=f"75+ {status}")
        assert done.returncode == status and len(starts(machine.recorded())) == 2


def test_restarts_are_bounded_and_further_and_further_apart(machine: Machine) -> None:
    done = machine.run("train.sh", *QUICK, PLAN="75", SFTREC_RESTARTS="8")
    lines = machine.recorded()
    assert done.returncode == 75 and "was 8 times" in done.stderr.splitlines()[-1]
    gaps = " ".join("s" if line.startswith("start") else "." for line in lines).replace(" ", "").split("s")[1:-1]
    assert [len(gap) for gap in gaps] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert machine.run("train.sh", *QUICK, PLAN="75", SFTREC_RESTARTS="0").returncode == 75
    assert len(starts(machine.recorded())) == 1
    done = machine.run("train.sh", *QUICK, PLAN="0", SFTREC_RESTARTS="x")
    assert done.returncode == 2 and done.stderr == "error: SFTREC_RESTARTS is 'x'; use a number from 0 on\n"
    done = machine.run("train.sh", *QUICK, "--resume", "--overwrite", PLAN="0")
    assert done.returncode == 2 and done.stderr == "error: --resume and --overwrite were both given; use one\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_signal_arrives_once_and_the_script_leaves(machine: Machine, number: signal.Signals, whole_group: bool) -> None:
    with started(machine, "train.sh", *QUICK, PLAN="hold") as process:
        until(machine.record, "ready")
        (os.killpg if whole_group else os.kill)(process.pid, number)
        assert process.wait(30) == 75
    lines = machine.recorded()
    passed = signal.SIGTERM if number == signal.SIGHUP else number
    assert signals(lines) == [passed.name] and starts(lines) == [""]


def test_the_second_signal_is_passed_on_too(machine: Machine) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with started(machine, "train.sh", *QUICK, PLAN="hold", SAVING="60") as process:
            until(machine.record, "ready")
            os.kill(process.pid, number)
            until(machine.record, number.name)
            os.kill(process.pid, number)
            assert process.wait(30) == 128 + number
        assert signals(machine.recorded()) == [number.name] * 2
    with started(machine, "train.sh", *QUICK, PLAN="hold", SAVING="1") as process:  # the end of a session sends both
        until(machine.record, "ready")
        os.kill(process.pid, signal.SIGTERM)
        until(machine.record, "SIGTERM")
        os.kill(process.pid, signal.SIGHUP)
        assert process.wait(30) == 75
    assert signals(machine.recorded()) == ["SIGTERM"]


@pytest.mark.parametrize("times", [1, 2])
def test_control_c_on_a_terminal(machine: Machine, times: int) -> None:
    with started(machine, "train.sh", *QUICK, terminal=True, PLAN="hold", SAVING="0.5" if times == 1 else "60") as process:
        until(machine.record, "ready")
        for at in range(times):
            type_interrupt(process)
            until(machine.record, "SIGINT", at + 1)
        assert process.wait(30) == (75 if times == 1 else 130)
    lines = machine.recorded()
    assert signals(lines) == ["SIGINT"] * times and len(starts(lines)) == 1


def test_a_signal_to_sftrec_alone_starts_it_again(machine: Machine) -> None:
    with started(machine, "train.sh", *QUICK, PLAN="hold 0") as process:
        os.kill(int(until(machine.record, "ready").split()[1]), signal.SIGTERM)
        assert process.wait(30) == 0
    assert starts(machine.recorded()) == ["", "--resume"]


def test_a_signal_between_two_starts(machine: Machine) -> None:
    machine.add("sleep", SLEEP + "exec /usr/bin/env -u RECORD /bin/sleep 0.3\n")
    with started(machine, "train.sh", *QUICK, PLAN="75+") as process:
        until(machine.record, "sleep", 4)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 75
    assert len(starts(machine.recorded())) == 3  # in the pause before the fourth


def both(machine: Machine) -> list[list[str]]:
    return [Path(f"{machine.record}{i}").read_text().splitlines() for i in range(2)]


@pytest.mark.parametrize("how", ["TERM", "group", "terminal"])
def test_all_processes_hear_it(machine: Machine, how: str) -> None:
    words = ("--count", "2", "--", *QUICK)
    with started(machine, "processes.sh", *words, terminal=how == "terminal", PLAN="75+ hold", SFTREC_VENV="") as process:
        for index in range(2):
            until(Path(f"{machine.record}{index}"), "ready")
        if how == "terminal":
            type_interrupt(process)
        else:
            (os.killpg if how == "group" else os.kill)(process.pid, signal.SIGTERM)
        assert process.wait(30) == 75
    for lines in both(machine):
        assert signals(lines) == ["SIGINT" if how == "terminal" else "SIGTERM"] and starts(lines) == ["", "--resume"]


def test_an_error_of_one_process_counts_more_than_75(machine: Machine) -> None:
    machine.add(
        "sftrec", SFTREC.replace('os.environ["PLAN"]', 'os.environ["PLAN"].split("/")[int(os.environ["SFTREC_PROCESS"])]')
    )
    shutil.copy(machine.bin / "sftrec", machine.checkout / ".venv" / "bin" / "sftrec")
    for plan, status in (("0/0", 0), ("75/0", 75), ("75/2", 2), ("2/75", 2)):
        done = machine.run("processes.sh", "--", *QUICK, PLAN=plan, SFTREC_RESTARTS="0")
        assert done.returncode == status, (plan, done.stderr)
        for index in range(2):
            Path(f"{machine.record}{index}").unlink()
