"""`sftrec reproduce`: runs a published result again and says whether it falls where it must, or runs and publishes one."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sftrec_jax.config import RunConfig
from sftrec_jax.config_file import load_config
from sftrec_jax.console import console
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.comparison import BASELINES
from sftrec_jax.results.hardware import described, hardware
from sftrec_jax.results.lists import TestSets
from sftrec_jax.results.portable import portable_config
from sftrec_jax.results.publish import MINUTES, check_distinct, check_publishable, free_place, publish
from sftrec_jax.results.record import FOLDER, JUDGED, Published, find_config, find_published, plain_metrics, read_published
from sftrec_jax.results.summary import ranges
from sftrec_jax.run.card import data_card
from sftrec_jax.run.folder import RunFolder, differing_fields, new_run, write_json
from sftrec_jax.run.tables import SHOWN, row_name, short

OUT = Path("runs") / "reproduce"
BASELINE_TOLERANCE = 1e-6
"""Baselines draw nothing: only rounding may differ."""


def seeded(config: RunConfig, seed: int, tie_seed: int) -> RunConfig:
    """The configuration of one seed: `train.seed` and `data.tie_seed`; those of item vectors and semantic ids stay."""
    data, train = dataclasses.replace(config.data, tie_seed=tie_seed), dataclasses.replace(config.train, seed=seed)
    return dataclasses.replace(config, data=data, train=train)


def run_seed(config: RunConfig, path: Path) -> dict[str, Any]:
    """Prepares, trains and evaluates in `path`, from where an earlier call was stopped. Returns `metrics.json`.

    A run that is finished there is taken as it is. `minutes.json` sums the time of all calls.
    Raises: UserError where `path` holds a run of another configuration.
    """
    from sftrec_jax.run import session as sessions
    from sftrec_jax.run.evaluation import evaluate_stage
    from sftrec_jax.run.stages import train_stage

    folder = RunFolder(path)
    if folder.config.exists() and folder.metrics.exists() and folder.recommendations.exists():
        fields = differing_fields(load_config(folder.config), config)
        if fields:
            raise UserError(f"{path}: holds another run ({', '.join(fields)} differ); remove it or choose another --out")
        console.print(f"{path}: is finished, taken as it is")
        return _read(folder)
    going_on = folder.config.exists()
    before = _noted(path) if going_on else 0.0
    begin = None
    try:
        with new_run(path, config, resume=going_on, overwrite=False):
            begin = time.monotonic()
            prepared = going_on and folder.whole.exists()
            session = sessions.open_session(path) if prepared else sessions.prepare(folder, config)
            codes = session.codes.codes
            check_distinct(len(codes) - len(np.unique(codes, axis=0)), path)
            train_stage(session, resume=going_on)
        evaluate_stage(session, *session.trained_decoder())
    finally:
        if begin is not None and folder.config.exists():  # else nothing of the run was begun, or kept
            spent = before + (time.monotonic() - begin) / 60
            write_json(path / MINUTES, {"minutes": round(spent, 3), "hardware": hardware()})
    return _read(folder)


def _read(folder: RunFolder) -> dict[str, Any]:
    return json.loads(folder.metrics.read_text(encoding="utf-8"))


def _noted(path: Path) -> float:
    return float(json.loads((path / MINUTES).read_text(encoding="utf-8"))["minutes"]) if (path / MINUTES).exists() else 0.0


def publish_stage(
    name: str, seeds: Sequence[int] | None, out: Path, runs: Sequence[Path], title: str | None, overwrite: bool
) -> None:
    """Runs `configs/NAME.yaml` with each seed (default 0) and publishes it; with `runs` these finished runs are published.

    Seed s is `train.seed` s, and where times are tied `data.tie_seed` s as well.
    """
    if runs:
        if seeds is not None:
            raise UserError("--seeds and --from-runs: choose one; finished runs have their seeds")
        publish(Path(name).stem if name.endswith((".yaml", ".yml")) else name, runs, Path.cwd() / FOLDER, title, overwrite)
        return
    file, folder = find_config(name)
    name, config = file.stem, load_config(file)
    free_place(name, folder, overwrite)
    check_publishable(config)
    portable_config(config, folder)
    sets = TestSets(config)
    chosen = _checked([0] if seeds is None else seeds)
    paths = [out / name / f"seed-{seed}" for seed in chosen]
    for at, (seed, path) in enumerate(zip(chosen, paths, strict=True), start=1):
        console.print(f"{name}: seed {seed} ({at} of {len(chosen)}) in {path}")
        run_seed(seeded(config, seed, seed if sets.tied else config.data.tie_seed), path)
    publish(name, paths, folder, title, overwrite)


def reproduce_stage(name: str, seeds: Sequence[int] | None, out: Path) -> int:
    """Runs a published result again. Returns 0 where the judged metrics fall into the range and baselines are equal, else 1.

    Args:
        name: NAME or the path of its JSON.
        seeds: default: the published ones.
        out: runs go to OUT/NAME/seed-S.
    """
    published = read_published(find_published(name))
    values, config = published.values, published.config
    chosen = _checked(published.seeds if seeds is None else seeds)
    span = ranges([one["metrics"]["model"] for one in values["seeds"]], values["ci"]["model"], len(chosen))
    console.print(f"{published.name}: seeds {_words(chosen)} of {published.path}")
    minutes = values.get("minutes")
    took = f"{minutes:.1f} min a seed ({values.get('minutes_are')})" if minutes is not None else "an unknown time"
    console.print(f"there it took {took} on {described(values['hardware'])}, {values['date']}")
    one = len(published.seeds) == 1
    what = values["range_is"] if one else f"99 % prediction interval of the mean of {len(chosen)} further seed(s)"
    console.print(f"the model must fall within ({what}): " + ", ".join(f"{short(n)} {_span(span[n])}" for n in JUDGED))
    _check_data(published, chosen)
    results = {}
    for at, seed in enumerate(chosen, start=1):
        path = out / published.name / f"seed-{seed}"
        console.print(f"{published.name}: seed {seed} ({at} of {len(chosen)}) in {path}")
        results[seed] = run_seed(seeded(config, seed, published.tie_seed(seed)), path)
    means = {n: float(np.mean([r["model"][n] for r in results.values()])) for n in span}
    within = {n: low - 1e-9 <= means[n] <= high + 1e-9 for n, (low, high) in span.items()}
    console.print(_table(published, means, span, within))
    wrong = _baseline_differences(published, results)
    for line in wrong:
        console.print(line)
    sound = all(within[n] for n in JUDGED) and not wrong
    told = ", ".join(f"{short(n)} {means[n]:.4f} {'within' if within[n] else 'OUTSIDE'} {_span(span[n])}" for n in JUDGED)
    console.print(
        f"{published.name}: {told}; "
        + ("baselines DIFFER" if wrong else "baselines equal")
        + ("" if sound else "; NOT reproduced")
    )
    return 0 if sound else 1


def _checked(seeds: Sequence[int]) -> list[int]:
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds {_words(seeds)}: give different numbers, 0 or more")
    return list(seeds)


def _words(seeds: Sequence[int]) -> str:
    return " ".join(map(str, seeds))


def _span(span: Sequence[float]) -> str:
    return f"[{span[0]:.4f}, {span[1]:.4f}]"


def _check_data(published: Published, seeds: Sequence[int]) -> None:
    """UserError, before anything is trained, where the data are other ones than those of the result."""
    known = [one for one in published.values["seeds"] if one["seed"] in seeds or not published.tied]
    if not known:
        return
    test = TestSets(published.config).of(known[0]["tie_seed"])
    card = data_card(published.config, test.dataset, len(test.users))
    found = {"histories_sha256": card["data"]["histories_sha256"], "split_sha256": card["split"]["sha256"]}
    for key, value in found.items():
        if value != known[0][key]:
            raise UserError(
                f"{published.config.data.source}: {key} is {value}, published is {known[0][key]}; other data, or another way to "
                "split them: get the data that the result names, or use the version of sftrec-jax in its protocol.code"
            )


def _table(published: Published, means: dict[str, float], span: dict[str, list[float]], within: dict[str, bool]) -> Table:
    table = Table(title=f"{published.name}: model")
    for column in ("", "published", "range", "found", ""):
        table.add_column(column, justify="right" if column else "left")
    for name in SHOWN:
        if name in span:
            mean = published.values["metrics"]["model"][name]
            told = "within" if within[name] else "OUTSIDE"
            table.add_row(short(name), f"{mean:.4f}", _span(span[name]), f"{means[name]:.4f}", told)
    return table


def _baseline_differences(published: Published, results: dict[int, dict[str, Any]]) -> list[str]:
    """A line for each baseline's metric that is not as published for the same order of ties."""
    by_ties = {one["tie_seed"]: one["metrics"] for one in published.values["seeds"]}
    if not published.tied:
        by_ties = dict.fromkeys((published.tie_seed(seed) for seed in results), published.values["seeds"][0]["metrics"])
    out = []
    for seed, result in results.items():
        there = by_ties.get(published.tie_seed(seed))
        if there is None:
            console.print(f"baselines of seed {seed}: tie seed {published.tie_seed(seed)} is not published, not compared")
            continue
        for row, metrics in plain_metrics(result, BASELINES).items():
            for name, value in metrics.items():
                if name in there[row] and not abs(value - there[row][name]) <= BASELINE_TOLERANCE:
                    out.append(f"seed {seed}: {row_name(row)} {short(name)} is {value:.6f}, published is {there[row][name]:.6f}")
    return out
