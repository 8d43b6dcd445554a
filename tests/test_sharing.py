"""Loss and gradients of segments that share a prompt against the same examples each in a row of its own."""

import functools
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_models import save_family
from flax import nnx
from helpers import TITLES, make_case
from tiny_training import ROUNDING, Parts, assert_close, loss_and_gradient, split, stories

from sftrec_jax.config import LoraConfig, PromptConfig
from sftrec_jax.data.prompts import prompt_builder
from sftrec_jax.data.segments import PackedBatch, Segments
from sftrec_jax.data.windows import Windows
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.naming import title_codes
from sftrec_jax.model import packed_attention
from sftrec_jax.model.attention import packed_mask
from sftrec_jax.model.sharding import named_arrays
from sftrec_jax.train.loss import target_loss

FRAMES = {"text after": ("Once", ",", "then a"), "no suffix": ("Once", ",", ""), "bare": ("", "", "")}
LIMITS = {"exact": PromptConfig(max_history=4), "strided": PromptConfig(max_history=4, stride=2), "whole": PromptConfig()}
ROWS, LENGTH, TARGETS = 2, 128, 64
SHARED = 2e-5
"""Of the largest value: prompts written once and written out differ by up to 1.2e-5 on one of several processors."""
ALONE, ALONE_LENGTH, ALONE_TARGETS = 10, 64, 12


@pytest.fixture(scope="module")
def parts() -> Parts:
    return stories()


def item_codes(parts: Parts, coding: str) -> ItemCodes:
    atomic = parts.case.codes
    if coding == "atomic":
        return atomic
    if coding == "titles":
        return title_codes(TITLES, parts.case.tokenizer)
    # Semantic ids: three of the new tokens an item.
    codes = np.asarray([[0, 2, 4], [0, 2, 5], [0, 3, 4], [1, 2, 4], [1, 2, 6], [1, 3, 5], [1, 3, 6]], np.int32)
    return ItemCodes(atomic.codes[codes, 0], atomic.new_tokens, atomic.new_token_ids, atomic.init_tokens, TITLES)


def shared(parts: Parts, coding: str, history: str, frame: str, limits: str, seed: int = 0) -> Segments:
    """Three users with up to seven items."""
    limit = LIMITS[limits]
    config = PromptConfig("instruct", limit.max_history, "all", history, *FRAMES[frame], limit.stride)  # type: ignore[arg-type]
    codes = item_codes(parts, coding)
    builder = prompt_builder(config, codes, parts.case.tokenizer, ALONE_LENGTH)
    lengths = np.asarray([7, 2, 4])
    items = np.random.default_rng(seed).integers(0, 7, lengths.sum()).astype(np.int32)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    return builder.segments(items, Windows(edges[:-1], edges[:-1], edges[1:])).within(LENGTH, TARGETS)


def in_rows(segments: Segments) -> PackedBatch:
    """Several users a row, the last row with the fewest."""
    rows: list[list[int]] = [[]]
    for i, (length, targets) in enumerate(zip(segments.lengths, segments.targets, strict=True)):
        if segments.lengths[rows[-1]].sum() + length > LENGTH or segments.targets[rows[-1]].sum() + targets > TARGETS:
            rows.append([])
        rows[-1].append(i)
    assert len(rows) <= ROWS and max(map(len, rows)) > 1
    return segments.pack([np.asarray(r, np.int64) for r in rows] + [np.zeros(0, np.int64)] * (ROWS - len(rows)), LENGTH, TARGETS)


def alone(segments: Segments) -> PackedBatch:
    each = segments.apart()
    return each.pack([np.asarray([i]) for i in range(ALONE)], ALONE_LENGTH, ALONE_TARGETS)


def moved(gradient: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in gradient.items() if np.abs(value).max() > 0}


@pytest.mark.parametrize("limits", ["strided", *(pytest.param(name, marks=pytest.mark.slow) for name in ("exact", "whole"))])
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(
    ("coding", "history"), [("titles", "titles"), ("atomic", "tokens"), ("atomic", "titles"), ("semantic", "tokens")]
)
def test_loss_and_gradients_equal_examples_one_by_one(parts: Parts, coding: str, history: str, frame: str, limits: str) -> None:
    segments = shared(parts, coding, history, frame, limits)
    packed, each = in_rows(segments), alone(segments)
    assert (packed.weights > 0).sum() == (each.weights > 0).sum()
    assert (packed.segments > 0).sum() < (each.segments > 0).sum()
    assert packed.branches.any() or frame != "text after"
    loss, gradient = loss_and_gradient(parts, packed)
    total, reference = loss_and_gradient(parts, each)
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert gradient.keys() == reference.keys()
    assert moved(reference).keys() >= {name for name in reference if "lora" in name}
    assert_close(moved(gradient), moved(reference), SHARED)


