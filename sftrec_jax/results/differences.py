"""In what two cards, or two sets of numbers, differ; runs that may not be averaged."""

from collections.abc import Mapping, Sequence
from typing import Any

from sftrec_jax.errors import UserError

SEEDED = {"seeds.train", "seeds.tie", "order.tie_seed", "model.checkpoint_step"}
"""What differs from seed to seed."""
BY_TIES = {"data.histories_sha256", "split.sha256", "items.codes_sha256", "items.distinct_codes"}
"""What another order of tied times changes as well."""
TOLERANCE = 1e-9
MISSING = object()


def differing(first: Any, second: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted path and both values wherever dictionaries differ, sorted by path; MISSING for a key that one lacks."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = sorted(first.keys() | second.keys(), key=str)
        parts = [differing(first.get(k, MISSING), second.get(k, MISSING), f"{path}.{k}" if path else str(k)) for k in keys]
        return [one for part in parts for one in part]
    return [] if _alike(first, second) else [(path, first, second)]


def differing_numbers(published: Any, found: Any, path: str) -> list[str]:
    """A line for each value that is not what was found, numbers within `TOLERANCE`."""
    return [f"{name}: {shown(a)} is published, {shown(b)} was found" for name, a, b in differing(published, found, path)]


def _alike(first: Any, second: Any) -> bool:
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(_alike(a, b) for a, b in zip(first, second, strict=True))
    numbers = [isinstance(v, int | float) and not isinstance(v, bool) for v in (first, second)]
    if all(numbers):
        return abs(first - second) <= TOLERANCE  # false for NaN
    return type(first) is type(second) and first == second


def shown(value: Any) -> str:
    """A value in a message."""
    return "nothing" if value is MISSING else repr(value)


def check_alike(names: Sequence[str], cards: Sequence[Mapping[str, Any]], what: str, tied: bool) -> None:
    """UserError where cards (or configurations) differ in more than the seeds, and with `tied` in what follows from these.

    Args:
        names: of the runs, for the message.
        cards: one a run.
        what: the cards are, as in `protocol`.
        tied: whether another tie seed is another order.
    """
    allowed = SEEDED | (BY_TIES if tied else set()) | {"train.seed", "data.tie_seed"}
    way_out = "evaluate them alike with `sftrec evaluate`" if what == "protocol" else "run them alike"
    first = _without_messages(cards[0])
    for name, card in zip(names[1:], cards[1:], strict=True):
        for path, a, b in differing(first, _without_messages(card)):
            if path not in allowed:
                raise UserError(
                    f"mixed runs: {names[0]} and {name} differ in {what}.{path}: {shown(a)} and {shown(b)}; {way_out}"
                )


def _without_messages(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card with accepted leaks by name only: their messages count users, which a seed changes."""
    leaks = card.get("leaks")
    if not isinstance(leaks, dict) or not isinstance(leaks.get("found"), list):
        return dict(card)
    names = [one.get("name") if isinstance(one, dict) else one for one in leaks["found"]]
    return {**card, "leaks": {**leaks, "found": names}}
