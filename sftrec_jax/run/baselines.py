"""What a model has to beat on the data of a config: the baselines alone, over several tie seeds, by item and by code string."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sftrec_jax.config import RunConfig
from sftrec_jax.console import console
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.by_code import CodeScoring
from sftrec_jax.evaluate.checks import check_evaluable
from sftrec_jax.evaluate.comparison import BASELINES, fit_baselines
from sftrec_jax.evaluate.metrics import DEFAULT_KS, user_metrics
from sftrec_jax.evaluate.uncertainty import intervals
from sftrec_jax.items.index_file import read_index
from sftrec_jax.items.titles import distinct_titles
from sftrec_jax.run.card import data_card
from sftrec_jax.run.folder import check_free, write_json
from sftrec_jax.run.lint import check_data
from sftrec_jax.run.naming import numbered
from sftrec_jax.run.tables import SHOWN, row_name, short

KINDS = {"": "", "by_code_string": "; by code string", "by_code_item": "; by item, as named by its code"}
"""How lists are scored, by key of the result."""

Values = dict[str, dict[str, np.ndarray]]


def baselines_stage(config: RunConfig, tie_seeds: int, to: Path | None, overwrite: bool) -> dict[str, Any]:
    """Fits and scores the `BASELINES`; prints a table, and writes JSON where `to` is given.

    Args:
        config: `data`, `decode.top_k`, `evaluate.mask_seen`, `evaluate.counter_decay`; with `items.tokenizer: file` the codes
            as well.
        tie_seeds: orders of tied times that are tried, from `data.tie_seed` up.
        to: `.json`.
        overwrite: replace `to`.

    Returns: of each baseline its metrics (means over tie seeds), and `users`, `items`, `mask_seen`, `tie_seeds`, `spread`
        (standard deviations over tie seeds), `ci` (95 % over the users of the first tie seed), `protocol`; with codes
        `by_code_string` and `by_code_item`, see `CodeScoring`.
    """
    if tie_seeds < 1:
        raise UserError(f"--tie-seeds {tie_seeds}: use 1 or more")
    if to is not None:
        check_free(to, overwrite)
    dataset = prepare_dataset(config.data)
    check_evaluable(Path(config.data.source), config, dataset)
    leaks = check_data(dataset, config)
    tied = dataset.report.get("tied_timestamp_share")
    if tie_seeds > 1 and not tied:
        console.print("no times are tied in this data (or it has none), so every tie seed gives the same order: one is enough")
        tie_seeds = 1
    seeds = list(range(config.data.tie_seed, config.data.tie_seed + tie_seeds))
    scored = [_scored(config, dataset, _scoring(config, dataset))]
    for seed in seeds[1:]:
        again = prepare_dataset(dataclasses.replace(config.data, tie_seed=seed))
        scored.append(_scored(config, again, _scoring(config, again)))
    test = int((dataset.test_position >= 0).sum())
    result: dict[str, Any] = {"users": test, "items": len(dataset.item_ids), "mask_seen": config.evaluate.mask_seen}
    result |= {"tie_seeds": seeds, "tied_timestamp_share": tied}
    for kind in scored[0]:
        means, spread = _over_seeds([one[kind] for one in scored])
        about = means | {"ci": _certain(scored[0][kind])} | ({"spread": spread} if tie_seeds > 1 else {})
        if kind:
            result[kind] = about
        else:
            result |= about
        console.print(_table(_title(config, result) + KINDS[kind], means, spread if tie_seeds > 1 else None))
    scoring = _scoring(config, dataset)
    if scoring is not None:
        users = np.flatnonzero(dataset.test_position >= 0)
        result["items_sharing_a_code"] = int(scoring.shared(np.arange(len(dataset.item_ids))).sum())
        result["targets_sharing_a_code"] = int(scoring.shared(_targets(dataset, users)).sum())
    result["protocol"] = data_card(config, dataset, test) | {"leaks": leaks}
    if scoring is not None:
        console.print(
            f"{result['items_sharing_a_code']:,} items share a code with others and are the target of "
            f"{result['targets_sharing_a_code']:,} of {test:,} test rows; a code string is a hit there whichever item was meant"
        )
    if to is not None:
        write_json(to, result)
        console.print(f"wrote {to}")
    return result


def _table(title: str, means: dict[str, dict[str, float]], spread: dict[str, dict[str, float]] | None) -> Table:
    table = Table(title=title)
    for column in ("", *map(short, SHOWN)):
        table.add_column(column, justify="right" if column else "left")
    for name in BASELINES:
        table.add_row(row_name(name), *(f"{means[name][m]:.4f}" for m in SHOWN if m in means[name]))
        if spread is not None:
            table.add_row("", *("±" + f"{spread[name][m]:.4f}"[1:] for m in SHOWN if m in spread[name]))
    return table


def _title(config: RunConfig, result: dict[str, Any]) -> str:
    seen = "seen items masked" if config.evaluate.mask_seen else "seen items allowed"
    seeds = f", {len(result['tie_seeds'])} tie seeds (± standard deviation)" if len(result["tie_seeds"]) > 1 else ""
    return f"baselines on test: {result['users']:,} users, all {result['items']:,} items, {seen}{seeds}"


def _scoring(config: RunConfig, dataset: Dataset) -> CodeScoring | None:
    if config.items.codes_file is None:
        return None
    paths = read_index(Path(config.items.codes_file), dataset.item_ids, config.items.codes_keys)
    return CodeScoring.of(numbered(paths), distinct_titles(dataset.titles, dataset.item_ids))


def _targets(dataset: Dataset, users: np.ndarray) -> np.ndarray:
    return dataset.items[dataset.offsets[users] + dataset.test_position[users]]


def _scored(config: RunConfig, dataset: Dataset, scoring: CodeScoring | None) -> dict[str, Values]:
    """By kind of scoring ("": by item) and baseline, the metrics of every user."""
    users, n, mask = np.flatnonzero(dataset.test_position >= 0), len(dataset.item_ids), config.evaluate.mask_seen
    histories = [dataset.history(int(u))[: dataset.test_position[u]] for u in users]
    targets = _targets(dataset, users)
    k = config.decode.top_k
    ks = tuple(c for c in DEFAULT_KS if c <= k)
    out: dict[str, Values] = {"": {}} if scoring is None else {"": {}, "by_code_string": {}, "by_code_item": {}}
    for name, baseline in fit_baselines(dataset, config.evaluate.counter_decay).items():
        # Twice as many items as codes are asked for: few share one.
        ranked = baseline.rank(histories, k if scoring is None else min(n, 2 * k), mask)
        out[""][name] = user_metrics(ranked[:, :k], targets, ks)
        if scoring is not None:
            written = scoring.written(ranked, k)
            out["by_code_string"][name] = scoring.by_string(written, targets, ks)
            out["by_code_item"][name] = scoring.by_item(written, targets, histories if mask else None, ks)
    return out


def _over_seeds(scored: list[Values]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Means and standard deviations over tie seeds, of each baseline and metric."""
    every = {b: {m: [float(one[b][m].mean()) for one in scored] for m in metrics} for b, metrics in scored[0].items()}
    means = {b: {m: float(np.mean(v)) for m, v in metrics.items()} for b, metrics in every.items()}
    several = len(scored) > 1
    return means, {b: {m: float(np.std(v, ddof=1)) if several else 0.0 for m, v in ms.items()} for b, ms in every.items()}


def _certain(values: Values) -> dict[str, dict[str, list[float]]]:
    return {name: {m: list(i) for m, i in intervals(row).items()} for name, row in values.items()}
