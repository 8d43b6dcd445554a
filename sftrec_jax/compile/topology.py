"""TPU slices that are not there: their devices, as libtpu describes them."""

import importlib.util
import os
import re
from typing import Any

from sftrec_jax.errors import UserError

EXAMPLES = "v5e:4x4, v5p:4x4x4 or v6e:2x4"
ACCELERATORS = {"v5e": "v5litepod", "v6e": "v6e", "v5p": "v5p", "v4": "v4"}


def pretend(topology: str) -> None:
    """Sets what libtpu asks of its surroundings, before jax is imported: no metadata server, and jax itself on the CPU.

    Raises: UserError for a name that is no topology, and where libtpu is not installed.
    """
    found = re.fullmatch(r"(v\d+[a-z]*):(\d+)x(\d+)(?:x(\d+))?", topology)
    if not found:
        raise UserError(f"--topology {topology}: not a TPU slice; write its kind and shape, such as {EXAMPLES}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("sftrec compile needs libtpu, which is not installed; pip install 'sftrec-jax[tpu]' (Linux)")
    chips = 1
    for size in found.groups()[1:]:
        chips *= int(size or 1)
    cores = chips * (2 if found[1] in ("v4", "v5p") else 1)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_ACCELERATOR_TYPE"] = f"{ACCELERATORS.get(found[1], found[1])}-{cores}"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_WORKER_ID"] = "0"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # there is no chip to quarrel over
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def topology_devices(topology: str) -> list[Any]:
    """The devices of a slice (`pretend` comes first). Raises UserError for one that libtpu does not know."""
    import jax
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--topology {topology}: libtpu does not know it ({why}); use one such as {EXAMPLES}") from None
