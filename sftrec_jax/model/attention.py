"""Attention masks and products, in plain XLA.

Axes: B batch, T tokens, P prompt, W beams, L tail, N heads, K kv-heads, H head-dim.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def packed_mask(
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    branches: Int[Array, "B T"],
    forks: Int[Array, "B T"],
    since: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T T"]:
    """Who sees whom in a packed row: True where query (axis 1) may attend to key (axis 2).

    Key k is visible to query q when both stand in the same segment and either k lies on the trunk (branch 0) before
    q's fork, or both stand on the same branch and k is not after q. With branches 0 and forks = positions + 1 this is
    causal attention inside each segment. Padding is segment 0 and attends to padding only. `since`: see `first_seen`.
    """
    marks = (positions, segments, branches, forks) + (() if since is None else (since,))
    return visible([x[:, :, None] for x in marks], [x[:, None, :] for x in marks])


def visible(query: Sequence[Array], key: Sequence[Array]) -> Array:
    """The rule of `packed_mask`: positions, segments, branches, forks and, in a sliding layer, first positions seen, of queries
    and of keys, that broadcast to pairs.
    """
    trunk = (key[2] == 0) & (key[0] < query[3])
    own_branch = (query[2] == key[2]) & (key[0] <= query[0])
    seen = (query[1] == key[1]) & (trunk | own_branch)
    return seen & (key[0] >= query[4]) if len(query) > 4 else seen


def first_seen(positions: Int[Array, "..."], window: Int[Array, ""]) -> Int[Array, "..."]:
    """The first position that each token sees in a layer of this sliding window: it sees `window` positions, its own the last."""
    return positions - (window - 1)


def soft_capped(scores: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    """softcap * tanh(scores / softcap) (Gemma 2); with None the scores as they are."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention; the softmax is taken in float32. Every query needs at least one visible key."""
    b, t, n, h = query.shape
    k = key.shape[2]
    grouped = query.reshape(b, t, k, n // k, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where(mask[:, None, None], soft_capped(scores, softcap), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(b, t, n, h)


FEW_TOKENS = 4
Shared = tuple[Float[Array, "_ K H"], Float[Array, "_ K H"]]
"""Keys and values [S, K, H] that all rows have in front of their own."""
Part = tuple[Float[Array, "B _ K H"], Float[Array, "B _ K H"], Bool[Array, "..."]]
"""Keys and values [B, S, K, H], and a mask [T, S] or [B, T, S]."""


def attend_causal(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    before: Shared | None = None,
    window: Int[Array, ""] | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """`attend` with the causal mask, in blocks of queries that see no later key: half of the products, and of the memory a
    block's share. Positions begin after those of `before`, whose begin at 0.
    """
    t, out = query.shape[1], []
    offset = 0 if before is None else before[0].shape[0]
    block = max(128, -(-t // 128) * 16)
    for at in range(0, t, block):
        end = min(at + block, t)
        rows = jnp.arange(at, end)
        mask, before_mask = rows[:, None] >= jnp.arange(end), None
        if window is not None:
            mask &= jnp.arange(end) >= first_seen(rows, window)[:, None]
            before_mask = jnp.arange(offset) >= first_seen(rows + offset, window)[:, None]
        out.append(attend_to(query[:, at:end], [(key[:, :end], value[:, :end], mask)], before, before_mask, softcap))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def attend_to(
    query: Float[Array, "B T N H"],
    parts: list[Part],
    before: Shared | None = None,
    before_mask: Bool[Array, "..."] | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """`attend` to keys in several pieces, and to those of `before`, which all rows share, under a mask [T, S] or [B, T, S]."""
    b, t, n, h = query.shape
    k = parts[0][0].shape[2]
    grouped = query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)

    def spread(mask: Array) -> Array:
        return mask if mask.ndim == 2 else mask[:, None, None]

    pieces = []
    if before is not None:
        pieces.append(_shared_piece(grouped, before, None if before_mask is None else spread(before_mask), softcap))
    for key, value, mask in parts:
        pieces.append(_piece(grouped, key, value, spread(mask), softcap))
    return _mixed(pieces).astype(query.dtype).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def attend_beams(
    query: Float[Array, "B W T N H"],
    prompt: Part,
    tail_key: Float[Array, "B W L K H"],
    tail_value: Float[Array, "B W L K H"],
    tail_mask: Bool[Array, "T L"],
    before: Shared | None = None,
    before_mask: Bool[Array, "B T S"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "B W T N H"]:
    """The newest T tokens of each of W beams: all share the prompt's keys and values, each has its own tail.

    The prompt's keys and values are never repeated along W. `prompt` has a mask [B, P] or, in a sliding layer, [B, T, P].
    """
    b, w, t, n, h = query.shape
    k, length = tail_key.shape[3], tail_key.shape[2]
    grouped = query.reshape(b, w, t, k, n // k, h).transpose(0, 3, 1, 2, 4, 5)
    pieces = []
    if before is not None:
        hidden = None if before_mask is None else before_mask[:, None, None, :, None]
        pieces.append(_shared_piece(grouped, before, hidden, softcap))
    prompt_mask = prompt[2] if prompt[2].ndim == 3 else prompt[2][:, None]
    pieces.append(_piece(grouped, prompt[0], prompt[1], prompt_mask[:, None, None, :, None], softcap))
    key, value = (x.transpose(0, 3, 1, 2, 4) for x in (tail_key, tail_value))
    if length <= FEW_TOKENS:
        # So few products that laying them out for a matrix unit costs more than doing them.
        scores = jnp.sum(grouped[..., None, :] * key[:, :, :, None, None], axis=-1, dtype=jnp.float32)
    else:
        scores = jnp.einsum("bkwtgh,bkwlh->bkwtgl", grouped, key, preferred_element_type=jnp.float32)

    def product(weights: Array) -> Array:
        if length > FEW_TOKENS:
            return jnp.einsum("bkwtgl,bkwlh->bkwtgh", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return jnp.sum(weights[..., None] * value[:, :, :, None, None], axis=-2, dtype=jnp.float32)

    pieces.append((jnp.where(tail_mask[:, None], soft_capped(scores * h**-0.5, softcap), -jnp.inf), product))
    return _mixed(pieces).astype(query.dtype).transpose(0, 2, 3, 1, 4, 5).reshape(b, w, t, n, h)


Piece = tuple[Array, Callable[[Array], Array]]
"""Scores float32 [B, K, ..., S], -inf where hidden; and what turns weights of their shape into sums of values."""


def _piece(query: Float[Array, "B K ... H"], key: Array, value: Array, mask: Bool[Array, "..."], softcap: float | None) -> Piece:
    """Keys and values [B, S, K, H]. One matrix product for each row and kv-head, whatever axes the queries have."""
    b, k, *rest, h = query.shape
    scores = jnp.matmul(query.reshape(b, k, -1, h), key.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)

    def product(weights: Array) -> Array:
        flat = weights.reshape(b, k, -1, weights.shape[-1]).astype(value.dtype)
        return jnp.matmul(flat, value.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32).reshape(query.shape)

    scores = soft_capped(scores.reshape(b, k, *rest, -1) * h**-0.5, softcap)
    return jnp.where(mask, scores, -jnp.inf), product


def _shared_piece(
    query: Float[Array, "B K ... H"], before: Shared, mask: Bool[Array, "..."] | None, softcap: float | None
) -> Piece:
    key, value = before
    scores = jnp.einsum("bk...h,skh->bk...s", query, key, preferred_element_type=jnp.float32)
    scores = soft_capped(scores * query.shape[-1] ** -0.5, softcap)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)

    def product(weights: Array) -> Array:
        return jnp.einsum("bk...s,skh->bk...h", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)

    return scores, product


def _mixed(pieces: list[Piece]) -> Array:
    """Softmax over all pieces together, in float32, without putting them side by side."""
    scores = [s for s, _ in pieces]
    top = reduce(jnp.maximum, [s.max(axis=-1, keepdims=True) for s in scores])
    weights = [jnp.exp(s - top) for s in scores]
    total = reduce(jnp.add, [w.sum(axis=-1, keepdims=True) for w in weights])
    return reduce(jnp.add, [product(w) for (_, product), w in zip(pieces, weights, strict=True)]) / total
