"""Scores of next tokens, and the four ways to normalise them.

A beam's score is the sum of z(token) - N(prefix) over its tokens, z being logits and N the logarithm of the sum of exp z over

- `full`: all logit columns. The score is the model's log-probability of the item's tokens, so the ranking is exactly that of
  the model given that it names an item. Costs the whole head for every beam and token.
- `items`: the tokens of all items. The same as `full` at the first token; later it differs by the logarithm of the share that
  the model leaves to item tokens, which goes to 1 with training. Costs as many columns as there are item tokens.
- `level`: the tokens that some item has at this place (for codes of more than 16 tokens: at any place from the third on).
  The same argument. Costs only the columns that are computed anyway.
- `children`: the tokens that may follow this prefix. Another distribution: the model restricted step by step, which favours
  prefixes with few continuations (label bias). Where no node has a choice nothing is computed at all.

Shapes: B users, W beams, T tokens, C codes of a level, D model.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.token_table import TokenTable

Normaliser = Literal["full", "items", "level", "children"]

WHOLE_BYTES = 16 * 2**20
"""Up to this size logits of all columns are made at once."""
CHUNK_BYTES = 2**20
"""Larger ones in chunks of about this size, so that they are reduced while in cache."""


class LogZ(NamedTuple):
    """log Z in two parts, subtracted one after the other: logits are large, their difference to the largest is not."""

    top: Float[Array, "B W 1"]
    rest: Float[Array, "B W 1"]

    def log_prob(self, logits: Float[Array, "B W C"]) -> Float[Array, "B W C"]:
        """Logits, normalised."""
        return (logits - self.top) - self.rest


def log_z(logits: Float[Array, "B W C"]) -> LogZ:
    """Of the given logits; those that do not count are -inf."""
    top = jnp.max(logits, -1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0.0, top)  # nothing counts: the sum is 0, not NaN
    return LogZ(top, jnp.log(jnp.sum(jnp.exp(logits - top), -1, keepdims=True)))


def merged(parts: list[LogZ]) -> LogZ:
    """Of the union of disjoint columns."""
    if len(parts) == 1:
        return parts[0]
    top = jnp.maximum(parts[0].top, parts[1].top)
    both = LogZ(top, jnp.log(sum(jnp.exp(p.top - top + p.rest) for p in parts[:2])))
    return merged([both, *parts[2:]])


def level_logits(
    head: TokenTable, hidden: Float[Array, "... D"], tokens: Int[Array, "C"], table: Array | None = None
) -> Float[Array, "... C"]:
    """Float32 logits of some tokens; -inf where a token is -1. `table` saves looking their rows up again."""
    table = rows_of(head, hidden, tokens) if table is None else table
    logits = head.capped(jnp.einsum("...d,cd->...c", hidden, table, preferred_element_type=jnp.float32))
    return jnp.where(tokens < 0, -jnp.inf, logits)


def rows_of(head: TokenTable, hidden: Array, tokens: Int[Array, "C"]) -> Float[Array, "C D"]:
    """Rows of the head, in the type of `hidden`."""
    return head.embed(jnp.maximum(tokens, 0), hidden.dtype)


def full_log_z(decoder: Decoder, hidden: Float[Array, "B W D"]) -> LogZ:
    """Over all logit columns."""
    head = decoder.head
    table = head.weight[...]
    rows, (size, _) = hidden.shape[0] * hidden.shape[1], table.shape
    replaced = jnp.zeros(size, bool).at[jnp.asarray([i for i in head.row_ids if i < size], jnp.int32)].set(True)

    def part(first: Int[Array, ""] | int, count: int, fresh: Int[Array, ""] | int) -> LogZ:
        # Cut out in the stored type, converted piece by piece.
        some = lax.dynamic_slice_in_dim(table, first, count).astype(hidden.dtype)
        logits = head.capped(jnp.einsum("bwd,vd->bwv", hidden, some, preferred_element_type=jnp.float32))
        out = lax.dynamic_slice_in_dim(replaced, first, count) | (first + jnp.arange(count) < fresh)
        return log_z(jnp.where(out, -jnp.inf, logits))

    chunk = max(1024, CHUNK_BYTES // (4 * max(1, rows)) // 128 * 128)
    if 4 * rows * size <= WHOLE_BYTES or chunk >= size:
        parts = [part(0, size, 0)]
    else:
        # The last chunk is moved back to fit and counts only the columns that are new.
        def body(i: Int[Array, ""], so_far: LogZ) -> LogZ:
            return merged([so_far, part(jnp.minimum(i * chunk, size - chunk), chunk, i * chunk)])

        parts = [lax.fori_loop(1, -(-size // chunk), body, part(0, chunk, 0))]
    if head.row_ids:
        own = jnp.einsum("bwd,vd->bwv", hidden, head.rows[...].astype(hidden.dtype), preferred_element_type=jnp.float32)
        parts.append(log_z(head.capped(own)))
    return merged(parts)


def prefix_log_z(
    normaliser: Normaliser, decoder: Decoder, hidden: Float[Array, "B W D"], logits: Float[Array, "B W C"], every: Int[Array, "I"]
) -> LogZ | None:
    """N of each beam, from the logits of the level's codes where they do; None for `children`, which needs the candidates."""
    if normaliser == "full":
        return full_log_z(decoder, hidden)
    if normaliser == "items":
        return log_z(level_logits(decoder.head, hidden, every))
    return log_z(logits) if normaliser == "level" else None
