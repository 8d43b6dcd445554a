"""One pure training step: (trained variables, optimizer state) and a stack of packed batches in, new state and metrics out."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sftrec_jax.data.segments import PackedBatch
from sftrec_jax.distributed import place
from sftrec_jax.errors import UserError
from sftrec_jax.model.sharding import spec_of, ways, with_arrays
from sftrec_jax.train.loss import loss_and_finite

TRUSTED = 32
"""Steps after which the mean and the spread of the loss are known well enough to call one a spike."""
MEMORY = 0.98
"""How much of the mean and the variance of the loss a step leaves."""


class TrainState(NamedTuple):
    """What changes while training. `step` counts optimizer steps, int32; `trained` holds arrays by path name."""

    step: jax.Array
    trained: dict[str, jax.Array]
    optimizer: Any
    health: dict[str, jax.Array]
    """Of the steps so far: `taken`, `skipped`, `in_a_row` skipped last (int32); `mean` and `variance` of the loss (float32)."""


HEALTH = {"taken": np.int32, "skipped": np.int32, "in_a_row": np.int32, "mean": np.float32, "variance": np.float32}


def init_state(trained: dict[str, jax.Array], optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Step 0; the optimizer's moments lie where their parameters lie, its scalars on every device."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(trained, optimizer, mesh))
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trained)
    health = {name: place(np.zeros((), kind), shardings.step) for name, kind in HEALTH.items()}
    return TrainState(place(np.zeros((), np.int32), shardings.step), trained, moments, health)


def abstract_state(trained: Mapping[str, Any], optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state whose trained arrays are `trained`, or are of those shapes and shardings."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(path: tuple[Any, ...], x: Any) -> Any:
        name = str(getattr(path[-1], "key", ""))
        sharding = trained[name].sharding if name in trained else everywhere
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    named = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in trained.items()}
    moments = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(optimizer.init, named))
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    health: Any = {name: jax.ShapeDtypeStruct((), kind, sharding=everywhere) for name, kind in HEALTH.items()}
    return TrainState(step, cast(dict[str, jax.Array], named), moments, health)


def make_train_step(
    graphdef: nnx.GraphDef,
    template: nnx.State,
    optimizer: optax.GradientTransformation,
    dropout_seed: int | None,
    like: TrainState,
    only: Collection[str] | None = None,
    spikes: float | None = None,
) -> Callable[[TrainState, nnx.State, PackedBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step (state, frozen, batches) -> (state, metrics); `state` is donated.

    `template` is a state with the structure of the trained variables. New states lie where the arrays of `like` lie: left
    to XLA they would be written down otherwise, and the second step compiled again. `only`: names of the arrays that the
    step trains, None for all; of the others no gradient is computed, and `optimizer` gets `optax.MaskedNode()` for them.

    `batches` holds arrays [A, B, ...]: A passes whose gradients are added before one update. The loss is normalised
    over all target tokens of the A passes, so passes of unequal size weigh by their tokens. Metrics, float32 scalars:
    `loss` (nats a target token), `grad_norm` (before clipping), `targets`, `tokens` (without padding), `pairs` (tokens and those
    that each of them sees), `taken` (1, or 0 for an update that was skipped), `in_a_row` (skipped last); and `finite`, bool
    [A, B], whether the hidden states at the targets of each row are.

    An update is skipped where loss or gradient are not finite or, with `spikes`, where the loss exceeds its mean over the steps
    before by more than so many standard deviations (exponential averages both, from `TRUSTED` steps on). The step still counts.
    """

    def step(state: TrainState, frozen: nnx.State, batches: PackedBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        passes = batches.tokens.shape[0]
        keys = None
        if dropout_seed is not None:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(dropout_seed), state.step), passes)
        moving = {name: value for name, value in state.trained.items() if only is None or name in only}

        def total_loss(moving: dict[str, jax.Array], batch: PackedBatch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            decoder = nnx.merge(graphdef, with_arrays(template, state.trained | moving), frozen)
            return loss_and_finite(decoder, batch, key)

        def add(carry: Any, scanned: tuple[PackedBatch, jax.Array | None]) -> tuple[Any, jax.Array]:
            (value, finite), gradient = jax.value_and_grad(total_loss, has_aux=True)(moving, *scanned)
            return (carry[0] + value, jax.tree.map(jnp.add, carry[1], gradient)), finite

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, moving))
        if passes == 1:
            key = None if keys is None else keys[0]
            one = jax.tree.map(lambda x: x[0], batches)
            (loss, finite), gradient = jax.value_and_grad(total_loss, has_aux=True)(moving, one, key)
            finite = finite[None]
        else:
            (loss, gradient), finite = jax.lax.scan(add, zero, (batches, keys))
        targets = jnp.sum(batches.weights)
        gradient = jax.tree.map(lambda g: g / targets, gradient)
        masked = {name: gradient.get(name, optax.MaskedNode()) for name in state.trained}
        updates, optimizer_state = optimizer.update(masked, state.optimizer, state.trained)
        updates = cast(dict[str, jax.Array], updates)
        moved = cast(dict[str, jax.Array], optax.apply_updates(moving, {name: updates[name] for name in moving}))
        loss, norm = loss / targets, optax.tree.norm(gradient)
        take = jnp.isfinite(loss) & jnp.isfinite(norm)
        if spikes is not None:
            usual = state.health["mean"] + spikes * jnp.sqrt(state.health["variance"])
            take &= (state.health["taken"] < TRUSTED) | (loss <= usual)

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(take, a, b), new, old)

        trained = state.trained | kept(moved, moving)
        optimizer_state = kept(optimizer_state, state.optimizer)
        health = _health(state.health, loss, take)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "taken": take.astype(jnp.float32),
            "in_a_row": health["in_a_row"].astype(jnp.float32),
            "finite": finite,
            "targets": targets,
            "tokens": jnp.sum(batches.segments > 0).astype(jnp.float32),
            # A token sees as many as it would see alone, that is its position and itself.
            "pairs": jnp.sum(jnp.where(batches.segments > 0, batches.positions + 1, 0), dtype=jnp.float32),
        }
        return TrainState(state.step + 1, trained, optimizer_state, health), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, like), like.step.sharding))