@pytest.mark.parametrize("name", ["gemma2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mistral", "smollm3", "gemma3"))])
def test_windows_and_layers_without_rope_share_too(name: str, tmp_path: Path) -> None:
    """Windows of five positions hide what stands before an example's own fifth last token, wherever that lies in the row."""
    save_family(name, tmp_path, 512)
    parts = split(make_case(tmp_path, LoraConfig(r=2)))
    segments = shared(parts, "titles", "titles", "text after", "strided")
    packed, each = in_rows(segments), alone(segments)
    assert packed.branches.any()
    loss, gradient = loss_and_gradient(parts, packed)
    total, reference = loss_and_gradient(parts, each)
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert_close(moved(gradient), moved(reference), SHARED)


def test_a_token_sees_as_many_as_alone(parts: Parts) -> None:
    """Its position and itself: what the count of pairs relies on (`make_train_step`)."""
    for frame in FRAMES:
        packed = in_rows(shared(parts, "titles", "titles", frame, "whole"))
        mask = packed_mask(*(jnp.asarray(x) for x in (packed.positions, packed.segments, packed.branches, packed.forks)))
        real = packed.segments > 0
        np.testing.assert_array_equal(np.asarray(mask).sum(-1)[real], packed.positions[real] + 1)


Mask = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def planted(positions: jax.Array, segments: jax.Array, branches: jax.Array, forks: jax.Array) -> dict[str, jax.Array]:
    """The mask and forms of it with one rule broken."""
    q, k = (slice(None), slice(None), None), (slice(None), None)
    same = segments[q] == segments[k]
    on_trunk, before_fork = branches[k] == 0, positions[k] < forks[q]
    one_branch, not_after = branches[q] == branches[k], positions[k] <= positions[q]
    return {
        "none": same & (on_trunk & before_fork | one_branch & not_after),
        "other users are seen": on_trunk & before_fork | one_branch & not_after,
        "the trunk is seen behind the fork": same & (on_trunk & not_after | one_branch & not_after),
        "the fork is one too far": same & (on_trunk & (positions[k] < forks[q] + 1) & not_after | one_branch & not_after),
        "the fork is one too near": same & (on_trunk & (positions[k] < jnp.maximum(forks[q] - 1, 1)) | one_branch & not_after),
        "other branches are seen": same & (on_trunk & before_fork | ~on_trunk & not_after),
        "the own branch is seen ahead": same & (on_trunk & before_fork | one_branch & ~on_trunk),
        "the own branch is not seen": same & (on_trunk & before_fork | one_branch & (positions[q] == positions[k])),
    }


RULES = list(planted(*(jnp.zeros((1, 1), jnp.int32) for _ in range(4))))


@pytest.fixture(scope="module")
def broken(parts: Parts) -> Callable[[PackedBatch, str], tuple[float, dict[str, np.ndarray]]]:
    """Loss and gradients with a rule of `planted`, by the whole mask; compiled once for all rules."""

    def loss(trained: nnx.State, batch: PackedBatch, rule: jax.Array) -> jax.Array:
        def mask(*tree: jax.Array) -> jax.Array:
            return jnp.stack(list(planted(*tree).values()))[rule]

        with patch.object(packed_attention, "packed_mask", mask), patch.object(packed_attention, "WHOLE", LENGTH):
            return target_loss(nnx.merge(parts.graphdef, trained, parts.frozen), batch)

    compiled = jax.jit(jax.value_and_grad(loss))

    def run(batch: PackedBatch, rule: str) -> tuple[float, dict[str, np.ndarray]]:
        value, gradient = compiled(parts.trained, batch, jnp.int32(RULES.index(rule)))
        return float(value), {name: np.asarray(v) for name, v in named_arrays(gradient).items()}

    return run


@pytest.fixture(scope="module")
def one_by_one(parts: Parts) -> Callable[[str, str], tuple[Segments, dict[str, np.ndarray]]]:
    @functools.cache
    def made(coding: str, history: str) -> tuple[Segments, dict[str, np.ndarray]]:
        segments = shared(parts, coding, history, "text after", "whole")
        return segments, loss_and_gradient(parts, alone(segments))[1]

    return made


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("coding", "history"), [("titles", "titles"), ("semantic", "tokens")])
def test_a_broken_rule_shows(one_by_one: Callable, broken: Callable, coding: str, history: str, rule: str) -> None:
    """With text after the history every rule matters, by far more than the bound of the test above."""
    segments, reference = one_by_one(coding, history)
    packed = in_rows(segments)
    tree = (jnp.asarray(x) for x in (packed.positions, packed.segments, packed.branches, packed.forks))
    np.testing.assert_array_equal(planted(*(x := list(tree)))["none"], packed_mask(*x))
    _, gradient = broken(packed, rule)
    names = list(moved(reference))
    apart = max(np.abs(gradient[n] - reference[n]).max() / np.abs(reference[n]).max() for n in names)
    assert apart < ROUNDING if rule == "none" else apart > 1e-3
