"""Attention masks and products, in plain XLA.

Axes: B batch, T tokens, P prompt, W beams, L tail, N heads, K kv-heads, H head-dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def packed_mask(
    positions: Int[Array, "B T"], segments: Int[Array, "B T"], branches: Int[Array, "B T"], forks: Int[Array, "B T"]
) -> Bool[Array, "B T T"]:
    """Who sees whom in a packed row: True where query (axis 1) may attend to key (axis 2).

    Key k is visible to query q when both stand in the same segment and either k lies on the trunk (branch 0) before
    q's fork, or both stand on the same branch and k is not after q. With branches 0 and forks = positions + 1 this is
    causal attention inside each segment. Padding is segment 0 and attends to padding only.
    """
    same_segment = segments[:, :, None] == segments[:, None, :]
    trunk = (branches[:, None, :] == 0) & (positions[:, None, :] < forks[:, :, None])
    own_branch = (branches[:, :, None] == branches[:, None, :]) & (positions[:, None, :] <= positions[:, :, None])
    return same_segment & (trunk | own_branch)


def attend(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B T N H"]:
    """Grouped-query attention; the softmax is taken in float32. Every query needs at least one visible key."""
    b, t, n, h = query.shape
    k = key.shape[2]
    grouped = query.reshape(b, t, k, n // k, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(b, t, n, h)


def attend_beams(
    query: Float[Array, "B W N H"],
    prompt_key: Float[Array, "B P K H"],
    prompt_value: Float[Array, "B P K H"],
    prompt_mask: Bool[Array, "B P"],
    tail_key: Float[Array, "B W L K H"],
    tail_value: Float[Array, "B W L K H"],
    tail_mask: Bool[Array, "L"],
) -> Float[Array, "B W N H"]:
    """One new token for each of W beams: all share the prompt's keys and values, each has its own tail.

    The two score parts are put side by side before one softmax, which equals merging them by log-sum-exp; the
    prompt's keys and values are never repeated along W.
    """
    b, w, n, h = query.shape
    k, p = prompt_key.shape[2], prompt_key.shape[1]
    grouped = query.reshape(b, w, k, n // k, h)
    of_prompt = jnp.einsum("bwkgh,bpkh->bwkgp", grouped, prompt_key, preferred_element_type=jnp.float32)
    of_tail = jnp.einsum("bwkgh,bwlkh->bwkgl", grouped, tail_key, preferred_element_type=jnp.float32)
    of_prompt = jnp.where(prompt_mask[:, None, None, None], of_prompt * h**-0.5, -jnp.inf)
    of_tail = jnp.where(tail_mask, of_tail * h**-0.5, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([of_prompt, of_tail], -1), axis=-1).astype(prompt_value.dtype)
    out = jnp.einsum("bwkgp,bpkh->bwkgh", weights[..., :p], prompt_value)
    out += jnp.einsum("bwkgl,bwlkh->bwkgh", weights[..., p:], tail_value)
    return out.reshape(b, w, n, h)
