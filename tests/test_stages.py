"""Training of new token rows alone, and of rows first: the optimizer against torch, the steps, the runs around them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import polars as pl
import pytest
import torch
from helpers import FIXTURE, make_case, source_of
from test_checkpoint import Stopped, assert_same, go, last_state, records
from test_train_step import formula
from tiny_run import histories, write_inputs
from tiny_training import Parts, assert_close, loss_and_gradient, one_device, placed, split, start, stories, stream_plan

from sftrec_jax.cli import main
from sftrec_jax.config import LoraConfig, ModelConfig, TrainConfig
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.load import load_decoder, make_build, source_architecture
from sftrec_jax.model.sharding import named_arrays, with_arrays
from sftrec_jax.run import stages
from sftrec_jax.train.checkpoint import Checkpoints
from sftrec_jax.train.optimizer import learning_rates, make_optimizer, rows_only_steps
from sftrec_jax.train.step import make_train_step, shard_batches

ROWS = "embed_tokens/rows"
CONFIG = TrainConfig(
    row_length=24, batch_rows=2, accumulate=2, epochs=20.0, learning_rate=3e-3, rows_learning_rate=1e-2, warmup_fraction=0.3,
    rows_first=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> Parts:
    return stories()


@pytest.fixture(scope="module")
def rows_only() -> Parts:
    """The same base and the same rows without adapters: `train.method: rows`."""
    case = make_case(FIXTURE, LoraConfig(r=4, alpha=8.0), trained=False)
    train = TrainConfig(method="rows")
    build = make_build(
        ModelConfig(compute_dtype="float32"), LoraConfig(), train, source_architecture(source_of(FIXTURE)), case.codes
    )
    decoder = load_decoder(build, source_of(FIXTURE), case.codes, one_device(), 0, False)
    return split(dataclasses.replace(case, decoder=decoder, build=build), "rows")


def test_two_stages_equal_torch() -> None:
    """torch's AdamW passes parameters without a gradient over and counts their steps from the first that they get."""
    rng = np.random.default_rng(0)
    config = dataclasses.replace(
        CONFIG,
        learning_rate=1e-2,
        rows_learning_rate=5e-2,
        weight_decay=0.3,
        clip_norm=1.0,
        beta1=0.8,
        beta2=0.95,
        rows_first=0.4,
    )
    steps, switch = 10, 4
    assert rows_only_steps(config, steps) == switch
    shapes = {"layers/q_proj/lora_a": (2, 6, 3), "norm/weight": (6,), ROWS: (5, 6)}
    ours: Any = {name: jax.device_put(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(np.asarray(value))) for name, value in ours.items()}
    reference = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.3 if "lora" in name else 0.0} for name, p in theirs.items()],
        betas=(0.8, 0.95),
        eps=1e-8,
    )
    first, then = make_optimizer(config, steps, True), make_optimizer(config, steps)
    state: Any = then.init(ours)
    assert jax.tree.structure(state) == jax.tree.structure(first.init(ours))
    updates: Any
    for step in range(steps):
        moving = [ROWS] if step < switch else list(shapes)
        gradient = {name: ((10.0 if step % 2 else 0.05) * rng.normal(size=shapes[name])).astype(np.float32) for name in moving}
        masked: Any = {name: gradient.get(name, optax.MaskedNode()) for name in shapes}
        updates, state = (first if step < switch else then).update(masked, state, ours)
        ours = ours | {name: ours[name] + updates[name] for name in moving}
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name]) if name in gradient else None
        torch.nn.utils.clip_grad_norm_([p for p in theirs.values() if p.grad is not None], 1.0)
        for group, name in zip(reference.param_groups, shapes, strict=True):
            # Warm-ups of 3 steps in 10 and of 2 in the 6 that are left.
            group["lr"] = formula(step, 5e-2, steps, 3, 0.1) if name == ROWS else formula(step - switch, 1e-2, 6, 2, 0.1)
        reference.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("share", "method", "steps", "expected"),
    [(0.0, "lora", 7, 0), (0.3, "lora", 10, 3), (0.3, "full", 100, 30), (0.99, "lora", 10, 9), (0.01, "lora", 10, 0),
     (0.9, "lora", 1, 0), (0.5, "rows", 10, 0)],
)  # fmt: skip
def test_steps_and_rates_of_the_stages(share: float, method: Any, steps: int, expected: int) -> None:
    """Something is left for the second stage; method rows has one stage only."""
    config = dataclasses.replace(CONFIG, rows_first=share, method=method, warmup_fraction=0.0)
    assert rows_only_steps(config, steps) == expected
    rates = learning_rates(config, steps)
    np.testing.assert_allclose(rates["rows_learning_rate"], [formula(s, 1e-2, steps, 0, 0.1) for s in range(steps)], rtol=1e-5)
    late = steps if method == "rows" else expected
    rest = [0.0] * late + [formula(s, 3e-3, steps - late, 0, 0.1) for s in range(steps - late)]
    np.testing.assert_allclose(rates["learning_rate"], rest, rtol=1e-5)


