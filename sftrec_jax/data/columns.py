"""Columns as they come to columns with one meaning: ids as text, times as seconds, ratings as numbers."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import polars as pl
from polars.exceptions import PolarsError

from sftrec_jax.data.table import Table
from sftrec_jax.errors import UserError


def text_ids(table: Table, role: str) -> pl.Series:
    """The ids as text [rows]: 42 and 42.0 of a numeric column become "42". UserError for a null or empty id."""
    values = as_text(table, role)
    bad = values.is_null() | (values == "").fill_null(False)
    if bad.any():
        raise UserError(f"{table.where}: row {first_row(table, bad)} has no {role} id; fill it in or remove the row")
    return values


def as_text(table: Table, role: str) -> pl.Series:
    """A column as text, nulls kept. UserError for bytes that are not UTF-8 and for nested values."""
    values = table.frame[role]
    dtype = values.dtype
    if dtype.is_nested() or dtype == pl.Object:
        raise UserError(f"{table.where}: the {role} column holds {dtype}; name a column with one value a row")
    if (far := _no_date(values)).any():
        raise UserError(
            f"{table.where}: row {first_row(table, far)} has a {role} that is no date of the years 1 to 9999; correct it"
        )
    try:
        text = values.cast(pl.String, strict=False)
    except PolarsError as error:
        raise UserError(
            f"{table.where}: the {role} column holds {dtype}, which is no text ({error}); write it as UTF-8"
        ) from None
    if dtype.is_float():  # each by itself, since a source may come in parts
        whole = values.cast(pl.Int64, strict=False)
        same = (whole.cast(dtype) == values).fill_null(False)
        text = whole.cast(pl.String).zip_with(same, text)
    lost = text.is_null() & values.is_not_null()
    if lost.any():
        raise UserError(f"{table.where}: row {first_row(table, lost)} has a {role} that is not UTF-8; write it as UTF-8 text")
    return text


def as_words(table: Table, role: str) -> pl.Series:
    """A column as text for reading; the parts of a list (a JSON array, or a list of Parquet) and of lists in it joined by commas.

    Null where there is nothing but white space. UserError as in `as_text`.
    """
    values = table.frame[role]
    while isinstance(values.dtype, pl.List) and isinstance(values.dtype.inner, pl.List):
        values = values.list.eval(pl.element().explode())
    if isinstance(values.dtype, pl.List) and not values.dtype.inner.is_nested():  # pyright: ignore[reportAttributeAccessIssue]
        text = values.list.eval(pl.element().drop_nulls().cast(pl.String)).list.join(", ")
    else:
        text = as_text(table, role).map_elements(_joined, return_dtype=pl.String)
    text = text.str.strip_chars()
    return text.set(text == "", None)


def _joined(text: str) -> str:
    if not text.startswith("["):
        return text
    try:
        parts = json.loads(text)
        return ", ".join(_flat(parts)) if isinstance(parts, list) else text
    except (ValueError, RecursionError):
        return text


def _flat(parts: list[Any]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, list):
            yield from _flat(part)
        elif part is not None:
            yield str(part)


def ratings(table: Table, least: float | None = None) -> pl.Series:
    """The ratings as float64 [rows], NaN where there is none.

    Raises: UserError for one that is no number, NaN or infinite, and for none where there is a `least`.
    """
    raw = table.frame["rating"]
    if not (raw.dtype.is_numeric() or raw.dtype in (pl.String, pl.Boolean, pl.Null)):
        raise UserError(f"{table.where}: the rating column holds {raw.dtype}; name a column of numbers, or null")
    values = raw.cast(pl.Float64, strict=False)
    none = raw.is_null() | (raw.str.strip_chars() == "" if raw.dtype == pl.String else False)
    if least is not None and none.any():
        raise UserError(
            f"{table.where}: row {first_row(table, none)} has no rating, but data.min_rating is {least:g}; give one, "
            "remove the row, or set data.min_rating: null"
        )
    bad = ~none & ~(values.abs() < LARGEST).fill_null(False)
    if bad.any():
        value = raw.filter(bad)[0]
        raise UserError(
            f"{table.where}: row {first_row(table, bad)} has the rating {value!r}; give a finite number, remove the row,"
            " or set data.rating_column: null"
        )
    return values.fill_null(float("nan"))


LARGEST = 3e38
"""Ratings are kept in float32."""
FIRST, LAST = -62_135_596_800, 253_402_300_799
"""Seconds at the beginning of the year 1 and at the end of the year 9999."""
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def times(table: Table, unit: str = "s") -> pl.DataFrame:
    """The times as `time` (int64 seconds, rounded down) and `fraction` (int64 nanoseconds below a second) [rows].

    Numbers count `unit`s, as do texts that are numbers; other texts are ISO dates, UTC where they name no zone. A column is
    numbers or dates, not both. UserError for a time that is missing or reads as neither, and for one beyond the year 9999.
    """
    raw, parts = table.frame["time"], UNITS[unit]
    wanted = "a number of seconds" if unit == "s" else f"a number ({unit})"
    if raw.dtype == pl.String:
        raw = raw.str.strip_chars()
        integers, floats = raw.cast(pl.Int64, strict=False), raw.cast(pl.Float64, strict=False)
        if integers.is_not_null().all():
            return _checked(table, _from_integers(integers, parts), wanted)
        if floats.is_not_null().sum() * 2 >= raw.len():
            parsed, whole = _from_floats(floats, parts), _from_integers(integers, parts)
            exact = integers.is_not_null()  # integers past 2^53 lose digits as floats
            parsed = pl.DataFrame({name: whole[name].zip_with(exact, parsed[name]) for name in ("time", "fraction")})
            return _checked(table, parsed, wanted)
        return _checked(table, _from_iso(raw), "an ISO date such as 2015-03-01T12:00:00")
    if raw.dtype.is_integer():
        return _checked(table, _from_integers(raw, parts), wanted)
    if raw.dtype.is_float():
        return _checked(table, _from_floats(raw, parts), wanted)
    if raw.dtype == pl.Date or raw.dtype == pl.Datetime:
        if (far := _no_date(raw)).any():
            raise UserError(
                f"{table.where}: row {first_row(table, far)} has a time that is not in the years 1 to 9999; correct it"
            )
        moments = raw.cast(pl.Datetime("us")) if raw.dtype == pl.Date else raw
        seconds = moments.dt.timestamp("us") // 1_000_000
        return _checked(table, pl.DataFrame({"time": seconds, "fraction": moments.dt.nanosecond().cast(pl.Int64)}), "a time")
    raise UserError(f"{table.where}: the time column holds {raw.dtype}; give numbers of seconds, ISO dates or datetimes")


def _from_integers(values: pl.Series, parts: int) -> pl.DataFrame:
    numbers = values.cast(pl.Int64, strict=False)
    return pl.DataFrame({"time": numbers // parts, "fraction": (numbers % parts) * (1_000_000_000 // parts)})


def _from_floats(values: pl.Series, parts: int) -> pl.DataFrame:
    values = values.cast(pl.Float64) / parts
    seconds = values.floor().cast(pl.Int64, strict=False)
    fraction = ((values - values.floor()) * 1e9).cast(pl.Int64, strict=False)
    return pl.DataFrame({"time": seconds, "fraction": fraction})


def _from_iso(values: pl.Series) -> pl.DataFrame:
    distinct = values.drop_nulls().unique().to_list()
    parsed = [_iso_moment(text) for text in distinct]
    lookup = pl.DataFrame(
        {"text": distinct, "time": [p[0] for p in parsed], "fraction": [p[1] for p in parsed]},
        schema={"text": pl.String, "time": pl.Int64, "fraction": pl.Int64},
    )
    return values.alias("text").to_frame().join(lookup, on="text", how="left", maintain_order="left").select("time", "fraction")


def _iso_moment(text: str) -> tuple[int | None, int]:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None, 0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    elapsed = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return elapsed.days * 86_400 + elapsed.seconds, elapsed.microseconds * 1000


def _checked(table: Table, parsed: pl.DataFrame, wanted: str) -> pl.DataFrame:
    bad = parsed["time"].is_null()
    if bad.any():
        value = table.frame["time"].filter(bad)[0]
        raise UserError(
            f"{table.where}: row {first_row(table, bad)} has the time {value!r}, which is not {wanted}; correct or remove the row"
        )
    if parsed.height and (beyond := (parsed["time"] > LAST) | (parsed["time"] < FIRST)).any():
        value, row = table.frame["time"].filter(beyond)[0], first_row(table, beyond)
        raise UserError(
            f"{table.where}: row {row} has the time {value!r}, not in the years 1 to 9999; set data.time_unit (ms, us or ns)"
        )
    return parsed


def _no_date(values: pl.Series) -> pl.Series:
    """bool [rows]: whether a date, or a time of the day, is none that can be written."""
    dtype, numbers = values.dtype, values.to_physical()
    if dtype == pl.Time:
        low, high = 0, 86_400 * UNITS["ns"] - 1
    elif dtype == pl.Date:
        low, high = FIRST // 86_400, LAST // 86_400
    elif isinstance(dtype, pl.Datetime):
        low, high = FIRST * UNITS[dtype.time_unit], (LAST + 1) * UNITS[dtype.time_unit] - 1
    else:
        return pl.Series([False])
    high = min(high, (1 << 63) - 1)
    return ((numbers < max(low, -(1 << 63))) | (numbers > high)).fill_null(False)


def first_row(table: Table, mask: pl.Series) -> int:
    """Row number in the source of the first true value."""
    return int(table.frame["row"].filter(mask)[0])
