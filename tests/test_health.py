"""Numbers that go wrong: an update that is not finite, or a spike, is skipped, counted, and its examples named."""

import dataclasses
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_case, save_llama
from test_checkpoint import CONFIG, meter, validation
from tiny_training import Parts, one_device, placed, read_lines, split, stream_plan

from sftrec_jax.config import LoraConfig
from sftrec_jax.data.segments import PackedBatch
from sftrec_jax.errors import UserError
from sftrec_jax.model.sharding import named_arrays, with_arrays
from sftrec_jax.train.batches import BatchPlan
from sftrec_jax.train.checkpoint import Checkpoints
from sftrec_jax.train.loop import TrainResult, train
from sftrec_jax.train.optimizer import make_optimizer
from sftrec_jax.train.step import MEMORY, TRUSTED, init_state, make_train_step, shard_batches


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """The head is not tied, so that a bad embedding is seen by those alone whose row it stands in."""
    base = save_llama(tmp_path_factory.mktemp("base"), 2, False, 512)
    return split(make_case(base, LoraConfig(r=4, alpha=8.0)))


class Poisoned(BatchPlan):
    """A plan in which the rows of some steps carry a token whose embedding is not a number."""

    bad: dict[int, int] = {}

    def batch(self, step: int, own: np.ndarray | None = None) -> PackedBatch:
        batch = super().batch(step, own)
        if step + 1 in self.bad:
            tokens = batch.tokens.copy()
            flat = tokens.reshape(-1, tokens.shape[-1])
            flat[self.bad[step + 1]] = 511
            batch = dataclasses.replace(batch, tokens=tokens)
        return batch


def poison(parts: Parts) -> tuple[Any, dict[str, jax.Array]]:
    """The frozen variables with a token of which nothing good comes, and the trained ones."""
    arrays = named_arrays(parts.frozen)
    table = np.array(arrays["embed_tokens/weight"])
    table[511] = np.nan
    arrays["embed_tokens/weight"] = jnp.asarray(table)
    return with_arrays(parts.frozen, arrays), parts.arrays


def go(parts: Parts, folder: Path, bad: dict[int, int], **changes: Any) -> TrainResult:
    config = dataclasses.replace(CONFIG, **{"max_steps": 6, "accumulate": 1, **changes})
    plan = Poisoned(stream_plan(parts.case, config).examples, config)
    Poisoned.bad = bad
    frozen, arrays = poison(parts)
    folder.mkdir(exist_ok=True)
    with closing(Checkpoints(folder / "checkpoints", 2)) as checkpoints:
        return train(
            parts.graphdef, with_arrays(parts.trained, arrays), frozen, plan, False, one_device(), folder, checkpoints,
            validation(), meter(parts, config), checkpoints.newest(), lambda part: f"part {part}",
        )  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, read_lines(folder / "metrics.jsonl")) if "loss" in line]


def test_an_update_that_is_not_finite_is_skipped_and_its_examples_named(
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = go(parts, tmp_path, {2: 1, 5: 0})
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6] and result.skipped == 2
    assert [line["step"] for line in found if "skipped" in line] == [2, 5]
    assert all(np.isfinite(line["loss"]) for line in found if "skipped" not in line)
    assert found[1]["loss"] is None and found[1]["skipped"] == "loss and gradient not finite" and found[1]["in_a_row"] == 1
    config = dataclasses.replace(CONFIG, max_steps=6, accumulate=1)
    rows = stream_plan(parts.case, config).parts_of(1)
    assert found[1]["examples"] == [f"part {part}" for part in rows[1]]  # of the one row that is to blame
    said = capsys.readouterr().err
    assert f"step 2: update skipped, loss and gradient not finite (1 in a row); it saw part {rows[1][0]}" in said


