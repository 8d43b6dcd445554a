"""First values of new token rows from codebooks and from the items that carry a token, against plain loops."""

import numpy as np
import pytest

from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.quantise.quantiser import Quantiser
from sftrec_jax.items.rows import codebook_rows, member_rows

RNG = np.random.default_rng(0)


def codes(rows: list[list[str]]) -> ItemCodes:
    """Tokens in sorted order from id 100 on."""
    names = sorted({name for row in rows for name in row} | {"<b_3>"})
    table = {name: 100 + i for i, name in enumerate(names)}
    length = max(map(len, rows))
    ids = np.array([[table[name] for name in row] + [-1] * (length - len(row)) for row in rows], np.int32)
    titles = np.array([f"t{i}" for i in range(len(rows))], object)
    return ItemCodes(ids, tuple(names), np.array(sorted(table.values()), np.int32), ((),) * len(names), titles)


ROWS = [["<a_0>", "<b_1>"], ["<a_2>", "<b_0>"], ["<a_2>", "<b_1>"], ["<a_1>", "<b_2>", "<c_0>"], ["<a_0>", "<b_2>", "<c_1>"]]


def scaled(vectors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    lengths = [float(v @ v) for v in vectors.values() if v.any()]
    return {name: v / np.sqrt(np.mean(lengths)) for name, v in vectors.items()}


def test_rows_of_members_are_scaled_means() -> None:
    vectors = RNG.standard_normal((5, 4)).astype(np.float32)
    made = codes(ROWS)
    expected: dict[str, np.ndarray] = {"<b_3>": np.zeros(4)}
    for place in range(3):
        at = {}
        for item, row in enumerate(ROWS):
            if len(row) > place:
                at.setdefault(row[place], []).append(vectors[item])
        expected |= scaled({name: np.mean(members, axis=0) for name, members in at.items()})
    for name, row in zip(made.new_tokens, member_rows(made, vectors), strict=True):
        np.testing.assert_allclose(row, expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["residual", "product"])
def test_rows_of_codebooks_are_centred_and_scaled_by_level(kind: str) -> None:
    books = (
        RNG.standard_normal((3, 4)).astype(np.float32),
        RNG.standard_normal((4, 4 if kind == "residual" else 2)).astype(np.float32),
    )
    made = codes(ROWS)
    rows = dict(zip(made.new_tokens, codebook_rows(made, Quantiser(kind, books)), strict=True))  # pyright: ignore
    width = 4 if kind == "residual" else 6
    for letter, book, begin in (("a", books[0], 0), ("b", books[1], 0 if kind == "residual" else 4)):
        expected = scaled({f"<{letter}_{k}>": vector for k, vector in enumerate(book - book.mean(0))})
        for name, vector in expected.items():
            whole = np.zeros(width)
            whole[begin : begin + len(vector)] = vector
            np.testing.assert_allclose(rows[name], whole, atol=1e-5, err_msg=name)
    assert not rows["<c_0>"].any() and not rows["<c_1>"].any()  # the extra level has no codebook
