"""What a checkpoint belongs to, by name, so that a run is never gone on with, and never read, with anything else."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from sftrec_jax.console import console
from sftrec_jax.errors import UserError
from sftrec_jax.model.hub import BaseSource
from sftrec_jax.run.card import array_bytes, prompt_card, sha256_of, text_bytes
from sftrec_jax.run.session import Session
from sftrec_jax.train.batches import BatchPlan

HARMLESS = ("save_every", "save_minutes", "keep_checkpoints", "keep_every", "checkpoints")
"""Fields of `train` that change no result."""
SAMPLES = 16
SAMPLE_BYTES = 1 << 20
"""Of a file of weights so many pieces are hashed: hashing all of a large base would take longer than loading it."""
READ = ("items.codes", "items.ids", "tokenizer", "model.weights", "data.histories")
"""What recommending, evaluating and exporting depend on."""


def fingerprint(session: Session) -> dict[str, str]:
    """Of the run itself: model, adapters, data, tokenizer, item codes, prompts and the options of training.

    Hashes are SHA-256 of contents. Those of items and their codes begin with how many items they cover, since `add-items` adds
    more behind them.
    """
    config, data, codes = session.config, session.dataset, session.codes
    model = dataclasses.asdict(config.model) | {"compute_dtype": session.build.dtype.name, "remat": session.build.remat}
    sections = {
        "model": model,
        "lora": dataclasses.asdict(config.lora) | {"start": None if config.lora.start is None else _folder(config.lora.start)},
        "train": {key: value for key, value in dataclasses.asdict(config.train).items() if key not in HARMLESS},
        "prompt": prompt_card(config.prompt),
        "tasks": dataclasses.asdict(config.tasks)
        | {"templates": None if config.tasks.templates is None else _folder(config.tasks.templates)},
    }
    named = {f"{section}.{key}": repr(value) for section, values in sections.items() for key, value in values.items()}
    n = len(codes.codes)
    return named | {
        "model.base": Path(session.source.label).name,
        "model.tokenizer": repr(config.model.tokenizer and Path(config.model.tokenizer).name),
        "model.weights": weights_sha256(session.source),
        "tokenizer": sha256_of(session.tokenizer.backend_tokenizer.to_str().encode()),
        "items.codes": f"{n} {codes_sha256(session, n)}",
        "items.ids": f"{n} {ids_sha256(session, n)}",
        "data.histories": sha256_of(text_bytes(data.user_ids), array_bytes(data.offsets), array_bytes(data.items)),
        "data.split": sha256_of(*map(array_bytes, (data.train_end, data.valid_position, data.test_position))),
    }


def packing_sha256(plan: BatchPlan) -> str:
    """Of the rows of the first epoch: which examples of which size stand where."""
    rows = plan.rows(0)
    return sha256_of(*map(array_bytes, (rows.order, rows.starts, plan.lengths, plan.targets)), str(plan.targets_per_row).encode())


def codes_sha256(session: Session, n: int) -> str:
    """Of the tokens of the first n items, however many tokens others have."""
    first = session.codes.codes[:n]
    return sha256_of(array_bytes(first[:, : int((first >= 0).sum(axis=1).max(initial=0))]))


def ids_sha256(session: Session, n: int) -> str:
    """Of the ids of the first n items."""
    return sha256_of(text_bytes(session.dataset.item_ids[:n]))


def weights_sha256(source: BaseSource) -> str:
    """Of the base: each of its files by name, size, and pieces at even distances (small files whole)."""
    files = [source.gguf] if source.gguf else sorted(p for p in source.folder.iterdir() if p.suffix in (".json", ".safetensors"))
    parts: list[bytes] = []
    for path in files:
        size = path.stat().st_size
        parts.append(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                parts.append(hashlib.file_digest(file, "sha256").digest())
                continue
            for at in np.linspace(0, size - SAMPLE_BYTES, SAMPLES).astype(np.int64).tolist():
                file.seek(at)
                parts.append(file.read(SAMPLE_BYTES))
    return sha256_of(*parts)


def check_same(where: Any, step: int, wrote: dict[str, str], mine: dict[str, str], accept: bool) -> None:
    """UserError, with the names, where a run would be gone on with as another than it was; `accept`: say so and go on."""
    names = sorted(name for name in wrote.keys() | mine.keys() if wrote.get(name) != mine.get(name))
    if not names:
        return
    shown = ", ".join(_difference(name, wrote.get(name), mine.get(name)) for name in names)
    if accept:
        console.print(f"accepted: step {step} was written with other settings ({shown})", markup=False)
        return
    raise UserError(
        f"{where}: step {step} was written with other settings ({shown}); set them back, start again in another --out, or add "
        "--accept-changes"
    )


def check_readable(session: Session, where: Any, step: int, wrote: dict[str, str]) -> None:
    """UserError where a checkpoint is of other items, another tokenizer, base or data than what lies in the run's folder."""
    if not wrote:
        return
    mine = fingerprint(session)
    for name, of in (("items.codes", codes_sha256), ("items.ids", ids_sha256)):
        n = int(wrote[name].split()[0])
        mine[name] = f"{n} {of(session, n)}"  # those that were added since do not count
    names = [name for name in READ if wrote.get(name) != mine[name]]
    if names:
        raise UserError(
            f"{where}: step {step} belongs to another run than {session.folder.prepared}: {', '.join(names)} differ; put back "
            "what was replaced, or prepare and train again"
        )


def _difference(name: str, wrote: str | None, mine: str | None) -> str:
    if wrote is None or mine is None or max(len(wrote), len(mine)) > 40:
        return name
    return f"{name} {wrote}, now {mine}"


def _folder(path: str) -> str:
    """Of the files of a folder, by name and content; as it is where there is none."""
    root = Path(path)
    if not root.is_dir():
        return path
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return sha256_of(*(part for p in files for part in (p.relative_to(root).as_posix().encode(), p.read_bytes())))
