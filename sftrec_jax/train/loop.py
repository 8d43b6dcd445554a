"""The training loop: restore, step, validate, save; reads top to bottom."""

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

from sftrec_jax.config import TrainConfig
from sftrec_jax.console import console
from sftrec_jax.errors import UserError
from sftrec_jax.model.sharding import named_arrays
from sftrec_jax.train.batches import BatchPlan
from sftrec_jax.train.checkpoint import BEST_METRIC, Checkpoints
from sftrec_jax.train.meter import Meter
from sftrec_jax.train.metrics import JsonLines, TrainProgress
from sftrec_jax.train.optimizer import is_rows, learning_rates, make_optimizer, rows_only_steps
from sftrec_jax.train.step import TrainState, init_state, make_train_step, own_rows, shard_batches

Validate = Callable[[dict[str, jax.Array]], dict[str, float]]


@dataclass(frozen=True)
class TrainResult:
    """What training ended with."""

    step: int
    best_step: int
    best: float
    """Validation NDCG@10 of `best_step`."""
    seconds: float
    seconds_validating: float
    tokens: int
    targets: int


def train(
    graphdef: nnx.GraphDef,
    trained: nnx.State,
    frozen: nnx.State,
    plan: BatchPlan,
    dropout: bool,
    mesh: Mesh,
    folder: Path,
    validate: Validate,
    meter: Meter,
    resume: bool,
) -> TrainResult:
    """Trains to `plan.steps` and keeps checkpoints in `folder/checkpoints`, records in `folder/metrics.jsonl`.

    `validate` takes the trained arrays by name and returns ranking metrics, `ndcg@10` among them. With `resume` it goes on
    from the newest checkpoint, or begins where there is none. With `train.rows_first` the first steps train new token rows
    only; the state is one throughout, so a run is resumed on either side of the switch. `meter` counts what is done.
    """
    config, steps = plan.config, plan.steps
    optimizer = make_optimizer(config, steps)
    checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
    state = init_state(named_arrays(trained), optimizer, mesh)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained)
    first = checkpoints.latest() if resume else None
    if first is not None:
        state = checkpoints.restore(first, state)
        console.print(f"resumed from step {first} of {steps}")
    first = first or 0
    records = JsonLines(folder / "metrics.jsonl", first if resume else None)
    dropout_seed = config.seed if dropout else None
    step_all = make_train_step(graphdef, template, optimizer, dropout_seed, state)
    step_rows, rows_until = step_all, rows_only_steps(config, steps)
    if first < rows_until:
        rows = [name for name in state.trained if is_rows(name)]
        step_rows = make_train_step(graphdef, template, make_optimizer(config, steps, True), dropout_seed, state, rows)
    # All rates beforehand: computing one in the loop would queue behind the step that was just launched.
    rates = learning_rates(config, steps)
    every = config.validate_every or max(1, -(-steps // 4))
    begin, validating, totals = time.monotonic(), 0.0, np.zeros(2)

    def note(step: int, metrics: dict[str, jax.Array], waited: float, since: float, progress: TrainProgress) -> float:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not np.isfinite(values["loss"]):
            raise UserError(
                f"the loss is {values['loss']} at step {step}; lower train.learning_rate and train.rows_learning_rate, "
                "then start again (earlier checkpoints are intact)"
            )
        now = time.monotonic()
        seconds = max(now - since, 1e-9)
        totals[:] += (values["tokens"], values["targets"])
        steady = step not in (first + 1, rows_until + 1)  # which compiled
        record = values | {
            **meter.step(values, plan.counts(step - 1), seconds, waited, step <= rows_until, steady),
            **{name: float(each[step - 1]) for name, each in rates.items()},
            "seconds": round(now - begin, 3),
        }
        records.write({"step": step, **record})
        progress.update(step, record)
        return now

    # Closed on any way out, so that a run that stops half-way leaves whole checkpoints.
    with closing(checkpoints), closing(records), TrainProgress(steps, first) as progress:
        pending: tuple[int, Any, float] | None = None
        rows = config.batch_rows
        own = own_rows(mesh, rows)
        batches = plan.iterate(first, own)
        noted = time.monotonic()
        for step in range(first + 1, steps + 1):
            step_fn = step_rows if step <= rows_until else step_all
            asked = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - asked
            state, metrics = step_fn(state, frozen, shard_batches(batch, mesh, rows, own))
            if pending:  # the numbers of a step are fetched after the next one has been launched
                noted = note(*pending, noted, progress)
            pending = (step, metrics, waited)
            if step % every == 0 or step == steps:
                noted = note(*pending, noted, progress)
                pending = None
                before = time.monotonic()
                valid = validate(state.trained)
                validating += time.monotonic() - before
                records.write({"step": step, "valid": valid, "seconds": round(time.monotonic() - begin, 3)})
                console.print(f"step {step}: validation " + "  ".join(f"{k} {valid[k]:.4f}" for k in ("recall@10", "ndcg@10")))
                checkpoints.save(state, {BEST_METRIC: valid[BEST_METRIC]})
                noted = time.monotonic()
    return _result(folder, config, state, time.monotonic() - begin, validating, totals)


def _result(
    folder: Path, config: TrainConfig, state: TrainState, seconds: float, validating: float, totals: np.ndarray
) -> TrainResult:
    checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
    best = checkpoints.best()
    assert best is not None  # the last step is always saved
    score = checkpoints.score(best)
    checkpoints.close()
    return TrainResult(int(state.step), best, score, seconds, validating, int(totals[0]), int(totals[1]))
