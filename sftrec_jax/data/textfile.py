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
"""Bytes of text that are parsed at once, and most bytes of a line (with quotation marks: of a row)."""
WHOLE = 1 << 30
"""Most bytes of a file that is taken whole: a gzipped one may be a thousandth of what it unpacks to."""


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
    """The file's bytes, decompressed when its name ends in `.gz`; UserError when it is missing, damaged, or beyond `WHOLE`."""
    pieces, total = [], 0
    with opened(path) as file:
        while piece := _read(path, file, BLOCK):
            pieces.append(piece)
            total += len(piece)
            if total > WHOLE:
                raise UserError(
                    f"{path}: unpacks to more than {WHOLE >> 20:,} MB; divide it, or write it as .jsonl, .csv or .parquet"
                )
    return b"".join(pieces)


def beginning(path: Path, size: int = BLOCK) -> bytes:
    """The first bytes of a text, without byte order mark. UserError as in `read_bytes`."""
    with opened(path) as file:
        return _read(path, file, size).removeprefix(_BOM)


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
    whole = read_bytes(path)
    data = whole.removeprefix(_BOM)
    _check(path, data, 0, len(whole) - len(data))
    return data


def text_blocks(path: Path, quote: bytes | None = None, size: int = BLOCK) -> Iterator[Block]:
    """The file in blocks of about `size` bytes, cut at line breaks (with `quote`, at those outside of quotation marks).

    UserError as in `read_utf8`, and for a line that is longer than `BLOCK`.
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
            if len(rest) > BLOCK:
                what = "a line" if quote is None else "a row, or what stands between two quotation marks,"
                raise UserError(
                    f"{path}: row {lines + 1}: {what} has more than {BLOCK >> 20} MB; correct line breaks and quotes there"
                )
        if rest:
            _check(path, rest, lines, offset)
            yield Block(rest, lines, offset)


def pieces(block: Block, rows: int, quote: bytes | None = None) -> Iterator[Block]:
    """A block in pieces of at most `rows` lines, where it can be cut: few bytes may be many lines, which take memory each."""
    data, count = block.data, block.data.count(b"\n")
    end = 0
    if count > rows:
        end = next((end for share in (4, 6, 7) if (end := _last_break(data[: len(data) * share // 8], quote))), 0)
    if not end:
        yield block
        return
    yield from pieces(Block(data[:end], block.lines, block.offset), rows, quote)
    after = Block(data[end:], block.lines + data.count(b"\n", 0, end), block.offset + end)
    yield from pieces(after, rows, quote)


def _last_break(data: bytes, quote: bytes | None) -> int:
    """Where the last line ends that is not inside of quotation marks; 0 where none does."""
    end = data.rfind(b"\n") + 1
    if quote is None or not end:
        return end
    odd = data.count(quote, 0, end) % 2
    while end and odd:
        last = data.rfind(quote, 0, end)
        end = data.rfind(b"\n", 0, last) + 1
        odd = data.count(quote, end, last) % 2
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
