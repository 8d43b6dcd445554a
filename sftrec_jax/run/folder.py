"""What lies where in the folder of a run, and the rule that nothing of a user's is lost."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftrec_jax.config import RunConfig, dump_config, load_config, to_dict
from sftrec_jax.errors import UserError

ENTRIES = ("config.yaml", "prepared", "checkpoints", "metrics.jsonl", "metrics.json", "recommendations.parquet", "export")
"""Everything that a run writes; `--overwrite` removes these and nothing else."""


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
    def checkpoints(self) -> Path:
        """Orbax checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Test metrics of the model and the baselines."""
        return self.path / "metrics.json"

    @property
    def recommendations(self) -> Path:
        """Ten items a user."""
        return self.path / "recommendations.parquet"

    @property
    def export(self) -> Path:
        """The merged model; the adapter in `adapter/` below."""
        return self.path / "export"


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name, then renames it."""
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


def differing_fields(a: RunConfig, b: RunConfig) -> list[str]:
    """Names such as `train.epochs` in which two configurations differ."""
    first, second = to_dict(a), to_dict(b)
    return [f"{s}.{k}" for s in first for k in first[s] if first[s][k] != second[s][k]]


def create_run(out: Path, config: RunConfig, resume: bool, overwrite: bool) -> RunFolder:
    """Makes the folder and writes `config.yaml`.

    A folder that holds anything is refused; with `resume` it must be a run of the same configuration, with `overwrite`
    the files of the run in it are removed.
    """
    folder = RunFolder(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder with --out")
    if out.exists() and any(out.iterdir()):
        if resume and folder.config.exists():
            fields = differing_fields(load_config(folder.config), config)
            if fields:
                raise UserError(
                    f"{out}: was run with another configuration ({', '.join(fields)} differ); resume with {folder.config}, "
                    "or choose another --out"
                )
        elif overwrite:
            if not folder.config.exists():
                raise UserError(f"{out}: holds no run (no config.yaml), so --overwrite removes nothing; choose another --out")
            for name in ENTRIES:
                entry = out / name
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)
        else:
            raise UserError(
                f"{out}: already exists and is not empty; add --resume to go on, --overwrite to start again, or another --out"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); choose another --out") from None
    write_text(folder.config, dump_config(config))
    return folder


def open_folder(path: Path) -> RunFolder:
    """The folder of an earlier run; raises UserError where there is none."""
    folder = RunFolder(path)
    if not folder.config.exists():
        raise UserError(f"{path}: holds no run (no config.yaml); name the folder that `sftrec run ... --out DIR` wrote")
    return folder