def products(step: Any, *arguments: Any) -> int:
    """Matrix products in the compiled program."""
    return len(re.findall(r"\bdot\(", step.lower(*arguments).compile().as_text()))


def test_the_first_stage_touches_rows_alone(parts: Parts) -> None:
    """Their gradient is the whole one's part, the rest and its moments keep every bit, then all moves; one compilation each."""
    plan = stream_plan(parts.case, CONFIG)
    run = start(parts, make_optimizer(CONFIG, 6))
    first = make_train_step(parts.graphdef, parts.trained, make_optimizer(CONFIG, 6, True), None, run.state, [ROWS])
    all_arrays, arguments = run.step, (parts.frozen, shard_batches(plan.batch(0), run.mesh))
    # The gradients of A and B are a product each, for every projection (one layer's, in a loop over layers).
    spared = products(all_arrays, run.state, *arguments) - products(first, run.state, *arguments)
    assert spared >= 2 * len(parts.case.build.adapters.targets)
    begin, frozen_part = run.arrays, jax.tree.map(np.asarray, run.state.optimizer)
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), plan.batch(0))
    gradient = loss_and_gradient(parts, flat)[1][ROWS] / flat.weights.sum()
    run.step = first
    for step in range(3):
        norm = run.take(plan.batch(step))["grad_norm"]
        if step == 0:
            np.testing.assert_allclose(norm, np.linalg.norm(gradient.astype(np.float64)), rtol=1e-5)
    moved = [name for name, value in run.arrays.items() if (value != begin[name]).any()]
    assert moved == [ROWS] and int(run.state.step) == 3
    later = jax.tree_util.tree_leaves_with_path(run.state.optimizer)
    for (path, leaf), before in zip(later, jax.tree.leaves(frozen_part), strict=True):
        held = "'rows'" not in jax.tree_util.keystr(path)
        assert (np.asarray(leaf) == before).all() == held, path
    run.step, middle = all_arrays, run.arrays
    for step in range(3, 6):
        run.take(plan.batch(step))
    assert all((run.arrays[name] != middle[name]).any() for name in middle)
    assert first._cache_size() == all_arrays._cache_size() == 1


def test_rows_first_is_the_method_rows_until_the_switch(rows_only: Parts) -> None:
    """Adapters start at the identity, so a model without any takes the same steps."""
    with_adapters = stories(trained=False)
    config = dataclasses.replace(CONFIG, accumulate=1)
    plan = stream_plan(with_adapters.case, config)
    method_rows = dataclasses.replace(config, method="rows")
    alone = start(rows_only, make_optimizer(method_rows, 6))
    assert list(alone.arrays) == [ROWS]
    before = {name: np.asarray(value) for name, value in named_arrays(rows_only.frozen).items()}
    both = start(with_adapters, make_optimizer(config, 6))
    both.step = make_train_step(
        with_adapters.graphdef, with_adapters.trained, make_optimizer(config, 6, True), None, both.state, [ROWS]
    )
    for step in range(3):
        assert alone.take(plan.batch(step))["loss"] == pytest.approx(both.take(plan.batch(step))["loss"], rel=1e-5)
    begin = np.asarray(rows_only.arrays[ROWS])
    assert_close({ROWS: alone.arrays[ROWS] - begin}, {ROWS: both.arrays[ROWS] - begin}, 1e-3)
    assert all((np.asarray(v) == before[n]).all() for n, v in named_arrays(rows_only.frozen).items())


