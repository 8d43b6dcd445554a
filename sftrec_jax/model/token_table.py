"""The token table with its trainable rows: input embedding and head. Shapes: D model, V vocabulary."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class TokenRows(nnx.Variable):
    """Trainable rows of the token table, addressed by token id."""


class TokenTable(nnx.Module):
    """Token embedding [V, D] whose rows `row_ids` are replaced by trainable ones; used as input table and as head.

    Logit columns: the V rows of the table first, then the trainable rows in the order of `row_ids`. A table row that a
    trainable row replaces has the logit -inf. `column_of` maps a token id to its column.
    """

    def __init__(self, vocab_size: int, hidden_size: int, row_ids: tuple[int, ...], key: Array, softcap: float | None = None):
        self.weight = nnx.Param(jax.random.normal(key, (vocab_size, hidden_size), jnp.float32) * 0.02)
        self.row_ids = row_ids
        self.vocab_size = vocab_size
        self.softcap = softcap
        if row_ids:
            self.rows = TokenRows(jnp.zeros((len(row_ids), hidden_size), jnp.float32))

    def column_of(self) -> Int[Array, "ids"]:
        """Column of each token id; ids run to the largest one that exists, gaps map to column 0."""
        size = max(self.vocab_size, max(self.row_ids, default=-1) + 1)
        columns = jnp.where(jnp.arange(size) < self.vocab_size, jnp.arange(size), 0)
        return columns.at[jnp.asarray(self.row_ids, jnp.int32)].set(self.vocab_size + jnp.arange(len(self.row_ids)))

    def embed(self, tokens: Int[Array, "..."], dtype: jnp.dtype) -> Float[Array, "... D"]:
        """Input embedding of token ids."""
        if not self.row_ids:
            return self.weight[...][tokens].astype(dtype)
        column = self.column_of()[tokens]
        new = column >= self.vocab_size
        base = self.weight[...][jnp.where(new, 0, column)].astype(dtype)
        own = self.rows[...][jnp.where(new, column - self.vocab_size, 0)].astype(dtype)
        return jnp.where(new[..., None], own, base)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... C"]:
        """Float32 logits in column order."""
        table = self.weight[...].astype(hidden.dtype)
        base = self.capped(jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32))
        if not self.row_ids:
            return base
        replaced = [i for i in self.row_ids if i < self.vocab_size]
        if replaced:
            base = base.at[..., jnp.asarray(replaced, jnp.int32)].set(-jnp.inf)
        rows = self.rows[...].astype(hidden.dtype)
        own = self.capped(jnp.einsum("...d,vd->...v", hidden, rows, preferred_element_type=jnp.float32))
        return jnp.concatenate([base, own], -1)

    def capped(self, logits: Float[Array, "..."]) -> Float[Array, "..."]:
        """Logits as the family bounds them: softcap * tanh(logits / softcap), or as they are."""
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)
