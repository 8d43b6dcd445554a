"""Every family against transformers on torch: logits, round trips of files, exports, searches."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from family_models import FAMILIES, family_model, save_family
from helpers import by_token, largest_difference, make_case, packed, python_block, source_of
from safetensors.torch import load_file
from test_export import CARD, LORA

from sftrec_jax.errors import UserError
from sftrec_jax.model.export import export_merged
from sftrec_jax.model.load import source_architecture
from sftrec_jax.model.peft_write import export_adapter

# peft 0.21 asks transformers 5.23 for a name that it renamed; this can go once peft asks for the new one.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def rows(vocab: int) -> list[list[np.ndarray]]:
    """Packed rows and padded ones, with segments much longer than the windows."""
    rng = np.random.default_rng(1)
    return [[rng.integers(3, vocab, n).astype(np.int32) for n in lengths] for lengths in ([9, 20], [31], [1, 2, 14])]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = save_family(name, tmp_path, vocab=512)
    case = make_case(tmp_path, None, atomic=False, trained=False)
    parts = rows(512)
    ours = by_token(case.decoder, packed(parts, 32))
    largest = 0.0
    for b, segments in enumerate(parts):
        at = 0
        for part in segments:
            with torch.no_grad():
                theirs = reference(torch.tensor(part[None]).long()).logits[0].numpy()
            assert theirs.std() > 0.1  # logits that differ from one another are compared
            largest = max(largest, float(np.abs(ours[b, at : at + len(part)] - theirs).max()))
            at += len(part)
    print(f"{name}: largest logit difference {largest:.1e}")
    assert largest < 1e-4


@pytest.mark.parametrize("name", ["mistral", "smollm3", "qwen3", "gemma2", "gemma3"])
def test_padded_batches_equal_transformers(name: str, tmp_path: Path) -> None:
    """Rows of one segment each, padded on the right, against torch's batch with its mask of padding."""
    reference = save_family(name, tmp_path, vocab=512)
    case = make_case(tmp_path, None, atomic=False, trained=False)
    parts = [segments[-1:] for segments in rows(512)]
    ours = by_token(case.decoder, packed(parts, 32))
    tokens, real = np.zeros((3, 32), np.int64), np.zeros((3, 32), np.int64)
    for b, (part,) in enumerate(parts):
        tokens[b, : len(part)], real[b, : len(part)] = part, 1
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens), attention_mask=torch.tensor(real)).logits.numpy()
    assert np.abs(ours - theirs)[real > 0].max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama, biases", "mistral", "smollm3", "qwen2", "qwen3", "gemma2, untied", "gemma3"])
def test_files_come_back_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_family(name, tmp_path / "base", 512, dtype, "100KB" if dtype == torch.float32 else "5GB")
    case = make_case(tmp_path / "base", None, atomic=False, trained=False)
    kind = "float32" if dtype == torch.float32 else "bfloat16"
    out = export_merged(case.decoder, case.build, case.codes, case.tokenizer, tmp_path / "out", CARD, dtype=kind).folder
    ours, theirs = tensors(out), tensors(tmp_path / "base")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == dtype and torch.equal(ours[key], value), key
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "base", out))
    for config in (first, second):
        for key in ("dtype", "torch_dtype", "transformers_version"):
            config.pop(key, None)
    assert first == second


def tensors(folder: Path) -> dict[str, Any]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize("name", ["mistral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_trained_models_load_elsewhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged by transformers and as an adapter by peft, with the lines of their README, new item tokens and all."""
    save_family(name, tmp_path / "base", 512)
    case = make_case(tmp_path / "base", LORA)
    report = export_merged(case.decoder, case.build, case.codes, case.tokenizer, tmp_path / "out", CARD)
    assert report.merge_change is not None and report.merge_change < 1e-4
    other = export_adapter(case.decoder, case.build, case.codes, case.tokenizer, str(case.base), tmp_path / "adapter", CARD)
    for folder in (report.folder, other.folder):
        monkeypatch.chdir(folder)
        names: dict[str, Any] = {}
        exec(python_block(folder / "README.md"), names)
        assert largest_difference(case, names["model"]) < 1e-4


REFUSED = {
    "phi": ({"model_type": "phi3"}, "phi3.*use a model of llama, mistral"),
    "multimodal": ({"model_type": "gemma3"}, "gemma3.*text"),
    "rope": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope.*llama3"),
    "part of a head": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised.*unquantised"),
    "activation": ({"hidden_act": "relu"}, "relu.*silu"),
    "both ways": ({"use_bidirectional_attention": True}, "bidirectional"),
    "heads": ({"num_key_value_heads": 3}, "4 heads.*3"),
    "layers": (
        {"model_type": "qwen3", "sliding_window": 5, "use_sliding_window": True, "layer_types": ["sliding_attention"]},
        "num_hidden_layers.*1 ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_costs_one_line(name: str, tmp_path: Path) -> None:
    changes, expected = REFUSED[name]
    config = family_model("llama, biases").config.to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=expected) as error:
        source_architecture(source_of(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_configs_of_transformers_4_read_the_same(tmp_path: Path) -> None:
    """Gemma 3 had rope_theta, rope_local_base_freq and sliding_window_pattern at the top level, and no tie_word_embeddings."""
    old = {
        "model_type": "gemma3_text", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 7, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 97, "rope_theta": 1e6, "rope_local_base_freq": 123.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 5, "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(old))
    arch = source_architecture(source_of(tmp_path))
    assert arch.tied and arch.sliding == (True,) * 5 + (False, True) and arch.local_rope_theta == 123.0
    assert arch.rope_theta == 1e6 and arch.rope_scaling is not None and arch.rope_scaling.factor == 8.0
    assert jax.tree.leaves(arch.embed_scale)[0] == pytest.approx(48**0.5)
