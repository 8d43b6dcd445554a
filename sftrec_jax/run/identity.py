"""What decides the lists that a run gives, down to the last bit, as a dictionary that can be kept and compared."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sftrec_jax import __version__
from sftrec_jax.config_file import to_dict
from sftrec_jax.model.hub import BaseSource
from sftrec_jax.run.places import step_folder
from sftrec_jax.run.session import Session, describe_devices

SMALL = 1 << 20
"""Files up to so many bytes are read; of larger ones the size counts."""
OF_BASE = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def identity(session: Session, step: int) -> dict[str, Any]:
    """Checkpoint, base, catalogue, templates, fields of the config, versions and devices.

    Weights are not read: of a checkpoint and a base the names and sizes of files count, and what the small ones hold, among
    which are the time and the content's names of a checkpoint.
    """
    config = to_dict(session.config)
    return {
        "checkpoint_step": step,
        "checkpoint": folder_digest(step_folder(session.folder, session.config.train, step)),
        "base": _base(session.source),
        "catalogue": _catalogue(session),
        "templates": folder_digest(session.folder.prepared / "templates"),
        # Where templates and a first adapter lie is no part of what they hold.
        "prompt": config["prompt"] | {"templates": len(config["prompt"]["templates"])},
        "model": {name: value for name, value in config["model"].items() if name not in ("base", "revision", "tokenizer")},
        "lora": config["lora"] | {"start": config["lora"]["start"] is not None},
        "train": {name: config["train"][name] for name in ("method", "row_length")},
        "decode": config["decode"],
        "devices": describe_devices(session.mesh),
        "versions": {"sftrec_jax": __version__, "jax": jax.__version__},
    }


def folder_digest(path: Path) -> str:
    """SHA-256 over the names of all files below a folder, their sizes, and the bytes of small ones."""
    return files_digest((file.relative_to(path).as_posix(), file) for file in sorted(path.rglob("*")) if file.is_file())


def _base(source: BaseSource) -> str:
    """Of weights, config and tokenizer, which may lie among files that are something else's."""
    weights = [source.gguf] if source.gguf is not None else sorted(source.folder.glob("*.safetensors*"))
    parts = [*weights, *(folder / name for folder in (source.folder, source.tokenizer) for name in OF_BASE)]
    return files_digest((file.name, file) for file in parts if file.is_file())


def files_digest(files: Iterable[tuple[str, Path]]) -> str:
    """As `folder_digest`, of files under the names given."""
    digest = hashlib.sha256()
    for name, file in files:
        size = file.stat().st_size
        digest.update(f"{name}\n{size}\n".encode())
        if size <= SMALL:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _catalogue(session: Session) -> str:
    """Of all items their tokens, ids and titles, in their order."""
    digest = hashlib.sha256(np.ascontiguousarray(session.codes.codes).tobytes())
    for texts in (session.dataset.item_ids, session.codes.titles):
        for text in texts.tolist():
            digest.update(f"{text}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
