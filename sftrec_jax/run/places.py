"""Where a run's checkpoints lie: in its folder, in another one on this machine, or on an object store."""

from pathlib import Path

from sftrec_jax.config import TrainConfig
from sftrec_jax.errors import UserError
from sftrec_jax.run.folder import RunFolder
from sftrec_jax.train.checkpoint import Checkpoints
from sftrec_jax.train.store import Store, is_remote


def open_checkpoints(folder: RunFolder, train: TrainConfig, writing: bool = True) -> Checkpoints:
    """The checkpoints of a run, to write or only to read. Raises UserError where they cannot be reached."""
    place, kept = train.checkpoints, (train.keep_checkpoints, train.keep_every)
    if place is None:
        return Checkpoints(folder.checkpoints, *kept, writing=writing)
    if is_remote(place):
        return Checkpoints(folder.checkpoints if writing else folder.fetched, *kept, writing=writing, store=Store(place))
    try:
        return Checkpoints(Path(place), *kept, writing=writing)
    except OSError as error:
        raise UserError(f"{place}: cannot be used ({error.strerror}); name another folder as train.checkpoints") from None


def step_folder(folder: RunFolder, train: TrainConfig, step: int) -> Path:
    """The files of a step that was read, on this machine."""
    place = train.checkpoints
    root = folder.checkpoints if place is None else folder.fetched if is_remote(place) else Path(place)
    return root / str(step)
