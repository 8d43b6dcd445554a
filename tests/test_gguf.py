"""GGUF files that the test writes with the `gguf` package, read back as Hugging Face tensors."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import LlamaConfig, LlamaForCausalLM

from sftrec_jax.errors import UserError
from sftrec_jax.model.gguf_file import read_gguf

QTYPE = GGMLQuantizationType
PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def small_model(heads: int = 4, kv_heads: int = 2, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=128, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        return f"blk.{layer}.{PARTS[part]}.weight"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[name[:-7]] + ".weight"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row, as llama.cpp stores them: rows i and i + half of a head become neighbours."""
    size = len(weight) // heads
    order = [h * size + i + half for h in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    return weight[order]


def weights_of(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


def write(path: Path, model: LlamaForCausalLM, kind: QTYPE = QTYPE.F32, architecture: str = "llama", **changes) -> Path:
    """`changes`: `drop` (GGUF tensor names), `add` (name to array), `metadata` (key to uint32 or str), `kv` False: no key."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list(["<unk>", "▁a", "b"] * 16)
    writer.add_token_scores([-1.0] * 48)
    for key, value in changes.get("metadata", {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    tensors = {}
    for name, weight in weights_of(model).items():
        if name.endswith("q_proj.weight"):
            weight = interleave(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = interleave(weight, config.num_key_value_heads)
        tensors[gguf_name(name)] = weight
    for name, weight in (tensors | changes.get("add", {})).items():
        if name in changes.get("drop", ()):
            continue
        stored = QTYPE.F32 if weight.ndim == 1 else kind
        writer.add_tensor(name, quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("heads", "kv_heads", "tied"), [(4, 2, True), (4, 4, False), (2, 1, True)])
def test_round_trip_is_exact(tmp_path, heads, kv_heads, tied):
    model = small_model(heads, kv_heads, tied)
    read = read_gguf(write(tmp_path / "m.gguf", model))
    expected = weights_of(model)
    assert sorted(read.tensor_names()) == sorted(expected)
    for name in read.tensor_names():
        value = read.tensor(name)
        assert value.dtype == np.float32 and value.flags.c_contiguous and value.flags.writeable
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_config_gives_the_same_logits_in_transformers(tmp_path):
    model = small_model()
    read = read_gguf(write(tmp_path / "m.gguf", model))
    assert read.config["rms_norm_eps"] == 1e-5 and read.config["rope_theta"] == 50000.0
    assert (read.config["bos_token_id"], read.config["eos_token_id"]) == (1, 2)
    again = LlamaForCausalLM(LlamaConfig.from_dict(read.config))
    state = {name: torch.from_numpy(read.tensor(name)) for name in read.tensor_names()}
    again.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens).logits, model.eval()(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [QTYPE.F16, QTYPE.BF16, QTYPE.Q8_0, QTYPE.Q4_1])
def test_quantised(tmp_path, kind):
    model = small_model()
    read = read_gguf(write(tmp_path / "m.gguf", model, kind))
    for name, weight in weights_of(model).items():
        stored = QTYPE.F32 if weight.ndim == 1 else kind
        # Blocks lie within a row, so the order of rows and quantisation commute.
        np.testing.assert_array_equal(read.tensor(name), dequantize(quantize(weight, stored), stored), err_msg=name)


def test_f16_and_q4_1_by_hand(tmp_path):
    model = small_model()
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.copy_(torch.arange(64).repeat(96, 1) % 16 * 0.5 - 2)  # 16 even steps: Q4_1 holds them exactly
    for kind in (QTYPE.F16, QTYPE.Q4_1):
        read = read_gguf(write(tmp_path / f"{kind.name}.gguf", model, kind))
        np.testing.assert_array_equal(read.tensor("model.layers.0.mlp.up_proj.weight"), weight.detach().numpy())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "qwen2"}, ["qwen2", "not supported", "Hugging Face folder"]),
        ({"drop": ["blk.1.ffn_up.weight"]}, ["1 tensors", "blk.1.ffn_up.weight"]),
        ({"drop": ["token_embd.weight"]}, ["token_embd.weight"]),
        ({"add": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, ["blk.0.attn_q.bias", "no place"]),
        ({"add": {"blk.0.ffn_up.weight": np.zeros((64, 96), np.float32)}}, ["blk.0.ffn_up.weight", "(64, 96)", "(96, 64)"]),
        ({"metadata": {"llama.expert_count": 8}}, ["mixture-of-experts"]),
        ({"metadata": {"llama.rope.dimension_count": 8}}, ["16", "8 rotated"]),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, ["yarn"]),
        ({"add": {"rope_freqs.weight": np.linspace(1, 5, 8, dtype=np.float32)}}, ["rope_freqs.weight"]),
    ],
)
def test_refused(tmp_path, changes, words):
    path = write(tmp_path / "m.gguf", small_model(), **changes)
    with pytest.raises(UserError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(word in message for word in words), message


def test_llama3_rope_divisors_are_recognised(tmp_path):
    scaling = {
        "rope_type": "llama3", "rope_theta": 50000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = small_model()
    config = LlamaConfig(**model.config.to_dict() | {"rope_parameters": scaling, "max_position_embeddings": 131072})
    plain = 50000.0 ** -(np.arange(0, 16, 2) / 16)
    divisors = (plain / LlamaForCausalLM(config).model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert divisors.max() == pytest.approx(32) and divisors.min() == pytest.approx(1)
    read = read_gguf(write(tmp_path / "m.gguf", model, add={"rope_freqs.weight": divisors}))
    found = read.config["rope_scaling"]
    assert found["factor"] == pytest.approx(32, rel=1e-5)
    assert found | {"factor": 32.0} == {key: value for key, value in scaling.items() if key != "rope_theta"}


def test_truncated_or_corrupt_never_escapes(tmp_path):
    """Any cut raises UserError; any flipped bit of the header does too, or leaves a file that reads in full."""
    whole = write(tmp_path / "m.gguf", small_model()).read_bytes()
    damaged = tmp_path / "damaged.gguf"
    rng = random.Random(0)
    for length in [0, 1, 4, 7, 24, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(60))]:
        damaged.write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_gguf(damaged)
    header = len(whole) - sum(weight.nbytes for weight in weights_of(small_model()).values())
    refused = 0
    for _ in range(400):
        position = rng.randrange(header)
        damaged.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << rng.randrange(8)]) + whole[position + 1 :])
        try:
            read = read_gguf(damaged)
            for name in read.tensor_names():
                read.tensor(name)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


def test_missing_and_foreign(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("not a model, but long enough to have a header")
    with pytest.raises(UserError, match="does not begin with GGUF"):
        read_gguf(tmp_path / "text.gguf")
    read = read_gguf(write(tmp_path / "m.gguf", small_model()))
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:-1000])
    with pytest.raises(UserError, match="changed"):
        [read.tensor(name) for name in read.tensor_names()]
