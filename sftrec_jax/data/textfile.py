"""Whole files as bytes, with gzip undone and UTF-8 checked."""

import gzip
import zlib
from pathlib import Path

from sftrec_jax.errors import UserError

_BOM = b"\xef\xbb\xbf"


def extension(path: Path) -> str:
    """The lower-case extension below an outer `.gz`: `a.CSV.gz` gives `.csv`."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def read_bytes(path: Path) -> bytes:
    """The file's bytes, decompressed when its name ends in `.gz`; UserError when it is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror}); correct the path in the data section") from None
    if path.suffix.lower() != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = str(error).rstrip(".")
        raise UserError(f"{path}: not a complete gzip file ({reason}); download or compress it again") from None


def read_utf8(path: Path) -> bytes:
    """Like `read_bytes`, for text: a byte order mark is taken off; UserError names row and byte of invalid UTF-8."""
    data = read_bytes(path)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: row {row}, byte {error.start} is not UTF-8; convert it with `iconv -f latin1 -t utf-8 FILE > NEW`"
            " if it is latin-1, as the MovieLens 100K and 1M files are"
        ) from None
    return data.removeprefix(_BOM)
