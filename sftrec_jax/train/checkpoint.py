"""Checkpoints: Orbax behind one module. A checkpoint is the trained variables and the optimizer state, by name, and a manifest.

A step is written in the background, then read again for its manifest (`manifest.py`), and only then do older ones make room: at
any moment the newest whole step is on disk. Of several processes the first writes manifests and looks for damage.
"""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sftrec_jax.console import console
from sftrec_jax.distributed import decide, is_main
from sftrec_jax.errors import UserError
from sftrec_jax.train import manifest
from sftrec_jax.train.manifest import Damaged, Manifest
from sftrec_jax.train.orbax_noise import silence
from sftrec_jax.train.step import TrainState
from sftrec_jax.train.store import Store

BEST_METRIC = "ndcg@10"
ASIDE = "damaged"
"""Where damaged steps wait for somebody to look at them."""
HALF = ".orbax-checkpoint-tmp"
"""In the names of what Orbax has not written to the end, as a killed run leaves it."""
PATIENCE = 10 * 365 * 86400
"""Seconds for a save, which Orbax reckons by the clock of the wall: a jump of it is no failure."""
LARGEST_FILE = 2 << 30
"""Bytes after which Orbax begins another file."""
FAILED_SAVES = 2
"""So many saves in a row may fail, such as on a full disk, before the run stops."""


def _words(error: Exception) -> str:
    """What a library says of a failure, in a line: of TensorStore's chains of reasons the last."""
    said = " ".join(str(getattr(error, "strerror", None) or error).split())
    return said if len(said) < 200 else f"{said[:60]} ... {said[-120:]}"


def _named(state: TrainState) -> dict[str, Any]:
    # Names, not positions in a pytree: a checkpoint can be read without rebuilding the classes that wrote it.
    return {
        "step": state.step,
        "trained": state.trained,
        "optimizer": {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)},
        "health": state.health,
    }


