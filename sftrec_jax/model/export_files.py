"""Folders that appear complete or not at all, and safetensors files in them."""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sftrec_jax.distributed import is_main
from sftrec_jax.errors import UserError

LazyTensors = dict[str, tuple[int, Callable[[], np.ndarray]]]
"""Tensor name -> (bytes, how to read it), so that one file's tensors are on the host at a time."""

# What an export writes, now or with another tokenizer class; a folder that holds anything else is never replaced.
_OWN_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "README.md",
    "adapter_config.json", "adapter_model.safetensors", "adapter", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "additional_chat_templates", "vocab.json", "merges.txt", "items.jsonl",
    "prompt.json",
)  # fmt: skip


def plan_shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Divides tensors (name -> bytes) into files of at most `max_bytes`, in order; a larger tensor has a file of its own."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_weights(folder: Path, tensors: LazyTensors, max_bytes: int) -> int:
    """Writes `model.safetensors`, or several files and their index; returns the bytes of all tensors."""
    shards = plan_shards({name: size for name, (size, _) in tensors.items()}, max_bytes)
    total = sum(size for size, _ in tensors.values())
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_tensors({name: tensors[name][1]() for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """One safetensors file as transformers and peft read it; of several processes the first alone writes it."""
    if not is_main():
        return
    # Of a transposed view safetensors writes the untransposed bytes without a word, hence ascontiguousarray.
    # transformers asks for the format entry.
    try:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error


def check_target(out: Path, overwrite: bool) -> Path:
    """The folder to export to, links resolved (a link stays one and its target is replaced).

    Raises UserError for a file, for a folder that is not empty (without `overwrite`), and for one with other files than
    those of an export (always).
    """
    out = Path(os.path.realpath(out))
    if not is_main():
        return out
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder to export to")
    names = sorted(p.name for p in out.iterdir()) if out.exists() else []
    if names and not overwrite:
        raise UserError(f"{out}: the folder is not empty ({names[0]}); name another one or add --overwrite")
    foreign = [n for n in names if not any(fnmatch(n, pattern) for pattern in _OWN_FILES)]
    if foreign:
        raise UserError(f"{out}: holds {foreign[0]}, which no export writes, and is not replaced; name another folder")
    return out


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends; after an error nothing of it is left.

    Of several processes the first alone makes it; the others get a folder of their own that is removed.
    Raises UserError when the file system refuses.
    """
    if not is_main():
        with tempfile.TemporaryDirectory() as own:
            yield Path(own)
        return
    mark = uuid.uuid4().hex[:8]
    new, old = (out.with_name(f".{out.name}.{mark}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        _share_like_a_new_file(new)
        if out.exists():
            os.rename(out, old)
            try:
                os.rename(new, out)
            except BaseException:
                os.rename(old, out)
                raise
        else:
            os.rename(new, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); name another folder or free space") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def _share_like_a_new_file(folder: Path) -> None:
    """safetensors makes files that only their owner may read; all get the mode that README.md got."""
    mode = (folder / "README.md").stat().st_mode & 0o777
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON in UTF-8."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """UTF-8 text."""
    path.write_text(text, encoding="utf-8")
