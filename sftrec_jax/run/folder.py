"""What lies where in the folder of a run, and the rule that nothing of a user's is lost."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftrec_jax.config import RunConfig, TrainConfig
from sftrec_jax.config_file import dump_config, load_config, to_dict
from sftrec_jax.distributed import is_main
from sftrec_jax.errors import UserError
from sftrec_jax.run import lock
from sftrec_jax.run.lock import locked
from sftrec_jax.train.store import Store, is_remote

ENTRIES = (
    "config.yaml", "prepared", "checkpoints", "metrics.jsonl", "metrics.json", "recommendations.parquet", "export", ".evaluate",
    ".fetched", "save-now",
)  # fmt: skip
"""Everything that a run writes; `--overwrite` removes these and nothing else."""

CHANGEABLE = (
    "mesh.",
    "train.save_every",
    "train.save_minutes",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.checkpoints",
)
"""Fields that a resumed run may change unasked: they change no result, but for rounding on another mesh."""
ACCEPTABLE = ("train.", "lora.dropout", "decode.", "evaluate.")
"""Fields that it may change with `--accept-changes`: what was prepared does not depend on them."""

PARKED = ".replaced"
"""Where an earlier run waits inside its folder until the one that overwrites it has come far enough."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def prepared(self) -> Path:
        """Histories, catalogue, item codes."""
        return self.path / "prepared"

    @property
    def whole(self) -> Path:
        """The last file of `prepared`: without it preparing was stopped half-way, or found leaks."""
        return self.path / "prepared" / "whole"

    @property
    def replaced(self) -> Path:
        """`prepared` as it was, for the moment in which `add-items` puts another in its place."""
        return self.path / ".prepared.old"

    @property
    def item_vectors(self) -> Path:
        """Added to the first values of new token rows (`items.init: collaborative`)."""
        return self.path / "prepared" / "item_vectors.npy"

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints, where `train.checkpoints` names no other place; on their way there where that is a store."""
        return self.path / "checkpoints"

    @property
    def fetched(self) -> Path:
        """Copies of checkpoints that lie on a store, to be read."""
        return self.path / ".fetched"

    @property
    def metrics(self) -> Path:
        """Test metrics of the model and the baselines."""
        return self.path / "metrics.json"

    @property
    def recommendations(self) -> Path:
        """Ten items a user."""
        return self.path / "recommendations.parquet"

    @property
    def evaluating(self) -> Path:
        """Lists of the users that an evaluation has come past, while it is under way."""
        return self.path / ".evaluate"

    @property
    def export(self) -> Path:
        """The merged model; the adapter in `adapter/` below."""
        return self.path / "export"


def holds_steps(folder: RunFolder, train: TrainConfig) -> bool:
    """Whether a checkpoint that was written to its end, which is when it has its manifest, is where the config says.

    Raises UserError where that place cannot be reached.
    """
    own = _whole(folder.checkpoints)
    place = train.checkpoints
    if place is None:
        return own
    if is_remote(place):
        return own or bool(Store(place).steps())  # what is here is on its way there
    try:
        return _whole(Path(place))
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error.strerror}); name another folder as train.checkpoints") from None


def _whole(checkpoints: Path) -> bool:
    return checkpoints.is_dir() and any(
        entry.name.isdigit() and (entry / "manifest.json").exists() for entry in checkpoints.iterdir()
    )


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name, then renames it; of several processes the first alone."""
    if not is_main():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space or choose another --out") from None


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_free(to: Path, overwrite: bool) -> None:
    """UserError for an option `--to` that is no `.json`, lies in no folder, or names a file that must stay."""
    if to.suffix != ".json":
        raise UserError(f"--to {to}: unknown ending {to.suffix!r}; use .json")
    if not to.parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {to.parent}; make it or choose another place")
    if to.exists() and not overwrite:
        raise UserError(f"--to {to}: exists already; name another file or add --overwrite")


def differing_fields(a: RunConfig, b: RunConfig) -> list[str]:
    """Names such as `train.epochs` in which two configurations differ."""
    first, second = to_dict(a), to_dict(b)
    return [f"{s}.{k}" for s in first for k in first[s] if first[s][k] != second[s][k]]


