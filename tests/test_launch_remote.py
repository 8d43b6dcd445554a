"""The scripts in launch/ that start a run elsewhere: the commands that they print, and what a machine there does with them."""

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASH = shutil.which("bash")
SCRIPTS = ("tpu_vm.sh", "gke.sh", "slurm.sh", "processes.sh")
pytestmark = pytest.mark.skipif(BASH is None or os.name == "nt", reason="the scripts need bash")
QUICK = "configs/quick.yaml"
SLICE = ("--name", "mine", "--zone", "us-west4-a")


def launch(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SFTREC_")} | variables
    command = [str(BASH), str(ROOT / "launch" / script), *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )


def commands(script: str, *words: str, **variables: str) -> list[list[str]]:
    """The printed commands, as a shell reads them."""
    done = launch(script, *words, **variables)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


GCLOUD = ["gcloud", "compute", "tpus"]
ZONE = ["--zone", "us-west4-a"]


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["create", "--type", "v5litepod-16"],
         ["tpu-vm", "create", "mine", *ZONE, "--accelerator-type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite"]),
        (["create", "--type", "v5p-128", "--spot", "--project", "p"],
         ["tpu-vm", "create", "mine", *ZONE, "--project", "p", "--accelerator-type", "v5p-128", "--version",
          "v2-alpha-tpuv5", "--spot"]),
        (["create", "--type", "v6e-8", "--queued", "--spot"],
         ["queued-resources", "create", "mine", "--node-id", "mine", *ZONE, "--accelerator-type", "v6e-8",
          "--runtime-version", "v2-alpha-tpuv6e", "--spot"]),
        (["create", "--type", "v4-32", "--version", "other"],
         ["tpu-vm", "create", "mine", *ZONE, "--accelerator-type", "v4-32", "--version", "other"]),
        (["status"], ["tpu-vm", "describe", "mine", *ZONE]),
        (["status", "--queued"], ["queued-resources", "describe", "mine", *ZONE]),
        (["delete"], ["tpu-vm", "delete", "mine", *ZONE, "--quiet"]),
        (["delete", "--queued"], ["queued-resources", "delete", "mine", *ZONE, "--force", "--quiet"]),
    ],
)  # fmt: skip
def test_slices_are_asked_for_and_given_back(words: list[str], command: list[str]) -> None:
    assert commands("tpu_vm.sh", *words, *SLICE, "--dry-run") == [[*GCLOUD, *command]]


def test_the_checkout_goes_to_all_workers() -> None:
    scp, unpack = commands("tpu_vm.sh", "copy", *SLICE, "--dry-run")
    assert scp == [*GCLOUD, "tpu-vm", "scp", "./sftrec.tar.gz", "mine:sftrec.tar.gz", *ZONE, "--worker=all"]
    assert unpack[-2:] == ["--command", "mkdir -p sftrec && tar -xzf sftrec.tar.gz -C sftrec"] and "--worker=all" in unpack


