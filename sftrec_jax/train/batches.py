"""From examples to the batches of any optimizer step, as a pure function of (examples, config, step)."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np

from sftrec_jax.config import TrainConfig
from sftrec_jax.data.mixture import Mixture
from sftrec_jax.data.plan import Plan, plan_epoch
from sftrec_jax.data.segments import PackedBatch
from sftrec_jax.errors import UserError

ROOM = (1.5, 3.0)
"""Targets that rows have room for, over those of an average one. Room that is not used costs little (see `train/loss.py`)."""
WORTH = 0.99
"""The second is taken where it makes no more than this share of the rows."""


@runtime_checkable
class Packable(Protocol):
    """What rows are packed from, `Segments` for one."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n] tokens of each."""
        ...

    @property
    def targets(self) -> np.ndarray:
        """int64 [n] target tokens of each."""
        ...

    @property
    def target_items(self) -> np.ndarray:
        """int64 [n] items that are targets, in each."""
        ...

    @property
    def lengths_apart(self) -> np.ndarray:
        """int64 [n] tokens of each, had each of its targets a prompt of its own."""
        ...

    @property
    def longest(self) -> int:
        """Target tokens of the largest part that cannot be divided."""
        ...

    def within(self, tokens: int, targets: int) -> "Packable":
        """The same in parts that fit a row, where one can be divided."""
        ...

    def pack(self, rows: list[np.ndarray], row_length: int, targets_per_row: int) -> PackedBatch:
        """The arrays of rows that hold the parts with these indices."""
        ...


class Counts(NamedTuple):
    """Of one optimizer step: targets, an item as one; tokens, had each a prompt of its own; positions, padding included."""

    items: int
    tokens_apart: int
    positions: int


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Which rows every step sees. Steps run on over the edges of epochs, so each row of an epoch is seen once."""

    examples: Packable
    config: TrainConfig

    def __post_init__(self) -> None:
        if not len(self.examples):
            raise UserError("no training example is left; lower data.user_core or data.min_rating, or give more interactions")
        if not self.examples.targets.any():
            raise UserError(
                f"none of the {len(self.examples):,} training examples has a target token; look at them with sftrec inspect"
            )

    @functools.cached_property
    def parts(self) -> Packable:
        """The examples, none larger than a row."""
        return self._parts(self.targets_per_row)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n] tokens of each part."""
        return self.parts.lengths

    @property
    def targets(self) -> np.ndarray:
        """int64 [n] target tokens of each part."""
        return self.parts.targets

    @functools.cached_property
    def targets_per_row(self) -> int:
        """K, at least the longest target: room for the targets that a full row has on average and half as many again; twice as
        much where that saves rows, as with short histories that have a target at every place among long ones."""
        share = self.examples.targets.sum() / self.examples.lengths.sum()
        tight, wide = (
            max(math.ceil(min(room * share, 1.0) * self.config.row_length / 8) * 8, self.examples.longest) for room in ROOM
        )
        if tight == wide:
            return tight
        return wide if len(self._plan(wide, 0)) <= WORTH * len(self._plan(tight, 0)) else tight

    @functools.lru_cache(maxsize=2)  # noqa: B019  (a plan lives as long as its run)
    def _parts(self, targets_per_row: int) -> Packable:
        return self.examples.within(self.config.row_length, targets_per_row)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _plan(self, targets_per_row: int, epoch: int) -> Plan:
        c, parts = self.config, self._parts(targets_per_row)
        if not isinstance(parts, Mixture) and parts.targets.all():
            return plan_epoch(parts.lengths, parts.targets, c.row_length, targets_per_row, c.seed, epoch)
        some = parts.chosen(c.seed, epoch) if isinstance(parts, Mixture) else np.arange(len(parts))
        some = some[parts.targets[some] > 0]  # the rest would teach nothing, and alone in a batch divide by zero
        if not len(some):
            raise UserError(f"tasks: an epoch takes none of {len(parts):,} examples, so small are the weights; raise one")
        made = plan_epoch(parts.lengths[some], parts.targets[some], c.row_length, targets_per_row, c.seed, epoch)
        return Plan(some[made.order], made.starts)

    def rows(self, epoch: int) -> Plan:
        """Rows (arrays of indices of `parts`) of an epoch."""
        return self._plan(self.targets_per_row, epoch)

    @functools.cached_property
    def without_target(self) -> int:
        """Examples that never reach a step since they have no target token."""
        return int((self.parts.targets == 0).sum())

    @property
    def rows_per_step(self) -> int:
        """batch_rows x accumulate."""
        return self.config.batch_rows * self.config.accumulate

    @functools.cached_property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        wanted = max(1, round(self.config.epochs * len(self.rows(0)) / self.rows_per_step))
        return min(wanted, self.config.max_steps) if self.config.max_steps else wanted

    def efficiency(self) -> float:
        """Share of row positions of the first epoch that are not padding."""
        rows = self.rows(0)
        return float(self.lengths[rows.order].sum()) / (len(rows) * self.config.row_length)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def _first_row(self, epoch: int) -> int:
        return 0 if epoch == 0 else self._first_row(epoch - 1) + len(self.rows(epoch - 1))

    def parts_of(self, step: int) -> list[np.ndarray]:
        """Indices of `parts` in each row of an optimizer step (counted from 0), in the order of `batch`'s rows."""
        rows: list[np.ndarray] = []
        epoch = 0
        for index in range(step * self.rows_per_step, (step + 1) * self.rows_per_step):
            while index >= self._first_row(epoch) + len(self.rows(epoch)):
                epoch += 1
            rows.append(self.rows(epoch)[index - self._first_row(epoch)])
        return rows

    def counts(self, step: int) -> "Counts":
        """What one optimizer step (counted from 0) holds."""
        chosen = np.concatenate(self.parts_of(step))
        return Counts(
            items=int(self.parts.target_items[chosen].sum()),
            tokens_apart=int(self.parts.lengths_apart[chosen].sum()),
            positions=self.rows_per_step * self.config.row_length,
        )

    def batch(self, step: int, own: np.ndarray | None = None) -> PackedBatch:
        """Arrays [A, B, ...] of one optimizer step (counted from 0); of each pass only the rows `own`, where that is given."""
        c, rows = self.config, self.parts_of(step)
        if own is not None:
            rows = [rows[at * c.batch_rows + row] for at in range(c.accumulate) for row in own.tolist()]
        flat = self.parts.pack(rows, c.row_length, self.targets_per_row)
        stacked = {n: v.reshape(c.accumulate, len(rows) // c.accumulate, -1) for n, v in vars(flat).items()}
        return PackedBatch(**stacked)

    def iterate(self, first_step: int, own: np.ndarray | None = None) -> Iterator[PackedBatch]:
        """Batches from `first_step` to the end, made ahead by a background thread. `own`: see `batch`."""
        dataset = grain.MapDataset.range(first_step, self.steps).map(partial(self.batch, own=own))
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
