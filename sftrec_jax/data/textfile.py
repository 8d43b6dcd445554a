"""Files as bytes, with gzip undone and UTF-8 checked: whole, or in blocks of lines."""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sftrec_jax.errors import UserError

_BOM = b"\xef\xbb\xbf"
_SHARD = re.compile(r"-\d+-of-\d+$")
BLOCK = 1 << 25
"""Bytes of text that are parsed at once."""


class Block(NamedTuple):
    """Whole lines of a file."""

    data: bytes
    lines: int
    """Lines before them."""
    offset: int
    """Bytes before them, decompressed."""


def extension(path: Path) -> str:
    """The lower-case extension below an outer `.gz`: `a.CSV.gz` gives `.csv`, as does a shard `a.csv-00000-of-00010`."""
    below = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return _SHARD.sub("", below.suffix.lower())


def read_bytes(path: Path) -> bytes:
    """The file's bytes, decompressed when its name ends in `.gz`; UserError when it is missing or damaged."""
    with opened(path) as file:
        return _read(path, file, -1)


def opened(path: Path) -> BinaryIO:
    """The file for reading, decompressed on the way; UserError when it is missing."""
    try:
        return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror}); correct the path in the data section") from None


def _read(path: Path, file: BinaryIO, size: int) -> bytes:
    try:
        return file.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error).rstrip(".")
        raise UserError(f"{path}: not a complete gzip file ({reason}); download or compress it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror}); correct the path in the data section") from None


def read_utf8(path: Path) -> bytes:
    """Like `read_bytes`, for text: a byte order mark is taken off; UserError names row and byte of invalid UTF-8."""
    return b"".join(block.data for block in text_blocks(path))


def text_blocks(path: Path, quote: bytes | None = None, size: int = BLOCK) -> Iterator[Block]:
    """The file in blocks of about `size` bytes, cut at line breaks (with `quote`, at those outside of quotation marks).

    UserError as in `read_utf8`.
    """
    with opened(path) as file:
        rest, lines, offset = _read(path, file, len(_BOM)), 0, 0
        if rest == _BOM:
            rest, offset = b"", len(_BOM)
        while more := _read(path, file, size):
            rest += more
            end = _last_break(rest, quote)
            if end:
                _check(path, rest[:end], lines, offset)
                yield Block(rest[:end], lines, offset)
                lines, offset, rest = lines + rest.count(b"\n", 0, end), offset + end, rest[end:]
        if rest:
            _check(path, rest, lines, offset)
            yield Block(rest, lines, offset)


def _last_break(data: bytes, quote: bytes | None) -> int:
    """Where the last line ends that is not inside of quotation marks; 0 where none does."""
    end = data.rfind(b"\n") + 1
    while end and quote is not None and data.count(quote, 0, end) % 2:
        end = data.rfind(b"\n", 0, end - 1) + 1
    return end


def _check(path: Path, data: bytes, lines: int, offset: int) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        row = lines + data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: row {row}, byte {offset + error.start} is not UTF-8; convert it with `iconv -f latin1 -t utf-8 FILE > NEW`"
            " if it is latin-1, as the MovieLens 100K and 1M files are"
        ) from None