def _health(health: dict[str, jax.Array], loss: jax.Array, take: jax.Array) -> dict[str, jax.Array]:
    """Counts a step; the loss of one that was skipped does not count for the averages."""
    taken = health["taken"] + take
    # Corrected for the start as Adam's moments are: of few steps the average is that of these steps.
    share = (1 - MEMORY) / (1 - MEMORY ** taken.astype(jnp.float32))
    away = loss - health["mean"]
    mean = health["mean"] + share * away
    variance = (1 - share) * (health["variance"] + share * away**2)
    return {
        "taken": taken,
        "skipped": health["skipped"] + ~take,
        "in_a_row": jnp.where(take, 0, health["in_a_row"] + 1),
        "mean": jnp.where(take, mean, health["mean"]),
        "variance": jnp.where(take, variance, health["variance"]),
    }


def own_rows(mesh: Mesh, rows: int) -> np.ndarray | None:
    """Which of the rows of a batch this process needs, int64 ascending; None for all."""
    if jax.process_count() == 1:
        return None
    parts = NamedSharding(mesh, spec_of("batch")).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in parts if index is not None]))


def shard_batches(batches: PackedBatch, mesh: Mesh, rows: int | None = None, own: np.ndarray | None = None) -> PackedBatch:
    """Places arrays [A, B, ...] with rows divided over the mesh axes data and fsdp, and their tokens over context.

    `rows` and `own`: B, and those of them that `batches` holds, where a process has its own alone.
    """
    count: int = batches.tokens.shape[1] if rows is None else rows
    parts = ways(mesh, "batch")
    if count % parts:
        raise UserError(
            f"train.batch_rows is {count}, which data x fsdp = {parts} devices cannot divide; use {-(-count // parts) * parts}"
        )
    if own is None:
        return jax.device_put(batches, batch_shardings(mesh))
    at = np.full(count, -1)
    at[own] = np.arange(len(own))

    def put(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
        shape = (values.shape[0], count, values.shape[2])

        def part(index: Any) -> np.ndarray:
            passes, some, last = index
            return values[passes][:, at[some]][..., last]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batches, batch_shardings(mesh))


def batch_shardings(mesh: Mesh) -> Any:
    """A PackedBatch of shardings, of arrays [A, B, T] and [A, B, K]."""
    tokens, targets = (NamedSharding(mesh, spec_of(None, "batch", last)) for last in ("length", None))
    by_target = ("target_positions", "labels", "weights")
    shardings: dict[str, Any] = {f.name: targets if f.name in by_target else tokens for f in fields(PackedBatch)}
    return PackedBatch(**shardings)
