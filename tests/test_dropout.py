"""Dropout of embeddings and sublayers (`train.dropout`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import FIXTURE, make_case, packed

from sftrec_jax.config import LoraConfig, TrainConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.layers import dropped


def test_values_are_zeroed_by_their_share_and_unbiased() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(1, 1, (2000, 4, 8)), jnp.float32)
    out = dropped(x, 0.3, jax.random.key(0))
    zeros = float((out == 0).mean())
    assert abs(zeros - 0.3) < 4 * (0.3 * 0.7 / x.size) ** 0.5
    np.testing.assert_allclose(out[out != 0], (x / 0.7)[out != 0], rtol=1e-6)
    np.testing.assert_array_equal(dropped(x, 0.3, None), x)
    np.testing.assert_array_equal(dropped(x, 0.0, jax.random.key(0)), x)


def with_dropout(share: float) -> Decoder:
    """stories260K, its weights those of the case, with this dropout."""
    case = make_case(FIXTURE, LoraConfig(r=2))
    build = dataclasses.replace(case.build, dropout=share)
    graphdef, _ = nnx.split(build.decoder(jax.random.key(0)))
    return nnx.merge(graphdef, nnx.split(case.decoder)[1])


def test_a_decoder_drops_with_a_key_alone_and_never_across_rows() -> None:
    tokens = [[np.asarray([5, 9, 12, 33], np.int32)], [np.asarray([5, 9, 12, 33], np.int32)]]
    batch = jax.tree.map(jnp.asarray, packed(tokens, 6))
    plain, noisy = with_dropout(0.0), with_dropout(0.5)
    exact = np.asarray(plain.packed_hidden(batch))
    np.testing.assert_array_equal(noisy.packed_hidden(batch), exact)
    np.testing.assert_array_equal(plain.packed_hidden(batch, jax.random.key(1)), exact)
    first, again, other = (np.asarray(noisy.packed_hidden(batch, jax.random.key(k))) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other)[:, :4].max() > 1e-3 and np.abs(first - exact)[:, :4].max() > 1e-3
    assert np.abs(first[0, :4] - first[1, :4]).max() > 1e-3  # each row draws its own


def test_no_share() -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match=r"train.dropout is .*; use a share in \[0, 1\)"):
            TrainConfig(dropout=share)
