"""Checkpoints, and the loop around them."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_training import Parts, one_device, read_lines, stories, stream_plan

from sftrec_jax.config import TrainConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model.sharding import with_arrays
from sftrec_jax.train.checkpoint import Checkpoints
from sftrec_jax.train.loop import TrainResult, train
from sftrec_jax.train.meter import Meter
from sftrec_jax.train.optimizer import make_optimizer
from sftrec_jax.train.step import TrainState, init_state

CONFIG = TrainConfig(
    row_length=24, batch_rows=2, accumulate=2, epochs=9.0, max_steps=6, validate_every=2, learning_rate=1e-2, keep_checkpoints=2
)
NAMES = ("layers/q_proj/lora_a", "layers/q_proj/lora_b", "embed_tokens/rows")


def tiny_state(seed: int, rank: int = 3) -> TrainState:
    """Random arrays and a random optimizer state at step `seed`."""
    rng = np.random.default_rng(seed)
    everywhere = NamedSharding(one_device(), PartitionSpec())
    shapes = dict(zip(NAMES, ((2, 6, rank), (2, rank, 6), (5, 6)), strict=True))
    trained = {n: jax.device_put(rng.normal(size=s).astype(np.float32), everywhere) for n, s in shapes.items()}
    state = init_state(trained, make_optimizer(CONFIG, 10), one_device())
    optimizer = jax.tree.map(
        lambda x: jax.device_put(np.asarray(rng.integers(1, 9, x.shape), x.dtype), x.sharding), state.optimizer
    )
    health = {n: jax.device_put(jnp.asarray(rng.integers(1, 9), x.dtype), everywhere) for n, x in state.health.items()}
    return TrainState(jax.device_put(jnp.int32(seed), everywhere), trained, optimizer, health)


def assert_same(ours: Any, theirs: Any) -> None:
    """Bit for bit, in one structure."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_what_is_saved_is_restored_bit_for_bit(tmp_path: Path) -> None:
    state, other = tiny_state(7), tiny_state(8)
    expected = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    checkpoints.save(state, 0.25)
    jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)(state)  # the loop gives its buffers away at once
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints", 2)
    assert (again.steps(), again.newest(), again.best(), again.score(7)) == ([7], 7, 7, 0.25)
    found = again.restore(7, other)
    assert_same(found, expected)
    assert [x.sharding for x in jax.tree.leaves(found)] == [x.sharding for x in jax.tree.leaves(other)]
    assert_same(again.restore_trained(7, other.trained), expected.trained)
    again.close()


@pytest.mark.parametrize(
    ("keep", "every", "scores", "left", "best"),
    [
        (1, None, [0.1, 0.5, 0.3, 0.2], [2, 4], 2),
        (2, None, [0.1, 0.2, 0.3, 0.4], [3, 4], 4),
        (2, None, [0.9, 0.2, 0.3, 0.4], [1, 3, 4], 1),
        (1, 2, [0.9, None, 0.3, None, 0.1], [1, 2, 4, 5], 1),
        (1, None, [None, None, None, None], [4], 4),
        (1, None, [0.4, 0.4, None, None], [2, 4], 2),
    ],
)
def test_the_best_the_newest_and_every_mth_are_kept(
    tmp_path: Path, keep: int, every: int | None, scores: list[float | None], left: list[int], best: int
) -> None:
    checkpoints = Checkpoints(tmp_path, keep, every)
    assert checkpoints.newest() is None and checkpoints.best() is None
    for step, score in enumerate(scores, start=1):
        checkpoints.save(tiny_state(step))
        if score is not None:
            checkpoints.set_score(step, score)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep)
    assert (again.steps(), again.newest(), again.best()) == (left, len(scores), best)
    assert again.score(best) == scores[best - 1]
    assert_same(again.restore(best, tiny_state(0)), tiny_state(best))
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(step) for step in left]


def test_of_an_adapter_no_more_than_four_times_its_bytes_are_stored(tmp_path: Path) -> None:
    """Values and two moments; what Orbax adds is little once adapters are of a real size."""
    state, rng = tiny_state(1, rank=4096), np.random.default_rng(0)

    def incompressible(x: jax.Array) -> jax.Array:
        return jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    state = state._replace(
        trained=jax.tree.map(incompressible, state.trained), optimizer=jax.tree.map(incompressible, state.optimizer)
    )
    own = sum(value.nbytes for value in state.trained.values())
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(state)
    checkpoints.close()
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert own > 300_000 and 2.5 * own < stored < 4 * own


