"""Who is asked about in validation and test: histories up to a position and the item there; prompts are built when needed."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from sftrec_jax.console import Progress, console
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.prompts import PromptBuilder
from sftrec_jax.distributed import process_count
from sftrec_jax.run.identity import files_digest, identity
from sftrec_jax.run.parts import Parts, sha256_of
from sftrec_jax.run.session import Session

SHARD = 8192
"""Users whose prompts are held at once, and whose lists are kept together."""

Ranked = dict[str, np.ndarray]
"""Arrays [U, ...] by name."""


class Beginnings(Sequence[np.ndarray]):
    """Of some users the first `ends` items of their histories, as views of the data set that are made when asked for."""

    def __init__(self, dataset: Dataset, users: np.ndarray, ends: np.ndarray):
        self._dataset, self._users, self._ends = dataset, users, ends

    def __len__(self) -> int:
        return len(self._users)

    @overload
    def __getitem__(self, at: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, at: slice) -> "Beginnings": ...
    def __getitem__(self, at: int | slice) -> "np.ndarray | Beginnings":
        if isinstance(at, slice):
            return Beginnings(self._dataset, self._users[at], self._ends[at])
        return self._dataset.history(int(self._users[at]))[: self._ends[at]]


class Asked:
    """Histories and targets of some users at the given positions of their histories (-1: after the whole history)."""

    def __init__(self, session: Session, users: np.ndarray, positions: np.ndarray):
        data = session.dataset
        lengths = np.diff(data.offsets)[users]
        self.ends = np.where(positions[users] < 0, lengths, positions[users]).astype(np.int64)
        """int64 [U] items of each history that count."""
        self.session, self.users = session, users
        self.histories = Beginnings(data, users, self.ends)
        self.targets = np.full(len(users), -1, np.int32)
        """int32 [U] the item after these, -1 where there is none."""
        has = self.ends < lengths
        self.targets[has] = data.items[data.offsets[users[has]] + self.ends[has]]

    def prompts(self, rows: Sequence[int] | np.ndarray | None = None, builder: PromptBuilder | None = None) -> list[np.ndarray]:
        """Of all users or of some `rows`, as the run asks or as another builder does."""
        builder = self.session.prompts if builder is None else builder
        data, chosen = self.session.dataset, range(len(self.users)) if rows is None else rows
        told = (data.told(int(self.users[row]), int(self.ends[row])) for row in chosen)
        return [builder.prompt(self.histories[row], more) for row, more in zip(chosen, told, strict=True)]


def in_shards(
    asked: Asked,
    users: int,
    rank: Callable[[list[np.ndarray], list[np.ndarray]], Ranked],
    report: Progress,
    parts: Parts | None,
    name: str,
    builder: PromptBuilder | None = None,
) -> Ranked:
    """What `rank` gives for prompts and histories of the first `users`, a shard after the other, put together again.

    Args:
        rank: calls `report` itself.
        parts: keeps finished shards as `NAME-00000.npz`. None where there are several processes: each shard is computed by
            all of them together, and files are the first one's alone.
        builder: of the prompts, if another than the run's.
    """
    found: list[Ranked] = []
    for number, rows in enumerate(_shards(users)):
        file = f"{name}-{number:05d}.npz"
        if parts is not None and parts.finished(file, "") is not None:
            with np.load(parts.path(file), allow_pickle=False) as arrays:
                found.append({key: arrays[key] for key in arrays.files})
            report.passed(len(rows))
            continue
        found.append(made := rank(asked.prompts(rows, builder), [asked.histories[row] for row in rows]))
        if parts is not None:
            parts.write(file, "", {"users": len(rows)}, lambda path, made=made: _save(path, made))
    return {key: np.concatenate([one[key] for one in found]) for key in found[0]}


def _shards(users: int) -> Iterator[range]:
    """At least one, which may be empty."""
    for begin in range(0, max(users, 1), SHARD):
        yield range(begin, min(begin + SHARD, users))


def _save(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:  # NumPy would add an ending to a name
        np.savez(file, **arrays)


def kept_parts(asked: Asked, step: int) -> Parts | None:
    """Where shards of an evaluation are kept until it ends; those of another one are removed. None beside other processes.

    Raises: UserError where they cannot be removed or written.
    """
    if process_count() > 1:
        return None
    session, people = asked.session, hashlib.sha256(asked.users.astype(np.int64).tobytes() + asked.ends.tobytes())
    config = session.config.evaluate
    request: dict[str, Any] = {
        "users": people.hexdigest(),
        "data": sha256_of(session.folder.prepared / "dataset.json"),
        "shard": SHARD,
        "evaluate": {
            "mask_seen": config.mask_seen,
            "templates": files_digest((file, Path(file)) for file in config.templates if Path(file).is_file()),
        },
    }
    parts = Parts(session.folder.evaluating, request | identity(session, step))
    if difference := parts.differences():
        console.print(f"removed what was kept of another evaluation ({difference})")
        parts.drop()
    parts.begin()
    return parts
