"""FLOPs against the products that XLA compiles, and the peak on a clock made up."""

import dataclasses
import math
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sftrec_jax.model.adapters import PROJECTIONS, AdapterSpec
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.attention import attend
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.load import trainable_filter
from sftrec_jax.model.rope import rope_tables
from sftrec_jax.train import flops
from sftrec_jax.train.flops import forward_flops, peak_flops, step_flops

# No two of the sizes that a kernel joins are equal.
ARCH = Architecture(900, 256, 512, 2, 6, 2, 64, 2048, 10000.0, 1e-5, True)
ROWS, LENGTH, TARGETS = 2, 128, 40


def adapters(*targets: str) -> AdapterSpec:
    return AdapterSpec(16, 32.0, 0.0, targets)


def compiled(arch: Architecture, spec: AdapterSpec | None, method: str, new_rows: int) -> Any:
    """Loss and gradient of an unrolled decoder without recomputation, compiled; XLA counts the body of a loop once."""
    row_ids = tuple(range(arch.vocab_size, arch.vocab_size + new_rows))
    decoder = nnx.eval_shape(lambda: Decoder(arch, spec, row_ids, jnp.float32, "none", jax.random.key(0)))
    graphdef, trained, frozen = nnx.split(decoder, trainable_filter(method), ...)

    def loss(trained: Any, frozen: Any, tokens: jax.Array, positions: jax.Array, at: jax.Array, labels: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, trained, frozen)
        mask = positions[:, None, :] <= positions[:, :, None]
        layer_def, layers = nnx.split(model.layers)
        x, rope = model.embed_tokens.embed(tokens, model.dtype), rope_tables(arch, positions)
        for n in range(arch.layers):
            layer = nnx.merge(layer_def, jax.tree.map(lambda p, n=n: p[n], layers))
            x, _ = layer(x, rope, lambda q, k, v, c, w: (attend(q, k, v, mask), c), None, None)
        hidden = jnp.take_along_axis(model.norm(x), at[:, :, None], axis=1)
        return -jnp.take_along_axis(jax.nn.log_softmax(model.logits(hidden)), labels[:, :, None], axis=-1).sum()

    by_token, by_target = (jax.ShapeDtypeStruct((ROWS, n), jnp.int32) for n in (LENGTH, TARGETS))
    lowered = jax.jit(jax.value_and_grad(loss)).lower(trained, frozen, by_token, by_token, by_target, by_target)
    return lowered.compile()


def compiled_forward(arch: Architecture, spec: AdapterSpec | None) -> Any:
    """The layers alone, unrolled: what remat computes again."""
    state: Any
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(arch, spec, (), jnp.float32, "none", jax.random.key(0)).layers))

    def forward(state: Any, x: jax.Array, positions: jax.Array) -> jax.Array:
        mask, rope = positions[:, None, :] <= positions[:, :, None], rope_tables(arch, positions)
        for n in range(arch.layers):
            layer = nnx.merge(graphdef, jax.tree.map(lambda p, n=n: p[n], state))
            x, _ = layer(x, rope, lambda q, k, v, c, w: (attend(q, k, v, mask), c), None, None)
        return x

    x = jax.ShapeDtypeStruct((ROWS, LENGTH, arch.hidden_size), jnp.float32)
    return jax.jit(forward).lower(state, x, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)).compile()


@pytest.mark.parametrize("spec", [None, adapters("q_proj", "down_proj"), adapters(*PROJECTIONS)])
def test_what_remat_computes_again(spec: AdapterSpec | None) -> None:
    # The mask applied whole computes every pair of tokens.
    expected = products(compiled_forward(ARCH, spec).as_text())
    assert forward_flops(ARCH, spec, ROWS * LENGTH, ROWS * LENGTH * LENGTH) == expected


def products(text: str) -> int:
    """FLOPs of all `dot` instructions of a compiled program: twice the result's size times the contracted sizes."""
    shapes: dict[str, list[int]] = {}
    total = 0
    for line in text.splitlines():
        result = re.match(r"\s*(?:ROOT )?(%\S+) = \w+\[([\d,]*)\]", line)
        if result is None:
            continue
        shapes[result[1]] = [int(n) for n in result[2].split(",") if n]
        dot = re.search(r" dot\((%[^,]+), .*lhs_contracting_dims=\{([\d,]+)\}", line)
        if dot is not None:
            contracted = [shapes[dot[1]][int(axis)] for axis in dot[2].split(",")]
            total += 2 * math.prod(shapes[result[1]]) * math.prod(contracted)
    return total