@contextmanager
def new_run(out: Path, config: RunConfig, resume: bool, overwrite: bool, accept: bool = False) -> Iterator[RunFolder]:
    """Makes the folder and writes `config.yaml` for the block that fills it.

    A folder that holds anything is refused; with `resume` it must be a run of the same configuration, but for what may change and
    what `accept` allows; with `overwrite` the files of the run in it make room. No other process may work in the folder.

    When the block ends in a UserError or an interrupt before there is a checkpoint, what it wrote is removed and the earlier run
    put back, so that the same command works once the mistake is corrected. A run that is resumed is left as it is.
    """
    folder = RunFolder(out)
    going_on = _check_free(folder, config, resume, overwrite, accept)
    if not going_on:
        _check_place(folder, config)
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); choose another --out") from None
    try:
        with locked(out):
            yield from _filled(folder, config, going_on)
    except (UserError, KeyboardInterrupt):
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


def _filled(folder: RunFolder, config: RunConfig, going_on: bool) -> Iterator[RunFolder]:
    out = folder.path
    parked = out / PARKED
    if not going_on:
        shutil.rmtree(parked, ignore_errors=True)
        _move_entries(out, parked)
    try:
        write_text(folder.config, dump_config(config))
        yield folder
    except (UserError, KeyboardInterrupt):
        if not going_on and not _may_hold_steps(folder, config.train):
            _remove_entries(out)
            _move_entries(parked, out)
            shutil.rmtree(parked, ignore_errors=True)
        raise
    shutil.rmtree(parked, ignore_errors=True)


def _may_hold_steps(folder: RunFolder, train: TrainConfig) -> bool:
    try:
        return holds_steps(folder, train)
    except UserError:
        return True  # nobody can tell now, and so nothing is removed


def _check_place(folder: RunFolder, config: RunConfig) -> None:
    """UserError where a new run would write among the steps of another one, or cannot write at all."""
    place = config.train.checkpoints
    if place is None:
        return
    if is_remote(place):
        taken = bool(Store(place).steps())
    else:
        taken = holds_steps(folder, config.train)
    if taken:
        raise UserError(
            f"{place}: holds checkpoints already, and --overwrite removes nothing outside of --out; add --resume to go on with "
            "them, remove them yourself, or name another folder as train.checkpoints"
        )


def _check_free(folder: RunFolder, config: RunConfig, resume: bool, overwrite: bool, accept: bool) -> bool:
    """True for a run to go on with, False for a fresh start; UserError where neither is allowed."""
    out = folder.path
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder with --out")
    if resume and overwrite:
        raise UserError("--resume and --overwrite were both given; use one of them")
    if not out.exists() or not any(entry.name != lock.NAME for entry in out.iterdir()):
        return False
    if not (resume or overwrite):
        raise UserError(
            f"{out}: already exists and is not empty; add --resume to go on, --overwrite to start again, or another --out"
        )
    if not folder.config.exists():
        option = "--resume has nothing to go on with" if resume else "--overwrite removes nothing"
        raise UserError(f"{out}: holds no run (no config.yaml), so {option}; choose another --out")
    differing = differing_fields(load_config(folder.config), config) if resume else []
    fields = [field for field in differing if not field.startswith(CHANGEABLE)]
    if any(not field.startswith(ACCEPTABLE) for field in fields) or (fields and not accept):
        also = ", add --accept-changes" if all(field.startswith(ACCEPTABLE) for field in fields) else ""
        raise UserError(
            f"{out}: was run with another configuration ({', '.join(fields)} differ); resume with {folder.config}{also}, "
            "start again with --overwrite, or choose another --out"
        )
    return resume


def _move_entries(source: Path, target: Path) -> None:
    for name in ENTRIES:
        if os.path.lexists(source / name):
            target.mkdir(exist_ok=True)
            os.replace(source / name, target / name)


def _remove_entries(out: Path) -> None:
    for name in ENTRIES:
        entry = out / name
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)


def open_folder(path: Path) -> RunFolder:
    """The folder of an earlier run; raises UserError where there is none."""
    folder = RunFolder(path)
    if not folder.config.exists():
        raise UserError(f"{path}: holds no run (no config.yaml); name the folder that `sftrec run ... --out DIR` wrote")
    return folder
