"""What a source tells of histories beside items and their order: ratings, times, texts, and the users' profiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

UNITS = (("year", 365 * 86_400), ("month", 30 * 86_400), ("day", 86_400), ("hour", 3_600), ("minute", 60))


@dataclass(frozen=True, eq=False)
class Told:
    """Of interactions, in the order of their items; None: not told."""

    ratings: np.ndarray | None = None
    """float32 [n], NaN where unknown."""
    times: np.ndarray | None = None
    """int64 [n], seconds since 1970."""
    gaps: np.ndarray | None = None
    """int64 [n], seconds since the interaction before; -1 for the first of a history."""
    texts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Text (object) [n] by name, such as review; "" where there is none."""
    profile: Mapping[str, str] = field(default_factory=dict)
    """Of the user whose history it is: text by name, "" where unknown."""

    def tells(self, name: str) -> bool:
        """Whether anything is known of a field."""
        if name == "rating":
            return self.ratings is not None
        if name in ("gap", "date"):
            return self.times is not None
        return name in self.texts or bool(self.profile.get(name))

    def last(self, count: int) -> "Told":
        """Of the newest `count` interactions."""

        def cut(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[max(0, len(values) - count) :]

        texts = {name: values[max(0, len(values) - count) :] for name, values in self.texts.items()}
        return Told(cut(self.ratings), cut(self.times), cut(self.gaps), texts, self.profile)


NOTHING = Told()


@dataclass(frozen=True, eq=False)
class Many:
    """What is told of all histories of a data set, one after the other."""

    told: Told
    """Of all interactions."""
    profiles: Sequence[Mapping[str, str]] | None = None
    """Of each history's user; None: nothing."""


def gap_words(seconds: int) -> str:
    """A time between interactions in the largest unit that it fills: `2 years`, `1 day`, `moments` below a minute."""
    for unit, length in UNITS:
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "moments"
