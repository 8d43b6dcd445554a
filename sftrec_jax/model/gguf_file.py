"""A GGUF file of the Llama architecture, seen as a Hugging Face checkpoint: config values and float32 tensors.

Names and metadata keys: the GGUF specification of the ggml project. Quantised blocks are decoded by `gguf.quants`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from sftrec_jax.errors import UserError
from sftrec_jax.model.gguf_header import GgufHeader, TensorInfo, read_header

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1 and later: what each RoPE frequency is divided by


@dataclass(frozen=True)
class GgufModel:
    """Hugging Face view of a GGUF file. Tensors are read and dequantised one at a time, when asked for."""

    path: Path
    config: dict[str, Any]
    """The values of a Hugging Face Llama `config.json`."""
    infos: dict[str, TensorInfo]
    """Tensors by Hugging Face name."""

    def tensor_names(self) -> list[str]:
        """Hugging Face names of all tensors; `lm_head.weight` is among them only when the head is untied."""
        return list(self.infos)

    def tensor(self, name: str) -> np.ndarray:
        """The tensor of that Hugging Face name: float32, C order, shape as in transformers (weights are (out, in)).

        Query and key rows are brought from interleaved RoPE pairs to the two halves that Hugging Face rotates.
        Raises KeyError for an unknown name, UserError when the storage type cannot be decoded or the file changed.
        """
        info = self.infos[name]
        value = _read(self.path, info)
        if name.endswith("self_attn.q_proj.weight"):
            return _rotate_half_rows(value, self.config["num_attention_heads"])
        if name.endswith("self_attn.k_proj.weight"):
            return _rotate_half_rows(value, self.config["num_key_value_heads"])
        return value


def read_gguf(path: str | Path) -> GgufModel:
    """Opens a GGUF file and checks it in full, without reading the tensors' values.

    Raises UserError when the file is damaged, of another architecture than Llama, or has tensors missing, left over or
    of the wrong shape.
    """
    path = Path(path)
    header = read_header(path)
    with np.errstate(all="ignore"):  # numbers without sense are refused, or fit nothing
        config = _config(path, header)
    shapes = _expected_shapes(config)
    missing = [_gguf_name(name) for name in shapes if _gguf_name(name) not in header.tensors]
    if missing:
        raise UserError(f"{path}: {len(missing)} tensors of a Llama model are missing, first {missing[0]}; fetch the file again")
    infos = {name: header.tensors[_gguf_name(name)] for name in shapes}
    known = {info.name for info in infos.values()} | {_ROPE_FACTORS}
    extra = [name for name in header.tensors if name not in known]
    if extra:
        raise UserError(
            f"{path}: {len(extra)} tensors have no place in a Llama model, first {extra[0]}; use a Hugging Face folder instead"
        )
    for name, info in infos.items():
        if info.shape != shapes[name]:
            raise UserError(
                f"{path}: {info.name} has shape {info.shape}, metadata says {shapes[name]}; use an unmodified GGUF file"
            )
    return GgufModel(path, config, infos)


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_LAYER[part]}.weight"


def _rotate_half_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows, columns)


def _read(path: Path, info: TensorInfo) -> np.ndarray:
    try:
        raw = np.fromfile(path, dtype=np.uint8, count=info.n_bytes, offset=info.offset)
    except OSError as error:
        raise UserError(f"{path}: cannot read the GGUF file ({error.strerror}); it was there when the run started") from None
    if raw.size != info.n_bytes:
        raise UserError(f"{path}: {info.name} is cut short; the file changed while it was read, fetch it again")
    rows = math.prod(info.shape[:-1])
    try:
        with np.errstate(all="ignore"):  # NaN and infinite values are refused where tensors are taken
            value = dequantize(raw.reshape(rows, -1), info.type)
    except NotImplementedError:
        raise UserError(
            f"{path}: {info.name} is stored as {info.type.name}, which the gguf package cannot decode; use F16, Q8_0 or Q4_K"
        ) from None
    return np.ascontiguousarray(value, dtype=np.float32).reshape(info.shape)


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{part}.weight": shape for part, shape in layer.items()}
    return shapes


def _config(path: Path, header: GgufHeader) -> dict[str, Any]:
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: GGUF architecture {architecture!r} is not supported, only 'llama'; use a Hugging Face folder")

    def number(key: str, default: int | float | None = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # some writers give one number a layer
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path}: GGUF metadata llama.{key} is {value!r}, expected one number; use a Hugging Face folder")
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{path}: GGUF metadata llama.{key} is {value}, expected a positive number; fetch the file again")
        return value

    def count(key: str, default: int | None = None) -> int:
        value = number(key, default)
        if not isinstance(value, int):
            raise UserError(f"{path}: GGUF metadata llama.{key} is {value}, expected a whole number; fetch the file again")
        return value

    if metadata.get("llama.expert_count", 0):
        raise UserError(f"{path}: mixture-of-experts GGUF files are not supported; use a dense Llama model")
    if "token_embd.weight" not in header.tensors:
        raise UserError(f"{path}: the tensor token_embd.weight is missing; name a GGUF file with a whole language model")

    hidden, heads = count("embedding_length"), count("attention.head_count")
    head_dim = count("attention.key_length", hidden // heads)
    rotated = count("rope.dimension_count", head_dim)
    if rotated != head_dim or head_dim % 2 or count("attention.value_length", head_dim) != head_dim:
        raise UserError(
            f"{path}: heads of {head_dim} with {rotated} rotated dimensions are not supported; use a Hugging Face folder"
        )
    layers, kv_heads = count("block_count"), count("attention.head_count_kv", heads)
    if layers > len(header.tensors) or heads % kv_heads:
        raise UserError(
            f"{path}: {layers} layers and {heads} heads over {kv_heads} key heads do not fit the tensors; fetch the file again"
        )
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": count("context_length"),
        "rope_theta": float(number("rope.freq_base", 10000.0)),
        "rms_norm_eps": _short_float(number("attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": False,
        "mlp_bias": False,
    }
    for name in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[f"{name}_token_id"] = token
    scaling = _rope_scaling(path, header, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _short_float(value: float) -> float:
    """The shortest decimal that has this float32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(path: Path, header: GgufHeader, config: dict[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of config.json, or None. Refuses what Hugging Face's `linear` and `llama3` types cannot express."""
    kind = header.metadata.get("llama.rope.scaling.type", "none")
    factor = header.metadata.get("llama.rope.scaling.factor", header.metadata.get("llama.rope.scale_linear", 1.0))
    info = header.tensors.get(_ROPE_FACTORS)
    if info is not None:
        return _llama3_scaling(path, _read(path, info), config)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not (math.isfinite(factor) and factor > 0):
        raise UserError(
            f"{path}: GGUF metadata llama.rope.scaling.factor is {factor!r}, expected a positive number; fetch it again"
        )
    if kind == "linear" or (kind == "none" and factor != 1.0):
        return {"rope_type": "linear", "factor": float(factor)}
    if kind != "none":
        raise UserError(f"{path}: RoPE scaling {kind!r} in GGUF is not supported; use the model's Hugging Face folder")
    return None


def _llama3_scaling(path: Path, factors: np.ndarray, config: dict[str, Any]) -> dict[str, Any]:
    """Names the parameters behind per-frequency divisors, after checking that they give these divisors.

    GGUF keeps the divisors alone. Every released Llama 3.1 to 3.3 uses low 1, high 4 and 8192 original positions.
    """
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    dims = np.arange(0, config["head_dim"], 2, dtype=np.float64)
    turns = original / (2 * np.pi * config["rope_theta"] ** (dims / config["head_dim"]))  # full turns within `original`
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not math.isfinite(factor) or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(f"{path}: {_ROPE_FACTORS} does not match Llama 3's RoPE scaling; use the model's Hugging Face folder")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
