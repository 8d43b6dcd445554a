"""A project whose result is published: a log with tied times, two seeds of four steps, `docs/results/tiny.json`."""

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helpers  # noqa: F401  (its cache of compiled programs)
import yaml
from tiny_run import CONFIG, ITEMS, STORIES, histories, write_lines

from sftrec_jax.cli import main

SHORT = {item: "ABCDE"[i // 6] + "uvwxyz"[i % 6] for i, item in enumerate(ITEMS)}
RUNS = Path("runs") / "reproduce" / "tiny"
SEEDS = (3, 8)


def write_project(folder: Path) -> None:
    """Every second item of a history shares its time with the one before, so tie seeds decide on many targets."""
    rows = [f"{user},{item},{at // 2}" for user, items in histories().items() for at, item in enumerate(items)]
    write_lines(folder / "log.csv", ["user_id,item_id,timestamp", *rows])
    write_lines(folder / "items.csv", ["item_id,title", *(f"{item},{SHORT[item]}" for item in ITEMS)])
    shutil.copytree(STORIES, folder / "base")
    (folder / "configs").mkdir()
    config = {**CONFIG, "data": {"source": "../log.csv", "catalogue": "../items.csv"}, "model": {"base": "../base"}}
    (folder / "configs" / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The current folder is `folder` for the block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@functools.cache
def project() -> Path:
    """Shared by all tests of this process; read it only, but for runs in folders of their own."""
    folder = Path(tempfile.mkdtemp(prefix="published-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_project(folder)
    with inside(folder):
        assert main(["reproduce", "tiny", "--publish", "--title", "tiny | one", "--seeds", *map(str, SEEDS)]) == 0
    return folder


def copied(folder: Path) -> Path:
    """What belongs to the published result, without the base and the runs; returns `folder`."""
    for name in ("log.csv", "items.csv"):
        shutil.copy(project() / name, folder / name)
    shutil.copytree(project() / "docs", folder / "docs")
    return folder


def record(folder: Path) -> dict[str, Any]:
    """The published JSON of a project."""
    return json.loads((folder / "docs/results/tiny.json").read_text(encoding="utf-8"))


def nested(values: dict[str, Any], path: str, to: Any) -> None:
    """Sets the value at a path such as `seeds/0/minutes`."""
    *keys, last = path.split("/")
    part: Any = values
    for key in keys:
        part = part[int(key)] if isinstance(part, list) else part[key]
    part[int(last) if isinstance(part, list) else last] = to


def edit_json(file: Path, path: str, to: Any) -> None:
    """The same in a JSON file."""
    values = json.loads(file.read_text(encoding="utf-8"))
    nested(values, path, to)
    file.write_text(json.dumps(values), encoding="utf-8")
