"""Tables of published results in a README, between `<!-- results NAME NAME ... -->` and `<!-- /results -->`."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftrec_jax.console import console
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.comparison import BASELINES
from sftrec_jax.results.differences import differing, shown
from sftrec_jax.results.hardware import described
from sftrec_jax.results.publish import PARTLY
from sftrec_jax.results.record import FOLDER, Published, find_published, read_published
from sftrec_jax.run.folder import write_text
from sftrec_jax.run.tables import SHOWN, short

_OPEN = re.compile(r"^<!-- results ([^\n]*?) *--> *$", re.MULTILINE)
_CLOSE = "<!-- /results -->"
INTERVAL = "ndcg@10"
"""Shown with its interval."""
_SAME = ("data.source", "data.users", "data.items", "data.interactions", "data.catalogue_sha256", "split.kind", "candidates",
         "users_evaluated", "order.by", "order.tied_timestamp_share", "baselines.counter_decay")  # fmt: skip
"""What results of one table share, beside the baselines' metrics where these have the same tie seeds."""


def check_readme(path: Path, known: Mapping[str, Published], write: bool) -> bool:
    """Whether all tables are those of the results; with `write` they are made so.

    Args:
        path: of the README.
        known: results that were read already; others are looked for beside the README in `docs/results`, then as
            `find_published` does.
        write: replace tables that are not.

    Raises: UserError for a README without such blocks, a block without an end, and results that do not belong in one table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a README") from None
    new, blocks = _regenerated(text, path, known)
    if new == text:
        console.print(f"verified: {path} ({blocks} table(s) of published results)")
        return True
    if write:
        write_text(path, new)
        console.print(f"wrote {path} ({blocks} table(s) of published results)")
        return True
    old_lines, new_lines = text.splitlines(), new.splitlines()
    lines = [line for line in difflib.unified_diff(old_lines, new_lines, lineterm="", n=0) if line[:1] in "+-"][2:]
    for line in lines:
        console.print(f"{path}: {line}", markup=False)
    console.print(f"{path}: tables are not those of the results; add --write to regenerate them")
    return False


def _regenerated(text: str, path: Path, known: Mapping[str, Published]) -> tuple[str, int]:
    """The text with every block made anew, and the number of blocks."""
    out, at, blocks = [], 0, 0
    for match in _OPEN.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        end = text.find(f"\n{_CLOSE}", match.end())
        following = _OPEN.search(text, match.end())
        if end < 0 or (following and following.start() < end):
            raise UserError(f"{path}: line {line} opens a table of results that no `{_CLOSE}` ends; add it")
        names = match.group(1).split()
        if not names:
            raise UserError(f"{path}: line {line} names no result; write <!-- results NAME -->")
        results = [_found(name, path, known) for name in names]
        out += [text[at : match.end()], "\n", table(results)]
        at, blocks = end, blocks + 1
    if not blocks:
        raise UserError(f"{path}: has no table of results; put one between `<!-- results NAME -->` and `{_CLOSE}`")
    return "".join([*out, text[at:]]), blocks


def _found(name: str, path: Path, known: Mapping[str, Published]) -> Published:
    beside = path.parent / FOLDER / f"{name}.json"
    return known.get(name) or read_published(beside if beside.is_file() else find_published(name))


def table(results: Sequence[Published]) -> str:
    """Markdown: a row a result, then the baselines of the first, then a line on what it was measured on and how."""
    first = results[0]
    for other in results[1:]:
        _check_comparable(first, other)
    lines = ["| | " + " | ".join(map(short, SHOWN)) + " |", "| --- |" + " ---: |" * len(SHOWN)]
    lines += [_row(_label(one), one.values["metrics"]["model"], one.values["ci"]["model"][INTERVAL]) for one in results]
    lines += [_row(name, first.values["metrics"][row]) for row, name in zip(BASELINES, _baseline_names(first), strict=True)]
    return "\n".join([*lines, "", _about(results)])


def _row(label: str, metrics: Mapping[str, float], interval: Sequence[float] | None = None) -> str:
    cells = [f"{metrics[name]:.4f}" if name in metrics else "-" for name in SHOWN]
    if interval is not None:
        cells[SHOWN.index(INTERVAL)] += f" [{interval[0]:.4f}, {interval[1]:.4f}]"
    return f"| {label} | " + " | ".join(cells) + " |"


def _label(result: Published) -> str:
    values, seeds = result.values, len(result.seeds)
    title = f" ({_cell(values['title'])})" if values.get("title") else ""
    minutes = f"{values['minutes']:.1f} min" if values.get("minutes") is not None else ""
    part = f" {PARTLY}" if minutes and values.get("minutes_are") == PARTLY else ""
    each = (" each" if minutes and seeds > 1 else "") + part
    told = ", ".join(filter(None, [minutes + each, f"{seeds} seeds" if seeds > 1 else "1 seed"]))
    return f"`{values['command']}`{title}: {told}" + (" (below item-item)" if values["below_counter"] else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _baseline_names(result: Published) -> list[str]:
    """As `BASELINES`; what recent popularity is depends on whether there are times."""
    timed = result.values["protocol"]["order"].get("by") == "time"
    newest = "newest tenth of training" if timed else "newest training item of each user"
    return ["popularity", f"recent popularity ({newest})", "first-order Markov", "item-item counter with decay"]


def _about(results: Sequence[Published]) -> str:
    card = results[0].values["protocol"]
    data, order = card["data"], card["order"]
    tied = order.get("tied_timestamp_share")
    masked = "seen items masked" if "history" in card["candidates"] else "seen items allowed"
    users = f"{card['users_evaluated']:,} test users"
    parts = [
        f"{data['source']}: {users}, {data['items']:,} items, split {card['split']['kind']}, {masked}",
        f"{tied:.1%} of times tied, ordered by a hash of the tie seed" if tied else _untied(order["by"]),
    ]
    ran = [(", ".join(_ran(one)), one.name) for one in results]
    distinct = list(dict.fromkeys(told for told, _ in ran))
    for told in distinct:
        names = "" if len(distinct) == 1 else ", ".join(name for other, name in ran if other == told) + ": "
        parts.append(names + told)
    several = "Means over seeds; in" if any(len(one.seeds) > 1 for one in results) else "In"
    return "; ".join(parts) + f". {several} brackets the 95 % interval of {short(INTERVAL)} over users."


def _untied(by: str) -> str:
    return "no times tied" if by == "time" else f"in {by} (no times)"


def _ran(result: Published) -> list[str]:
    values = result.values
    seeds = " ".join(map(str, result.seeds))
    ties = " ".join(str(one["tie_seed"]) for one in values["seeds"])
    told = [described(values["hardware"]), values["date"], f"seeds {seeds}" if len(result.seeds) > 1 else f"seed {seeds}"]
    if result.tied:
        told.append("tie seeds the same" if ties == seeds and len(result.seeds) > 1 else f"tie seed {ties}")
    return told


def _check_comparable(first: Published, other: Published) -> None:
    """UserError where two results were not measured alike and have no place in one table."""
    for path, a, b in differing(_part(first.values["protocol"]), _part(other.values["protocol"])):
        raise UserError(
            f"mixed runs: {first.name} and {other.name} differ in protocol.{path}: {shown(a)} and {shown(b)}; "
            "they belong in tables of their own"
        )
    ties = [[one["tie_seed"] for one in result.values["seeds"]] for result in (first, other)]
    if ties[0] == ties[1] or not first.tied:
        mine, others = ({name: one.values["metrics"][name] for name in BASELINES} for one in (first, other))
        for path, a, b in differing(mine, others):
            raise UserError(
                f"mixed runs: {first.name} and {other.name} differ in the baseline {path}: {shown(a)} and {shown(b)}; "
                "publish both again"
            )


def _part(card: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for path in _SAME:
        value: Any = card
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        out[path] = value
    return out