def test_resuming_is_exact_on_either_side_of_the_switch(parts: Parts, tmp_path: Path) -> None:
    """Checkpoints after every step, the switch after the second: stopped with the first of them written, then with the second."""
    config = dataclasses.replace(CONFIG, max_steps=3, validate_every=1, accumulate=1, rows_first=0.6)
    begin = {name: np.asarray(value) for name, value in parts.arrays.items()}
    parts = dataclasses.replace(parts, trained=with_arrays(parts.trained, placed(parts, one_device())))
    go(parts, tmp_path / "whole", resume=False, config=config)
    for _ in range(2):
        with pytest.raises(Stopped):
            go(parts, tmp_path / "parts", resume=True, stop_at=2, config=config)
    go(parts, tmp_path / "parts", resume=True, config=config)
    lines = records(tmp_path / "whole")
    assert records(tmp_path / "parts") == lines
    assert_same(last_state(parts, tmp_path / "parts", 3), last_state(parts, tmp_path / "whole", 3))
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates == [0.0, 0.0, pytest.approx(3e-3)]
    checkpoints = Checkpoints(tmp_path / "whole" / "checkpoints", config.keep_checkpoints)
    for step, unchanged in ((2, True), (3, False)):
        found = checkpoints.restore_trained(step, parts.arrays)
        assert all((np.asarray(found[name]) == begin[name]).all() == unchanged for name in begin if name != ROWS)
    checkpoints.close()


def test_a_stage_for_rows_needs_rows() -> None:
    codes = ItemCodes(np.array([[5], [6]], np.int32), (), np.zeros(0, np.int32), (), np.array(["a", "b"], object))
    arch = source_architecture(source_of(FIXTURE))
    for train, said in [
        (TrainConfig(method="rows"), r"train.method: rows .*items.tokenizer .* or train.method: lora"),
        (TrainConfig(rows_first=0.2), r"train.rows_first .*items.tokenizer .* or train.rows_first: 0"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            make_build(ModelConfig(), LoraConfig(), train, arch, codes)
        assert "\n" not in str(caught.value)


def test_a_run_says_when_what_is_trained() -> None:
    first = "steps 1-3 train new token rows only, "
    for method, share, said in [
        ("lora", 0.3, first + "steps 4-10 train adapters and new token rows"),
        ("full", 0.3, first + "steps 4-10 train everything"),
        ("lora", 0.01, "steps 1-10 train adapters and new token rows"),
        ("rows", 0.3, "steps 1-10 train new token rows only"),
    ]:
        assert stages._when(TrainConfig(method=method, rows_first=share), 10) == said


@pytest.mark.slow
def test_a_run_of_rows_with_items_that_share_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From training to an export without adapters; metrics again from the recommendations, as the mean over a group's places."""
    config, out = write_inputs(tmp_path), tmp_path / "run"
    assert main(["prepare", str(config), "--out", str(out), "--train.method", "rows", "--train.max-steps", "2"]) == 0
    codes = ItemCodes.load(out / "prepared")
    shared = codes.codes.copy()
    shared[6:9], shared[20:25] = shared[5], shared[19]
    dataclasses.replace(codes, codes=shared).save(out / "prepared")
    for verb in (["train", str(out)], ["evaluate", str(out)], ["export", str(out), "--to", str(tmp_path / "merged")]):
        assert main(verb) == 0, capsys.readouterr().err
    assert "export: " in capsys.readouterr().err and not (tmp_path / "merged" / "adapter").exists()
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["items_sharing_a_code"] == 10
    frame = pl.read_parquet(out / "recommendations.parquet")
    group = {item: tuple(code) for item, code in zip([f"i{n:02d}" for n in range(30)], shared.tolist(), strict=True)}
    expected = 0.0
    for user, items in histories().items():
        listed = frame.filter(pl.col("user") == user).sort("rank")["item_id"].to_list()
        possible = [i for i in group if group[i] == group[items[-1]] and i not in items[:-1]]
        places = [at for at, item in enumerate(listed) if group[item] == group[items[-1]]]
        if places and items[-1] in possible:
            expected += min(len(possible), 10 - places[0]) / len(possible)
    assert metrics["model"]["recall@10"] == pytest.approx(expected / len(histories()))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["learning_rate"] for line in lines if "loss" in line} == {0.0}
