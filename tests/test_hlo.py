"""The reader of compiled programs: what it counts of loops is what the same program counts unrolled."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sftrec_jax.compile.hlo import Module, group_size

LAYERS, WIDTH = 16, 64

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
from sftrec_jax.compile.hlo import Module

mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))
x = jax.ShapeDtypeStruct((16, 256), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
w = jax.ShapeDtypeStruct((6, 256, 256), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))

def layer(x, w):
    w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
    return jnp.tanh(x @ w), None

def scanned(x, w):
    return jax.lax.scan(layer, x, w)[0].sum()

def unrolled(x, w):
    for i in range(6):
        x, _ = layer(x, w[i])
    return x.sum()

for f in (scanned, unrolled):
    module = Module(jax.jit(f).lower(x, w).compile().as_text())
    gathers = [c for c in module.collectives() if c.kind == "all-gather"]
    print(sum(c.times for c in gathers), sum(c.bytes * c.times for c in gathers), len(module.unknown_loops))
"""


def test_collectives_in_a_loop_count_as_often_as_it_runs(tmp_path: Path) -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    scanned, unrolled = ([float(v) for v in line.split()] for line in done.stdout.splitlines())
    # Each chip sends three quarters of a layer's kernel, six times.
    assert scanned == unrolled == [6, 6 * 256 * 256 * 4 * 3 / 4, 0]


def memory(f: object, *shapes: tuple[int, ...]) -> float:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Module(jax.jit(f).lower(*arrays).compile().as_text()).memory_bytes()  # type: ignore[arg-type]


def test_memory_traffic_of_a_loop_is_that_of_its_rounds() -> None:
    def scanned(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def unrolled(x: jax.Array, w: jax.Array) -> jax.Array:
        for i in range(LAYERS):
            x = jnp.tanh(x @ w[i])
        return x

    shapes = (8, WIDTH), (LAYERS, WIDTH, WIDTH)
    one, many = memory(unrolled, *shapes), memory(scanned, *shapes)
    assert many == pytest.approx(one, rel=0.5)
    # A loop that reads the whole stack in each round would move sixteen times as much.
    kernels = LAYERS * WIDTH * WIDTH * 4
    assert kernels < many < 6 * kernels


def test_a_product_moves_its_operands_and_its_result() -> None:
    assert memory(lambda a, b: a @ b, (128, 256), (256, 512)) == (128 * 256 + 256 * 512 + 128 * 512) * 4


def test_a_slice_moves_what_it_takes() -> None:
    moved = memory(lambda x: jax.lax.dynamic_slice(x, (3, 0), (2, 1000)), (4000, 1000))
    assert moved <= 3 * 2 * 1000 * 4


LOOP = """HloModule m

%body.1 (p: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %p = (u32[], bf16[8,4]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %moved = bf16[8,4]{1,0:T(8,128)(2,1)} collective-permute(%x), channel_id=7, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (u32[], bf16[8,4]{1,0}) tuple(%next, %moved)
}

%cond.1 (p.1: (u32[], bf16[8,4])) -> pred[] {
  %p.1 = (u32[], bf16[8,4]{1,0}) parameter(0)
  %i.1 = u32[] get-tuple-element(%p.1), index=0
  %bound = u32[] constant(9)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (x.1: bf16[8,4]) -> bf16[8,4] {
  %x.1 = bf16[8,4]{1,0} parameter(0)
  %one = u32[] constant(1)
  %start = (u32[], bf16[8,4]{1,0}) tuple(%one, %x.1)
  %loop = (u32[], bf16[8,4]{1,0}) while(%start), condition=%cond.1, body=%body.1
  ROOT %last = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_without_a_known_count_is_counted_from_its_condition() -> None:
    """From 1 by 2 while below 9: four rounds."""
    module = Module(LOOP)
    assert module.times["body.1"] == 4 and module.collective_bytes() == {"collective-permute": 4 * 8 * 4 * 2}
    unknown = Module(LOOP.replace("direction=LT", "direction=NE"))
    assert unknown.unknown_loops == ["loop"] and unknown.times["body.1"] == 1


NESTED = """HloModule n

%inner (a: f32[6,4,8], i: s32[]) -> f32[4,8] {
  %a = f32[6,4,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = f32[1,4,8]{2,1,0} dynamic-slice(%a, %i, %zero, %zero), dynamic_slice_sizes={1,4,8}
  ROOT %flat = f32[4,8]{1,0} bitcast(%part)
}

%outer (w: f32[6,4,8], j: s32[], x: f32[2,4]) -> f32[2,8] {
  %w = f32[6,4,8]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %x = f32[2,4]{1,0:T(8,128)S(1)} parameter(2)
  %kernel = f32[4,8]{1,0} fusion(%w, %j), kind=kLoop, calls=%inner
  ROOT %y = f32[2,8]{1,0} convolution(%x, %kernel), dim_labels=bf_io->bf
}

ENTRY %main (w.1: f32[6,4,8], j.1: s32[], x.1: f32[2,4]) -> f32[2,8] {
  %w.1 = f32[6,4,8]{2,1,0} parameter(0)
  %j.1 = s32[] parameter(1)
  %x.1 = f32[2,4]{1,0:T(8,128)S(1)} parameter(2)
  ROOT %out = f32[2,8]{1,0} fusion(%w.1, %j.1, %x.1), kind=kOutput, calls=%outer
}
"""


def test_a_fusion_within_a_fusion_that_slices_a_stack() -> None:
    """One layer of the stack, and the result; x lies in fast memory."""
    assert Module(NESTED).memory_bytes() == 4 * 8 * 4 + 2 * 8 * 4


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={1}", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=[4,4]<=[4,4]T(1,0), x", 4),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['a'=1,'b'=4], device_ids=([2,4]T(1,0)) {'b'}, x", 4),
        ("replica_groups=mesh['a'=8] {'a':(2)4}, x", 4),
        ("replica_groups={}, x", 16),
    ],
)
def test_sizes_of_groups(text: str, size: int) -> None:
    assert group_size(text, 16) == size
