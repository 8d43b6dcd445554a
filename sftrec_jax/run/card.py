"""The protocol card: everything that a metric depends on, so that two numbers can be seen to be comparable, or not."""

import dataclasses
import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import sftrec_jax
from sftrec_jax.config import PromptConfig, RunConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.run.session import Session


def protocol_card(session: Session, step: int, users: int) -> dict[str, Any]:
    """JSON-serialisable; equal cards mean that metrics were taken in the same way, of the same data and codes.

    Args:
        session: the run as it was evaluated, options of the command line included.
        step: of the checkpoint.
        users: with a test target, that were evaluated.
    """
    config, codes = session.config, session.codes
    return data_card(config, session.dataset, users) | {
        "items": {
            "tokenizer": config.items.tokenizer,
            "codes_sha256": sha256_of(array_bytes(codes.codes)),
            "tokens_at_most": int(codes.codes.shape[1]),
            "distinct_codes": len(np.unique(codes.codes, axis=0)),
        },
        "prompt": prompt_card(config.prompt),
        "decode": {name: getattr(config.decode, name) for name in ("beam", "top_k", "normaliser")},
        "model": {"base": _name(session.source.label), "from_scratch": config.model.from_scratch, "checkpoint_step": step},
        "train": {"method": config.train.method, "row_length": config.train.row_length},
        "seeds": {
            "tie": config.data.tie_seed,
            "embedding": config.embedding.seed,
            "semantic": config.semantic.seed,
            "train": config.train.seed,
        },
    }


def data_card(config: RunConfig, dataset: Dataset, users: int) -> dict[str, Any]:
    """The part of the card that says how data were split, ordered and ranked, and by which program.

    Hashes are SHA-256 of contents, not of files: they do not change with a file format. `data.source` is a name without
    folders. Arguments as for `protocol_card`.
    """
    histories = sha256_of(text_bytes(dataset.user_ids), array_bytes(dataset.offsets), array_bytes(dataset.items))
    places = [dataset.train_end, dataset.valid_position, dataset.test_position]
    kind = "given" if dataset.given else config.data.split
    split = sha256_of(*map(array_bytes, [*places, dataset.train_begin] if dataset.given else places))
    fractions = {"valid_fraction": config.data.valid_fraction, "test_fraction": config.data.test_fraction}
    order = {"by": "time", "ties_by": "hash of (tie_seed, user, item)", "tie_seed": config.data.tie_seed}
    return {
        "data": {
            "source": _name(str(dataset.report.get("source", config.data.source))),
            "users": len(dataset.user_ids),
            "items": len(dataset.item_ids),
            "interactions": len(dataset.items),
            "histories_sha256": histories,
            "catalogue_sha256": sha256_of(text_bytes(dataset.item_ids), text_bytes(dataset.titles)),
        }
        | ({"profiles_sha256": sha256_of(*map(text_bytes, dataset.profiles.values()))} if dataset.profiles else {}),
        "split": {"kind": kind, "sha256": split} | (fractions if kind == "temporal" else {}),
        "order": (order if dataset.timed else {"by": "the source's order"})
        | {"tied_timestamp_share": dataset.report.get("tied_timestamp_share") if dataset.timed else None},
        "candidates": "all items of the catalogue" + (" but those of the history" if config.evaluate.mask_seen else ""),
        "users_evaluated": users,
        "baselines": {"counter_decay": config.evaluate.counter_decay},
        "code": {"source_sha256": source_hash()} | {name: version(name) for name in ("sftrec-jax", "jax", "flax", "numpy")},
    }


def prompt_card(prompt: PromptConfig) -> dict[str, Any]:
    """The options of prompts, templates by the SHA-256 of their texts."""
    hashes = [sha256_of(Path(template).read_bytes()) for template in prompt.templates]
    return dataclasses.asdict(prompt) | {"templates": hashes}


def source_hash() -> str:
    """SHA-256 over the package's Python files, by name and content."""
    root = Path(sftrec_jax.__file__).parent
    files = sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix())
    return sha256_of(*(part for file in files for part in (file.relative_to(root).as_posix().encode(), file.read_bytes())))


def sha256_of(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def text_bytes(texts: Iterable[str]) -> bytes:
    return b"".join(len(data).to_bytes(4, "little") + data for data in (str(text).encode("utf-8") for text in texts))


def array_bytes(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, np.dtype("<i8")).tobytes() + repr(values.shape).encode()


def _name(label: str) -> str:
    return Path(label).name if Path(label).is_absolute() else label
