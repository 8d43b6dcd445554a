"""Which interactions train, which one of each user validates, which one tests."""

from dataclasses import dataclass

import numpy as np

from sftrec_jax.data.parts import parts
from sftrec_jax.errors import UserError


@dataclass(frozen=True)
class Split:
    """int64 [U] each: leading items of a history that train; positions of the targets, -1 where there is none."""

    train_end: np.ndarray
    valid_position: np.ndarray
    test_position: np.ndarray


def leave_one_out(lengths: np.ndarray) -> Split:
    """Last item is test, the one before validation, the rest trains; histories (lengths int64 [U]) below 3 only train."""
    enough = lengths >= 3
    return Split(
        train_end=np.where(enough, lengths - 2, lengths),
        valid_position=np.where(enough, lengths - 2, -1),
        test_position=np.where(enough, lengths - 1, -1),
    )


def temporal(offsets: np.ndarray, timestamps: np.ndarray, valid_fraction: float, test_fraction: float) -> tuple[Split, int, int]:
    """Splits all users at the same two times t1 < t2 (seconds), taken as quantiles of all interactions.

    Training is before t1, the validation target a user's first interaction in [t1, t2), the test target the first
    at or after t2. offsets int64 [U+1], timestamps int64 [N] ascending within a user. UserError when ties leave a part empty.
    """
    ordered = np.sort(timestamps)
    count = len(ordered)
    t1, t2 = (
        int(ordered[min(count - 1, int(np.floor(share * count)))])
        for share in (1 - valid_fraction - test_fraction, 1 - test_fraction)
    )
    if ordered[0] == t1 or t1 == t2:
        part = "training" if ordered[0] == t1 else "validation"
        raise UserError(
            f"temporal split: too many equal times leave no interaction for {part} (cut at {t1} and {t2}); change"
            " data.valid_fraction or data.test_fraction, or set data.split: leave_one_out"
        )
    before_1, before_2 = _count_before(offsets, timestamps, t1), _count_before(offsets, timestamps, t2)
    lengths = np.diff(offsets)
    split = Split(
        train_end=before_1,
        valid_position=np.where(before_2 > before_1, before_1, -1),
        test_position=np.where(lengths > before_2, before_2, -1),
    )
    return split, t1, t2


def _count_before(offsets: np.ndarray, timestamps: np.ndarray, moment: int) -> np.ndarray:
    counts = np.zeros(len(offsets) - 1, np.int64)
    for part in parts(offsets):
        before = part.owner[timestamps[part.where] < moment] - part.first
        counts[part.first : part.last] = np.bincount(before, minlength=part.last - part.first)
    return counts
