"""The decoder without adapters: LoRA updates added to their kernels, token rows put into their tables, in float32."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.adapters import TABLES
from sftrec_jax.model.attention import attend, first_seen, packed_mask
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.load import Build
from sftrec_jax.model.quantised import as_qarray, dense
from sftrec_jax.model.sharding import path_name


def exported_vocab_size(build: Build) -> int:
    """Rows of the exported token table: the base's, or more where new rows lie past them; never fewer."""
    return max(build.arch.vocab_size, max(build.row_ids, default=-1) + 1)


def gap_ids(build: Build) -> tuple[int, ...]:
    """Token ids below `exported_vocab_size` that neither the base's table nor a new row defines."""
    own = set(build.row_ids)
    return tuple(i for i in range(build.arch.vocab_size, exported_vocab_size(build)) if i not in own)


def gap_row(table: Float[Array, "V D"]) -> Float[Array, "D"]:
    """What fills a gap: the mean row, in float32. Its logit is the mean of the table's and so never the largest."""
    return table.astype(jnp.float32).mean(0)


def arrays_of(decoder: Decoder) -> dict[str, Array]:
    """Every variable of the decoder under its path, such as `layers/q_proj/lora_a`."""
    return {path_name(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.split(decoder)[1])}


def grown_table(table: Float[Array, "V D"], rows: Float[Array, "R D"] | None, build: Build) -> Float[Array, "W D"]:
    """A table with the rows of its own in their places, in float32."""
    wide = table.astype(jnp.float32)
    if rows is None:
        return wide
    missing = exported_vocab_size(build) - wide.shape[0]
    grown = jnp.concatenate([wide, jnp.broadcast_to(gap_row(table), (missing, wide.shape[1]))]) if missing else wide
    return grown.at[jnp.asarray(build.row_ids, jnp.int32)].set(rows.astype(jnp.float32))


def merged_decoder(decoder: Decoder, build: Build) -> Decoder:
    """A float32 decoder without adapters that computes what `decoder` computes; its vocabulary is `exported_vocab_size`.

    Merging in bfloat16 would round kernel and update apart and change logits; here nothing is rounded.
    """
    arch = dataclasses.replace(build.arch, vocab_size=exported_vocab_size(build))
    wide = jnp.dtype(jnp.float32)
    plain = Build(arch, None, (), wide, wide, build.remat)
    have = arrays_of(decoder)

    def merged(name: str) -> Array:
        if name in TABLES:
            return grown_table(have[name], have.get(name.replace("weight", "rows")), build)
        module, _, variable = name.rpartition("/")
        if (kind := build.quantise) and f"{name}_scale" in have:
            value = jax.vmap(lambda v, s: dense(as_qarray(v, s, kind), jnp.float32))(have[name], have[f"{name}_scale"])
        else:
            value = have[name].astype(jnp.float32)
        if build.adapters is None or variable != "kernel" or f"{module}/lora_a" not in have:
            return value
        a, b = have[f"{module}/lora_a"], have[f"{module}/lora_b"]
        scales = have.get(f"{module}/lora_scale")
        b = b * (build.adapters.scale(module.split("/")[-1], 0) if scales is None else scales[..., None])
        # TPU and GPU multiply float32 in lower precision unless told otherwise.
        whole = value + jnp.einsum("lir,lro->lio", a, b, precision=jax.lax.Precision.HIGHEST)
        if not build.adapters.dora:
            return whole
        by = have[f"{module}/lora_magnitude"] / jnp.linalg.norm(whole, axis=1)
        if scales is not None:
            by = jnp.where(scales.any(-1, keepdims=True), by, 1.0)  # layers without an adapter
        return whole * by[:, None]

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: plain.decoder(jax.random.key(0))))
    flat = [(path, leaf.replace(merged(path_name(path)))) for path, leaf in nnx.to_flat_state(abstract)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def rounded(decoder: Decoder, dtype: Any) -> Decoder:
    """The same decoder with every parameter rounded to `dtype`; it still computes in its own type."""
    graphdef, state = nnx.split(decoder)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))


def probe_tokens(codes: ItemCodes, context: int, rows: int = 4, length: int = 32) -> Int[Array, "B T"]:
    """Histories of random items (always the same ones), written one after the other: int32 [rows, min(length, context)]."""
    length = min(length, context)
    rng = np.random.default_rng(0)
    out = np.zeros((rows, length), np.int32)
    for row in out:
        drawn = codes.codes[rng.integers(0, len(codes.codes), length)]
        row[:] = drawn[drawn >= 0][:length]  # an item has at least one token
    return jnp.asarray(out)


def token_logits(decoder: Decoder, build: Build, tokens: Int[Array, "B T"]) -> Float[Array, "B T I"]:
    """Logits [B, T, I] of plain causal prompts in float32 arithmetic, one column for each id that base or rows define."""
    gaps = set(gap_ids(build))
    ids = np.asarray([i for i in range(exported_vocab_size(build)) if i not in gaps], np.int32)
    with jax.default_matmul_precision("highest"):
        return _causal_logits(*nnx.split(decoder), tokens, ids)


@partial(jax.jit, static_argnums=0)
def _causal_logits(graphdef: Any, state: Any, tokens: Array, ids: Array) -> Array:
    model = nnx.merge(graphdef, state)
    model.dtype = jnp.dtype(jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    marks = positions, jnp.ones_like(tokens), jnp.zeros_like(tokens), positions + 1

    def masked(query: Array, key: Array, value: Array, cache: None, window: Array | None) -> tuple[Array, None]:
        mask = packed_mask(*marks, None if window is None else first_seen(positions, window))
        return attend(query, key, value, mask, model.arch.softcap), None

    logits = model.logits(model.hidden(tokens, positions, masked)[0])
    return logits[..., model.head.column_of()[ids]]
