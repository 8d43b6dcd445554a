"""Checkpoints: Orbax behind one module. A checkpoint is the trained variables and the optimizer state, by name."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from sftrec_jax.errors import UserError
from sftrec_jax.train.step import TrainState

BEST_METRIC = "ndcg@10"


def _named(state: TrainState) -> dict[str, Any]:
    # Names, not positions in a pytree: a checkpoint can be read without rebuilding the classes that wrote it.
    return {
        "step": state.step,
        "trained": state.trained,
        "optimizer": {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)},
    }


class Checkpoints:
    """The checkpoints of a run: the newest `keep`, and the best by validation NDCG@10."""

    def __init__(self, folder: Path, keep: int):
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(n=keep),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[BEST_METRIC], reverse=False, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            item_handlers=ocp.PyTreeCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=lambda metrics: metrics[BEST_METRIC], best_mode="max"
            ),
        )
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps that are on disk, rising."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the highest validation NDCG@10; the newest where none was validated; None where there is none."""
        return self._manager.best_step() if self.steps() else None

    def score(self, step: int) -> float:
        """Validation NDCG@10 of a step."""
        self._manager.wait_until_finished()
        metrics = self._manager.metrics(step)
        assert metrics is not None  # `save` always writes them
        return float(metrics[BEST_METRIC])

    def save(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Writes the state in the background, under its step."""
        args: Any = ocp.args.PyTreeSave(_named(state))  # pyright: ignore[reportCallIssue]
        self._manager.save(int(state.step), args=args, metrics=metrics)

    def restore(self, step: int, state: TrainState) -> TrainState:
        """Reads a step into the shardings of `state`, which is of the same run's shape."""
        named = _named(state)
        found = self._read(step, named)
        paths, tree = jax.tree_util.tree_flatten_with_path(state.optimizer)
        optimizer = jax.tree_util.tree_unflatten(tree, [found["optimizer"][jax.tree_util.keystr(path)] for path, _ in paths])
        return TrainState(found["step"], found["trained"], optimizer)

    def restore_trained(self, step: int, trained: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Reads only the trained arrays of a step, into the shardings of `trained`."""
        return self._read(step, {"trained": trained})["trained"]

    def _read(self, step: int, named: dict[str, Any]) -> dict[str, Any]:
        self._manager.wait_until_finished()  # a step is listed from the start of its save, its folder appears at the end
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), named)
        stored = self._manager.item_metadata(step)
        if stored is None:
            raise UserError(f"{self.folder}: step {step} cannot be read; it has the steps {self.steps()}")
        for part, arrays in named.items():
            if not isinstance(arrays, dict):
                continue
            for name in [*arrays, *stored[part]]:
                shape = getattr(stored[part].get(name), "shape", None)
                wanted = np.shape(arrays[name]) if name in arrays else None
                if shape is None or tuple(shape) != wanted:
                    raise UserError(
                        f"{self.folder}: step {step} holds {name} with shape {shape}, this configuration has {wanted}; "
                        "resume with the config of the run, or use another --out"
                    )
        restore = ocp.checkpoint_utils.construct_restore_args(target)
        args: Any = ocp.args.PyTreeRestore(target, restore_args=restore, partial_restore=True)  # pyright: ignore[reportCallIssue]
        return dict(self._manager.restore(step, args=args))

    def close(self) -> None:
        """Waits for writes in the background."""
        self._manager.wait_until_finished()
        self._manager.close()
