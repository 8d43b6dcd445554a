"""Adapters in PEFT's format: what they are, and their weights under this decoder's names."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sftrec_jax.config import LoraConfig
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.adapters import AdapterSpec, adapter_spec, module_paths
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.families import HEAD, weight_map

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DELTA = "token_adapter.trainable_tokens_delta"
WITHOUT = {
    "bias": "none", "exclude_modules": None, "target_parameters": None, "lora_bias": False,
    "layer_replication": None, "alora_invocation_tokens": None, "use_qalora": False, "megatron_config": None,
}  # fmt: skip
"""What an adapter must not use, each with the only value that is taken."""
TAKEN = (
    "r",
    "alpha",
    "targets",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "init",
    "modules_to_save",
)
"""Fields of the config that an adapter to start from decides."""


def adapter_folder(path: str) -> Path:
    """The folder of the adapter: itself, or `export/adapter` of a run. UserError where neither is one."""
    for folder in (Path(path), Path(path) / "export" / "adapter", Path(path) / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    raise UserError(f"lora.start: {path} holds no {CONFIG}; name the folder of a PEFT adapter, or a run that trained one")


def trains_tokens(path: str) -> bool:
    """Whether the adapter holds rows of tokens."""
    folder = adapter_folder(path)
    return bool(_read_config(folder / CONFIG).get("trainable_token_indices"))


def modules_to_save(config: LoraConfig) -> tuple[str, ...]:
    """Modules trained as a whole: as configured, or those of the adapter that the run starts from."""
    return config.modules_to_save if config.start is None else _peft_config(adapter_folder(config.start)).modules_to_save


def configured_spec(config: LoraConfig, arch: Architecture) -> AdapterSpec:
    """The adapters of a run: as configured, or as the adapter that it starts from has them.

    Raises: UserError where the config asks for something else than that adapter has.
    """
    if config.start is None:
        return adapter_spec(config, arch)
    folder = adapter_folder(config.start)
    theirs, default = _peft_config(folder), LoraConfig()
    for name in TAKEN:
        value, taken = getattr(config, name), getattr(theirs, name)
        if value not in (getattr(default, name), taken):
            raise UserError(f"lora.{name} is {value}, but the adapter in {folder} has {taken}; leave lora.{name} out")
    return adapter_spec(dataclasses.replace(theirs, dropout=config.dropout), arch)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy the adapter again") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds a {type(config).__name__}, not an object; copy the adapter again")
    return config


def _peft_config(folder: Path) -> LoraConfig:
    file = folder / CONFIG
    config = _read_config(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be gone on with")
    for name, only in WITHOUT.items():
        if config.get(name) not in (only, None, [], {}):
            raise UserError(f"{file}: {name} is {config[name]!r}, which is not supported; merge it into the base with peft first")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal", "pissa"):
        raise UserError(
            f"{file}: init_lora_weights is {init!r}, which changes the base; save it over the base as it was, with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    targets: Any = config.get("target_modules")
    layers = config.get("layers_to_transform")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        raise UserError(f"{file}: target_modules is {targets!r}; save the adapter again with the names of its modules")
    try:
        return LoraConfig(
            r=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
            use_rslora=bool(config.get("use_rslora", False)),
            use_dora=bool(config.get("use_dora", False)),
            rank_pattern={k: int(v) for k, v in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={k: float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
            layers_to_transform=None if layers is None else tuple(map(int, [layers] if isinstance(layers, int) else layers)),
            init="pissa" if init == "pissa" else "default",
            modules_to_save=tuple(sorted(config.get("modules_to_save") or ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file}: {error} is missing or wrong; copy the adapter again") from None


def read_adapter(
    path: str, spec: AdapterSpec, arch: Architecture, codes: ItemCodes, row_ids: Sequence[int], whole: Sequence[str]
) -> dict[str, np.ndarray]:
    """Weights by path of the decoder, float32: `lora_a` [L, in, R], `lora_b` [L, R, out], `lora_magnitude` [L, out], and `rows`
    of tokens [len(row_ids), D], NaN for those that the adapter did not train under the same name; and parameters in `whole`.

    Raises: UserError for missing, unexpected or mis-shaped tensors.
    """
    folder = adapter_folder(path)
    file = folder / WEIGHTS
    try:
        tensors = load_file(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error}); save the adapter with peft as safetensors") from None
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged safetensors file ({error}); copy the adapter again") from None
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    paths, arrays = module_paths(arch), {}

    def take(name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        value = tensors.pop(f"{PREFIX}{name}", None)
        if value is None:
            raise UserError(f"{file}: tensor {PREFIX}{name} is missing; the file and {CONFIG} differ")
        if len(value.shape) != len(shape) or any(w is not None and w != g for w, g in zip(shape, value.shape, strict=True)):
            raise UserError(f"{file}: tensor {PREFIX}{name} has shape {value.shape}, the model and {CONFIG} imply {shape}")
        return value

    for target in spec.targets:
        ranks, width = spec.layer_ranks(target, arch.layers), spec.rank(target)
        a, b, lengths = [], [], []
        for layer, rank in enumerate(ranks):
            key = paths[layer, target]
            size_in, size_out = _sizes(arch, target)
            if not rank:
                a.append(np.zeros((size_in, width), np.float32))
                b.append(np.zeros((width, size_out), np.float32))
                lengths.append(np.ones(size_out, np.float32))
                continue
            wide = ((0, 0), (0, width - rank))
            a.append(np.pad(take(f"{key}.lora_A.weight", (rank, size_in)).T, wide))
            b.append(np.pad(take(f"{key}.lora_B.weight", (size_out, rank)), wide).T)
            if spec.dora:
                lengths.append(take(f"{key}.lora_magnitude_vector", (size_out,)))
        arrays |= {f"layers/{target}/lora_a": np.stack(a), f"layers/{target}/lora_b": np.stack(b)}
        if spec.dora:
            arrays[f"layers/{target}/lora_magnitude"] = np.stack(lengths)
    if arch.tied and "embed_tokens/weight" in whole:
        twice = tensors.pop(f"{PREFIX}{HEAD}", None)
        if twice is not None and not np.array_equal(twice, tensors.get(f"{PREFIX}model.embed_tokens.weight", twice)):
            raise UserError(
                f"{file}: token table and head differ, but the model's head is its table; use ensure_weight_tying in peft"
            )
    table = weight_map(arch)
    for name in whole:
        values = [take(tensor, table[name].shape) for tensor in table[name].names(arch.layers)]
        arrays[name] = np.stack(values) if table[name].stacked else values[0]
    arrays |= _rows(folder, tensors, codes, row_ids)
    if tensors:
        raise UserError(f"{file}: {len(tensors)} unexpected tensors, first {min(tensors)}; merge them into the base with peft")
    return arrays


def _sizes(arch: Architecture, target: str) -> tuple[int, int]:
    wide, narrow = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    outputs = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow, "gate_proj": arch.ffw_size, "up_proj": arch.ffw_size}
    inputs = {"o_proj": wide, "down_proj": arch.ffw_size}
    return inputs.get(target, arch.hidden_size), outputs.get(target, arch.hidden_size)


def _rows(folder: Path, tensors: dict[str, np.ndarray], codes: ItemCodes, row_ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Rows of this run's new tokens that the adapter trained under the same names, and of the base's by id; takes them out of
    `tensors`.
    """
    found = {name: tensors.pop(name) for name in list(tensors) if name.endswith(DELTA)}
    ids = _read_config(folder / CONFIG).get("trainable_token_indices") or {}
    if not found or not row_ids:
        return {}
    vocabulary = _vocabulary(folder) if codes.new_tokens else {}
    theirs = [*(vocabulary.get(token, -1) for token in codes.new_tokens), *row_ids[len(codes.new_tokens) :]]
    rows = {}
    for name, values in found.items():
        table = "embed_tokens" if "embed_tokens" in name else "lm_head"
        listed = ids.get(table, ids) if isinstance(ids, dict) else ids
        place = {int(token): at for at, token in enumerate(sorted(listed))}
        at = [place.get(token, -1) for token in theirs]
        rows[f"{table}/rows"] = np.where(np.asarray(at)[:, None] >= 0, values[at], np.nan).astype(np.float32)
    return rows


def _vocabulary(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder).get_vocab()
    except (OSError, ValueError):
        raise UserError(
            f"{folder}: trained new tokens, but there is no tokenizer to tell their names; save it there (save_pretrained)"
        ) from None
