"""Shapes and types that signatures promise are checked at run time while the tests run.

Only where arrays of the device are handled: the other modules name types that they import for the type checker alone.
"""

import os
import signal
from importlib.metadata import version
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# The tests compile hundreds of small programs and run each a few times: unoptimised code halves their time. Before jax starts.
FLAGS = ["--xla_backend_optimization_level=0"]
if version("jax").startswith("0.10."):
    # Without products through YNNPACK, whose rounding is three times as large (docs/log.md, 2026-11-22) and another on every
    # kind of machine: tolerances are those of plain products.
    FLAGS.append("--xla_cpu_experimental_ynn_fusion_type=")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

# What tests start inherits what is ignored here, as `nohup` leaves it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

MODEL = (
    "architecture", "attention", "decoder", "families", "kernel", "layers", "load", "lora", "merge", "rope", "sharding",
    "token_table", "weights",
)  # fmt: skip
CHECKED = ["sftrec_jax.train", "sftrec_jax.decode", *(f"sftrec_jax.model.{name}" for name in MODEL)]

SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines())

install_import_hook(CHECKED, "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    # flax 0.12 declares nnx.State with typing.Hashable, which beartype calls old; can go once flax writes collections.abc.
    config.addinivalue_line("filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks slow what slow.txt names: tests of more than about 4.5 s of a core where others say the same."""
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
