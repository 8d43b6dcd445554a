"""What a `config.json` in Hugging Face format says of a decoder: one reader for all families, one entry each for what differs.

Keys that a file leaves out have the defaults of transformers' configuration classes.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftrec_jax.errors import UserError
from sftrec_jax.model.architecture import Activation, Architecture, RopeScaling

QKV = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
MOST_LAYERS = 10_000
SLIDING = "sliding_attention"


def _nothing(config: dict[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """What sets a `model_type` apart."""

    hf_class: str
    """Class of transformers, `architectures` of an exported config."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Of keys that config.json may leave out."""
    more: Callable[[dict[str, Any]], dict[str, Any]] = _nothing
    """Fields of the architecture beyond Llama's, from the config with its defaults."""


def _layer_types(config: dict[str, Any], sliding: Callable[[int], bool]) -> tuple[bool, ...]:
    given = config.get("layer_types")
    if given is not None:
        return tuple(kind == SLIDING for kind in given)
    return tuple(sliding(i) for i in range(int(config["num_hidden_layers"])))


def _attention_bias(config: dict[str, Any]) -> tuple[str, ...]:
    return (*QKV, "o_proj") if config.get("attention_bias") else ()


def _llama(config: dict[str, Any]) -> dict[str, Any]:
    return {"biases": (*_attention_bias(config), *(MLP if config.get("mlp_bias") else ()))}


def _mistral(config: dict[str, Any]) -> dict[str, Any]:
    return {"window": config["sliding_window"], "sliding": (True,) * int(config["num_hidden_layers"])}


def _smollm3(config: dict[str, Any]) -> dict[str, Any]:
    layers, every = int(config["num_hidden_layers"]), int(config["no_rope_layer_interval"])
    rotated = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    return _llama(config) | {
        "unrotated": tuple(not r for r in rotated[:layers]),
        "window": config.get("sliding_window") if config.get("use_sliding_window") else None,
        "sliding": _layer_types(config, lambda i: not rotated[i]),
    }


def _qwen_window(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "window": config["sliding_window"] if config.get("use_sliding_window") else None,
        "sliding": _layer_types(config, lambda i: i >= int(config["max_window_layers"])),
    }


def _qwen2(config: dict[str, Any]) -> dict[str, Any]:
    return {"biases": QKV, **_qwen_window(config)}


def _qwen3(config: dict[str, Any]) -> dict[str, Any]:
    return {"biases": _attention_bias(config), "qk_norm": True, **_qwen_window(config)}


def _gemma(config: dict[str, Any], sliding: Callable[[int], bool]) -> dict[str, Any]:
    return {
        "biases": _attention_bias(config),
        "norms_after": True,
        "unit_norms": True,
        "embed_scale": math.sqrt(int(config["hidden_size"])),
        "query_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "softcap": config["attn_logit_softcapping"],
        "final_softcap": config["final_logit_softcapping"],
        "window": config["sliding_window"],
        "sliding": _layer_types(config, sliding),
    }


def _gemma2(config: dict[str, Any]) -> dict[str, Any]:
    return _gemma(config, lambda i: i % 2 == 0)


def _gemma3(config: dict[str, Any]) -> dict[str, Any]:
    nested = (config.get("rope_parameters") or {}).get(SLIDING) or {}
    theta = nested.get("rope_theta", config.get("rope_local_base_freq", 10_000.0))
    every = int(config["sliding_window_pattern"])
    return _gemma(config, lambda i: (i + 1) % every != 0) | {"qk_norm": True, "local_rope_theta": float(theta)}


GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048}, _llama),
    "mistral": Family("MistralForCausalLM", {"sliding_window": 4096, "max_position_embeddings": 131_072}, _mistral),
    "smollm3": Family(
        "SmolLM3ForCausalLM", {"rope_theta": 2_000_000.0, "tie_word_embeddings": True, "no_rope_layer_interval": 4}, _smollm3
    ),
    "qwen2": Family("Qwen2ForCausalLM", {"sliding_window": 4096, "max_window_layers": 28}, _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", {"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28}, _qwen3),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192},
        _gemma2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **GEMMA,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_theta": 1_000_000.0,
            "sliding_window_pattern": 6,
            "max_position_embeddings": 131_072,
        },
        _gemma3,
    ),
}
ELSEWHERE = {"gemma3": "a text-only one, such as google/gemma-3-1b-it", "mixtral": "a dense one, such as Mistral-7B"}