def test_other_shapes_and_names_are_the_users_problem(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(tiny_state(1), 0.0)
    wider = tiny_state(1, rank=4)
    with pytest.raises(UserError, match=r"layers/q_proj/lora_a with shape \(2, 6, 3\).*\(2, 6, 4\).*config of the run"):
        checkpoints.restore(1, wider)
    with pytest.raises(UserError, match="lora_a"):
        checkpoints.restore_trained(1, wider.trained)
    more = wider.trained | {"layers/v_proj/lora_a": wider.trained[NAMES[0]]}
    with pytest.raises(UserError, match="layers/v_proj/lora_a"):
        checkpoints.restore_trained(1, {n: v for n, v in more.items() if "v_proj" in n})
    fewer = {n: v for n, v in tiny_state(1).trained.items() if n != NAMES[1]}
    with pytest.raises(UserError, match="layers/q_proj/lora_b"):  # what was trained is not dropped in silence
        checkpoints.restore_trained(1, fewer)
    checkpoints.close()


@pytest.fixture(scope="module")
def parts() -> Parts:
    return stories(dropout=0.2)


class Stopped(Exception):
    """The machine went away."""


def validation(stop_at: int | None = None) -> Callable[[dict[str, jax.Array]], dict[str, float]]:
    """A score that any change of an array would change; raises at the call number `stop_at`."""
    calls = iter(range(1, 100))

    def validate(trained: dict[str, jax.Array]) -> dict[str, float]:
        if next(calls) == stop_at:
            raise Stopped
        total = float(sum(np.abs(np.asarray(value, np.float64)).sum() for value in trained.values()))
        return {"ndcg@10": total, "recall@10": total / 2}

    return validate


def meter(parts: Parts, config: TrainConfig) -> Meter:
    build = parts.case.build
    return Meter(build.arch, build.adapters, config.method, len(build.row_ids), jnp.float32)


def go(parts: Parts, folder: Path, resume: bool, stop_at: int | None = None, config: TrainConfig = CONFIG) -> TrainResult:
    folder.mkdir(exist_ok=True)
    plan = stream_plan(parts.case, config)
    with closing(Checkpoints(folder / "checkpoints", config.keep_checkpoints, config.keep_every)) as checkpoints:
        return train(
            parts.graphdef, with_arrays(parts.trained, parts.arrays), parts.frozen, plan, True, one_device(), folder,
            checkpoints, validation(stop_at), meter(parts, config), checkpoints.newest() if resume else None,
        )  # fmt: skip


def records(folder: Path) -> list[dict[str, Any]]:
    """What `metrics.jsonl` says, times left out."""
    lines = [json.loads(line) for line in read_lines(folder / "metrics.jsonl")]
    timed = {"seconds", "tokens_per_s", "target_tokens_per_s", "examples_per_s", "mfu", "loader_wait_s", "peak_bytes"}
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def last_state(parts: Parts, folder: Path, step: int) -> TrainState:
    checkpoints = Checkpoints(folder / "checkpoints", CONFIG.keep_checkpoints)
    assert checkpoints.newest() == step
    state = init_state(parts.arrays, make_optimizer(CONFIG, CONFIG.max_steps or 0), one_device())
    found = checkpoints.restore(step, state)
    checkpoints.close()
    return found


def test_resuming_equals_never_stopping(parts: Parts, tmp_path: Path) -> None:
    """Six steps against: stopped while step 4 is validated (which was saved before), resumed to the end."""
    whole = go(parts, tmp_path / "whole", resume=True)  # nothing to resume: begins at 0
    assert [r["step"] for r in records(tmp_path / "whole")] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    with pytest.raises(Stopped):
        go(parts, tmp_path / "halves", resume=False, stop_at=2)
    assert (tmp_path / "halves" / "checkpoints" / "4").exists()
    assert records(tmp_path / "halves")[-1]["step"] == 4
    resumed = go(parts, tmp_path / "halves", resume=True)
    assert records(tmp_path / "halves") == records(tmp_path / "whole")
    assert_same(last_state(parts, tmp_path / "halves", 6), last_state(parts, tmp_path / "whole", 6))
    assert (resumed.step, resumed.best_step, resumed.best) == (whole.step, whole.best_step, whole.best)
    assert whole.step == 6
    losses = [r["loss"] for r in records(tmp_path / "whole") if "loss" in r]
    assert len(set(losses)) == 6
    steps = [r for r in records(tmp_path / "whole") if "loss" in r]
    assert whole.targets == sum(r["targets"] for r in steps) and resumed.targets == sum(r["targets"] for r in steps[4:])
    assert whole.tokens == sum(r["tokens"] for r in steps)
    # A run that is complete has nothing left to do.
    finished = go(parts, tmp_path / "whole", resume=True)
    assert (finished.step, finished.best_step, finished.best) == (6, whole.best_step, whole.best)
    assert records(tmp_path / "whole") == records(tmp_path / "halves")
