"""What `prepare` says at its end: what came in, what was kept, and why the rest was not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sftrec_jax.config import DataConfig

_SHOWN = (
    "source", "interactions_read", "users_read", "catalogue_items_read", "below_min_rating", "duplicates_dropped", "core_rounds",
    "core_dropped_interactions", "users_dropped", "users_without_rows_left", "items_not_in_catalogue",
    "interactions_of_items_not_in_catalogue", "users", "items", "interactions", "training_interactions", "validation_targets",
    "test_targets", "split", "tied_timestamp_share", "tied_in_file_order_share", "tied_pairs",
)  # fmt: skip
"""In the table, or in the line before it; what else the report has stands below."""


class Row(NamedTuple):
    """A line of the table; None: the count does not apply."""

    label: str
    interactions: int | None = None
    users: int | None = None
    items: int | None = None


def data_table(report: Mapping[str, Any], config: DataConfig) -> Table:
    """The table of a data set's report (`Dataset.report`)."""
    table = Table("", "interactions", "users", "items", box=SIMPLE_HEAD, title=f"what became of {report['source']}")
    table.title_justify = "left"
    for column in table.columns[1:]:
        column.justify = "right"
    for label, *counts in _rows(report, config):
        table.add_row(label, *("" if count is None else f"{count:,}" for count in counts))
    return table


def other_counts(report: Mapping[str, Any]) -> list[str]:
    """What the report has beside the table, a line each, without counts of nothing."""
    return [f"{name}: {value}" for name, value in report.items() if name not in _SHOWN and value not in (0, None)]


def _rows(report: Mapping[str, Any], config: DataConfig) -> list[Row]:
    valid, test, items = report["validation_targets"], report["test_targets"], report["catalogue_items_read"]
    use = [Row("to train", report["training_interactions"]), Row("to validate", valid), Row("to test", test)]
    if report["split"] == "given":
        read = sum(row.interactions or 0 for row in use)
        return [Row("came in, as examples", read, None, items), Row("kept", read, None, items), *use]
    came = Row("came in", report["interactions_read"], report["users_read"], items)
    kept = Row("kept", report["interactions"], report["users"], report["items"])
    left = kept.interactions - sum(row.interactions or 0 for row in use)  # pyright: ignore[reportOptionalOperand]
    later = [Row("neither: after the user's first target", left)] if left else []
    return [came, *_lost(report, config), kept, *use, *later]


def _lost(report: Mapping[str, Any], config: DataConfig) -> list[Row]:
    rows = [Row("- user, item and time of another row", -report["duplicates_dropped"])]
    if config.min_rating is not None:
        rows.insert(0, Row(f"- rated below {config.min_rating:g}", -report["below_min_rating"]))
    if missing := report["items_not_in_catalogue"]:
        label = f"- of {missing:,} items that the catalogue lacks"
        rows.insert(0, Row(label, -report["interactions_of_items_not_in_catalogue"]))
    gone = report["users_without_rows_left"]
    if gone:
        rows.append(Row("- no row left after that", None, -gone))
    cores = {"users": config.user_core, "items": config.item_core}
    few = " or ".join(f"{name} with < {least}" for name, least in cores.items() if least > 1)
    if few or report["catalogue_items_read"] > report["items"]:
        rounds = f" ({report['core_rounds']} rounds)" if report["core_rounds"] > 1 else ""
        users, items = report["users_dropped"] - gone, report["catalogue_items_read"] - report["items"]
        rows.append(Row(f"- {few or 'items that nobody took'}{rounds}", -report["core_dropped_interactions"], -users, -items))
    return rows
