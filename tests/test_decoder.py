"""The decoder against transformers on torch, for the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sftrec_jax.config import MeshConfig
from sftrec_jax.data.segments import PackedBatch
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.hub import BaseSource, resolve_base
from sftrec_jax.model.load import Build, load_decoder, source_architecture
from sftrec_jax.model.mesh import make_mesh
from sftrec_jax.model.tensor_files import open_tensors

FIXTURE = Path(__file__).parent / "fixtures" / "stories260k"


def no_codes() -> ItemCodes:
    return ItemCodes(np.array([[5], [6]], np.int32), (), np.zeros(0, np.int32), (), np.array(["a", "b"], object))


def source_of(folder: Path) -> BaseSource:
    return BaseSource(folder=folder, gguf=None, tokenizer=folder, label=str(folder))


def packed(lengths: list[list[int]], row: int, vocab: int, seed: int = 0) -> PackedBatch:
    """Random tokens; each inner list gives the lengths of the segments of one row, the rest is padding."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), row)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    for b, parts in enumerate(lengths):
        at = 0
        for s, n in enumerate(parts, start=1):
            tokens[b, at : at + n] = rng.integers(0, vocab, n)
            positions[b, at : at + n] = np.arange(n)
            segments[b, at : at + n] = s
            at += n
    targets = np.zeros((shape[0], 1), np.int32)
    return PackedBatch(
        tokens, positions, segments, np.zeros_like(tokens), positions + 1, targets, targets, targets.astype(np.float32)
    )


ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}


@pytest.mark.parametrize(
    ("kv_heads", "tied", "rope", "head_dim"),
    [(1, True, "default", 16), (2, False, "llama3", 8), (4, True, "linear", 16), (2, True, "llama3", 32)],
)
def test_logits_equal_transformers(tmp_path: Path, kv_heads: int, tied: bool, rope: str, head_dim: int) -> None:
    torch.manual_seed(kv_heads)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=64, rope_parameters=ROPE[rope], tie_word_embeddings=tied, rms_norm_eps=1e-5,
        initializer_range=0.3,
    )  # fmt: skip
    reference = LlamaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path, max_shard_size="40KB" if kv_heads == 2 else "5GB")
    check_against(reference, source_of(tmp_path))


def test_logits_of_pretrained_weights_equal_transformers() -> None:
    check_against(LlamaForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32).eval(), source_of(FIXTURE))


def test_old_rope_layout_is_read(tmp_path: Path) -> None:
    """Before transformers 5 rope_theta stood at the top level; ignoring it would be silently wrong."""
    config = json.loads((FIXTURE / "config.json").read_text())
    config.pop("rope_parameters", None)
    config["rope_theta"] = 123.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert source_architecture(source_of(tmp_path)).rope_theta == 123.0


def check_against(reference: LlamaForCausalLM, source: BaseSource) -> None:
    arch = source_architecture(source)
    build = Build(arch, None, (), jnp.dtype(jnp.float32), jnp.dtype(jnp.float32), "full")
    decoder = load_decoder(build, source, no_codes(), make_mesh(MeshConfig()), 0, False)
    batch = packed([[7, 11, 3], [20], [1, 2]], 24, arch.vocab_size)
    ours = np.asarray(jax.jit(lambda b: decoder.logits(decoder.packed_hidden(b)))(batch))
    largest = 0.0
    for b in range(3):
        for s in range(1, batch.segments[b].max() + 1):
            inside = batch.segments[b] == s
            with torch.no_grad():
                theirs = reference(torch.tensor(batch.tokens[b][inside][None]).long()).logits[0].numpy()
            largest = max(largest, float(np.abs(ours[b][inside] - theirs).max()))
            assert theirs.std() > 0.1  # the comparison is of logits that differ from one another
    print(f"largest logit difference {largest:.2e}")
    assert largest < 1e-4


@pytest.mark.weights
def test_logits_of_smollm2_equal_transformers() -> None:
    """The same dequantised tensors in both; logits reach 34, so 1e-4 is 3e-6 of them.

    In a process of its own, with XLA's plain products on CPU: through YNNPACK, the default of jax 0.10, the difference is
    2.6e-4 (against float64: 2.5e-4, without it 8e-5, torch 6e-5).
    """
    flags = {"XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import test_decoder; test_decoder.compare_smollm2()"]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compare_smollm2() -> None:
    source = resolve_base("smollm2-135m")
    arch = source_architecture(source)
    tensors = open_tensors(source.gguf or source.folder)
    reference = LlamaForCausalLM(LlamaConfig(**arch.raw_config)).eval()
    weights = {name: torch.from_numpy(np.array(tensors.read(name, (slice(None),)))) for name in tensors.where}
    missing = reference.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
    reference.tie_weights()
    check_against(reference, source)
