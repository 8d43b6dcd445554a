"""Which numeric type a run computes in."""

import jax
import jax.numpy as jnp
import pytest

from sftrec_jax.config import ModelConfig
from sftrec_jax.model import dtype as module
from sftrec_jax.model.dtype import bfloat16_speed, compute_dtype


@pytest.mark.parametrize(("speed", "chosen"), [(0.7, jnp.float32), (1.8, jnp.float32), (2.0, jnp.bfloat16), (7.9, jnp.bfloat16)])
def test_bfloat16_on_a_cpu_where_its_products_are_faster(speed: float, chosen: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bfloat16_speed", lambda: speed)
    dtype, why = compute_dtype(ModelConfig())
    assert dtype == chosen and f"{speed:.1f} times the speed" in why


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_configured_type_is_not_questioned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bfloat16_speed", lambda: pytest.fail("measured"))
    assert compute_dtype(ModelConfig(compute_dtype=name)) == (jnp.dtype(name), "as configured")  # type: ignore[arg-type]


def test_accelerators_compute_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compute_dtype(ModelConfig())[0] == jnp.bfloat16


def test_the_speed_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bfloat16_speed() > 0
    monkeypatch.setattr(jax, "jit", lambda _: pytest.fail("measured again"))
    assert bfloat16_speed() > 0


@pytest.mark.parametrize("busy", [0.0, 5.0])
def test_other_work_on_the_machine_does_not_decide(busy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32 and bfloat16 that take equally long, most of the former beside other work, or all of the early ones."""
    clock, turn = 0.0, 0

    def wait(x: object) -> object:
        nonlocal clock, turn
        turn += 1
        float32 = turn > 2 and turn % 2 == 1
        clock += 1 + (busy if float32 and turn % 8 != 1 else 0) + (9 if turn < 12 else 0)
        return x

    monkeypatch.setattr(jax, "block_until_ready", wait)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock)
    assert bfloat16_speed.__wrapped__() == pytest.approx(1)