def test_all_workers_run_together_in_one_folder(tmp_path: Path) -> None:
    words = ["run", *SLICE, "--dry-run", "--bucket", "my-runs", "--", QUICK, "--out", "a run", "--lora.targets", "q_proj|v_proj"]
    (command,) = commands("tpu_vm.sh", *words)
    assert command[:-1] == [*GCLOUD, "tpu-vm", "ssh", "mine", *ZONE, "--worker=all", "--command"]
    # What a worker does with it: gcsfuse and train.sh stand in here.
    (tmp_path / "sftrec" / "launch").mkdir(parents=True)
    for name, text in (("gcsfuse", 'echo "gcsfuse $*"'), ("mountpoint", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    script = 'printf "%s\\n" "$SFTREC_DISTRIBUTED $SFTREC_DEVICE" "$@"\n'
    (tmp_path / "sftrec" / "launch" / "train.sh").write_text(script, encoding="utf-8")
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        [str(BASH), "-c", command[-1]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    runs = tmp_path / "runs"
    assert done.stdout.splitlines() == [
        f"gcsfuse --implicit-dirs my-runs {runs}", "auto tpu", QUICK, "--out", f"{runs}/a run", "--lora.targets", "q_proj|v_proj",
    ]  # fmt: skip


def test_a_workload_of_a_cluster() -> None:
    place = ["--cluster", "c", "--name", "n", "--zone", "z"]
    words = f"{QUICK} --out /mnt/r --train.epochs 2"
    (command,) = commands("gke.sh", "run", *place, "--type", "v5litepod-16", "--dry-run", "--", *words.split())
    assert command[:3] == ["xpk", "workload", "create"]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options == {
        "--cluster": "c", "--workload": "n", "--zone": "z", "--tpu-type": "v5litepod-16", "--num-slices": "1",
        "--base-docker-image": "python:3.11", "--script-dir": str(ROOT), "--max-restarts": "100",
        "--restart-on-exit-codes": "75", "--termination-grace-period-seconds": "120",
        "--command": f"exec env SFTREC_DEVICE=tpu SFTREC_DISTRIBUTED=auto bash launch/train.sh {words}",
    }  # fmt: skip
    assert commands("gke.sh", "delete", *place, "--dry-run") == [
        ["xpk", "workload", "delete", "--cluster", "c", "--workload", "n", "--zone", "z"]
    ]


def test_a_pod_that_is_taken_away_hears_of_it(tmp_path: Path) -> None:
    place = ["--cluster", "c", "--name", "n", "--zone", "z", "--type", "t"]
    (command,) = commands("gke.sh", "run", *place, "--dry-run", "--", QUICK, "--out", "/mnt/r")
    (tmp_path / "launch").mkdir()
    script = 'trap "exit 75" TERM\ntouch begun\nwhile true; do sleep 0.1; done\n'
    (tmp_path / "launch" / "train.sh").write_text(script, encoding="utf-8")
    # As a pod does it: the command in a subshell, TERM to the first process, which passes it on.
    wrapped = f"""trap 'kill -TERM "$!"' TERM; ({command[-1]}) & pid=$!
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done; wait "$pid"; exit $?"""
    with subprocess.Popen([str(BASH), "-c", wrapped], cwd=tmp_path, stdin=subprocess.DEVNULL) as process:
        end = time.monotonic() + 30
        while not (tmp_path / "begun").exists() and time.monotonic() < end:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == 75


def test_a_job_installs_once_and_runs_on_every_node() -> None:
    (command,) = commands(
        "slurm.sh", "--nodes", "2", "--gpus", "4", "--sbatch", "--partition=gpu --time=1:00", "--dry-run", "--", QUICK
    )
    assert command[:-1] == [
        "sbatch", "--job-name", "sftrec", "--nodes", "2", "--ntasks-per-node", "1", "--gpus-per-node", "4",
        "--requeue", "--open-mode=append", "--signal=TERM@120", "--partition=gpu", "--time=1:00", "--wrap",
    ]  # fmt: skip
    train = ["bash", str(ROOT / "launch" / "train.sh")]
    words = [word for word in shlex.split(command[-1]) if not word.startswith("SFTREC_REPLACES=")]
    first, task = words.index("&&"), words.index("||")
    assert words[1:first] == ["srun", "--nodes=1", "--ntasks=1", "env", "SFTREC_DEVICE=cuda", *train, "--install-only"]
    run = [*train, str(ROOT / QUICK), "--out", str(ROOT / "runs" / "quick")]
    assert words[first + 1 : task] == ["srun", "env", "SFTREC_DEVICE=cuda", "SFTREC_DISTRIBUTED=auto", *run]
    (alone,) = commands("slurm.sh", "--dry-run", "--", QUICK)
    assert "SFTREC_DISTRIBUTED" not in alone[-1] and "SFTREC_DEVICE=cpu" in alone[-1]


@pytest.mark.parametrize(
    ("install", "status", "left", "again"),
    [(0, 0, 0, False), (0, 75, 75, True), (0, 2, 2, False), (0, 143, 143, False), (2, 0, 2, False)],
)
def test_a_job_that_saved_goes_back_into_the_queue(tmp_path: Path, install: int, status: int, left: int, again: bool) -> None:
    (command,) = commands("slurm.sh", "--dry-run", "--", QUICK, "--out", str(tmp_path / "a run"))
    srun = f'case "$*" in *--install-only) exit {install} ;; esac\nexit {status}'
    for name, text in (("srun", srun), ("scontrol", f'echo "$@" >>"{tmp_path}/scontrol.txt"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "42"}
    done = subprocess.run(["/bin/sh", "-c", command[-1]], env=environment, capture_output=True, text=True, check=False)
    said = (tmp_path / "scontrol.txt").read_text() if (tmp_path / "scontrol.txt").exists() else ""
    assert (done.returncode, said, done.stderr) == (left, "requeue 42\n" if again else "", "")


def test_a_job_overwrites_only_what_was_there_when_it_was_submitted(tmp_path: Path) -> None:
    def replaces() -> list[str]:
        (command,) = commands("slurm.sh", "--dry-run", "--", QUICK, "--out", str(tmp_path), "--overwrite")
        return [word for word in shlex.split(command[-1]) if word.startswith("SFTREC_REPLACES=")]

    assert replaces() == ["SFTREC_REPLACES=none"]
    (tmp_path / "config.yaml").touch()
    os.utime(tmp_path / "config.yaml", (1_000_000_000, 1_000_000_000))
    assert replaces() == ["SFTREC_REPLACES=1000000000"]
    (tmp_path / "metrics.json").touch()
    (tmp_path / "export").mkdir()
    for given, replaced, last in (
        ("--overwrite", "1000000000", "--overwrite"), ("--overwrite", "none", "--resume"),
        ("", "1000000000", str(tmp_path)), ("", "none", "--resume"),
    ):  # fmt: skip
        words = (QUICK, "--out", str(tmp_path), "--dry-run", *([given] if given else []))
        done = launch("train.sh", *words, SFTREC_REPLACES=replaced, SFTREC_DEVICE="cpu")
        assert done.stdout.splitlines()[-1].split()[-1] == last, done.stderr


def test_processes_know_each_other() -> None:
    install, *started = commands(
        "processes.sh", "--count", "3", "--devices", "2", "--dry-run", "--", QUICK, "--out", "/tmp/a run"
    )
    train = ["bash", str(ROOT / "launch" / "train.sh")]
    assert install == [*train, "--install-only"]
    flags = "XLA_FLAGS=--xla_force_host_platform_device_count=2"
    assert started == [
        ["env", "SFTREC_COORDINATOR=localhost:12355", "SFTREC_PROCESSES=3", f"SFTREC_PROCESS={i}", flags, *train, QUICK,
         "--out", "/tmp/a run"] for i in range(3)
    ]  # fmt: skip
    words = ("--count", "3", "--index", "2", "--coordinator", "first:9", "--dry-run", "--", QUICK, "--out", "/nfs/r")
    _, one = commands("processes.sh", *words, SFTREC_DEVICE="cuda")
    assert one[1:4] == ["SFTREC_COORDINATOR=first:9", "SFTREC_PROCESSES=3", "SFTREC_PROCESS=2"] and flags not in one


@pytest.mark.parametrize(
    ("script", "words", "text"),
    [
        ("tpu_vm.sh", ["--name", "a"], "say what to do: create, status, copy, run or delete"),
        ("tpu_vm.sh", ["create", "--name", "a"], "--zone is missing"),
        ("tpu_vm.sh", ["create", *SLICE], "--type is missing, such as --type v5litepod-16"),
        ("tpu_vm.sh", ["create", *SLICE, "--type", "v9-8"], "--type v9-8 is not known"),
        ("tpu_vm.sh", ["create", "--name", "--zone"], "--name needs a value"),
        ("tpu_vm.sh", ["run", *SLICE, "--", QUICK], "name the folder of the run with --out; all workers must see it"),
        ("tpu_vm.sh", ["run", *SLICE, "--", QUICK, "--out", "runs/a"], "give an absolute path that all workers see, or --bucket"),
        ("tpu_vm.sh", ["run", *SLICE, "--bucket", "b", "--", QUICK, "--out", "/a"], "--out is below ~/runs; give a relative one"),
        ("tpu_vm.sh", ["run", *SLICE, "--", "nosuch.yaml", "--out", "/a"], "nosuch.yaml: no such config"),
        ("gke.sh", ["run", "--name", "n", "--zone", "z"], "--cluster is missing"),
        ("gke.sh", ["run", "--cluster", "c", "--name", "n", "--zone", "z", "--type", "t", "--slices", "0"], "--slices 0: use"),
        ("gke.sh", ["run", *SLICE, "--cluster", "c", "--type", "t", "--", QUICK, "--out", "/r", "--overwrite"],
         "--overwrite would overwrite at every restart; name another --out, or add --restarts 0"),
        ("slurm.sh", ["--nodes", "0", "--", QUICK], "--nodes 0: use a number from 1 on"),
        ("slurm.sh", ["--nodes", "2"], "no CONFIG given"),
        ("processes.sh", ["--count", "x", "--", QUICK], "--count x: use a number from 1 on"),
        ("processes.sh", ["--index", "2", "--", QUICK], "--index 2: use 0 to 1"),
        ("processes.sh", ["--", QUICK], "name the folder of the run with --out"),
        ("processes.sh", ["--what"], "unknown word --what"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_line(script: str, words: list[str], text: str) -> None:
    done = launch(script, *words)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert text in done.stderr and f"see launch/{script} --help" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script: str) -> None:
    done = launch(script, "--help")
    assert done.returncode == 0 and f"usage: launch/{script}" in done.stdout and "--dry-run" in done.stdout


def test_a_command_that_is_not_installed_is_named() -> None:
    place = ["--cluster", "c", "--name", "n", "--zone", "z"]
    done = launch("gke.sh", "delete", *place, PATH="/usr/bin:/bin")
    if shutil.which("xpk", path="/usr/bin:/bin"):
        pytest.skip("xpk is installed here")
    assert done.returncode == 2 and "xpk is not installed here" in done.stderr
