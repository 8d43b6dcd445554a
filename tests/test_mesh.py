"""Meshes: which are refused and what is offered instead, and which one `auto` takes."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from sftrec_jax.config import ItemsConfig, LoraConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from sftrec_jax.config_file import parse_config
from sftrec_jax.errors import UserError
from sftrec_jax.model.chips import CHIPS
from sftrec_jax.model.hf_config import parse_architecture
from sftrec_jax.model.memory import assumed_build, choose_mesh, parameters, step_memory
from sftrec_jax.model.mesh import all_sizes, check_mesh, make_mesh, obstacle
from sftrec_jax.model.sharding import AXES, LOGICAL, RULES, spec_for, spec_of
from sftrec_jax.overrides import overridden

TINY: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True,
}  # fmt: skip
ARCH = parse_architecture(TINY, "test")
BIG = parse_architecture(
    TINY | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 4096, "tie_word_embeddings": False}, "test"
)  # fmt: skip


def mesh(*sizes: int) -> Any:
    return AbstractMesh(sizes, AXES)


@pytest.mark.parametrize(
    ("sizes", "train", "text", "near"),
    [
        ((8, 1, 1, 1), TrainConfig(batch_rows=6), "batch_rows is 6, which data x fsdp = 8 DIVIDE; use 8 or", (2, 1, 1, 4)),
        ((1, 1, 1, 8), TrainConfig(batch_rows=8), "4 kv-heads, which tensor x context = 8 DIVIDE; use", (2, 1, 1, 4)),
        ((1, 1, 2, 4), TrainConfig(batch_rows=8), "4 kv-heads, which tensor x context = 8 DIVIDE; use", (2, 1, 1, 4)),
        ((2, 1, 4, 1), TrainConfig(row_length=510), "row_length is 510, which context = 4 DIVIDE; use 512 or", (4, 1, 2, 1)),
        ((1, 16, 1, 1), TrainConfig(batch_rows=24), "batch_rows is 24, which data x fsdp = 16 DIVIDE; use 32 or", (1, 8, 1, 2)),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(
    sizes: tuple[int, ...], train: TrainConfig, text: str, near: tuple[int, ...]
) -> None:
    with pytest.raises(UserError) as raised:
        check_mesh(mesh(*sizes), ARCH, train)
    said, _, offered = str(raised.value).partition(" the nearest mesh that works: ")
    assert said.endswith(text.replace("DIVIDE", "devices cannot divide")) and [
        int(part.split()[1]) for part in offered.split(", ")
    ] == list(near)
    check_mesh(mesh(*near), ARCH, train)


def test_a_mesh_for_which_there_is_no_other() -> None:
    with pytest.raises(UserError, match=r"no other mesh of 7 devices works"):
        check_mesh(mesh(7, 1, 1, 1), ARCH, TrainConfig(batch_rows=4))
    check_mesh(mesh(7, 1, 1, 1), ARCH)  # without a batch to divide


def test_all_sizes_are_every_way_to_divide() -> None:
    sizes = [tuple(s[a] for a in AXES) for s in all_sizes(8)]
    assert len(sizes) == len(set(sizes)) == 20  # three twos among four axes
    assert all(a * b * c * d == 8 for a, b, c, d in sizes)


def test_every_rule_names_logical_axes_and_none_collide() -> None:
    for pattern, logical in RULES:
        assert all(name in LOGICAL for name in logical), pattern
        spec_of(*logical)
    with pytest.raises(ValueError, match="collide"):
        spec_of("heads", "ffw")
    assert spec_for("layers/down_proj/kernel") == PartitionSpec(None, "tensor", "fsdp")


def chips(kind: str, count: int) -> list[Any]:
    return [SimpleNamespace(device_kind=kind, platform="tpu", memory_stats=dict, id=i) for i in range(count)]


CONFIG = RunConfig(
    items=ItemsConfig(tokenizer="rqkmeans"), lora=LoraConfig(r=16), model=ModelConfig(compute_dtype="bfloat16"),
    train=TrainConfig(row_length=2048, batch_rows=32), mesh=MeshConfig(auto=True),
)  # fmt: skip


def test_auto_divides_parameters_no_more_than_it_must() -> None:
    small, why = choose_mesh(CONFIG, ARCH, 1000, chips("TPU v5 lite", 16), "tpu")
    assert (small.data, small.fsdp, small.context, small.tensor) == (16, 1, 1, 1) and "GB a device" in why
    large, _ = choose_mesh(CONFIG, BIG, 1000, chips("TPU v5 lite", 16), "tpu")
    assert large.fsdp > 1 and large.context == large.tensor == 1
    roomy, _ = choose_mesh(CONFIG, BIG, 1000, chips("TPU v5", 16), "tpu")
    assert roomy.fsdp == 1  # 95 GB hold it whole
    few = dataclasses.replace(CONFIG, train=TrainConfig(row_length=2048, batch_rows=4))
    heads, _ = choose_mesh(few, BIG, 1000, chips("TPU v5 lite", 16), "tpu")
    assert heads.data * heads.fsdp == 4 and heads.tensor == 4


def test_auto_says_when_nothing_holds_a_step() -> None:
    with pytest.raises(UserError, match=r"no mesh of 1 devices holds a step: the best, .* takes [\d.]+ GB of 16.0 GB"):
        choose_mesh(CONFIG, BIG, 1000, chips("TPU v5 lite", 1), "tpu")
    with pytest.raises(UserError, match="no mesh of 7 devices divides"):
        choose_mesh(CONFIG, BIG, 1000, chips("TPU v5 lite", 7), "tpu")


def test_the_count_falls_with_every_axis_that_divides() -> None:
    build = assumed_build(CONFIG, BIG, 1024, mesh(1, 1, 1, 1), CHIPS["TPU v5 lite"].hbm_bytes, "tpu")
    arrays = parameters(build, "lora")
    one, fsdp, tensor, context = (
        step_memory(build, arrays, dict(zip(AXES, sizes, strict=True)), 32, 2048)
        for sizes in ((1, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8), (1, 1, 8, 1))
    )
    assert fsdp.weights == pytest.approx(one.weights / 8, rel=0.01) == pytest.approx(tensor.weights, rel=0.01)
    assert context.weights == one.weights and context.activations == pytest.approx(one.activations / 8, rel=0.01)
    # bfloat16 weights of 8.2 billion parameters, and norms
    assert one.weights == pytest.approx(2 * 8.19e9, rel=0.01)


def test_auto_in_a_file_and_on_the_command_line() -> None:
    assert parse_config({"mesh": "auto"}, "test").mesh == MeshConfig(auto=True)
    divided = RunConfig(mesh=MeshConfig(fsdp=4))
    for words in (["--mesh", "auto"], ["--mesh=auto"]):
        assert overridden(divided, words).mesh == MeshConfig(auto=True)
    assert overridden(RunConfig(mesh=MeshConfig(auto=True)), ["--mesh.fsdp", "4"]).mesh == MeshConfig(fsdp=4)
    with pytest.raises(UserError, match="leave one of the two out"):
        MeshConfig(fsdp=2, auto=True)


def test_one_device_meets_no_obstacle() -> None:
    assert obstacle(dict.fromkeys(AXES, 1), ARCH, TrainConfig(batch_rows=1)) is None
    assert make_mesh(MeshConfig(), jax.devices()[:1]).axis_names == AXES
