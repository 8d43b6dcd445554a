"""Prompts of many users, sorted into batches of few lengths, and run one ahead of the results."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sftrec_jax import stopping

FEW_BATCHES = 3
"""A prompt length with fewer batches joins the next longer one: padding them costs less than compiling for them."""

Progress = Callable[[int], None]
"""Called with the number of users just finished."""


def run_batches(
    prompts: Sequence[np.ndarray],
    size: int,
    dispatch: Callable[[np.ndarray, np.ndarray, np.ndarray], Any],
    store: Callable[[np.ndarray, Any], None],
    progress: Progress | None,
) -> None:
    """Runs `dispatch` on every batch; the next one is made and launched before the results of the last are waited for.

    Args:
        prompts: U arrays int32.
        size: users in a batch, at most; fewer prompts make smaller batches (powers of two).
        dispatch: gets rows [at most size], prompts int32 [size, P] filled up at the right, lengths int32 [size]; starts work.
        store: gets the same rows and what `dispatch` returned.
    """
    size = min(size, 1 << max(0, len(prompts) - 1).bit_length())
    waiting: tuple[np.ndarray, Any] | None = None

    def finish() -> None:
        if waiting is not None:
            store(*waiting)
            if progress is not None:
                progress(len(waiting[0]))

    for rows, width in plan_batches(np.asarray([len(p) for p in prompts], np.int64), size):
        stopping.pause()
        # Rows that fill the last batch up are a prompt of one token.
        padded, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
        for at, row in enumerate(rows):
            padded[at, : len(prompts[row])] = prompts[row]
            lengths[at] = len(prompts[row])
        launched = rows, dispatch(rows, padded, lengths)
        finish()
        waiting = launched
    finish()


def plan_batches(lengths: np.ndarray, size: int) -> list[tuple[np.ndarray, int]]:
    """Batches of at most `size` prompts, longest first, each with the width that it is padded to.

    Widths are 16, 32, 48, 64, 96, 128, 192, ... or the longest prompt rounded up to 16; few of them are in use, since
    each is compiled.

    Args:
        lengths: int64 [U] tokens of each prompt.

    Returns: (rows int64 [at most size], width) per batch. The longest come first, so that want of memory shows at once.
    """
    if not len(lengths):
        return []
    order = np.argsort(-lengths, kind="stable")
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    longest = -(-int(lengths.max()) // 16) * 16
    wanted = [min(ladder(int(lengths[g[0]])), longest) for g in groups]
    batches: list[tuple[np.ndarray, int]] = []
    width, used = longest, 0
    for at, group in enumerate(groups):
        narrower = wanted[at] < width
        if narrower and used >= FEW_BATCHES and wanted.count(wanted[at]) >= FEW_BATCHES:
            width, used = wanted[at], 0
        used += 1
        batches.append((group, width))
    return batches


def ladder(n: int) -> int:
    """The least of 16, 32, 48, 64, 96, 128, 192, ... (powers of two and half-way steps) that is at least n."""
    step = 16
    while step < n:
        if step >= 32 and step * 3 // 2 >= n:
            return step * 3 // 2
        step *= 2
    return step
