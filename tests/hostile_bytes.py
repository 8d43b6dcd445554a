"""Damage to files: to their bytes, to their lines, and fragments that readers have stumbled over before."""

import gzip
import random
import struct
from collections.abc import Callable, Sequence

WORDS = [
    "",
    " ",
    "\0",
    "\x1b[2J",
    "\u202eevil",
    "\u200b",
    "\ufeff",
    "a" * 70_000,
    "é" * 300,
    "e\u0301" * 50,
    "👩‍👩‍👧‍👦",
    "\ue0001\ue001",
    "\ue002",
    "../../../escaped",
    "/etc/passwd",
    "..\\..\\escaped",
    "C:\\escaped",
    "~/escaped",
    "file:///etc/passwd",
    "-",
    "--",
    "@",
    "=1+1",
    "{{ 7*7 }}",
    "{% for i in range(9) %}x{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{% raw %}",
    "{# #}",
    "${jndi:x}",
    "%s%n",
    "$(id)",
    "`id`",
    "'; DROP TABLE x; --",
    "<script>",
    "&lt;&amp;&#0;&#x110000;&#xD800;&#99999999999;",
    "<|item_1|>",
    "<|end|>",
    "<|start|>",
    "</s>",
    "<a_1>",
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\v\f\x1c\x85\u2028\u2029",
    ";",
    ";" * 300,
    ",",
    '"',
    '""',
    "'",
    "\\",
    "|",
    "[",
    "[1, 2",
    "[[]]",
    "[null, [1, [true]]]",
    "{",
    "{}",
    "null",
    "None",
    "NaN",
    "nan",
    "inf",
    "-inf",
    "Infinity",
    "-0",
    "0",
    "00",
    "+1",
    "1_000",
    "1e5",
    "1e308",
    "1e400",
    "-1e400",
    "5e-324",
    "0.1",
    "1.0",
    "1.5e3",
    "9" * 5000,
    "-9223372036854775808",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551616",
    "253402300800",
    "-62135596801",
    "2015-03-01",
    "2015-13-01",
    "2015-03-01T12:00:00+23:59",
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59.999999-14:00",
    "2015-W01-1",
    "12:00",
    "true",
    "True",
    "yes",
    "٣",
    "１２",
    "Ⅷ",
]
"""Cells, titles, ids."""
FRAGMENTS = [
    *(word.encode("utf-8") for word in WORDS if len(word) < 100),
    b"\xff",
    b"\xfe\xff",
    b"\xff\xfe\0\0",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xc0\x80",
    b"\xef\xbb\xbf",
    b"\0" * 64,
    b"\x1f\x8b",
    b"PAR1",
    b"GGUF",
    b"\x80\x04\x95",
    b"\x93NUMPY",
    b"PK\x03\x04",
    rb"\ud800",
    rb"\u0000",
    rb"\udc00\ud800",
    b"\\",
    b"\n\n\n",
    b"\r\r",
    b"\n\r",
    b'\n"',
    b'"\n',
]
DEEP = [
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"(" * 3_000,
    b"-" * 20_000,
    b"[" * 500 + b"]" * 500,
    b'{"a":' * 400 + b"1" + b"}" * 400,
    b"&" * 9999,
]
NUMBERS = [
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    32767,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]

Damage = Callable[[random.Random, bytes], bytes]


def flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 3, 20])):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def lose(rng: random.Random, data: bytes) -> bytes:
    begin = rng.randrange(len(data) + 1)
    return data[:begin] + data[begin + rng.choice([1, 2, 4, 8, 100]) :]


def repeat(rng: random.Random, data: bytes) -> bytes:
    begin = rng.randrange(len(data) + 1)
    piece = data[begin : begin + rng.choice([1, 4, 30, 300])]
    return data[:begin] + piece * rng.choice([2, 2, 3, 50]) + data[begin:]


def put(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(FRAGMENTS) + data[at:]


def deep(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(DEEP) + data[at:]


def number(rng: random.Random, data: bytes) -> bytes:
    """A binary number in place of another: lengths, counts, offsets."""
    code = rng.choice(["<B", "<H", "<I", "<Q", ">I"])
    width = struct.calcsize(code)
    if len(data) < width:
        return data
    # Headers stand in front, in Parquet at the end.
    where = rng.choice([64, 512, len(data)])
    at = min(rng.randrange(min(where, len(data))), len(data) - width)
    at = len(data) - width - at if rng.random() < 0.3 else at
    value = rng.choice(NUMBERS) % (1 << 8 * width)
    return data[:at] + struct.pack(code, value) + data[at + width :]


def shuffle(rng: random.Random, data: bytes) -> bytes:
    one, two = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[one:two] + data[:one] + data[two:]


def noise(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice([1, 8, 64])) + data[at:]


BINARY: Sequence[Damage] = (flip, flip, flip, cut, lose, repeat, put, number, number, number, shuffle, noise)


def line_ends(rng: random.Random, data: bytes) -> bytes:
    ends = [b"\n", b"\r\n", b"\r", b"\n\n", b"\n \n"]
    return b"".join(line + rng.choice(ends) for line in data.split(b"\n"))


def bom(rng: random.Random, data: bytes) -> bytes:
    return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"]) + data


def recode(rng: random.Random, data: bytes) -> bytes:
    return data.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7"]), "replace")


def ragged(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    mark = rng.choice([b",", b"\t", b" ", b'"', b"]", b"}", b":"])
    lines[at] = rng.choice(
        [lines[at] + mark * rng.choice([1, 3, 5000]), lines[at].rpartition(mark)[0], lines[at].replace(mark, b"")]
    )
    return b"\n".join(lines)


def swap_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    rng.shuffle(lines)
    return b"\n".join(lines)


def many_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at : at + 1] = [lines[at]] * min(rng.choice([2, 2000]), (8 << 20) // (len(lines[at]) + 1) + 2)
    return b"\n".join(lines)


def long_line(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice([b"a", b",", b"\t", b" ", b'"', b"\0", b"9"]) * rng.choice([5_000, 100_000]) + data[at:]


TEXT: Sequence[Damage] = (
    put, put, put, put, flip, cut, lose, repeat, shuffle, noise, deep, line_ends, bom, recode, ragged, ragged, swap_lines,
    many_lines, long_line,
)  # fmt: skip


def damaged(rng: random.Random, data: bytes, kinds: Sequence[Damage], sound: float = 0.15) -> bytes:
    """Damages once or some times; as it is with probability `sound`."""
    if rng.random() < sound:
        return data
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if len(data) < 4 << 20:
            data = rng.choice(kinds)(rng, data)
    return data


def zipped(rng: random.Random, data: bytes) -> bytes:
    """As gzip; maybe damaged, in two members, with rubbish behind, or of a file that unpacks to a thousand times its size."""
    kind = rng.randrange(40)
    if kind == 0:
        return gzip.compress(data + rng.choice([b"\0", b"a", b"[", b"\n", b",", b'"']) * (48 << 20), 1)
    packed = gzip.compress(data, 1)
    if kind < 10:
        return damaged(rng, packed, BINARY, 0)
    return packed + rng.choice([b"", b"", b"rubbish", packed, packed[:10], b"\0" * 100])


def cell(rng: random.Random, usual: str) -> str:
    return rng.choice(WORDS) if rng.random() < 0.03 else usual
