"""Checkpoints as named tensors of which slices are read: safetensors, in one file or several, and GGUF."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax  # noqa: F401  (teaches numpy the name bfloat16, which safetensors asks it for)
import numpy as np
from safetensors import safe_open

from sftrec_jax.errors import UserError
from sftrec_jax.model.gguf_file import GgufModel, read_gguf

CHUNK_BYTES = 32 * 2**20
"""Read at once: a file's mapped pages count as memory of the process until it is closed, so it is opened again for each chunk."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
"""Of stored tensors."""
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class TensorSource:
    """Named tensors. `where` maps a name to the file it is in, `shapes` to its shape."""

    where: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str, Slices], np.ndarray]
    """A part of a tensor in its stored type; every slice has bounds and step 1."""

    def fill(self, out: np.ndarray, name: str, part: Slices, transposed: bool, label: str) -> None:
        """Reads a part of a tensor into `out`, converted to its type, some rows at a time.

        Args:
            out: of the part's shape, or of its transpose with `transposed`.
            part: bounds within the tensor as stored.
            label: what errors call the checkpoint.

        Raises: UserError for NaN and infinite values.
        """
        if not out.size:
            return
        first, *rest = part
        width = max(1, int(np.prod([s.stop - s.start for s in rest]))) * 4
        rows = max(1, CHUNK_BYTES // width)
        for begin in range(first.start, first.stop, rows):
            end = min(begin + rows, first.stop)
            value = self.read(name, (slice(begin, end), *rest))
            if not np.isfinite(value).all():
                raise UserError(f"{label}: tensor {name} holds NaN or infinite values; copy or convert the model again")
            to = slice(begin - first.start, end - first.start)
            if transposed:
                out[:, to] = value.T
            else:
                out[to] = value


def open_tensors(path: Path) -> TensorSource:
    """Tensors of a Hugging Face folder or of a `.gguf` file, under Hugging Face names. Reads headers only.

    Raises: UserError for no, a damaged or a pickled checkpoint, and for a tensor that is there twice.
    """
    return _gguf_source(read_gguf(path), path) if path.suffix == ".gguf" else _safetensors_source(path)


def _files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise UserError(f"{index}: not a safetensors index (no weight_map); copy the model folder again") from None
        for name in files:
            if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\0" in name:
                raise UserError(
                    f"{index}: names {name!r}, which is no .safetensors file of this folder; copy the model folder again"
                )
        return files
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    pickled = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if not files and pickled:
        raise UserError(
            f"{folder}: {pickled[0]} is a pickle, which runs code when it is read; where you trust it, load the model with "
            "transformers and write it with save_pretrained(folder), which makes .safetensors files"
        )
    if not files:
        raise UserError(f"{folder}: no .safetensors file; write the model with transformers' save_pretrained(folder)")
    return files


def _safetensors_source(folder: Path) -> TensorSource:
    where: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _files(folder):
        try:
            with safe_open(folder / name, framework="numpy") as handle:
                slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118  (no dict)
                found = {key: tuple(one.get_shape()) for key, one in slices.items()}
                kinds = {key: one.get_dtype() for key, one in slices.items()}
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read ({error}); copy the model folder again") from None
        except Exception as error:  # safetensors raises its own SafetensorError, a plain Exception
            raise UserError(f"{folder / name}: damaged safetensors file ({error}); copy the model folder again") from None
        for key in found:
            if kinds[key] not in TYPES:
                raise UserError(f"{folder / name}: tensor {key} is stored as {kinds[key]}; use a model in {', '.join(TYPES[:4])}")
            if key in where:
                raise UserError(f"{folder}: duplicate tensor {key} in {where[key]} and {name}; remove one of the files")
            where[key] = name
        shapes |= found

    def read(name: str, part: Slices) -> np.ndarray:
        with safe_open(folder / where[name], framework="numpy") as handle:
            return handle.get_slice(name)[part]

    return TensorSource(where, shapes, read)


def _gguf_source(model: GgufModel, path: Path) -> TensorSource:
    """Blocks are dequantised by the tensor; the last one is kept for the other devices' parts of it."""
    last: dict[str, np.ndarray] = {}

    def read(name: str, part: Slices) -> np.ndarray:
        if name not in last:
            last.clear()
            last[name] = model.tensor(name)
        return last[name][part]

    names = model.tensor_names()
    return TensorSource(dict.fromkeys(names, path.name), {name: tuple(model.infos[name].shape) for name in names}, read)
