"""Several processes that work as one run, each with its own devices: joining, agreeing, and arrays of which each holds a part.

Files are written by the first process alone, in a folder that all of them see; checkpoints by all together (Orbax). Without
`SFTREC_DISTRIBUTED` or `SFTREC_COORDINATOR` a program is one process, and all of this does nothing.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from sftrec_jax.errors import LeakError, UserError

HOW = (
    "set SFTREC_DISTRIBUTED=auto on TPU slices and under SLURM, or SFTREC_COORDINATOR=HOST:PORT, SFTREC_PROCESSES=N and "
    "SFTREC_PROCESS=0 to N-1"
)
DAY_MS = 24 * 3600 * 1000
"""How long processes wait for the first one, which may have much to prepare."""

_joined = False


def wanted() -> bool:
    """Whether the surroundings ask for several processes."""
    return bool(os.environ.get("SFTREC_DISTRIBUTED") or os.environ.get("SFTREC_COORDINATOR"))


def join() -> None:
    """Connects this process with the others, before any other use of jax. Raises UserError for settings that do not fit."""
    global _joined
    if _joined or not wanted():
        return
    import jax

    from sftrec_jax.console import console

    coordinator = os.environ.get("SFTREC_COORDINATOR")
    try:
        if coordinator:
            count, index = (_number(name) for name in ("SFTREC_PROCESSES", "SFTREC_PROCESS"))
            if not 0 <= index < count:
                raise UserError(f"SFTREC_PROCESS is {index} and SFTREC_PROCESSES {count}; {HOW}")
            jax.distributed.initialize(coordinator, count, index)
        elif os.environ["SFTREC_DISTRIBUTED"] == "auto":
            jax.distributed.initialize()
        else:
            raise UserError(f"SFTREC_DISTRIBUTED is {os.environ['SFTREC_DISTRIBUTED']!r}; {HOW}")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot be joined: {str(error).splitlines()[0]}; {HOW}") from None
    _joined = True
    if not is_main():
        console.quiet = True
    console.print(f"processes: {jax.process_count()}, {jax.local_device_count()} of {jax.device_count()} devices here")


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise UserError(f"{name} is {value!r} beside SFTREC_COORDINATOR; {HOW}")
    return int(value)


def is_main() -> bool:
    """Whether this process writes files and speaks; true where there is only one."""
    if not _joined:
        return True
    import jax

    return jax.process_index() == 0


def process_count() -> int:
    """How many there are."""
    if not _joined:
        return 1
    import jax

    return jax.process_count()


def _store() -> Any:
    """The key-value store of the coordination service: it knows no devices, and so no collective that could time out."""
    from jax._src import distributed

    return distributed.global_state.client


def agree(what: str, mine: str) -> None:
    """Raises UserError in every process unless all have the same JSON dictionary of sections `mine`."""
    if process_count() == 1:
        return
    import jax

    store, index = _store(), jax.process_index()
    store.key_value_set(f"sftrec/{what}/{index}", mine)
    verdict = f"sftrec/{what}/verdict"
    if index == 0:
        others = [store.blocking_key_value_get(f"sftrec/{what}/{i}", DAY_MS) for i in range(1, process_count())]
        store.key_value_set(verdict, json.dumps(_differences(mine, others)))
    different = json.loads(store.blocking_key_value_get(verdict, DAY_MS))
    if different:
        raise UserError(f"the processes disagree on the {what}: {different}; start all of them with the same command")


def _differences(mine: str, others: list[str]) -> str:
    first = json.loads(mine)
    for index, text in enumerate(others, start=1):
        other = json.loads(text)
        for section, fields in first.items():
            theirs = other.get(section)
            if theirs == fields:
                continue
            if not isinstance(fields, dict) or not isinstance(theirs, dict):
                return f"{section} is {fields} in process 0 and {theirs} in process {index}"
            name = next(key for key in fields if fields[key] != theirs.get(key))
            return f"{section}.{name} is {fields[name]} in process 0 and {theirs.get(name)} in process {index}"
    return ""


def on_main(name: str, action: Callable[[], None]) -> None:
    """Runs `action` in the first process while the others wait; an error there ends all of them. `name` is used once."""
    if process_count() == 1:
        action()
        return
    store, key = _store(), f"sftrec/done/{name}"
    if is_main():
        outcome = "failed"
        try:
            action()
            outcome = "ok"
        except LeakError:
            outcome = "leak"
            raise
        finally:
            store.key_value_set(key, outcome)
        return
    outcome = store.blocking_key_value_get(key, DAY_MS)
    if outcome != "ok":
        raise (LeakError if outcome == "leak" else UserError)("process 0 stopped; its message says why")


_decided = 0


def decide(what: str, choose: Callable[[], Any]) -> Any:
    """What `choose` returns in the first process (JSON), in all of them. All must call it, in the same order."""
    global _decided
    if process_count() == 1:
        return choose()
    _decided += 1
    store, key = _store(), f"sftrec/decided/{_decided}/{what}"
    if is_main():
        try:
            found = json.dumps({"value": choose()})
        except BaseException:
            store.key_value_set(key, json.dumps({"failed": True}))
            raise
        store.key_value_set(key, found)
        return json.loads(found)["value"]
    told = json.loads(store.blocking_key_value_get(key, DAY_MS))
    if "failed" in told:
        raise UserError("process 0 stopped; its message says why")
    return told["value"]


def announce(what: str, value: str) -> None:
    """Tells the other processes something, once for each `what`."""
    _store().key_value_set(f"sftrec/said/{what}", value)


def announced(what: str) -> str | None:
    """What was announced under that name; None where nothing was yet."""
    import jax

    try:
        return _store().key_value_try_get(f"sftrec/said/{what}")
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def to_host(values: Any) -> np.ndarray:
    """An array as NumPy, wherever its parts are. All processes must ask for the same one."""
    if process_count() == 1 or not hasattr(values, "is_fully_addressable") or values.is_fully_addressable:
        return np.asarray(values)
    if values.is_fully_replicated:
        return np.asarray(values.addressable_data(0))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values, tiled=True))


def place(values: Any, sharding: Any) -> Any:
    """A pytree of arrays that every process has, each process's parts put into `sharding`."""
    import jax

    if process_count() == 1:
        return jax.device_put(values, sharding)

    def put(value: Any) -> Any:
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, values)
