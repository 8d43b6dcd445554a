"""What a `config.json` in Hugging Face format says of a Llama-family decoder."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftrec_jax.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """`linear` divides positions by `factor`; `llama3` slows low frequencies only (Llama 3.1, `rope_type: llama3`)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Llama-family decoder; `raw` keeps the config it was read from, for export."""

    vocab_size: int
    hidden_size: int
    ffw_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rope_theta: float
    rms_eps: float
    tied: bool
    rope_scaling: RopeScaling | None = None
    raw: str = "{}"

    @property
    def raw_config(self) -> dict[str, Any]:
        """The dictionary of `config.json`."""
        return json.loads(self.raw)


def _rope(config: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    # transformers 5 moved rope_theta and rope_scaling into rope_parameters; files of both kinds exist.
    parameters = config.get("rope_parameters") or {}
    scaling = dict(config.get("rope_scaling") or {}) or dict(parameters)
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), RopeScaling("linear", float(scaling["factor"]))
    if kind == "llama3":
        return float(theta), RopeScaling(
            "llama3",
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
    raise UserError(f"{where}: rope_type {kind!r} is not supported; use a model with rope_type default, linear or llama3")


def parse_architecture(config: dict[str, Any], where: str) -> Architecture:
    """Reads the dictionary of a Hugging Face `config.json` of model_type `llama`.

    Raises UserError, naming `where`, for another model type, an unknown rope type, biases, or a missing size.
    """
    kind = config.get("model_type")
    if kind != "llama":
        raise UserError(f"{where}: model_type {kind!r} is not supported; use a Llama-family model (llama, SmolLM2)")
    if config.get("quantization_config"):
        raise UserError(f"{where}: the checkpoint is quantised; use the unquantised model of the same name")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise UserError(f"{where}: {name} is true, which Llama and SmolLM2 models do not have; use one of those")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {config['hidden_act']!r} is not supported; Llama models use silu")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        theta, scaling = _rope(config, where)
        architecture = Architecture(
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden,
            ffw_size=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            context=int(config.get("max_position_embeddings", 2048)),
            rope_theta=theta,
            rms_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied=bool(config.get("tie_word_embeddings", False)),
            rope_scaling=scaling,
            raw=json.dumps(config, sort_keys=True),
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing; a Hugging Face config.json of a Llama model has it") from None
    if architecture.heads % architecture.kv_heads:
        raise UserError(f"{where}: {heads} heads are not a multiple of {architecture.kv_heads} key-value heads")
    if min(architecture.layers, architecture.head_dim, architecture.vocab_size) < 1 or not math.isfinite(theta):
        raise UserError(f"{where}: sizes must be positive")
    return architecture


def read_architecture(path: Path) -> Architecture:
    """Reads `config.json`, given the file or its folder."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); a model folder needs a config.json") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object; a Hugging Face config.json is one")
    return parse_architecture(config, str(file))
