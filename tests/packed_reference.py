"""What each label of packed rows may see, token by token, for comparison with examples written one by one."""

from collections import Counter

import numpy as np

from sftrec_jax.data.segments import PackedBatch


def seen(batch: PackedBatch) -> Counter[tuple[tuple[int, ...], int]]:
    """Of each label the tokens, in order of position, that the hidden state which predicts it may see."""
    tree = (batch.segments, batch.branches, batch.positions, batch.forks)
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for b, k in zip(*np.nonzero(batch.weights), strict=True):
        at = batch.target_positions[b, k]
        segment, branch, position, fork = (x[b] for x in tree)
        on_trunk = (branch == 0) & (position < fork[at])
        on_branch = (branch == branch[at]) & (position <= position[at])
        keys = np.flatnonzero((segment == segment[at]) & (on_trunk | on_branch))
        assert keys.max() <= batch.target_positions[b, k]  # no key behind its query: kernels rely on it
        keys = keys[np.argsort(batch.positions[b, keys], kind="stable")]
        assert batch.positions[b, keys].tolist() == list(range(len(keys)))
        found[tuple(batch.tokens[b, keys].tolist()), int(batch.labels[b, k])] += 1
    return found


def one_by_one(made: list[tuple[list[int], list[int]]]) -> Counter[tuple[tuple[int, ...], int]]:
    return Counter((tuple(prompt + answer[:t]), label) for prompt, answer in made for t, label in enumerate(answer))
