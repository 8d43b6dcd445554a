"""The scripts in launch/: what they would run, and what they do with stand-ins for Python, pip and sftrec."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None or os.name == "nt", reason="the scripts need bash")

# Stands in for the interpreter of a virtual environment: pip says what it was asked for, warns, and fails on demand.
PYTHON = """#!/usr/bin/env bash
if [[ "$1 $2" == "-m venv" ]]; then
    mkdir -p "$3/bin"
    touch "$3/pyvenv.cfg"
    cp "$0" "$3/bin/python"
    cp "$(dirname "$0")/sftrec" "$3/bin/sftrec"
elif [[ "$1 $2 $3" == "-m pip install" ]]; then
    echo "Location file:///nowhere is ignored" >&2
    printf '%s\\n' "$@" >>"$RECORD"
    [[ -z "${NO_NETWORK:-}" ]] || { echo "ERROR: no route" >&2; exit 1; }
elif [[ "$1 $2" == "-m pytest" ]]; then
    printf '%s\\n' "in $PWD" "$@" >>"$RECORD"
elif [[ "$1" == -c && -n "${OLD:-}" && "$2" == *3,\\ 11* ]]; then
    exit 1
fi
"""
SFTREC = """#!/usr/bin/env bash
printf '%s\\n' "sftrec on ${JAX_PLATFORMS:-any}" "$@" >>"$RECORD"
"""
SMI = """#!/usr/bin/env bash
if [[ "$1" == -L ]]; then echo "GPU 0: NVIDIA H100"; else echo "${DRIVER:-580.65.06}"; fi
"""


class Machine:
    """A machine with stand-ins on its PATH, in a folder with a space in its name."""

    def __init__(self, folder: Path):
        self.home = folder / "a machine"
        self.bin = self.home / "bin"
        self.bin.mkdir(parents=True)
        self.record = self.home / "record.txt"
        self.add("python3.11", PYTHON)
        self.add("python3.13", "#!/usr/bin/env bash\nexit 127\n")  # as a shim of pyenv without that version
        self.add("sftrec", SFTREC)
        self.checkout = self.home / "check out"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        shutil.copytree(ROOT / "configs", self.checkout / "configs")
        (self.checkout / "configs" / "movielens.yaml").touch()
        shutil.copy(ROOT / "pyproject.toml", self.checkout)

    def add(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def run(self, script: str, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SFTREC_", "TPU_", "JAX_"))}
        environment = kept | {"PATH": f"{self.bin}:/usr/bin:/bin", "RECORD": str(self.record)} | variables
        command = [str(BASH), str(self.checkout / "launch" / script), *words]
        return subprocess.run(
            command, cwd=cwd or self.home, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )

    def recorded(self) -> list[str]:
        lines = self.record.read_text(encoding="utf-8").splitlines() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def extra(machine: Machine, **variables: str) -> str:
    """What of the package is installed, and for which platform it runs."""
    done = machine.run("train.sh", "configs/quick.yaml", **variables)
    assert done.returncode == 0, done.stderr
    lines = machine.recorded()
    spec = lines[lines.index("-e") + 1].removeprefix(str(machine.checkout))
    return f"{spec} {next(line for line in lines if line.startswith('sftrec'))}"


def test_installs_once_and_runs_the_default_config(machine: Machine):
    done = machine.run("train.sh")
    assert done.returncode == 0, done.stderr
    checkout = machine.checkout
    lines = machine.recorded()
    assert lines[lines.index("-e") + 1].startswith(str(checkout))
    run = lines[lines.index("run") :]
    assert run == ["run", str(checkout / "configs" / "movielens.yaml"), "--out", "runs/movielens"]
    assert "installed in" in done.stderr and "ignored" not in done.stderr and done.stdout == ""

    done = machine.run("train.sh", "configs/quick.yaml", "--out", "my runs/one", "--train.epochs", "2", "--overwrite")
    assert done.returncode == 0 and "installed already" in done.stderr
    assert machine.recorded()[1:] == [
        "run", str(checkout / "configs" / "quick.yaml"), "--out", "my runs/one", "--train.epochs", "2", "--overwrite",
    ]  # fmt: skip

    with (checkout / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert "installed in" in machine.run("train.sh").stderr


def test_goes_on_with_an_unfinished_run(machine: Machine):
    out = machine.home / "runs" / "quick"
    out.mkdir(parents=True)
    (out / "config.yaml").touch()
    done = machine.run("train.sh", "configs/quick.yaml")
    assert machine.recorded()[-1] == "--resume" and "was not finished" in done.stderr
    machine.run("train.sh", "configs/quick.yaml", "--overwrite")
    assert "--resume" not in machine.recorded()
    (out / "metrics.json").touch()  # not exported yet
    machine.run("train.sh", "configs/quick.yaml")
    assert machine.recorded()[-1] == "--resume"
    (out / "export").mkdir()  # finished: sftrec refuses and says what to do
    machine.run("train.sh", "configs/quick.yaml")
    assert "--resume" not in machine.recorded()


def test_picks_the_extra_for_what_is_there(machine: Machine):
    if Path("/dev/accel0").exists() or shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("this machine has an accelerator of its own")
    assert extra(machine) == " sftrec on cpu"
    machine.add("nvidia-smi", SMI)
    assert extra(machine) == "[cuda] sftrec on cuda,cpu"
    done = machine.run("train.sh", "configs/quick.yaml", DRIVER="570.1")
    assert done.returncode == 2 and "older than 580" in done.stderr and "SFTREC_DEVICE=cpu" in done.stderr


def test_device_can_be_named(machine: Machine):
    machine.add("nvidia-smi", SMI)
    assert extra(machine, SFTREC_DEVICE="tpu") == "[tpu] sftrec on tpu,cpu"
    assert extra(machine, SFTREC_DEVICE="cpu") == " sftrec on cpu"
    done = machine.run("train.sh", "configs/quick.yaml", SFTREC_DEVICE="gpu")
    assert done.returncode == 2 and done.stderr == "error: SFTREC_DEVICE is 'gpu'; use tpu, cuda or cpu\n"


def test_errors_are_one_line(machine: Machine):
    done = machine.run("train.sh", "nowhere.yaml")
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere.yaml: no such config") and not machine.recorded()
    done = machine.run("train.sh", "configs/quick.yaml", NO_NETWORK="1")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: pip could not install") and "ERROR: no route" in done.stderr
    assert "sftrec on" not in "".join(machine.recorded())
    assert machine.run("train.sh", "configs/quick.yaml").returncode == 0  # a failed installation is tried again

    taken = machine.home / "taken"
    taken.mkdir()
    (taken / "file").touch()
    done = machine.run("train.sh", "configs/quick.yaml", SFTREC_VENV=str(taken))
    assert done.returncode == 2 and "no virtual environment" in done.stderr and [p.name for p in taken.iterdir()] == ["file"]


def test_old_python_is_named(machine: Machine):
    tools = ("bash", "dirname", "basename", "cat", "cksum", "mktemp", "rm", "tail", "ls", "mkdir", "touch", "cp")
    for tool in tools:
        (machine.bin / tool).symlink_to(str(shutil.which(tool)))
    done = machine.run("train.sh", "configs/quick.yaml", PATH=str(machine.bin), OLD="1")
    assert done.returncode == 2 and len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "no Python 3.11 or later" in done.stderr and "SFTREC_PYTHON" in done.stderr


def test_dry_run_touches_nothing(machine: Machine):
    before = sorted(machine.home.rglob("*"))
    done = machine.run("train.sh", "--dry-run", "configs/quick.yaml", "--out", "my runs", SFTREC_VENV="v e")
    assert done.returncode == 0
    commands = done.stdout.splitlines()
    assert "-m venv" in commands[0] and "pip install" in commands[1]
    words = subprocess.run([str(BASH), "-c", f"printf '%s\\n' {commands[-1]}"], capture_output=True, text=True, check=True).stdout
    config = str(machine.checkout / "configs" / "quick.yaml")
    assert words.splitlines() == [str(machine.home / "v e" / "bin" / "sftrec"), "run", config, "--out", "my runs"]
    assert sorted(machine.home.rglob("*")) == before


def test_help_needs_nothing(machine: Machine):
    for script in ("train.sh", "test.sh"):
        done = machine.run(script, "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"usage: launch/{script}") and not machine.recorded()


def test_tests_run_from_the_checkout(machine: Machine):
    done = machine.run("test.sh", "-k", "two words")
    assert done.returncode == 0, done.stderr
    lines = machine.recorded()
    if sys.platform == "linux":
        assert lines.index("torch==2.13.0") < lines.index("-e")
    assert lines[lines.index("-e") + 1] == f"{machine.checkout}[test]"
    assert lines[-6:] == [f"in {machine.checkout}", "-m", "pytest", "-q", "-k", "two words"]
    machine.run("test.sh")
    assert machine.recorded() == [f"in {machine.checkout}", "-m", "pytest", "-q"]


def test_shellcheck_finds_nothing():
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed (it comes with the test extra)")
    scripts = [*sorted(str(p) for p in (ROOT / "launch").glob("*.sh")), str(ROOT / ".ci" / "run")]
    done = subprocess.run([checker, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
