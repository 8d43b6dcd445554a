"""Rates of steps and of runs, from counted work and given times."""

import jax.numpy as jnp
import pytest
from tiny_training import stories

from sftrec_jax.train.batches import Counts
from sftrec_jax.train.flops import step_flops
from sftrec_jax.train.meter import Meter, memory_peak

PEAK = 1e9


@pytest.fixture(scope="module")
def meter() -> Meter:
    build = stories().case.build
    return Meter(build.arch, build.adapters, "lora", len(build.row_ids), jnp.float32, 1, _peak=(PEAK, "given"))


def test_rates(meter: Meter) -> None:
    assert meter.summary().keys() == {"peak_bytes"}
    values = {"tokens": 100.0, "targets": 20.0, "pairs": 3000.0}
    flops = step_flops(meter.arch, meter.adapters, "lora", 100, 20, 3000, 7).total
    rows_only = step_flops(meter.arch, meter.adapters, "rows", 100, 20, 3000, 7).total
    assert rows_only < flops
    compiling = meter.step(values, Counts(5, 200, 128), 60.0, 1.0, False, False)
    assert compiling["tokens_per_s"] == pytest.approx(100 / 60)
    first = meter.step(values, Counts(5, 200, 128), 2.0, 0.5, False, True)
    assert first["mfu"] == pytest.approx(flops / 2 / PEAK) and first["loader_wait_s"] == 0.5
    assert first["examples_per_s"] == 2.5 and first["target_tokens_per_s"] == 10
    assert first["positions_used"] == 100 / 128 and first["saved_by_sharing"] == 2
    assert first["peak_bytes"] == pytest.approx(memory_peak(), rel=0.1)
    second = meter.step(values, Counts(7, 500, 122), 3.0, 0.5, True, True)
    assert second["mfu"] == pytest.approx(rows_only / 3 / PEAK)
    found = meter.summary()
    assert found["tokens_per_s"] == 40 and found["examples_per_s"] == pytest.approx(12 / 5)
    assert found["loader_wait_share"] == pytest.approx(0.2)
    assert found["positions_used"] == 200 / 250 and found["saved_by_sharing"] == 3.5
    assert found["mfu"] == pytest.approx((flops + rows_only) / 5 / PEAK)
    assert "waited for the loader 20.0% of the time" in meter.describe() and "(given)" in meter.describe()


def test_memory_peak_is_that_of_the_process() -> None:
    before = memory_peak()
    held = bytearray(200_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert memory_peak() >= max(before, 200_000_000)
