"""The jitted step and its optimizer."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from helpers import make_case, save_llama, source_of
from tiny_training import (
    Parts,
    assert_close,
    loss_and_gradient,
    one_device,
    split,
    stacked,
    start,
    stories,
    stream_plan,
)

from sftrec_jax.config import LoraConfig, ModelConfig, TrainConfig
from sftrec_jax.data.segments import PackedBatch
from sftrec_jax.model.load import load_decoder, make_build, source_architecture
from sftrec_jax.model.sharding import named_arrays
from sftrec_jax.train.loss import target_loss
from sftrec_jax.train.optimizer import make_optimizer, schedule

# One shape for all: two passes of two rows.
CONFIG = TrainConfig(row_length=24, batch_rows=2, accumulate=2, epochs=20.0, learning_rate=3e-3, warmup_fraction=0.0)
FIVE_STEPS = dataclasses.replace(CONFIG, warmup_fraction=0.4)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return stories()


@pytest.fixture(scope="module")
def batches(parts: Parts) -> list[PackedBatch]:
    plan = stream_plan(parts.case, CONFIG)
    return [plan.batch(step) for step in range(10)]


@pytest.fixture(scope="module")
def dropping() -> Parts:
    return stories(dropout=0.3)


def test_passes_of_unequal_size_equal_one_large_batch(parts: Parts, batches: list[PackedBatch]) -> None:
    """Plain gradient descent, so that the bound on parameters follows from the bound on gradients."""
    weights = batches[0].weights.copy()
    weights[0, :, 3:] = 0  # the first pass has far fewer targets than the second
    uneven = dataclasses.replace(batches[0], weights=weights)
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), uneven)
    per_pass = weights.sum((1, 2))
    assert 2 * per_pass[0] < per_pass[1]
    loss, gradient = loss_and_gradient(parts, flat)
    gradient = {name: value / weights.sum() for name, value in gradient.items()}
    before = {name: np.asarray(value) for name, value in parts.arrays.items()}
    for batch in (uneven, stacked(flat, 1)):
        run = start(parts, optax.sgd(1.0))
        metrics = run.take(batch)
        moved = {name: before[name] - value for name, value in run.arrays.items()}
        assert_close(moved, gradient)
        np.testing.assert_allclose(metrics["loss"], loss / weights.sum(), rtol=1e-5)
        norm = np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in gradient.values()))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        assert metrics["targets"] == weights.sum()
        assert metrics["tokens"] == (flat.segments > 0).sum()
        assert metrics["pairs"] == (flat.positions + 1)[flat.segments > 0].sum()


def digest(arrays: dict[str, jax.Array]) -> dict[str, str]:
    return {name: hashlib.sha256(np.asarray(value).tobytes()).hexdigest() for name, value in arrays.items()}


def test_only_adapters_and_rows_change_and_it_compiles_once(parts: Parts, batches: list[PackedBatch]) -> None:
    frozen = digest(named_arrays(parts.frozen))
    run = start(parts, make_optimizer(FIVE_STEPS, 5))
    before = {name: np.asarray(value) for name, value in parts.arrays.items()}
    expected = {f"layers/{name}/lora_{x}" for name in parts.case.build.adapters.targets for x in "ab"} | {"embed_tokens/rows"}
    assert before.keys() == expected
    for batch in batches[:4]:
        run.take(batch)
    assert run.step._cache_size() == 1
    assert digest(named_arrays(parts.frozen)) == frozen
    assert all((run.arrays[name] != value).any() for name, value in before.items())
    assert {value.dtype for value in run.arrays.values()} == {np.dtype(np.float32)}
    # Two moments of each trained array; what else the optimizer holds is scalar.
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(run.state.optimizer) if leaf.shape)
    assert shapes == sorted(2 * [value.shape for value in before.values()])
    assert int(run.state.step) == 4


def test_adamw_clipping_rates_and_decay_equal_torch() -> None:
    """The same gradients to both, norms below and above the clipping norm; rows never decay and have their own rate."""
    rng = np.random.default_rng(0)
    config = TrainConfig(
        learning_rate=1e-2, rows_learning_rate=5e-2, weight_decay=0.3, clip_norm=1.0, beta1=0.8, beta2=0.95, warmup_fraction=0.3
    )
    steps = 10
    shapes = {"layers/q_proj/lora_a": (2, 6, 3), "layers/q_proj/lora_b": (2, 3, 6), "embed_tokens/rows": (5, 6)}
    ours: Any = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(np.asarray(value))) for name, value in ours.items()}
    rows = theirs["embed_tokens/rows"]
    adapters = [value for value in theirs.values() if value is not rows]
    reference = torch.optim.AdamW(
        [{"params": adapters, "weight_decay": 0.3}, {"params": [rows], "weight_decay": 0.0}], betas=(0.8, 0.95), eps=1e-8
    )
    optimizer = make_optimizer(config, steps)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)
    for step in range(steps):
        size = 10.0 if step % 2 else 0.05
        gradient = {name: (size * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
        updates, state = update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        for group, peak in zip(reference.param_groups, (1e-2, 5e-2), strict=True):
            group["lr"] = formula(step, peak, steps, 3, 0.1)
        reference.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def formula(step: int, peak: float, steps: int, warmup: int, fraction: float) -> float:
    """Linear from 0 to the peak in `warmup` steps, then half a cosine down to `fraction` of it."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (steps - warmup)
    return peak * (fraction + (1 - fraction) * (1 + np.cos(np.pi * done)) / 2)


