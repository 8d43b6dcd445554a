"""Finished runs of one configuration become `NAME.json` and `NAME.top10.parquet`."""

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sftrec_jax.config import PromptConfig, RunConfig
from sftrec_jax.config_file import load_config, to_dict
from sftrec_jax.console import console
from sftrec_jax.errors import UserError
from sftrec_jax.results.differences import TOLERANCE, check_alike, differing, shown
from sftrec_jax.results.hardware import hardware
from sftrec_jax.results.lists import LENGTH, TestSet, TestSets, Values, model_values, published_frame, ranked_lists
from sftrec_jax.results.portable import portable_config
from sftrec_jax.results.record import ROWS, check_name, lists_path, plain_metrics
from sftrec_jax.results.summary import summarise
from sftrec_jax.run.card import data_card, prompt_card
from sftrec_jax.run.folder import RunFolder, open_folder, write_json
from sftrec_jax.run.tables import write_frame

MINUTES = "minutes.json"
"""In the folder of a run that `sftrec reproduce` made: how long the whole run took, and on what."""
FROM_DATA = ("data", "split", "order", "candidates", "users_evaluated", "baselines")
"""Parts of the protocol card that the configuration and the data alone decide."""


@dataclass(frozen=True, eq=False)
class SeedRun:
    """A finished run as it is published."""

    folder: RunFolder
    config: RunConfig
    result: dict[str, Any]
    """`metrics.json`."""

    @property
    def seed(self) -> int:
        """The key of this run among those of the result."""
        return self.config.train.seed

    @property
    def card(self) -> dict[str, Any]:
        """How it was evaluated."""
        return self.result["protocol"]


def check_publishable(config: RunConfig) -> None:
    """UserError for settings whose lists of ten would not give the metrics back, before a run takes its time."""
    if config.decode.top_k < LENGTH:
        raise UserError(f"decode.top_k is {config.decode.top_k}; published lists have {LENGTH} items, use {LENGTH} or more")
    if config.evaluate.users is not None:
        raise UserError(f"evaluate.users is {config.evaluate.users}; published results are of all test users, use null")


def check_distinct(items_sharing_a_code: int, where: Path) -> None:
    """UserError where items share a code: their expected ranks cannot be counted again from ten items."""
    if items_sharing_a_code:
        raise UserError(
            f"{where}: {items_sharing_a_code:,} items share a code, and their expected ranks cannot be recomputed "
            "from ten items; set semantic.collisions to extra or nearest to publish"
        )