def _rope(config: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of layers that see everything."""
    # transformers 5 moved rope_theta and rope_scaling into rope_parameters, by layer type in Gemma 3; files of all kinds exist.
    parameters = config.get("rope_parameters") or {}
    local = parameters.get(SLIDING) or {}
    if local.get("rope_type", "default") != "default":
        raise UserError(f"{where}: rope_type {local['rope_type']!r} of {SLIDING} is not supported; use a model with default")
    parameters = parameters.get("full_attention") or parameters
    scaling = dict(config.get("rope_scaling") or {}) or dict(parameters)
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if float(scaling.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported; use a model that rotates whole heads")
    # `dynamic` changes frequencies for sequences beyond the context only, and prompts are cut to it.
    if kind in ("default", "dynamic"):
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(
            f"{where}: rope_type {kind!r} is not supported; use a model with rope_type default, dynamic, linear, llama3 or yarn"
        )
    factor = float(scaling["factor"])
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    original = int(original or config["max_position_embeddings"])
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        return theta, RopeScaling("llama3", factor, low, high, original)
    return theta, RopeScaling(
        "yarn",
        factor,
        original_context=original,
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        truncate=bool(scaling.get("truncate", True)),
        attention_factor=_yarn_attention(scaling, factor),
    )


def _yarn_attention(scaling: dict[str, Any], factor: float) -> float:
    """0.1 ln(factor) + 1 where nothing else is given; DeepSeek's models give two multipliers of the logarithm."""

    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(above) / grown(below) if above and below else grown(1.0)


def _check(config: dict[str, Any], where: str) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        instead = ELSEWHERE.get(str(kind), f"a model of {', '.join(FAMILIES)}")
        raise UserError(f"{where}: model_type {kind!r} is not supported; use {instead}")
    if config.get("quantization_config"):
        raise UserError(f"{where}: the checkpoint is quantised; use the unquantised model of the same name")
    if config.get("use_bidirectional_attention"):
        raise UserError(f"{where}: use_bidirectional_attention is true; use a model that reads from left to right")


def parse_architecture(config: dict[str, Any], where: str) -> Architecture:
    """Reads the dictionary of a Hugging Face `config.json` of a model_type in `FAMILIES`.

    Raises UserError, naming `where`, for another model type, rope type or activation, a quantised checkpoint, or a missing size.
    """
    _check(config, where)
    raw = json.dumps(config, sort_keys=True)
    family = FAMILIES[config["model_type"]]
    config = {"max_position_embeddings": 32_768, **family.defaults, **config}
    act = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act {act!r} is not supported; use a model with {', '.join(ACTIVATIONS)}")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        if not 1 <= int(config["num_hidden_layers"]) <= MOST_LAYERS:
            raise UserError(
                f"{where}: num_hidden_layers is {config['num_hidden_layers']}; from 1 to {MOST_LAYERS:,} are supported"
            )
        theta, scaling = _rope(config, where)
        context = int(config["max_position_embeddings"])
        more = family.more(config)
        # A window as wide as the context hides nothing.
        if not more.get("window") or int(more["window"]) >= context or not any(more["sliding"]):
            more |= {"window": None, "sliding": () if "local_rope_theta" not in more else more["sliding"]}
        if not any(more.get("unrotated", ())):
            more["unrotated"] = ()
        architecture = Architecture(
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden,
            ffw_size=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            context=context,
            rope_theta=theta,
            rms_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied=bool(config.get("tie_word_embeddings", False)),
            rope_scaling=scaling,
            family=config["model_type"],
            activation=ACTIVATIONS[act],
            raw=raw,
            **more,
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing; a Hugging Face config.json of {family.hf_class} has it") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
        raise UserError(
            f"{where}: a value is not what {family.hf_class} needs ({error}); copy the model's config.json again"
        ) from None
    sizes = (architecture.heads, architecture.kv_heads, architecture.head_dim, architecture.vocab_size)
    if min(sizes) < 1 or not math.isfinite(theta):
        raise UserError(f"{where}: sizes must be positive; copy the model's config.json again")
    if architecture.heads % architecture.kv_heads:
        raise UserError(f"{where}: {heads} heads are not a multiple of {architecture.kv_heads} key-value heads")
    for name in ("sliding", "unrotated"):
        if len(getattr(architecture, name)) not in (0, architecture.layers):
            raise UserError(
                f"{where}: num_hidden_layers is {architecture.layers}, but {len(getattr(architecture, name))} layers are listed"
            )
    return architecture


def read_architecture(path: Path) -> Architecture:
    """Reads `config.json`, given the file or its folder."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); a model folder needs a config.json") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy the model's config.json again") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object; a Hugging Face config.json is one")
    return parse_architecture(config, str(file))
