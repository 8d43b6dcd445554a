"""`sftrec verify-results`: every number of a published result that ten items a user tell, computed again from lists and data."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sftrec_jax.console import console
from sftrec_jax.errors import UserError
from sftrec_jax.results.differences import differing_numbers, shown
from sftrec_jax.results.lists import TestSets, Values, model_values, ranked_lists, read_frame
from sftrec_jax.results.publish import FROM_DATA, configured_card, differences_within
from sftrec_jax.results.record import ROWS, Published, find_published, read_published
from sftrec_jax.results.summary import summarise
from sftrec_jax.run.card import data_card
from sftrec_jax.run.tables import SHOWN, row_name, short

SHOWN_LINES = 20


def verify(published: Published) -> list[str]:
    """A line for each thing that is not as published; none: the result stands.

    Recomputed: the SHA-256 of the lists, histories and split of each seed, that the lists are those of all test users, the
    model's metrics up to `@10`, every metric of the baselines, and the means, spread, intervals, tests and range that follow.
    The model's metrics at 20 and `mrr` are only checked for agreeing among the seeds and their mean: ten items do not tell them.

    Raises: UserError for data that are not here, unknown users and items, and lists of another result.
    """
    values = published.values
    frame, digest = read_frame(published.lists)
    _check_own(published, digest)
    held = sorted(frame["seed"].unique().to_list())
    if held != sorted(published.seeds):
        raise UserError(
            f"{published.lists}: mixed runs: has the seeds {held}, {published.path.name} {sorted(published.seeds)}; "
            "publish them again"
        )
    out = [] if digest == values["top10"]["sha256"] else [f"{published.lists.name}: SHA-256 is {digest}, not as published"]
    config = published.config
    sets = TestSets(config)
    first = values["seeds"][0]
    of_first = {
        "model": {"checkpoint_step": first["checkpoint_step"]},
        "seeds": {"train": first["seed"], "tie": first["tie_seed"]},
    }
    for expected in (configured_card(config), of_first):
        out += _differences(expected, values["protocol"])
    metrics: list[dict[str, Any]] = []
    every: list[dict[str, Values]] = []
    users = sets.of(first["tie_seed"]).users
    for at, seed in enumerate(values["seeds"]):
        test = sets.of(seed["tie_seed"])
        if not np.array_equal(users, test.users):
            raise UserError(f"{published.path}: mixed runs: seed {seed['seed']} has other test users; publish them one by one")
        data = data_card(config, test.dataset, len(test.users))
        changed = {"histories_sha256": seed["histories_sha256"], "split_sha256": seed["split_sha256"]}
        now = {"histories_sha256": data["data"]["histories_sha256"], "split_sha256": data["split"]["sha256"]}
        out += differing_numbers(changed, now, f"seeds[{at}]")
        if at == 0:
            out += _differences({key: data[key] for key in FROM_DATA if key in data}, values["protocol"])
        ranked, wrong = ranked_lists(
            frame.filter(seed=seed["seed"]), test, config.evaluate.mask_seen, f"{published.lists.name}, seed {seed['seed']}"
        )
        out += wrong
        one: dict[str, Values] = {"model": model_values(ranked, test.targets), **test.baselines}
        found = {row: {n: _mean(one[row], n, v) for n, v in seed["metrics"][row].items()} for row in ROWS}
        out += differing_numbers({row: seed["metrics"][row] for row in ROWS}, found, f"seeds[{at}].metrics")
        metrics.append(found)
        every.append(one)
    about = summarise(metrics, every, first["seed"])
    about["minutes"] = _mean_minutes(values["seeds"])
    return out + [line for key, new in about.items() for line in differing_numbers(values.get(key), new, key)]


def _mean(values: Values, name: str, published: float) -> float:
    return float(values[name].mean()) if name in values else published


def _mean_minutes(seeds: list[dict[str, Any]]) -> float | None:
    minutes = [one["minutes"] for one in seeds if one.get("minutes") is not None]
    return sum(minutes) / len(minutes) if len(minutes) == len(seeds) else None


def _differences(expected: dict[str, Any], card: dict[str, Any]) -> list[str]:
    return [f"protocol.{n}: {shown(b)} is published, {shown(a)} was found" for n, a, b in differences_within(expected, card)]


def _check_own(published: Published, digest: str) -> None:
    """UserError where the lists are those of another result in the same folder."""
    for other in sorted(published.path.parent.glob("*.json")):
        if other.name == published.path.name or digest == published.values["top10"]["sha256"]:
            continue
        try:
            values = read_published(other).values
        except UserError:
            continue  # its own verification says so
        if values["top10"]["sha256"] == digest:
            raise UserError(f"{published.lists}: mixed runs: these are the lists of {other.name}; publish {published.name} again")


def verify_stage(files: list[str], readme: Path | None, write: bool) -> int:
    """Verifies results, then the tables of a README that show some; prints what it finds. Returns the exit code."""
    from sftrec_jax.results.readme import check_readme

    if not files and readme is None:
        raise UserError("nothing to verify; name docs/results/NAME.json, or --readme README.md")
    if write and readme is None:
        raise UserError("--write needs --readme; see sftrec verify-results --help")
    every = [read_published(find_published(file)) for file in files]
    sound = True
    for published in every:
        lines = verify(published)
        console.print(result_table(published))
        sound &= not lines
        for line in lines[:SHOWN_LINES]:
            console.print(f"{published.path.name}: {line}", markup=False)
        if len(lines) > SHOWN_LINES:
            console.print(f"{published.path.name}: and {len(lines) - SHOWN_LINES:,} more")
        if not lines:
            console.print(
                f"verified: {published.path} ({len(published.seeds)} seed(s), "
                f"{published.values['protocol']['users_evaluated']:,} users; the model's metrics at 20 and mrr "
                "as the runs wrote them)"
            )
    if readme is not None:
        sound &= check_readme(readme, {one.name: one for one in every}, write)
    return 0 if sound else 1


def result_table(published: Published) -> Table:
    """Published means of model and baselines."""
    values = published.values
    table = Table(title=f"{published.name}: mean of {len(published.seeds)} seed(s)")
    for column in ("", *map(short, SHOWN)):
        table.add_column(column, justify="right" if column else "left")
    for row in ROWS:
        mark = " (below)" if row == "model" and values["below_counter"] else ""
        metrics = values["metrics"][row]
        table.add_row(row_name(row) + mark, *(f"{metrics[n]:.4f}" if n in metrics else "-" for n in SHOWN))
    return table
