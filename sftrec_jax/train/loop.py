"""The training loop: restore, step, validate, save; reads top to bottom."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sftrec_jax import stopping
from sftrec_jax.console import console
from sftrec_jax.errors import UserError
from sftrec_jax.model.sharding import named_arrays
from sftrec_jax.stopping import Stopped
from sftrec_jax.train.batches import BatchPlan
from sftrec_jax.train.checkpoint import Checkpoints
from sftrec_jax.train.meter import Meter
from sftrec_jax.train.metrics import JsonLines, TrainProgress
from sftrec_jax.train.optimizer import is_rows, learning_rates, make_optimizer, rows_only_steps
from sftrec_jax.train.requests import Requests
from sftrec_jax.train.step import TrainState, init_state, make_train_step, own_rows, shard_batches

Validate = Callable[[dict[str, jax.Array]], dict[str, float]]
SHOWN = 3
"""Examples of a skipped update that are shown,"""
RECORDED = 50
"""and that are recorded."""


@dataclass(frozen=True)
class TrainResult:
    """What training ended with."""

    step: int
    best_step: int
    best: float
    """The validation metric `train.best_metric` of `best_step`."""
    seconds: float
    seconds_validating: float
    tokens: int
    targets: int
    skipped: int
    """Updates that were skipped, in all of the run."""


def train(
    graphdef: nnx.GraphDef,
    trained: nnx.State,
    frozen: nnx.State,
    plan: BatchPlan,
    dropout: bool,
    mesh: Mesh,
    folder: Path,
    checkpoints: Checkpoints,
    validate: Validate,
    meter: Meter,
    first: int | None,
    name: Callable[[int], str] = str,
) -> TrainResult:
    """Trains to `plan.steps`, keeps `checkpoints` and records in `folder/metrics.jsonl`.

    `validate` takes the trained arrays by name and returns ranking metrics, `train.best_metric` among them. `first`: the
    checkpoint to go on from, None to begin. With `train.rows_first` the first steps train new token rows only; the state is one
    throughout, so a run is resumed on either side of the switch. `meter` counts what is done; `name` says of a part of the plan
    which examples it holds.

    Every checkpoint is begun before its validation, so a run that stops at any moment and is resumed does what one that never
    stopped does. Raises Stopped, with all saved, where the run was asked to stop.
    """
    config, steps = plan.config, plan.steps
    optimizer = make_optimizer(config, steps)
    state = init_state(named_arrays(trained), optimizer, mesh)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained)
    every = config.validate_every or max(1, -(-steps // 4))

    def due(step: int) -> bool:
        return step % every == 0 or step == steps

    begun, unvalidated = first or 0, False
    if first is not None:
        state = checkpoints.restore(first, state)
        console.print(f"resumed from step {first} of {steps}")
        unvalidated = due(first) and checkpoints.score(first) is None
    records = JsonLines(folder / "metrics.jsonl", first, not unvalidated)
    dropout_seed = config.seed if dropout else None
    step_all = make_train_step(graphdef, template, optimizer, dropout_seed, state, spikes=config.skip_spikes)
    step_rows, rows_until = step_all, rows_only_steps(config, steps)
    if begun < rows_until:
        rows = [name for name in state.trained if is_rows(name)]
        step_rows = make_train_step(
            graphdef, template, make_optimizer(config, steps, True), dropout_seed, state, rows, config.skip_spikes
        )
    # All rates beforehand: computing one in the loop would queue behind the step that was just launched.
    rates = learning_rates(config, steps)
    requests = Requests(folder, config.save_minutes)
    begin, validating, totals = time.monotonic(), 0.0, np.zeros(2)

    def note(step: int, metrics: dict[str, jax.Array], waited: float, since: float, progress: TrainProgress) -> float:
        found = jax.device_get(metrics)
        finite = found.pop("finite")
        values = {key: float(value) for key, value in found.items()}
        taken, in_a_row = values.pop("taken"), int(values.pop("in_a_row"))
        now = time.monotonic()
        seconds = max(now - since, 1e-9)
        totals[:] += (values["tokens"], values["targets"])
        steady = step not in (begun + 1, rows_until + 1)  # which compiled
        record = values | {
            **meter.step(values, plan.counts(step - 1), seconds, waited, step <= rows_until, steady),
            **{key: float(each[step - 1]) for key, each in rates.items()},
            "seconds": round(now - begin, 3),
        }
        progress.update(step, record)
        if not taken:
            record |= _skipped(plan, step, values, finite, in_a_row, name)
        records.write({"step": step, **{key: _plain(value) for key, value in record.items()}})
        if in_a_row >= config.stop_after_skips:
            raise UserError(
                f"{in_a_row} updates in a row were skipped up to step {step}, whose loss is {values['loss']:.4g} and gradient "
                f"{values['grad_norm']:.4g}; lower train.learning_rate and train.rows_learning_rate, then start again "
                "(earlier checkpoints are intact)"
            )
        return now

    def save(state: TrainState) -> None:
        checkpoints.save(state)
        requests.saved()

    def score(step: int, state: TrainState) -> None:
        before = time.monotonic()
        with stopping.released():  # what is not saved yet is being written
            valid = validate(state.trained)
        records.write({"step": step, "valid": valid, "seconds": round(time.monotonic() - begin, 3)})
        checkpoints.set_score(step, valid[config.best_metric])
        shown = dict.fromkeys(("recall@10", "ndcg@10", config.best_metric))
        console.print(f"step {step}: validation " + "  ".join(f"{k} {valid[k]:.4f}" for k in shown))
        nonlocal validating
        validating += time.monotonic() - before

    # Closed on any way out, so that a run that stops half-way leaves whole checkpoints.
    with closing(records), TrainProgress(steps, begun) as progress, stopping.holding(), stopping.saving(checkpoints.finish):
        if unvalidated:
            score(begun, state)
        pending: tuple[int, Any, float] | None = None
        rows = config.batch_rows
        own = own_rows(mesh, rows)
        batches = plan.iterate(begun, own)
        noted = time.monotonic()
        for step in range(begun + 1, steps + 1):
            done = step - 1
            stop = stopping.agreed()
            switch = step == rows_until + 1 and done > begun  # compiles, for minutes perhaps
            asked_for = not stop and requests.save(done)
            if stop or asked_for or switch:
                if pending:
                    noted, pending = note(*pending, noted, progress), None
                if done > begun:
                    save(state)
                    if asked_for:
                        console.print(f"step {done}: saved, as asked by a file or by train.save_minutes")
            if stop:
                checkpoints.finish()
                console.print(
                    f"stopped after step {done} of {steps}, which is saved" if done else "stopped before the first step"
                )
                raise Stopped
            step_fn = step_rows if step <= rows_until else step_all
            asked = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - asked
            placed = shard_batches(batch, mesh, rows, own)
            if step == begun + 1 or switch:
                with stopping.released():  # the first step compiles, and has changed nothing yet
                    step_fn.lower(state, frozen, placed).compile()  # type: ignore[attr-defined]
            state, metrics = step_fn(state, frozen, placed)
            if pending:  # the numbers of a step are fetched after the next one has been launched
                noted = note(*pending, noted, progress)
            pending = (step, metrics, waited)
            if due(step) or (config.save_every and step % config.save_every == 0):
                noted, pending = note(*pending, noted, progress), None
                save(state)
                if due(step):
                    score(step, state)
                noted = time.monotonic()
        checkpoints.finish()
        if steps not in checkpoints.steps():  # its save failed; training went on, but now nothing comes after it
            save(state)
            checkpoints.finish(last=True)
            score(steps, state)
            checkpoints.finish(last=True)
        if stopping.agreed():
            raise Stopped
    return _result(checkpoints, state, time.monotonic() - begin, validating, totals)


def _result(checkpoints: Checkpoints, state: TrainState, seconds: float, validating: float, totals: np.ndarray) -> TrainResult:
    best = checkpoints.best()
    if best is None:
        raise UserError(f"{checkpoints.folder}: no checkpoint is whole; look at the messages above, then go on with --resume")
    score, skipped = checkpoints.score(best), int(jax.device_get(state.health["skipped"]))
    tokens, targets = totals.astype(int).tolist()
    return TrainResult(int(state.step), best, score or 0.0, seconds, validating, tokens, targets, skipped)


def _plain(value: Any) -> Any:
    """A number that JSON has; it knows neither infinity nor what is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _skipped(
    plan: BatchPlan, step: int, values: dict[str, float], finite: np.ndarray, in_a_row: int, name: Callable[[int], str]
) -> dict[str, Any]:
    """What is recorded of a skipped update, and said: why, and which examples it saw, by rows whose hidden states are not finite
    where there are such."""
    wrong = [what for what, key in (("loss", "loss"), ("gradient", "grad_norm")) if not math.isfinite(values[key])]
    why = f"{' and '.join(wrong)} not finite" if wrong else f"the loss, {values['loss']:.4g}, is a spike"
    rows = plan.parts_of(step - 1)
    flags = finite.reshape(-1)
    blamed = [row for row, fine in zip(rows, flags, strict=True) if not fine] or rows
    examples = [name(part) for row in blamed for part in row[:RECORDED].tolist()]
    more = f" and {len(examples) - SHOWN} others" if len(examples) > SHOWN else ""
    console.print(
        f"step {step}: update skipped, {why} ({in_a_row} in a row); it saw {'; '.join(examples[:SHOWN])}{more} (metrics.jsonl)",
        markup=False,
    )
    return {"skipped": why, "in_a_row": in_a_row, "examples": examples[:RECORDED], "examples_in_all": len(examples)}
