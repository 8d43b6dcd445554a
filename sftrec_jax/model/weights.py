"""Tensors of a checkpoint as parameters of the decoder.

Missing, unexpected, duplicate and mis-shaped tensors are four distinct errors. Files are safetensors only.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from sftrec_jax.errors import UserError
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.families import HEAD, tensor_names, weight_map
from sftrec_jax.model.gguf_file import read_gguf


@dataclass(frozen=True)
class TensorSource:
    """Named tensors, each read when asked for. `where` maps a name to the file it is in."""

    where: dict[str, str]
    read: Callable[[str], np.ndarray]


def _safetensors_source(folder: Path) -> TensorSource:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index}: not a safetensors index (no weight_map); copy the model folder again") from None
    else:
        files = sorted(p.name for p in folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no .safetensors file; save the model with save_pretrained(safe_serialization=True)")
    where: dict[str, str] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="numpy") as handle:
                keys = list(handle.keys())
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read ({error}); copy the model folder again") from None
        except Exception as error:  # safetensors raises its own SafetensorError, a plain Exception
            raise UserError(f"{folder / name}: damaged safetensors file ({error}); copy the model folder again") from None
        for key in keys:
            if key in where:
                raise UserError(f"{folder}: duplicate tensor {key} in {where[key]} and {name}; remove one of the files")
            where[key] = name

    def read(name: str) -> np.ndarray:
        with safe_open(folder / where[name], framework="numpy") as handle:
            return handle.get_tensor(name)

    return TensorSource(where, read)


def open_tensors(path: Path) -> TensorSource:
    """Tensors of a Hugging Face folder or of a `.gguf` file, under Hugging Face names."""
    if path.suffix == ".gguf":
        model = read_gguf(path)
        return TensorSource(dict.fromkeys(model.tensor_names(), path.name), model.tensor)
    return _safetensors_source(path)


def check_tensors(source: TensorSource, arch: Architecture, label: str) -> None:
    """Raises UserError for a tensor that is missing or unexpected."""
    expected = set(tensor_names(arch))
    missing = [name for name in tensor_names(arch) if name not in source.where]
    if missing:
        raise UserError(f"{label}: {len(missing)} tensors are missing, first {missing[0]}; the files and config.json differ")
    # Old checkpoints carry rotary buffers and, when tied, a copy of the head; both follow from what is loaded.
    known = {*expected, HEAD} if arch.tied else expected
    extra = [name for name in source.where if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise UserError(f"{label}: {len(extra)} unexpected tensors, first {extra[0]}; the files and config.json differ")


def read_checked(source: TensorSource, name: str, shape: tuple[int, ...], label: str) -> np.ndarray:
    """One tensor; raises UserError when its shape is not the one that config.json implies, or it is not finite."""
    value = source.read(name)
    if value.shape != shape:
        raise UserError(f"{label}: tensor {name} has shape {value.shape}, config.json implies {shape}; the files differ")
    value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise UserError(f"{label}: tensor {name} holds NaN or infinite values; copy or convert the model again")
    return value


def decoder_arrays(source: TensorSource, arch: Architecture, label: str) -> Iterable[tuple[str, np.ndarray]]:
    """Yields (decoder path, float32 array in decoder layout) for the whole model, layers stacked on axis 0."""
    check_tensors(source, arch, label)
    for path, tensor in weight_map(arch).items():
        values = [read_checked(source, name, tensor.shape, label) for name in tensor.names(arch.layers)]
        values = [value.T if tensor.transposed else value for value in values]
        yield path, np.stack(values) if tensor.stacked else values[0]
