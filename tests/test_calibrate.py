"""The shift that lets new item tokens start as likely as text, against its definition in NumPy."""

import jax
import numpy as np
from flax import nnx
from scipy.special import logsumexp
from tiny_training import examples, random_histories, rows_of, stories

from sftrec_jax.config import PromptConfig
from sftrec_jax.train.calibrate import calibrate


def test_items_start_as_likely_as_text() -> None:
    case = stories().case
    made = examples(case, PromptConfig(format="stream", max_history=6), random_histories(6, 6))
    batch = jax.device_put(rows_of(made, [list(range(3)), list(range(3, len(made)))], 64, 64))
    decoder = nnx.merge(*nnx.split(case.decoder))

    def target_logits() -> np.ndarray:
        hidden = np.asarray(decoder.packed_hidden(batch))
        at = np.take_along_axis(hidden, batch.target_positions[:, :, None], axis=1)
        return np.asarray(decoder.logits(jax.device_put(at)))[batch.weights > 0].astype(np.float64)

    before, rows, table = target_logits(), np.asarray(decoder.head.rows[...]), np.asarray(decoder.head.weight[...])
    size = decoder.head.vocab_size
    gap = logsumexp(before[:, :size], -1) - logsumexp(before[:, size:], -1)
    calibrate(decoder, batch)
    shift = np.asarray(decoder.head.rows[...]) - rows
    np.testing.assert_array_equal(np.asarray(decoder.head.weight[...]), table)
    np.testing.assert_allclose(shift, np.broadcast_to(shift[0], shift.shape), atol=1e-5)  # one vector for all items
    # Rows are inputs too: with the hidden states of before, items gain on average what they lacked.
    decoder.head.rows.set_value(jax.device_put(rows))
    hidden = np.take_along_axis(np.asarray(decoder.packed_hidden(batch)), batch.target_positions[:, :, None], axis=1)
    gained = (hidden[batch.weights > 0] @ shift[0]).astype(np.float64)
    assert abs(gap.mean()) > 1.0
    np.testing.assert_allclose(gained.mean(), gap.mean(), rtol=1e-4)