def _has_manifest(store: Store, step: int) -> bool:
    try:
        store.manifest(step)
    except Damaged:
        return False
    return True


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: a local one.
        keep: newest steps that are kept, beside the best by score,
        keep_every: and those whose number this divides; None: none of them.
        fingerprint: goes into the manifests.
        writing: False where the steps are only read: nothing in the folder, or in the store, is changed then.
        store: where the steps are kept instead; the folder then holds only those that are on their way to or from it.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int | None = None,
        fingerprint: dict[str, str] | None = None,
        writing: bool = True,
        store: Store | None = None,
    ):
        self.folder = epath.Path(Path(folder).resolve())
        self._store = store
        if store is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._keep, self._keep_every, self._writing = keep, keep_every, writing
        self.fingerprint = fingerprint or {}
        silence()
        if writing and is_main() and self.folder.exists():
            for path in self.folder.iterdir():
                if HALF in path.name:
                    path.rmtree() if path.is_dir() else path.unlink()
        self._manager = self._open()
        self._scores: dict[int, float | None] = {}
        self._seal: threading.Thread | None = None
        self._failed: tuple[int, Exception] | None = None
        self._failures = 0
        self._read_scores()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            create=self._writing,
            # Folders made in the background are waited for by the clock of the wall, too.
            async_options=ocp.AsyncOptions(timeout_secs=PATIENCE, create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(self.folder, item_handlers=ocp.PyTreeCheckpointHandler(), options=options)

    def _read_scores(self) -> None:
        def scores() -> list[list[Any]]:
            found: list[list[Any]] = []
            if self._store is not None:
                self._tidy(self._store)
            for step in self._all_steps():
                try:
                    found.append([step, self._manifest(step).score])
                except Damaged:
                    continue  # `newest` says so
            return found

        self._scores = {int(step): score for step, score in decide("scores", scores)}
        if self._store is not None:
            self._manager.reload()

    def _tidy(self, store: Store) -> None:
        """Sends steps that are whole here and not in the store, as a process leaves them that is stopped; empties the folder.

        Where steps are only read, those stay in the folder that the store has, so that they are fetched once.
        """
        there = set(store.steps())
        for step in sorted(self._manager.all_steps()):
            if self._writing:
                try:
                    manifest.verify(self._at(step))
                    if step not in there or not _has_manifest(store, step):
                        store.send(step, Path(self._at(step)))
                except Damaged:
                    pass  # half of what is, or is not, in the store
            if self._writing or step not in there:
                shutil.rmtree(self._at(step), ignore_errors=True)
        for left in self.folder.glob(".fetching.*") if self._writing else ():
            shutil.rmtree(left, ignore_errors=True)

    def _check(self, step: int) -> None:
        """Raises Damaged where the files of a step are not what was written. Those in a store are fetched for that."""
        if self._store is not None:
            kept = self._store.manifest(step)
            try:
                if manifest.verify(self._at(step)).files == kept.files:
                    return
            except Damaged:
                pass  # not fetched yet
            self._store.fetch(step, Path(self._at(step)))
        manifest.verify(self._at(step))

    def _at(self, step: int) -> epath.Path:
        return self.folder / str(step)

    def _all_steps(self) -> list[int]:
        return self._store.steps() if self._store is not None else sorted(self._manager.all_steps())

    def _manifest(self, step: int) -> Manifest:
        return self._store.manifest(step) if self._store is not None else manifest.read(self._at(step))

    @property
    def where(self) -> str:
        """Where the steps are kept."""
        return self._store.url if self._store is not None else str(self.folder)

    def steps(self) -> list[int]:
        """Steps that were written to the end, rising."""
        return sorted(self._scores)

    def newest(self) -> int | None:
        """The newest step whose files are what was written, or None. Damaged ones are named, and laid aside by who writes."""
        return self._intact(lambda steps: max(steps))

    def best(self) -> int | None:
        """The step with the highest score whose files are what was written; the newest where none has a score; None where there
        is none."""

        def choose(steps: list[int]) -> int:
            return max(steps, key=lambda step: (self._scores.get(step) is not None, self._scores.get(step) or 0.0, step))

        return self._intact(choose)

    def _intact(self, choose: Any) -> int | None:
        self.finish()

        def search() -> dict[str, Any]:
            left, gone = set(self._all_steps()), {}
            while left:
                # Those without a manifest are looked at, too: they are named and laid aside.
                half = left - self._scores.keys()
                step = max(half) if half else choose(sorted(left))
                left.discard(step)
                try:
                    self._check(step)
                except Damaged as why:
                    gone[str(step)] = str(why)
                    continue
                if step in self._scores:
                    return {"step": step, "gone": gone}
            return {"step": None, "gone": gone}

        found = decide("intact", search)
        for step, why in found["gone"].items():
            self._lay_aside(int(step), why)
        step = found["step"]
        if self._store is not None or (found["gone"] and self._writing):
            self._manager.reload()
        if found["gone"] and step is not None:
            console.print(f"checkpoints: using step {step}, which is whole", markup=False)
        return step

    def _lay_aside(self, step: int, why: str) -> None:
        self._scores.pop(step, None)
        where = ""
        if self._store is not None and is_main():
            shutil.rmtree(self._at(step), ignore_errors=True)
        if self._writing and self._store is not None:
            where = f"; kept aside in {self._store.url}/{ASIDE}"
            if is_main():
                self._store.lay_aside(step, ASIDE)
        elif self._writing:
            aside = self.folder / ASIDE
            number = 0
            if is_main():
                aside.mkdir(parents=True, exist_ok=True)
                while (to := aside / f"{step}.{number}").exists():
                    number += 1
                self._at(step).rename(to)
            where = f"; kept aside in {aside}"
        console.print(f"checkpoints: step {step} is damaged: {why}{where}", markup=False)

    def score(self, step: int) -> float | None:
        """The score of a step; None where it was not validated."""
        return self._scores[step]

    def manifest_of(self, step: int) -> Manifest:
        """What a step says of itself. Raises UserError where it is damaged."""
        self.finish()
        try:
            return self._manifest(step)
        except Damaged as why:
            raise UserError(f"{self.where}: step {step} is damaged: {why}; use another step") from None

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Writes the state in the background, under its step."""
        self.finish()
        step = int(state.step)
        if step in self._scores:
            return
        args: Any = ocp.args.PyTreeSave(_named(state))  # pyright: ignore[reportCallIssue]
        try:
            if missing := decide("room", lambda: self._missing_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))):
                raise OSError(missing)
            self._manager.save(step, args=args, force=True)
        except Exception as error:  # Orbax and TensorStore raise one kind for a full disk, another for a missing folder
            self._failed = step, error
            self._judge()
            return
        self._scores[step] = score
        self._seal = threading.Thread(target=self._sealed, args=(step,), daemon=True)
        self._seal.start()

    def _missing_room(self, size: int) -> str:
        """Why a step of so many bytes will not fit, or nothing: TensorStore fails in the middle of many writes, and noisily."""
        if "://" in str(self.folder) or not hasattr(os, "posix_fallocate"):
            return ""
        probe = Path(self.folder) / f".room.{os.getpid()}"
        try:
            with probe.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, min(size, LARGEST_FILE)))
        except OSError as error:
            # Some file systems cannot say.
            return "" if error.errno in (errno.EINVAL, errno.EOPNOTSUPP) else f"{error.strerror}: {size:,} bytes"
        finally:
            probe.unlink(missing_ok=True)
        return ""

    def _sealed(self, step: int) -> None:
        """Waits for the files of a step, then writes its manifest, and sends all to the store."""
        try:
            self._manager.wait_until_finished()
            if is_main():
                made = manifest.describe(self._at(step), step, self.fingerprint, self._scores[step])
                manifest.write(self._at(step), made)
                if self._store is not None:
                    self._store.send(step, Path(self._at(step)))
        except Exception as error:  # whatever it was is told in `finish`, by the thread that trains
            self._failed = step, error

    def finish(self, last: bool = False) -> None:
        """Waits until what was saved is whole, and removes steps that need not be kept. `last`: no failed save is forgiven."""
        if self._seal is None:
            return
        self._seal.join()
        self._seal = None
        self._judge(last)
        # Steps that could not be sent have no score; they stay here until the next start.
        sent = [] if self._store is None else [step for step in self._manager.all_steps() if step in self._scores]
        for step in self._unwanted():
            if self._store is None:
                self._manager.delete(step)
            elif is_main():
                try:
                    self._store.remove(step)
                except UserError as error:
                    console.print(f"checkpoints: step {step} is not needed any more, but stays ({error})", markup=False)
            del self._scores[step]
        for step in sent:
            self._manager.delete(step)

    def _judge(self, last: bool = False) -> None:
        """Says that a save failed, and raises UserError when too many have."""
        if self._failed is None:
            self._failures = 0
            return
        (step, error), self._failed = self._failed, None
        self._scores.pop(step, None)
        self._manager = self._open()  # the old one would raise the same error again
        self._failures += 1
        why = _words(error)
        said = f"{self.where}: the checkpoint of step {step} cannot be written ({why}); earlier ones are intact"
        if last or self._failures >= FAILED_SAVES:
            raise UserError(f"{said}; free space or mend the folder, then go on with --resume") from None
        console.print(f"{said}; going on, and trying again with the next one", markup=False)

    def set_score(self, step: int, score: float) -> None:
        """Gives a saved step its score."""
        if self._seal is not None and self._seal.is_alive():
            self._seal.join()
        if step not in self._scores:
            return  # its save failed, of which `finish` tells
        self._scores[step] = score
        if is_main() and self._failed is None:
            try:
                made = self._manifest(step)
                scored = Manifest(made.step, made.files, made.fingerprint, score)
                if self._store is not None:
                    self._store.put_manifest(step, scored)
                else:
                    manifest.write(self._at(step), scored)
            except (OSError, Damaged, UserError) as error:
                self._failed = step, OSError(str(error))

    def _unwanted(self) -> list[int]:
        steps = self.steps()
        scored = [step for step in steps if self._scores[step] is not None]
        kept = set(steps[-self._keep :])
        if scored:
            kept.add(max(scored, key=lambda step: (self._scores[step] or 0.0, step)))
        every = self._keep_every
        return [step for step in steps if step not in kept and not (every and step % every == 0)]

    def restore(self, step: int, state: TrainState) -> TrainState:
        """Reads a step into the shardings of `state`, which is of the same run's shape."""
        named = _named(state)
        found = self._read(step, named)
        paths, tree = jax.tree_util.tree_flatten_with_path(state.optimizer)
        optimizer = jax.tree_util.tree_unflatten(tree, [found["optimizer"][jax.tree_util.keystr(path)] for path, _ in paths])
        return TrainState(found["step"], found["trained"], optimizer, found["health"])

    def restore_trained(self, step: int, trained: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Reads only the trained arrays of a step, into the shardings of `trained`."""
        return self._read(step, {"trained": trained})["trained"]

    def _read(self, step: int, named: dict[str, Any]) -> dict[str, Any]:
        self.finish()
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), named)
        stored = self._manager.item_metadata(step)
        if stored is None:
            raise UserError(f"{self.where}: step {step} cannot be read; it has the steps {self.steps()}")
        for part, arrays in named.items():
            if not isinstance(arrays, dict):
                continue
            for name in [*arrays, *stored[part]]:
                shape = getattr(stored[part].get(name), "shape", None)
                wanted = np.shape(arrays[name]) if name in arrays else None
                if shape is None or tuple(shape) != wanted:
                    raise UserError(
                        f"{self.where}: step {step} holds {name} with shape {shape}, this configuration has {wanted}; "
                        "resume with the config of the run, or use another --out"
                    )
        restore = ocp.checkpoint_utils.construct_restore_args(target)
        args: Any = ocp.args.PyTreeRestore(target, restore_args=restore, partial_restore=True)  # pyright: ignore[reportCallIssue]
        return dict(self._manager.restore(step, args=args))

    def close(self) -> None:
        """Waits for writes in the background."""
        try:
            self.finish()
        finally:
            self._manager.close()
