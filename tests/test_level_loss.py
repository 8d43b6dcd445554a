"""Targets normalised over the tokens of their own place, against a softmax over all with the others masked out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sftrec_jax.config import DecodeConfig, RunConfig, TrainConfig
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.load import level_rows
from sftrec_jax.model.token_table import TokenTable
from sftrec_jax.train.loss import level_cross_entropy

LEVELS = ((0, 3), (3, 8), (8, 18))
VOCAB, WIDTH = 11, 6


def case(softcap: float | None) -> tuple[TokenTable, np.ndarray, np.ndarray, np.ndarray]:
    """Four rows with 0 to 5 whole items of three tokens, and hidden states [4, 17, 6]."""
    rng = np.random.default_rng(3)
    table = TokenTable(VOCAB, WIDTH, tuple(range(VOCAB, VOCAB + 18)), jax.random.key(0), softcap)
    table.rows.set_value(jnp.asarray(rng.normal(0, 1, (18, WIDTH)), jnp.float32))
    labels, weights = np.zeros((4, 17), np.int32), np.zeros((4, 17), np.float32)
    for row, count in enumerate((5, 0, 1, 3)):
        for item in range(count):
            for place, (begin, end) in enumerate(LEVELS):
                labels[row, 3 * item + place] = VOCAB + rng.integers(begin, end)
                weights[row, 3 * item + place] = rng.choice([0.5, 1.0, 2.0])
    return table, rng.normal(0, 1, (4, 17, WIDTH)).astype(np.float32), labels, weights


def masked(table: TokenTable, hidden: jax.Array, labels: np.ndarray, weights: np.ndarray) -> jax.Array:
    logits = table.logits(hidden)
    row = np.maximum(labels - VOCAB, 0)
    place = np.searchsorted([end for _, end in LEVELS], row, side="right")
    begin, end = (np.asarray([level[side] for level in LEVELS])[place][..., None] for side in (0, 1))
    column = np.arange(VOCAB + 18)
    logits = jnp.where((column >= VOCAB + begin) & (column < VOCAB + end), logits, -jnp.inf)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(VOCAB + row)[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * weights)


@pytest.mark.parametrize("chunk", [20, 1 << 20])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_loss_and_gradients_are_those_of_a_masked_softmax(chunk: int, softcap: float | None) -> None:
    table, hidden, labels, weights = case(softcap)
    graphdef, state = nnx.split(table)

    def ours(state: nnx.State, hidden: jax.Array) -> jax.Array:
        return level_cross_entropy(nnx.merge(graphdef, state), LEVELS, hidden, jnp.asarray(labels), jnp.asarray(weights), chunk)

    def reference(state: nnx.State, hidden: jax.Array) -> jax.Array:
        return masked(nnx.merge(graphdef, state), hidden, labels, weights)

    found, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(state, jnp.asarray(hidden)) for f in (ours, reference))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(found[1][1]).max()) > 0.01


def codes_of(codes: list[list[int]], new: int) -> ItemCodes:
    ids = np.arange(10, 10 + new, dtype=np.int32)
    titles = np.asarray([f"t{i}" for i in range(len(codes))], object)
    return ItemCodes(np.asarray(codes, np.int32), tuple(f"<{i}>" for i in ids), ids, ((),) * new, titles)


def test_rows_of_each_place() -> None:
    assert level_rows(codes_of([[10, 12], [11, 14], [10, 13]], 6)) == ((0, 2), (2, 5))
    for codes, text in (
        ([[10, 12], [11, -1]], "of the same number of new tokens"),
        ([[10, 3], [11, 4]], "of the same number of new tokens"),
        ([[10, 12], [12, 11]], "at two places"),
    ):
        with pytest.raises(UserError, match=text):
            level_rows(codes_of(codes, 6))


def test_decoding_goes_with_training() -> None:
    train = TrainConfig(normaliser="level")
    with pytest.raises(UserError, match="train.normaliser is level, .* decode.normaliser is full; set decode.normaliser: level"):
        RunConfig(train=train)
    assert RunConfig(train=train, decode=DecodeConfig(normaliser="level")).train.normaliser == "level"
