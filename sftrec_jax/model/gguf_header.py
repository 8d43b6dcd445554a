"""Reads the header of a GGUF file (metadata and tensor table), every read checked against the size of the file.

Format: the GGUF specification of the ggml project, versions 2 and 3, little endian.
The package `gguf` gives the type numbers and block sizes. Its own reader is not used: on a corrupt array length it loops
without end, and on the token lists of a large vocabulary it makes several arrays for each string.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from sftrec_jax.errors import UserError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


class _Malformed(Exception):
    """What is wrong with the file; `read_header` adds the file and the way out."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file."""

    name: str
    shape: tuple[int, ...]
    """Slowest axis first, as numpy has it (the file has it the other way round)."""
    type: GGMLQuantizationType
    offset: int
    """Bytes from the start of the file."""
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (scalars, strings, lists) and tensors by GGUF name, in file order."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Cursor:
    """Takes values off a buffer; refuses to read past its end."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer = buffer
        self.position = 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.buffer):
            raise _Malformed(f"it ends at byte {len(self.buffer)}, but byte {end} is needed (truncated or corrupt)")
        start, self.position = self.position, end
        return self.buffer[start:end]

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        start = self.position
        raw = self.take(self.scalar("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _Malformed(f"the text at byte {start} is not UTF-8 (corrupt)") from None

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            start, inner, count = self.position, self.scalar("<I"), self.scalar("<Q")
            if inner == GGUFValueType.STRING:
                return [self.text() for _ in range(count)]
            if inner not in _SCALARS:
                raise _Malformed(f"the array at byte {start} has elements of type {inner} (corrupt)")
            code = _SCALARS[GGUFValueType(inner)]
            return np.frombuffer(self.take(count * struct.calcsize(code)), dtype=np.dtype(code)).tolist()
        if kind not in _SCALARS:
            raise _Malformed(f"the value at byte {self.position} has type {kind} (corrupt)")
        return self.scalar(_SCALARS[GGUFValueType(kind)])


def _tensor(cursor: _Cursor) -> TensorInfo:
    """One row of the tensor table; its offset is still relative to the data section."""
    name = cursor.text()
    axes = cursor.scalar("<I")
    if not 1 <= axes <= 4:
        raise _Malformed(f"tensor {name!r} has {axes} axes (corrupt)")
    shape = tuple(cursor.scalar("<Q") for _ in range(axes))[::-1]
    kind, offset = cursor.scalar("<I"), cursor.scalar("<Q")
    try:
        quantization = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[quantization]
    except (ValueError, KeyError):
        raise _Malformed(
            f"tensor {name!r} has the unknown type {kind} (corrupt, or newer than the installed gguf package)"
        ) from None
    if shape[-1] % block or 0 in shape:
        raise _Malformed(f"tensor {name!r} has shape {shape}, which {quantization.name} cannot store (corrupt)")
    size = 1
    for length in shape:
        size *= length
    return TensorInfo(name, shape, quantization, offset, size // block * block_bytes)


def _parse(buffer: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(buffer)
    if cursor.take(4) != MAGIC:
        raise _Malformed("it does not begin with GGUF")
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise _Malformed(f"version {version} (or big endian) is not supported, only little-endian versions 2 and 3")
    n_tensors, n_metadata = cursor.scalar("<Q"), cursor.scalar("<Q")

    metadata: dict[str, Any] = {}
    for _ in range(n_metadata):
        key = cursor.text()
        if key in metadata:
            raise _Malformed(f"metadata key {key!r} occurs twice (corrupt)")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    relative: dict[str, TensorInfo] = {}
    for _ in range(n_tensors):
        info = _tensor(cursor)
        if info.name in relative:
            raise _Malformed(f"tensor {info.name!r} occurs twice (corrupt)")
        relative[info.name] = info

    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Malformed(f"general.alignment is {alignment!r}, not a power of two (corrupt)")
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for info in relative.values():
        offset = start + info.offset
        if offset + info.n_bytes > len(buffer):
            raise _Malformed(
                f"tensor {info.name!r} ends at byte {offset + info.n_bytes}, the file at {len(buffer)} (truncated or corrupt)"
            )
        tensors[info.name] = TensorInfo(info.name, info.shape, info.type, offset, info.n_bytes)
    return GgufHeader(metadata, tensors)


def read_header(path: Path) -> GgufHeader:
    """Reads metadata and tensor table. Raises UserError when the file is missing, truncated, corrupt or of another kind."""
    try:
        with open(path, "rb") as file:
            if not file.seek(0, 2):  # mmap refuses a file of no bytes
                raise _Malformed("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                return _parse(buffer)
    except OSError as error:
        raise UserError(f"{path}: cannot read the GGUF file ({error.strerror}); name another with --model.base") from None
    except _Malformed as error:
        raise UserError(f"{path}: not a usable GGUF file: {error}; fetch it again or name another with --model.base") from None
