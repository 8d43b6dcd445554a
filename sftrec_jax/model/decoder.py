"""The causal language model: token table, a scanned stack of layers, head."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sftrec_jax.model.adapters import AdapterSpec
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.layers import Attend, Layers, RMSNorm, dropped
from sftrec_jax.model.packed_attention import packed_attention
from sftrec_jax.model.quantised import Quantisation
from sftrec_jax.model.rope import all_tables
from sftrec_jax.model.sharding import laid_out, ways
from sftrec_jax.model.token_table import TokenTable

Remat = Literal["none", "dots", "full"]
"""What the backward pass computes again: nothing, all but the products with kernels, or the whole layer."""


UNBOUNDED = np.iinfo(np.int32).max
"""Window of a layer that sees all."""


class Decoder(nnx.Module):
    """A causal LM of one of the families. Shapes: B batch, T tokens, D model, C logit columns (see TokenTable)."""

    def __init__(
        self,
        arch: Architecture,
        adapters: AdapterSpec | None,
        row_ids: tuple[int, ...],
        dtype: Any,
        remat: Remat,
        key: Array,
        mesh: Mesh | None = None,
        quantise: Quantisation | None = None,
        dropout: float = 0.0,
        levels: tuple[tuple[int, int], ...] = (),
    ):
        table_key, layers_key, head_key = jax.random.split(key, 3)
        self.arch, self.dtype, self.remat, self.mesh, self.dropout = arch, jnp.dtype(dtype), remat, mesh, dropout
        self.levels = levels
        self.embed_tokens = TokenTable(arch.vocab_size, arch.hidden_size, row_ids, table_key, arch.final_softcap)
        self.layers = Layers(arch, adapters, layers_key, quantise, dropout)
        self.norm = RMSNorm((arch.hidden_size,), arch.rms_eps, arch.unit_norms)
        if not arch.tied:
            self.lm_head = TokenTable(arch.vocab_size, arch.hidden_size, row_ids, head_key, arch.final_softcap)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        caches: Any = None,
        dropout_key: Array | None = None,
        divided: Literal["batch", "users"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Final hidden states, and what `attend` returned as cache in each layer (stacked on a leading layer axis).

        `caches` is a pytree with a leading layer axis, or None. `dropout_key` switches dropout on.
        `divided`: what axis 0 is, and how the states lie over the mesh between layers; None: as XLA likes.
        """
        x = self._embedded(tokens)
        rope_of, which, windows = self._by_layer(positions)
        graphdef, state = nnx.split(self.layers)
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, self.arch.layers)
            x = dropped(x, self.dropout, jax.random.fold_in(dropout_key, self.arch.layers))

        def body(x: Array, scanned: tuple[Any, ...]) -> tuple[Array, Any]:
            layer_state, cache, key, kind, window = scanned
            x, cache = nnx.merge(graphdef, layer_state)(self._laid(x, divided), rope_of(kind), attend, cache, key, window=window)
            return self._laid(x, divided), cache

        if self.remat != "none":
            # Kernels' products have no batch axes, those of attention have.
            kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
            body = jax.checkpoint(body, policy=kept)
        x, caches = jax.lax.scan(body, x, (state, caches, keys, which, windows), length=self.arch.layers)
        return self.norm(x), caches

    def prefilled(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        last: Int[Array, "B"],
        attend: Callable[[Array, Array, Array, Any, Array | None], Array],
        attend_last: Callable[[Array, Array, Array, Any, Array | None], Array],
        caches: Any = None,
    ) -> tuple[Float[Array, "B 1 D"], tuple[Float[Array, "layers B T K H"], Float[Array, "layers B T K H"]]]:
        """The final hidden state of one token of each row, and the keys and values of all tokens in all layers.

        The last layer's outputs are computed for that token alone: `attend_last` gets its query [B, 1, N, H], `attend` all
        queries. Both get one layer of `caches`.
        """
        x = self._embedded(tokens)
        rope_of, which, windows = self._by_layer(positions)
        graphdef, state = nnx.split(self.layers)

        def layer(x: Array, at: Any, attend: Any, only: Array | None) -> tuple[Array, Any]:
            # Layers are picked by number; slicing the stacked parameters for the scan would copy nearly all of them.
            one, cache, kind, window = jax.tree.map(
                lambda p: jax.lax.dynamic_index_in_dim(p, at, 0, keepdims=False), (state, caches, which, windows)
            )

            def keeping(
                query: Array, key: Array, value: Array, cache: Any, window: Array | None
            ) -> tuple[Array, tuple[Array, Array]]:
                return attend(query, key, value, cache, window), (key, value)

            x, kept = nnx.merge(graphdef, one)(self._laid(x, "users"), rope_of(kind), keeping, cache, None, only, window)
            return self._laid(x, "users"), kept

        count = self.arch.layers - 1
        x, stacked = jax.lax.scan(lambda x, at: layer(x, at, attend, None), x, jnp.arange(count), length=count)
        x, own = layer(x, count, attend_last, last[:, None])
        key, value = (jnp.concatenate([s, o[None]]) for s, o in zip(stacked, own, strict=True))
        return self.norm(x), (key, value)

    def packed_hidden(self, batch: Any, dropout_key: Array | None = None) -> Float[Array, "B T D"]:
        """Final hidden states of packed rows; `batch` has tokens, positions, segments, branches, forks [B, T]."""
        attention = packed_attention((batch.positions, batch.segments, batch.branches, batch.forks), self.mesh, self.arch.softcap)
        hides = self.arch.window is not None and self.arch.window < batch.tokens.shape[1]

        def masked(query: Array, key: Array, value: Array, cache: None, window: Array | None) -> tuple[Array, None]:
            return attention(query, key, value, window if hides else None), None

        return self.hidden(batch.tokens, batch.positions, masked, dropout_key=dropout_key, divided="batch")[0]

    def _laid(self, x: Float[Array, "B T D"], axis: Literal["batch", "users"] | None) -> Float[Array, "B T D"]:
        """States as the mesh divides them, so that XLA moves kernels to them and not sums of partial products."""
        if axis is None or self.mesh is None or x.shape[0] % ways(self.mesh, axis):
            return x
        return laid_out(x, self.mesh, axis, "length" if axis == "batch" else None, None)

    def _embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = self.embed_tokens.embed(tokens, self.dtype)
        return x if self.arch.embed_scale == 1.0 else x * jnp.asarray(self.arch.embed_scale, x.dtype)

    def _by_layer(self, positions: Int[Array, "B T"]) -> tuple[Callable[[Any], tuple[Array, Array]], Any, Any]:
        """Rotary tables by kind of layer, and int32 [layers] each, or None where layers do not differ: kinds and windows."""
        tables, which = all_tables(self.arch, positions)
        windows = None
        if self.arch.window is not None:
            windows = jnp.where(jnp.asarray(self.arch.sliding), jnp.int32(self.arch.window), jnp.int32(UNBOUNDED))
        if which is None:
            return lambda kind: tables[0], None, windows
        cos, sin = (jnp.stack(part) for part in zip(*tables, strict=True))
        return lambda kind: (cos[kind], sin[kind]), jnp.asarray(which), windows

    @property
    def head(self) -> TokenTable:
        """The table that turns hidden states into logits (the input table when tied)."""
        return self.embed_tokens if self.arch.tied else self.lm_head

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... C"]:
        """Float32 logits in column order (see TokenTable)."""
        return self.head.logits(hidden)