def publish(
    name: str, runs: Sequence[Path], folder: Path, title: str | None = None, overwrite: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Writes `NAME.top10.parquet` (seed, user, rank from 1, item_id: the test users), then `NAME.json`.

    Metrics up to `@10`, intervals and comparisons are computed again from the lists and the data; metrics at 20 and `mrr`, which
    is cut at 20, are those that the runs wrote, as ten items do not tell them.

    Args:
        name: of the result.
        runs: folders of finished runs of one configuration, which differ in `train.seed` and `data.tie_seed` alone.
        folder: PROJECT/docs/results, made where it is not there.
        title: what the result is, for tables; None: that of the result it replaces.
        overwrite: replace a result of that name.

    Returns: the path of the JSON and what is in it.
    Raises: UserError for a run that is not finished, runs that were not evaluated alike, `metrics.json` that its own
        `recommendations.parquet` does not give, items that share a code, and paths that others would not have.
    """
    path = free_place(name, folder, overwrite)
    found = [_seed_run(run) for run in runs]
    names = [str(run.folder.path) for run in found]
    if len({run.seed for run in found}) < len(found):
        raise UserError(f"mixed runs: {', '.join(names)} have train.seed {[run.seed for run in found]}; each must have its own")
    first = found[0]
    sets = TestSets(first.config)
    check_alike(names, [to_dict(run.config) for run in found], "config", sets.tied)
    check_alike(names, [run.card for run in found], "protocol", sets.tied)
    config = portable_config(first.config, folder)
    frames, values, seeds = [], [], []
    users = sets.of(first.config.data.tie_seed).users
    for run in found:
        test = sets.of(run.config.data.tie_seed)
        if not np.array_equal(users, test.users):
            raise UserError(f"mixed runs: {names[0]} and {run.folder.path} have other test users; publish them one by one")
        frame, one = _scored(run, test)
        frames.append(frame)
        values.append(one)
        seeds.append(_seed_entry(run))
    about = summarise([one["metrics"] for one in seeds], values, first.seed)
    minutes = [one["minutes"] for one in seeds]
    timed = all(m is not None for m in minutes)
    record = {
        "name": name,
        "title": title if title is not None else _title(path),
        "command": f"sftrec reproduce {name}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": seeds[0].pop("hardware"),
        "minutes": float(np.mean(minutes)) if timed else None,
        "minutes_are": _minutes_are({one.pop("minutes_are") for one in seeds}) if timed else None,
        "config": config,
        "seeds": seeds,
        **about,
        "protocol": first.card,
    }
    for one in seeds[1:]:  # named where it is another
        if one["hardware"] == record["hardware"]:
            del one["hardware"]
    folder.mkdir(parents=True, exist_ok=True)
    write_frame(lists_path(path), pl.concat(frames))
    digest = hashlib.sha256(lists_path(path).read_bytes()).hexdigest()
    record["top10"] = {"file": lists_path(path).name, "sha256": digest}
    write_json(path, record)
    console.print(f"published {path} and {lists_path(path).name}: {len(found)} seed(s), {len(users):,} users")
    return path, record


def free_place(name: str, folder: Path, overwrite: bool) -> Path:
    """The path of the JSON; UserError where a result of that name is there and must stay."""
    path = folder / f"{check_name(name)}.json"
    taken = next((p for p in (path, lists_path(path)) if p.exists()), None)
    if taken is not None and not overwrite:
        raise UserError(f"{taken}: is published already; add --overwrite to replace it, or choose another name")
    return path


def _title(path: Path) -> str | None:
    """Of a result that is there; None too where it cannot be read, since it is about to be replaced."""
    try:
        title = json.loads(path.read_text(encoding="utf-8")).get("title")
    except (OSError, ValueError, AttributeError):
        return None
    return title if isinstance(title, str) else None


def _seed_run(path: Path) -> SeedRun:
    folder = open_folder(path)
    for file in (folder.metrics, folder.recommendations):
        if not file.exists():
            raise UserError(f"{path}: is not finished (no {file.name}); run `sftrec evaluate {path}` first")
    config = load_config(folder.config)
    check_publishable(config)
    try:
        result = json.loads(folder.metrics.read_text(encoding="utf-8"))
        card = result["protocol"]
        if not all(isinstance(result[row]["ndcg@10"], float) for row in ROWS) or not isinstance(card, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder.metrics}: lacks metrics or the protocol card; run `sftrec evaluate {path}` again") from None
    check_distinct(result.get("items_sharing_a_code") or 0, path)
    _check_as_configured(config, card, path)
    return SeedRun(folder, config, result)


def configured_card(config: RunConfig) -> dict[str, Any]:
    """The parts of the protocol card that the configuration alone decides, but for seeds."""
    return {
        "items": {"tokenizer": config.items.tokenizer},
        "prompt": prompt_card(config.prompt),
        "decode": {name: getattr(config.decode, name) for name in ("beam", "top_k", "normaliser")},
        "model": {"from_scratch": config.model.from_scratch},
        "train": {"method": config.train.method, "row_length": config.train.row_length},
        "candidates": "all items of the catalogue" + (" but those of the history" if config.evaluate.mask_seen else ""),
    }


def _check_as_configured(config: RunConfig, card: dict[str, Any], path: Path) -> None:
    """UserError for a run that was evaluated with options that its `config.yaml` does not have."""
    for name, configured, evaluated in differences_within(configured_card(config), card):
        raise UserError(
            f"{path}: config.yaml says {name} {shown(configured)}, but it was evaluated with {shown(evaluated)}; "
            f"run `sftrec evaluate {path}` without options"
        )


def differences_within(part: dict[str, Any], card: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where a card has other values for the keys of `part`; older cards lack sections, and options that were at their default."""
    out = []
    defaults = {"prompt": prompt_card(PromptConfig())}
    for section, expected in part.items():
        found = card.get(section)
        if isinstance(expected, dict) and isinstance(found, dict):
            found = {key: value for key, value in {**defaults.get(section, {}), **found}.items() if key in expected}
        if section in card:
            out += differing(expected, found, section)
    return out


def _scored(run: SeedRun, test: TestSet) -> tuple[pl.DataFrame, dict[str, Values]]:
    """The lists to publish, and every row's metrics of each user; UserError where `metrics.json` has other ones."""
    file = run.folder.recommendations
    data = data_card(run.config, test.dataset, len(test.users))
    for name, now, then in differences_within({key: data[key] for key in FROM_DATA if key in data}, run.card):
        raise UserError(
            f"{run.folder.path}: protocol.{name} is {shown(then)}, but the data of config.yaml give {shown(now)}; "
            "mixed runs, or data that have changed: run it again"
        )
    try:
        frame = published_frame(run.seed, pl.read_parquet(file), test, file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]}); evaluate the run again") from None
    ranked, wrong = ranked_lists(frame, test, run.config.evaluate.mask_seen, str(file))
    if wrong:
        raise UserError(f"{wrong[0]}; mixed runs, evaluate this one again")
    values: dict[str, Values] = {"model": model_values(ranked, test.targets), **test.baselines}
    for row, name, written in [(r, n, v) for r, each in plain_metrics(run.result).items() for n, v in each.items()]:
        if name in values[row] and not abs(float(values[row][name].mean()) - written) <= TOLERANCE:
            other = file.name if row == "model" else "the data"
            raise UserError(
                f"{run.folder.metrics}: {row}.{name} is {written!r}, but {other} give {float(values[row][name].mean())!r}; "
                "mixed runs, evaluate this one again"
            )
    return frame, values


