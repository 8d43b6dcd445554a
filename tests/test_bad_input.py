"""Mistakes that a user can make: exit code 2, one line that says what, where and what to do, nothing left in the way."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_run import TITLES, trained, write_inputs, write_lines
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from sftrec_jax.cli import main

Change = Callable[[Path], list[str]]
"""Spoils the inputs in a folder and returns options for the command."""

HEADER = "user_id,item_id,timestamp,rating"


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Runs a command that must fail; returns its one line."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def log_line(number: int, line: str) -> Change:
    """Puts `line` in place of a row of the log, counted from 1."""

    def change(folder: Path) -> list[str]:
        lines = (folder / "log.csv").read_text(encoding="utf-8").splitlines()
        lines[number - 1] = line
        write_lines(folder / "log.csv", lines)
        return []

    return change


def log_of(*lines: str) -> Change:
    def change(folder: Path) -> list[str]:
        write_lines(folder / "log.csv", list(lines))
        return []

    return change


def config_text(text: str) -> Change:
    def change(folder: Path) -> list[str]:
        (folder / "tiny.yaml").write_text(text, encoding="utf-8")
        return []

    return change


def config_key(section: str, key: str, value: object) -> Change:
    def change(folder: Path) -> list[str]:
        config = yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8"))
        config.setdefault(section, {})[key] = value
        return config_text(yaml.safe_dump(config))(folder)

    return change


def options(*words: str) -> Change:
    return lambda folder: list(words)


def latin1(folder: Path) -> list[str]:
    lines = (folder / "log.csv").read_bytes().split(b"\n")
    lines[4] = "u00,café,7,1".encode("latin-1")
    (folder / "log.csv").write_bytes(b"\n".join(lines))
    return []


def latin1_catalogue(folder: Path) -> list[str]:
    (folder / "items.csv").write_bytes((folder / "items.csv").read_bytes().replace(b"The red", b"Th\xe9 red", 1))
    return []


def nothing_to_read(folder: Path) -> list[str]:
    (folder / "log.csv").write_bytes(b"")
    return []


def title_without_tokens(folder: Path) -> list[str]:
    """A tokenizer that knows the letters of English only, and a title in Japanese."""
    letters = sorted(set("".join(TITLES.values())))
    vocabulary = {piece: n for n, piece in enumerate(["<s>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "letters")
    text = (folder / "items.csv").read_text(encoding="utf-8").replace(TITLES["i05"], "千と千尋")
    (folder / "items.csv").write_text(text, encoding="utf-8")
    return ["--model.tokenizer", str(folder / "letters")]


CASES: dict[str, tuple[Change, list[str]]] = {
    "missing column": (
        log_line(1, "user_id,item,timestamp,rating"),
        ["log.csv", "'item_id'", "data.item_column", "nearest: 'item'"],
    ),
    "no column of times": (log_line(1, "user_id,item_id,when,rating"), ["log.csv", "data.time_column", "null"]),
    "log with a header only": (log_of(HEADER), ["log.csv", "no interactions"]),
    "log without a byte": (nothing_to_read, ["log.csv", "empty"]),
    "no log": (options("--data.source", "nowhere.csv"), ["nowhere.csv", "data section"]),
    "one user": (log_of(HEADER, *(f"a,i{n:02d},{n},1" for n in range(9))), ["log.csv", "one user", "data.user_column"]),
    "too short histories": (options("--data.user-core", "50"), ["log.csv", "data.user_core (50)"]),
    "item not in the catalogue": (log_line(5, "u00,i99,7,1"), ["log.csv", "'i99'", "row 5", "items.csv", "add the items"]),
    "title without tokens": (title_without_tokens, ["'i05'", "千と千尋", "items.init: mean"]),
    "NaN rating": (
        lambda folder: [*log_line(5, "u00,i01,7,nan")(folder), "--data.rating-column", "rating"],
        ["log.csv", "row 5", "'nan'", "data.rating_column: null"],
    ),
    "time that is none": (log_line(5, "u00,i01,soon,1"), ["log.csv", "row 5", "'soon'"]),
    "log not in UTF-8": (latin1, ["log.csv", "row 5", "UTF-8", "iconv"]),
    "catalogue not in UTF-8": (latin1_catalogue, ["items.csv", "row 2", "UTF-8", "iconv"]),
    "unknown key": (config_key("train", "learning_rat", 1), ["tiny.yaml", "train.learning_rat", "train.learning_rate"]),
    "unknown section": (config_key("trian", "epochs", 1), ["tiny.yaml", "trian", "train"]),
    "value of a wrong type": (config_key("train", "epochs", "many"), ["tiny.yaml", "train.epochs", "'many'", "float"]),
    "not YAML": (config_text("data: [unclosed\n"), ["tiny.yaml", "not valid YAML", "line 2"]),
    "unknown option": (options("--train.epoch", "2"), ["--train.epoch;", "--train.epochs"]),
    "misspelt option": (options("--overwite"), ["--overwite", "--overwrite"]),
    "option of a wrong type": (options("--train.epochs", "many"), ["--train.epochs", "'many'"]),
    "stray word": (options("stray"), ["stray"]),
    "no base model": (config_key("model", "base", "../no/such/base"), ["model.base", "no/such/base", "config.json"]),
    "rank 0": (options("--lora.r", "0"), ["lora.r is 0", "1 or more"]),
    "unknown target": (options("--lora.targets", "q_proj", "v_prj"), ["lora.targets", "'v_prj'", "v_proj"]),
    "too many devices": (options("--mesh.tensor", "64"), ["mesh", "64"]),
}


@pytest.mark.parametrize("case", CASES)
def test_prepare_refuses(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    change, expected = CASES[case]
    config, out = write_inputs(tmp_path), tmp_path / "runs" / "one"
    extra = change(tmp_path)
    line = refused(capsys, ["prepare", str(config), "--out", str(out), *extra])
    assert [word for word in expected if word not in line] == [], line
    assert not out.parent.exists()


def test_the_same_command_works_once_corrected(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, out = write_inputs(tmp_path), tmp_path / "run"
    out.mkdir()  # a folder of the user's own stays
    command = ["prepare", str(config), "--out", str(out)]
    log_line(5, "u00,i99,7,1")(tmp_path)
    refused(capsys, command)
    assert out.is_dir() and not any(out.iterdir())
    write_inputs(tmp_path)
    assert main(command) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    log_line(5, "u00,i99,7,1")(tmp_path)
    refused(capsys, [*command, "--overwrite"])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_item_longer_than_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, out = write_inputs(tmp_path), tmp_path / "run"
    words = ["--items.tokenizer", "title", "--train.row-length", "8"]
    capsys.readouterr()
    assert main(["run", str(config), "--out", str(out), *words]) == 2
    *summary, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "context has 8" in line and "items.max_title_tokens" in line
    assert not any(text.startswith(("error", "Traceback")) for text in summary)
    assert not out.exists()


def test_batch_that_the_devices_cannot_divide(tmp_path: Path):
    config, out = write_inputs(tmp_path), tmp_path / "run"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "sftrec_jax.cli", "prepare", str(config), "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: mesh data 3, fsdp 1, context 1, tensor 1: train.batch_rows is 4, which data x fsdp = 3 devices cannot divide; "
        "use 6 (no other mesh of 3 devices works)\n"
    )
    assert not out.exists()


@pytest.mark.parametrize("verb", [["train"], ["evaluate"], ["recommend", "--user", "1"], ["export", "--to", "there"]])
def test_no_such_run(verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = refused(capsys, [verb[0], str(tmp_path / "none"), *verb[1:]])
    assert str(tmp_path / "none") in line and "--out DIR" in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--user", "u03", "--k", "0"], ["--k 0", "from 1 to 30"]),
        (["--user", "u03", "--k", "31"], ["--k 31", "from 1 to 30"]),
        (["--user", "nobody"], ["--user nobody", "40", "u00"]),
        (["--history", "The red dgo 1900"], ["'The red dgo 1900'", "nearest titles"]),
        ([], ["--user", "--history", "--file"]),
        (["--user", "u03", "--to", "out.csv"], ["out.csv", ".parquet", ".jsonl"]),
        (["--user", "u03", "--to", "no/folder/out.jsonl"], ["no/folder"]),
        (["--file", "none.jsonl"], ["none.jsonl"]),
        (["--nonsense"], ["--nonsense", "sftrec recommend --help"]),
        (["--user", "u03", "--to", "a.jsonl", "--json"], ["--to", "--json", "choose one"]),
        (["--user", "u03", "--overwrite"], ["--overwrite", "--to"]),
        (["--user", "u03", "--decode.top-k", "5"], ["--decode.top-k", "--k"]),
        (["--user", "u03", "--decode.beam", "0"], ["decode.beam is 0"]),
    ],
    ids=lambda words: "_".join(words[-2:]) if words and words[0] in ("--user", "--history", "--file") else "",
)
def test_recommend_refuses(words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]):
    run = trained()
    line = refused(capsys, ["recommend", str(run), *words])
    assert [word for word in expected if word not in line] == [], line


def test_three_nearest_titles(capsys: pytest.CaptureFixture[str]):
    line = refused(capsys, ["recommend", str(trained()), "--history", f"{TITLES['i03']}; The tree sun"])
    nearest = line.split("nearest titles are ")[1].split("; ")
    assert len(nearest) == 3 and any("tree" in title for title in nearest)


def test_file_of_histories_names_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_lines(tmp_path / "lists.txt", [TITLES["i01"], "No such title"])
    line = refused(capsys, ["recommend", str(trained()), "--file", str(file)])
    assert str(file) in line and "row 2" in line and "'No such title'" in line
    file = write_lines(tmp_path / "lists.jsonl", ['{"items": ["i01"]}'])
    assert "`history`" in refused(capsys, ["recommend", str(trained()), "--file", str(file)])
    file.write_bytes(b"\xff\xfe")
    assert str(file) in refused(capsys, ["recommend", str(trained()), "--file", str(file)])


@pytest.mark.parametrize("argv", [[], ["fly"], ["run"], ["export", "somewhere"], ["recommend", "somewhere", "--k", "many"]])
def test_command_line_that_is_none(argv: list[str], capsys: pytest.CaptureFixture[str]):
    assert "; " in refused(capsys, argv)
