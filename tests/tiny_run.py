"""Runs of the command line that take seconds: a small log with a pattern to learn, its catalogue, a config over stories260K."""

import atexit
import functools
import random
import shutil
import tempfile
from pathlib import Path

import helpers  # noqa: F401  (its cache of compiled programs)
import yaml

from sftrec_jax.cli import main

STORIES = Path(__file__).parent / "fixtures" / "stories260k"
WORDS = "red big dog cat tree sun moon boy girl ball".split()
ITEMS = [f"i{i:02d}" for i in range(30)]
USERS = [f"u{u:02d}" for u in range(40)]
TITLES = {item: f"The {WORDS[i % 10]} {WORDS[(i * 7 + i // 10) % 10]} {1900 + i}" for i, item in enumerate(ITEMS)}
SHORT = {item: "ABCDE"[i // 6] + "uvwxyz"[i % 6] for i, item in enumerate(ITEMS)}
"""Titles of few tokens: what is compiled for a beam search grows with the longest."""
TITLES["i07"] = TITLES["i08"] = "Twice; said"

CONFIG = {
    "data": {"source": "log.csv", "catalogue": "items.csv"},
    "model": {"base": str(STORIES)},
    "lora": {"r": 4, "alpha": 8.0},
    "prompt": {"max_history": 16},
    "train": {
        "epochs": 50, "max_steps": 4, "row_length": 48, "batch_rows": 4, "learning_rate": 3e-3, "rows_learning_rate": 1e-2,
        "validate_every": 2, "validate_users": 16,
    },
    "evaluate": {"unconstrained_users": 4},
}  # fmt: skip


def histories() -> dict[str, list[str]]:
    """Items of each user in time order."""
    draw = random.Random(0)
    out = {}
    for user in USERS:
        start = draw.randrange(30)
        out[user] = [ITEMS[(start + 3 * step + draw.randrange(2)) % 30] for step in range(draw.randint(5, 9))]
    return out


def write_inputs(folder: Path, titles: dict[str, str] = TITLES) -> Path:
    """Log, catalogue and config; returns the config."""
    rows = [
        f"{user},{item},{1000 * at + n},{1 + at % 5}" for n, (user, items) in enumerate(histories().items())
        for at, item in enumerate(items)
    ]  # fmt: skip
    write_lines(folder / "log.csv", ["user_id,item_id,timestamp,rating", *rows])
    write_lines(folder / "items.csv", ["item_id,title", *(f"{item},{title}" for item, title in titles.items())])
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return folder / "tiny.yaml"


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@functools.cache
def trained() -> Path:
    """The folder of one finished run, shared by all tests of this process; read it only. Beside it lies `tiny.yaml`."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    assert main(["run", str(write_inputs(folder)), "--out", str(folder / "run")]) == 0
    return folder / "run"