def _seed_entry(run: SeedRun) -> dict[str, Any]:
    minutes, kind, machine = _minutes(run)
    return {
        "seed": run.seed,
        "tie_seed": run.config.data.tie_seed,
        "checkpoint_step": run.card["model"]["checkpoint_step"],
        "minutes": minutes,
        "minutes_are": kind,
        "hardware": machine,
        "histories_sha256": run.card["data"]["histories_sha256"],
        "split_sha256": run.card["split"]["sha256"],
        "metrics": plain_metrics(run.result),
    }


WHOLE, PARTLY = "of the whole run", "of training and evaluation"


def _minutes_are(kinds: set[str | None]) -> str:
    return WHOLE if kinds == {WHOLE} else PARTLY


def _minutes(run: SeedRun) -> tuple[float | None, str | None, dict[str, Any]]:
    """How long it took, what of it was timed, and on what: this machine where nothing else was noted."""
    noted = run.folder.path / MINUTES
    if noted.exists():
        values = json.loads(noted.read_text(encoding="utf-8"))
        return values["minutes"], WHOLE, values["hardware"]
    return training_minutes(run.folder, run.result.get("seconds_evaluating")), PARTLY, hardware()


def training_minutes(folder: RunFolder, seconds_evaluating: float | None) -> float | None:
    """Training and evaluation by `metrics.jsonl`, whose seconds begin anew where a run was resumed; None where not known."""
    if seconds_evaluating is None or not (folder.path / "metrics.jsonl").exists():
        return None
    lines = (folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clock = [json.loads(line).get("seconds", 0.0) for line in lines]
    if not clock:
        return None
    ends = [now for now, later in zip(clock, clock[1:], strict=False) if later < now] + clock[-1:]
    return (sum(ends) + seconds_evaluating) / 60