@pytest.mark.parametrize(("steps", "share", "warmup"), [(200, 0.05, 10), (40, 0.5, 20), (30, 0.0, 0), (2, 1.0, 1), (1, 0.05, 0)])
def test_schedule_equals_the_formula(steps: int, share: float, warmup: int) -> None:
    config = TrainConfig(warmup_fraction=share, final_fraction=0.2)
    ours = jax.vmap(schedule(3e-3, steps, config))(jnp.arange(steps))
    np.testing.assert_allclose(ours, [formula(s, 3e-3, steps, warmup, 0.2) for s in range(steps)], rtol=1e-5)
    assert ours[-1] > 0  # the last step of a run, be it the only one, trains


def test_norms_do_not_decay() -> None:
    trained: Any = {
        "layers/input_norm/weight": jnp.ones((2, 4)),
        "norm/weight": jnp.ones(4),
        "layers/q_proj/kernel": jnp.ones((2, 4, 4)),
    }
    optimizer = make_optimizer(dataclasses.replace(CONFIG, weight_decay=0.5), 5)
    updates: Any = optimizer.update(jax.tree.map(jnp.zeros_like, trained), optimizer.init(trained), trained)[0]
    assert not updates["norm/weight"].any() and not updates["layers/input_norm/weight"].any()
    np.testing.assert_allclose(updates["layers/q_proj/kernel"], -3e-3 * 0.5, rtol=1e-6)


def test_full_trains_everything(tmp_path: Path, batches: list[PackedBatch]) -> None:
    case = make_case(save_llama(tmp_path, kv_heads=2, tied=False, vocab=512), None, trained=False)
    full = split(case, "full")
    assert not named_arrays(full.frozen)
    before = {name: np.asarray(value) for name, value in full.arrays.items()}
    run = start(full, make_optimizer(CONFIG, 100))
    for batch in batches[:2]:
        run.take(batch)
    assert all((run.arrays[name] != value).any() for name, value in before.items())
    assert {"norm/weight", "lm_head/weight", "lm_head/rows", "embed_tokens/weight"} < before.keys()


def test_training_from_scratch_lowers_the_loss(tmp_path: Path, parts: Parts, batches: list[PackedBatch]) -> None:
    folder = save_llama(tmp_path, kv_heads=2, tied=False, vocab=512)
    (folder / "model.safetensors").unlink()  # only the config is read
    codes = parts.case.codes
    model, train = ModelConfig(compute_dtype="float32", from_scratch=True), TrainConfig(method="full")
    build = make_build(model, LoraConfig(), train, source_architecture(source_of(folder)), codes)
    decoder = load_decoder(build, source_of(folder), codes, one_device(), 0, True)
    run = start(split(dataclasses.replace(parts.case, decoder=decoder, build=build), "full"), make_optimizer(CONFIG, 100))
    losses = [run.take(batches[0])["loss"] for _ in range(40)]
    # Small random weights make every column about equally likely at first; then seven items are, and these rows are learnt.
    assert abs(losses[0] - np.log(512 + 7)) < 0.3
    assert losses[-1] < np.log(7)


def test_dropout_depends_on_step_and_seed_alone(dropping: Parts, batches: list[PackedBatch]) -> None:
    """With a rate of 0 nothing but the masks can move the loss."""
    batch = batches[0]
    run = start(dropping, optax.sgd(0.0), dropout_seed=0)
    first = [run.take(batch)["loss"] for _ in range(3)]
    assert len(set(first)) == 3
    run.restart()
    assert [run.take(batch)["loss"] for _ in range(3)] == first
    run.restart(2)  # as after resuming
    assert run.take(batch)["loss"] == first[2]
    # Were the masks of both passes the same, passes could change places.
    run.restart()
    swapped = run.take(jax.tree.map(lambda x: x[::-1].copy(), batch))["loss"]
    assert abs(swapped - first[0]) > 1e-4 * first[0]
    assert start(dropping, optax.sgd(0.0), dropout_seed=1).take(batch)["loss"] not in first


def test_dropout_of_0_is_off(parts: Parts, dropping: Parts, batches: list[PackedBatch]) -> None:
    """And so is any dropout without a key: nothing random is drawn."""

    def draws(parts: Parts, key: jax.Array | None) -> bool:
        flat = jax.tree.map(lambda x: x[0], batches[0])
        decoder = nnx.merge(parts.graphdef, parts.trained, parts.frozen)
        return "random_bits" in str(jax.make_jaxpr(lambda b: target_loss(decoder, b, key))(flat))

    assert draws(dropping, jax.random.key(0))
    assert not draws(parts, jax.random.key(0))
    assert not draws(dropping, None)


GOLDEN = {"loss": 4.318883, "grad_norm": 8.119510, "rows": 0.3341514, "lora_a": 0.06506355, "lora_b": 0.005739059}


def test_golden() -> None:
    """Five steps of AdamW over stories260K, adapters at their start; NumPy and the key's bits fix every number."""
    parts = stories(trained=False)
    plan = stream_plan(parts.case, CONFIG)
    run = start(parts, make_optimizer(FIVE_STEPS, 5))
    metrics: dict[str, float] = {}
    for step in range(5):
        metrics = run.take(plan.batch(step))
    found = {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
    for kind in ("rows", "lora_a", "lora_b"):
        values = [value.ravel().astype(np.float64) for name, value in run.arrays.items() if name.endswith(kind)]
        found[kind] = float(np.sqrt(np.mean(np.concatenate(values) ** 2)))
    assert found == pytest.approx(GOLDEN, rel=1e-4), (
        f"a fixed run of five steps ended elsewhere: {found}. Update GOLDEN only where the change was meant to alter training "
        "(order of examples, initialisation, optimizer, model arithmetic), and say so in CHANGELOG.md; anything else is a bug."
    )
