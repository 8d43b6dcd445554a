"""A base in 8 or 4 bits: rounding within half a step, numbers of a dense decoder of those values, memory, exports, errors."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import FIXTURE, by_token, largest_difference, make_case, packed, prompts, save_llama
from test_adapters import torch_base
from test_export import CARD
from tiny_run import write_inputs

from sftrec_jax.cli import main
from sftrec_jax.config import LoraConfig, ModelConfig, TrainConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model.export import export_merged
from sftrec_jax.model.load import TRAINABLE, make_build
from sftrec_jax.model.merge import arrays_of, merged_decoder
from sftrec_jax.model.quantised import STORED, Quantisation, as_qarray, block_size, dense, quantised
from sftrec_jax.model.sharding import named_arrays, with_arrays

KINDS: tuple[Quantisation, ...] = ("int8", "int4", "nf4")


@pytest.mark.parametrize(("kind", "steps"), [("int8", 127.5), ("int4", 7.5)])
@pytest.mark.parametrize("inputs", [256, 48])
def test_rounding_is_within_half_a_step(kind: Quantisation, steps: float, inputs: int) -> None:
    kernel = np.random.default_rng(0).normal(size=(inputs, 40)).astype(np.float32)
    values, scales = quantised(jnp.asarray(kernel), kind)
    block = {256: 64, 48: 48}[inputs]
    assert block_size(inputs) == block and scales.shape == (inputs // block, 40) and values.dtype == STORED[kind]
    found = np.asarray(dense(as_qarray(values, scales, kind), jnp.float32))
    largest = np.abs(kernel.reshape(-1, block, 40)).max(1)
    np.testing.assert_allclose(scales, largest / steps, rtol=1e-5)
    bound = np.repeat(largest / steps, block, axis=0)
    assert (np.abs(found - kernel) <= bound * 0.501).all()


def test_nf4_takes_the_nearest_of_its_sixteen_values() -> None:
    """The values of QLoRA's appendix E."""
    levels = [
        -1.0,
        -0.6962,
        -0.5251,
        -0.3949,
        -0.2844,
        -0.1848,
        -0.0911,
        0.0,
        0.0796,
        0.1609,
        0.2461,
        0.3379,
        0.4407,
        0.5626,
        0.7230,
        1.0,
    ]
    kernel = np.random.default_rng(0).normal(size=(128, 8)).astype(np.float32)
    values, scales = quantised(jnp.asarray(kernel), "nf4")
    found = np.asarray(dense(as_qarray(values, scales, "nf4"), jnp.float32)).reshape(2, 64, 8)
    blocks = kernel.reshape(2, 64, 8)
    largest = np.abs(blocks).max(1, keepdims=True)
    nearest = np.asarray(levels)[np.abs(blocks[..., None] / largest[..., None] - levels).argmin(-1)] * largest
    assert (np.abs(found - nearest) > 1e-3 * largest).mean() < 0.002  # a value halfway between two may go either way


def case_of(base: Path, kind: Quantisation, lora: LoraConfig) -> Any:
    return make_case(base, lora, quantise=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_logits_and_gradients_are_those_of_the_same_values_dense(kind: Quantisation, dora: bool, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", kv_heads=2, tied=True, vocab=512)
    lora = LoraConfig(r=3, alpha=5.0, use_dora=dora, targets=("q_proj", "up_proj"))
    case = case_of(base, kind, lora)
    have = arrays_of(case.decoder)
    plain = make_case(base, lora)
    graphdef, state = nnx.split(plain.decoder)
    values = {}
    for path, array in named_arrays(state).items():
        if f"{path}_scale" in have:
            values[path] = jax.vmap(lambda v, s: dense(as_qarray(v, s, kind), jnp.float32))(have[path], have[f"{path}_scale"])
        else:
            values[path] = have[path]
        assert values[path].shape == array.shape
    other = nnx.merge(graphdef, with_arrays(state, values))
    batch = jax.tree.map(jnp.asarray, packed(prompts(case), 32))
    direction = jnp.asarray(np.random.default_rng(1).normal(size=by_token(case.decoder, batch).shape), jnp.float32)

    def both(decoder: Any) -> tuple[Any, Any]:
        graphdef, trained, frozen = nnx.split(decoder, TRAINABLE, ...)

        def loss(arrays: Any) -> Any:
            model = nnx.merge(graphdef, with_arrays(trained, arrays), frozen)
            return jnp.sum(model.logits(model.packed_hidden(batch))[..., model.head.column_of()] * direction)

        return jax.jit(jax.value_and_grad(loss))(named_arrays(trained))

    (one, ours), (two, theirs) = both(case.decoder), both(other)
    assert float(abs(one - two)) <= 1e-5 * abs(float(two)) + 1e-2
    for path, gradient in theirs.items():
        np.testing.assert_allclose(ours[path], gradient, atol=2e-5 * float(jnp.abs(gradient).max()) + 1e-6, err_msg=path)
    np.testing.assert_allclose(by_token(case.decoder, batch), by_token(other, batch), atol=1e-5)
    # Merged, the base is what it was trained as.
    merged = merged_decoder(case.decoder, case.build)
    np.testing.assert_allclose(arrays_of(merged)["layers/k_proj/kernel"], values["layers/k_proj/kernel"], atol=1e-6)
    export_merged(case.decoder, case.build, case.codes, case.tokenizer, tmp_path / "merged", CARD)
    assert largest_difference(case, torch_base(tmp_path / "merged").eval()) < 1e-4


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.5), ("nf4", 4.5)])
def test_kernels_take_their_bits_and_half_a_bit_of_scales(kind: Quantisation, bits: float, tmp_path: Path) -> None:
    base = save_llama(tmp_path, 2, True, 512, hidden_size=64, head_dim=16, intermediate_size=128)
    arrays = arrays_of(case_of(base, kind, LoraConfig(r=2)).decoder)
    kernels = {path: array for path, array in arrays.items() if path.endswith("/kernel")}
    assert len(kernels) == 7 and all(array.dtype == STORED[kind] for array in kernels.values())
    held = sum(array.size * (8 if kind == "int8" else 4) + 32 * arrays[f"{path}_scale"].size for path, array in kernels.items())
    assert held / sum(array.size for array in kernels.values()) == pytest.approx(bits, abs=0.001)


@pytest.mark.slow
def test_a_run_over_a_base_of_four_bits(tmp_path: Path) -> None:
    """Trains, evaluates, exports and recommends; the loss falls."""
    config, run = write_inputs(tmp_path), tmp_path / "run"
    few = ["--train.max-steps", "8", "--evaluate.users", "6", "--evaluate.unconstrained-users", "2", "--model.quantise", "nf4"]
    assert main(["run", str(config), "--out", str(run), *few]) == 0
    losses = [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert main(["recommend", str(run), "--user", "u03", "--to", str(tmp_path / "out.jsonl")]) == 0


@pytest.mark.parametrize(
    ("model", "train", "lora", "expected"),
    [
        ({}, {"method": "full"}, {}, "method: full"),
        ({"from_scratch": True}, {}, {}, "from_scratch"),
        ({}, {}, {"init": "pissa"}, "pissa"),
    ],
)
def test_what_needs_the_whole_base_is_refused(model: Any, train: Any, lora: Any, expected: str) -> None:
    case = make_case(FIXTURE, None, atomic=False, trained=False)
    with pytest.raises(UserError, match=f"model.quantise is int8, but .*{expected}"):
        make_build(ModelConfig(quantise="int8", **model), LoraConfig(**lora), TrainConfig(**train), case.build.arch, case.codes)