def test_a_skipped_update_changes_nothing_but_the_count(parts: Parts) -> None:
    config = dataclasses.replace(CONFIG, accumulate=1)
    mesh, optimizer = one_device(), make_optimizer(config, 6)
    frozen, _ = poison(parts)
    state = init_state(placed(parts, mesh), optimizer, mesh)
    step = make_train_step(parts.graphdef, parts.trained, optimizer, None, state)
    plan = Poisoned(stream_plan(parts.case, config).examples, config)
    Poisoned.bad = {2: 0}
    state, metrics = step(state, frozen, shard_batches(plan.batch(0), mesh))
    assert float(metrics["taken"]) == 1 and np.asarray(metrics["finite"]).all()
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, frozen, shard_batches(plan.batch(1), mesh))
    after = jax.tree.map(np.array, state)
    assert float(metrics["taken"]) == 0 and np.asarray(metrics["finite"]).tolist() == [[False, True]]
    assert (after.step, after.health["skipped"], after.health["in_a_row"], after.health["taken"]) == (2, 1, 1, 1)
    for name, value in before.trained.items():
        np.testing.assert_array_equal(after.trained[name], value)
    for left, right in zip(jax.tree.leaves(before.optimizer), jax.tree.leaves(after.optimizer), strict=True):
        np.testing.assert_array_equal(left, right)


def test_so_many_in_a_row_stop_the_run_and_what_was_saved_stays(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 updates in a row were skipped up to step 5.*lower train.learning_rate") as caught:
        go(parts, tmp_path, {3: 0, 4: 0, 5: 0, 6: 0}, stop_after_skips=3)
    assert "\n" not in str(caught.value)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    assert checkpoints.newest() == 4
    checkpoints.close()


def test_the_base_is_not_touched(parts: Parts, tmp_path: Path) -> None:
    before = {name: np.array(value) for name, value in named_arrays(parts.frozen).items()}
    go(parts, tmp_path, {})
    after = named_arrays(parts.frozen)
    assert before.keys() == after.keys() and len(before) > 5
    assert all(value.tobytes() == np.asarray(after[name]).tobytes() for name, value in before.items())


def reference(losses: list[float], sigma: float) -> list[bool]:
    """Which losses are taken, by weighted sums over those before, written plainly."""
    taken: list[float] = []
    out = []
    for loss in losses:
        fine = True
        if len(taken) >= TRUSTED:
            mean, variance = 0.0, 0.0
            for n, value in enumerate(taken, start=1):
                share = (1 - MEMORY) / (1 - MEMORY**n)
                mean, variance = mean + share * (value - mean), (1 - share) * (variance + share * (value - mean) ** 2)
            fine = loss <= mean + sigma * variance**0.5
        if fine:
            taken.append(loss)
        out.append(fine)
    return out


def test_spikes_are_skipped_as_a_plain_rule_says() -> None:
    from sftrec_jax.train.step import HEALTH, _health

    rng = np.random.default_rng(0)
    losses = (5 + 0.1 * rng.standard_normal(80)).tolist()
    losses[20], losses[50], losses[60], losses[61] = 9.0, 9.0, 5.9, 30.0
    health = {name: jnp.zeros((), kind) for name, kind in HEALTH.items()}
    found = []
    for loss in losses:
        usual = health["mean"] + 6 * jnp.sqrt(health["variance"])
        take = (health["taken"] < TRUSTED) | (loss <= usual)
        health = _health(health, jnp.float32(loss), take)
        found.append(bool(take))
    assert found == reference(losses, 6.0)
    assert found[20] and not found[61]  # before anything is known of the loss, and after
    assert int(health["skipped"]) == found.count(False) >= 1


@pytest.mark.slow
def test_a_spike_is_skipped_in_training(parts: Parts, tmp_path: Path) -> None:
    """One of the later steps asks for items that nothing points to: its loss lies far above the others'."""
    config = dataclasses.replace(CONFIG, max_steps=TRUSTED + 6, accumulate=1, validate_every=100, skip_spikes=3.0, epochs=50.0)

    class Odd(BatchPlan):
        def batch(self, step: int, own: np.ndarray | None = None) -> PackedBatch:
            batch = super().batch(step, own)
            return dataclasses.replace(batch, labels=np.full_like(batch.labels, 7)) if step + 1 == TRUSTED + 3 else batch

    plan = Odd(stream_plan(parts.case, config).examples, config)
    with closing(Checkpoints(tmp_path / "checkpoints", 2)) as checkpoints:
        result = train(
            parts.graphdef, with_arrays(parts.trained, parts.arrays), parts.frozen, plan, False, one_device(), tmp_path,
            checkpoints, validation(), meter(parts, config), None,
        )  # fmt: skip
    skipped = [line for line in lines(tmp_path) if "skipped" in line]
    assert [line["step"] for line in skipped] == [TRUSTED + 3] and "is a spike" in skipped[0]["skipped"]
    assert result.skipped == 1