@pytest.mark.parametrize(
    ("method", "targets", "new_rows", "tied"),
    [
        ("rows", PROJECTIONS, 5, True),
        ("lora", PROJECTIONS, 5, False),
        ("lora", PROJECTIONS, 0, True),
        ("lora", ("k_proj", "gate_proj"), 0, True),
        ("lora", ("up_proj",), 0, True),
        ("full", (), 5, True),
    ],
)
def test_count_is_that_of_xla(method: Any, targets: tuple[str, ...], new_rows: int, tied: bool) -> None:
    arch = dataclasses.replace(ARCH, tied=tied)
    spec = adapters(*targets) if targets else None
    program = compiled(arch, spec, method, new_rows)
    # The compiled attention computes hidden pairs, too.
    found = step_flops(arch, spec, method, ROWS * LENGTH, ROWS * TARGETS, ROWS * LENGTH**2, new_rows)
    assert found.total == products(program.as_text())
    # XLA's own number has the elementwise work, too: 1.0 to 1.4 % in these cases.
    assert 1 <= program.cost_analysis()["flops"] / found.total < 1.02


def test_attention_and_head_have_parts_of_their_own() -> None:
    base = step_flops(ARCH, None, "full", 100, 10, 1000, 0)
    more_pairs = step_flops(ARCH, None, "full", 100, 10, 1500, 0)
    more_targets = step_flops(ARCH, None, "full", 100, 20, 1000, 0)
    more_tokens = step_flops(ARCH, None, "full", 200, 10, 1000, 0)
    assert more_pairs == dataclasses.replace(base, attention=1.5 * base.attention)
    assert more_targets == dataclasses.replace(base, head=2 * base.head)
    assert more_tokens == dataclasses.replace(base, layers=2 * base.layers)


def test_full_training_is_the_count_of_palm() -> None:
    """6 P + 12 L N H T a token: 134,515,008 parameters of SmolLM2-135M but for 61 norms of 576, T keys a query."""
    smollm = Architecture(49152, 576, 1536, 30, 9, 3, 64, 8192, 100000.0, 1e-5, True)
    found = step_flops(smollm, None, "full", 1, 1, 300, 0)
    assert found.total == 6 * (134_515_008 - 61 * 576) + 12 * 30 * 9 * 64 * 300


def test_what_does_not_fit_is_refused() -> None:
    for spec, method, new_rows in ((None, "lora", 5), (adapters("q_proj"), "full", 5), (None, "rows", 0)):
        with pytest.raises(ValueError, match=method):
            step_flops(ARCH, spec, method, 1, 1, 1, new_rows)  # pyright: ignore[reportArgumentType]


def test_peak_is_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    # Begin and end of the products; the first four make up less than half a second.
    ticks = iter([0.0, 0.2, 1.0, 1.1, 2.0, 2.05, 3.0, 3.1, 4.0, 4.3, 9.0, 9.001])
    monkeypatch.setattr(flops, "CPU_SIZE", 64)
    monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    peak, how = peak_flops(jnp.float32)
    assert how == "measured matmul" and peak == pytest.approx(2 * 64**3 / 0.05)
    assert next(ticks) == 9.0


def test_peak_of_a_known_device_is_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(kind: str) -> None:
        monkeypatch.setattr(flops.jax, "devices", lambda: [SimpleNamespace(device_kind=kind, platform="cpu")])

    monkeypatch.setattr(flops, "CPU_SIZE", 64)
    monkeypatch.setattr(flops, "MEASURE_S", 0.0)
    expected = {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "NVIDIA H100 80GB HBM3": 989e12}
    for kind, number in expected.items():
        device(kind)
        assert peak_flops("bfloat16") == peak_flops(jnp.bfloat16) == (number, "data sheet")
    # The number of bfloat16 says nothing of float32, and a device that is not in the table is measured.
    assert peak_flops("float32")[1] == "measured matmul"
    device("TPU v99")
    assert peak_flops("bfloat16")[1] == "measured matmul"
