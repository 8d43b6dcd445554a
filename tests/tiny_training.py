"""What the tests of training share: a small decoder split into trained and frozen parts, examples, packed batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from helpers import FIXTURE, Case, make_case

from sftrec_jax.config import LoraConfig, MeshConfig, PromptConfig, TrainConfig
from sftrec_jax.data.prompts import prompt_builder
from sftrec_jax.data.segments import Example, PackedBatch
from sftrec_jax.model.load import trainable_filter
from sftrec_jax.model.mesh import make_mesh
from sftrec_jax.model.sharding import named_arrays, sharding_for
from sftrec_jax.train.batches import BatchPlan
from sftrec_jax.train.loss import target_loss
from sftrec_jax.train.step import TrainState, init_state, make_train_step, shard_batches


@dataclass
class Parts:
    """A decoder in the form that the step takes."""

    case: Case
    graphdef: Any
    trained: nnx.State
    frozen: nnx.State

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Copies of the trained arrays: a step donates what it is given."""
        return {name: value.copy() for name, value in named_arrays(self.trained).items()}


def split(case: Case, method: str = "lora") -> Parts:
    return Parts(case, *nnx.split(case.decoder, trainable_filter(method), ...))


def stories(dropout: float = 0.0, trained: bool = True) -> Parts:
    """stories260K with adapters on every projection and seven item tokens."""
    return split(make_case(FIXTURE, LoraConfig(r=4, alpha=8.0, dropout=dropout), trained=trained))


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def examples(case: Case, prompt: PromptConfig, histories: Sequence[Sequence[int]]) -> list[Example]:
    builder = prompt_builder(prompt, case.codes, case.tokenizer, 64)
    return [e for history in histories for e in builder.examples(np.asarray(history, np.int32))]


def random_histories(count: int, longest: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 7, rng.integers(2, longest + 1)) for _ in range(count)]


def stream_plan(case: Case, config: TrainConfig, users: int = 40) -> BatchPlan:
    return BatchPlan(ExampleList(examples(case, PromptConfig("stream", max_history=9), random_histories(users, 12))), config)


@dataclass(frozen=True, eq=False)
class ExampleList:
    """Examples written one by one, for a `BatchPlan`."""

    examples: Sequence[Example]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray([len(e.tokens) for e in self.examples], np.int64)

    @property
    def targets(self) -> np.ndarray:
        return np.asarray([len(e.labels) for e in self.examples], np.int64)

    @property
    def target_items(self) -> np.ndarray:
        return np.ones(len(self.examples), np.int64)

    @property
    def lengths_apart(self) -> np.ndarray:
        return self.lengths

    @property
    def longest(self) -> int:
        return int(self.targets.max(initial=0))

    def within(self, tokens: int, targets: int) -> "ExampleList":
        return self

    def pack(self, rows: list[np.ndarray], row_length: int, targets_per_row: int) -> PackedBatch:
        return pack_rows(self.examples, rows, row_length, targets_per_row)


def pack_rows(made: Sequence[Example], rows: Sequence[np.ndarray], row_length: int, targets_per_row: int) -> PackedBatch:
    """The arrays of rows that hold whole examples, written in a plain loop: the reference for packing."""
    shape, target_shape = (len(rows), row_length), (len(rows), targets_per_row)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    target_positions, labels = (np.zeros(target_shape, np.int32) for _ in range(2))
    weights = np.zeros(target_shape, np.float32)
    for b, row in enumerate(rows):
        at, target_at = 0, 0
        for segment, index in enumerate(row, start=1):
            example = made[int(index)]
            end, target_end = at + len(example.tokens), target_at + len(example.labels)
            tokens[b, at:end] = example.tokens
            positions[b, at:end] = np.arange(end - at)
            segments[b, at:end] = segment
            target_positions[b, target_at:target_end] = example.target_positions + at
            labels[b, target_at:target_end] = example.labels
            weights[b, target_at:target_end] = example.weights
            at, target_at = end, target_end
    return PackedBatch(tokens, positions, segments, np.zeros(shape, np.int32), positions + 1, target_positions, labels, weights)


def rows_of(made: Sequence[Example], rows: Sequence[Sequence[int]], length: int, targets: int) -> PackedBatch:
    return pack_rows(made, [np.asarray(row, np.int64) for row in rows], length, targets)


def stacked(batch: PackedBatch, passes: int) -> PackedBatch:
    """[B, ...] as [A, B / A, ...]."""
    return jax.tree.map(lambda x: x.reshape(passes, -1, x.shape[-1]), batch)


def loss_and_gradient(parts: Parts, batch: PackedBatch, key: jax.Array | None = None) -> tuple[float, dict[str, np.ndarray]]:
    """Sum of weighted losses, and its gradient by path name."""
    loss, gradient = _loss_and_gradient(parts.graphdef, parts.trained, parts.frozen, batch, key)
    return float(loss), {name: np.asarray(value) for name, value in named_arrays(gradient).items()}


@partial(jax.jit, static_argnums=0)
def _loss_and_gradient(graphdef: Any, trained: Any, frozen: Any, batch: PackedBatch, key: jax.Array | None) -> Any:
    return jax.value_and_grad(lambda t: target_loss(nnx.merge(graphdef, t, frozen), batch, key))(trained)


@dataclass
class Run:
    """A step and its state; `take` makes one step and returns its metrics, `restart` goes back without compiling again."""

    parts: Parts
    optimizer: optax.GradientTransformation
    step: Any
    mesh: jax.sharding.Mesh
    state: TrainState

    def take(self, batches: PackedBatch) -> dict[str, float]:
        self.state, metrics = self.step(self.state, self.parts.frozen, shard_batches(batches, self.mesh))
        return {name: float(value) for name, value in metrics.items() if name != "finite"}

    def restart(self, step: int = 0) -> None:
        self.state = init_state(placed(self.parts, self.mesh), self.optimizer, self.mesh)
        self.state = self.state._replace(step=jax.device_put(jnp.int32(step), self.state.step.sharding))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in self.state.trained.items()}


def placed(parts: Parts, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """The trained arrays where `load_decoder` puts them."""
    return {n: jax.device_put(np.asarray(v), sharding_for(n, v.shape, mesh)) for n, v in parts.arrays.items()}


def start(
    parts: Parts, optimizer: optax.GradientTransformation, dropout_seed: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> Run:
    mesh = mesh or one_device()
    state = init_state(placed(parts, mesh), optimizer, mesh)
    return Run(parts, optimizer, make_train_step(parts.graphdef, parts.trained, optimizer, dropout_seed, state), mesh, state)


ROUNDING = 1e-5
"""Sums of float32 in another order; a wrong mask makes 1e-3."""


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], relative: float = ROUNDING) -> None:
    """Every array equals within `relative` of that array's largest absolute value; float32 sums have no better bound."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        largest = np.abs(np.asarray(value)).max()
        assert largest > 0, name
        difference = np.abs(np.asarray(ours[name]) - np.asarray(value)).max()
        assert difference <= relative * largest, f"{name}: {difference:.2e} of {largest:.2e}"


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
