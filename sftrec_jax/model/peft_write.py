"""Export of an adapter in PEFT's format; the folder appears complete or not at all."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sftrec_jax.distributed import to_host
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.adapters import TABLES, AdapterSpec, module_paths
from sftrec_jax.model.cards import CardInfo, adapter_card, hub_name
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.export import ExportReport, check_tokenizer, example_prompt
from sftrec_jax.model.export_files import check_target, replacing, save_tensors, write_json, write_text
from sftrec_jax.model.families import HEAD, weight_map
from sftrec_jax.model.load import Build
from sftrec_jax.model.merge import arrays_of, exported_vocab_size, gap_ids, gap_row, grown_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_adapter(
    decoder: Decoder,
    build: Build,
    codes: ItemCodes,
    tokenizer: "PreTrainedTokenizerBase",
    base_name: str,
    out: Path,
    card: CardInfo,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads over the base; README.md has the exact lines.

    `base_name` is what `from_pretrained` takes (a folder, a hub id), a `.gguf` file, or the built-in base's name. The
    other arguments and errors are those of `export_merged`. Weights are float32. Also raises UserError when the
    decoder has no adapters.
    """
    if build.adapters is None:
        raise UserError("there is no adapter to export: only train.method: lora makes one; export the merged model instead")
    check_tokenizer(tokenizer, codes)
    out = check_target(out, overwrite)
    size, base_size = exported_vocab_size(build), build.arch.vocab_size
    spec = build.adapters
    notes = f"Rank {spec.r}, alpha {spec.alpha:g}, on {', '.join(spec.targets)}; weights are float32."
    prompt = card.example or example_prompt(codes, tokenizer)
    with replacing(out) as folder:
        write_json(folder / "adapter_config.json", peft_config(build, base_name))
        tokenizer.save_pretrained(str(folder))
        resize_to = size if size > base_size else None
        write_text(folder / "README.md", adapter_card(card, base_name, prompt, notes, base_size, resize_to))
        tensors = peft_tensors(decoder, build)
        save_tensors(tensors, folder / "adapter_model.safetensors")
    return ExportReport(out, sum(t.nbytes for t in tensors.values()), size, "float32")


def _tables(build: Build) -> tuple[str, ...]:
    """Tables with rows of their own; one that is trained as a whole holds them."""
    tables = ("embed_tokens",) if build.arch.tied else ("embed_tokens", "lm_head")
    return tuple(table for table in tables if f"{table}/weight" not in build.whole)


def _sizes(spec: AdapterSpec, build: Build) -> dict[str, tuple[int, float]]:
    """Module path -> rank and alpha as PEFT has to be told. A PiSSA adapter is written over the base as it was, as PEFT converts
    it: what was taken from the base stands beside it with its sign turned, which doubles the rank.
    """
    by = 2 if spec.pissa else 1
    paths, sizes = module_paths(build.arch), {}
    for target in spec.targets:
        for layer, rank in enumerate(spec.layer_ranks(target, build.arch.layers)):
            if rank:
                scale = spec.scale(target, layer)
                whole = by * rank
                sizes[paths[layer, target]] = whole, scale * (whole**0.5 if spec.rslora else whole)
    return sizes


def _saved(build: Build) -> dict[str, tuple[str, int | None]]:
    """Tensor name of every module trained as a whole -> path here, and layer."""
    table = weight_map(build.arch)
    return {
        name: (path, layer if table[path].stacked else None)
        for path in build.whole
        for layer, name in enumerate(table[path].names(build.arch.layers))
    }


def _saved_modules(build: Build) -> list[str]:
    """Names that end the paths of these modules and of no others, as PEFT looks for them; of a norm, those of all layers."""
    names = (weight_map(build.arch)[path].name.removesuffix(".weight") for path in build.whole)
    return sorted(name.split("{i}.")[-1] for name in names)


def _number(value: float) -> float | int:
    value = round(value, 9)  # what a root and its square leave behind
    return int(value) if value.is_integer() else value


def peft_config(build: Build, base_name: str) -> dict[str, Any]:
    """`adapter_config.json`. Where modules differ in rank or alpha, or layers have none, each module stands there by its path."""
    spec = build.adapters
    assert spec is not None
    ids = sorted({*build.row_ids, *gap_ids(build)})
    sizes = _sizes(spec, build)
    rank, alpha = next(iter(sizes.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_name(base_name),
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": spec.dropout,
        "target_modules": list(sizes) if spec.ranks else list(spec.targets),
        "rank_pattern": {path: r for path, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {path: _number(a) for path, (_, a) in sizes.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "trainable_token_indices": {table: ids for table in _tables(build)} if ids and _tables(build) else None,
        "modules_to_save": _saved_modules(build) or None,
        "ensure_weight_tying": build.arch.tied and "embed_tokens/weight" in build.whole,
    }


def peft_tensors(decoder: Decoder, build: Build) -> dict[str, np.ndarray]:
    """Names and layout as peft 0.21 saves them: A [r, in], B [out, r]; the token `delta` holds whole rows, in id order."""
    spec = build.adapters
    assert spec is not None
    arrays, paths = arrays_of(decoder), module_paths(build.arch)
    tensors: dict[str, np.ndarray] = {}

    def host(name: str) -> np.ndarray:
        return to_host(arrays[f"layers/{name}"]).astype(np.float32)

    for target in spec.targets:
        a, b = host(f"{target}/lora_a"), host(f"{target}/lora_b")
        taken = (host(f"{target}/pissa_a"), host(f"{target}/pissa_b")) if spec.pissa else None
        for layer, rank in enumerate(spec.layer_ranks(target, build.arch.layers)):
            if not rank:
                continue
            parts = [(a[layer, :, :rank], b[layer, :rank])]
            if taken is not None:
                parts.append((taken[0][layer, :, :rank], -taken[1][layer, :rank]))
            key = f"base_model.model.{paths[layer, target]}"
            tensors[f"{key}.lora_A.weight"] = np.concatenate([p[0] for p in parts], axis=1).T
            tensors[f"{key}.lora_B.weight"] = np.concatenate([p[1] for p in parts], axis=0).T
            if spec.dora:
                tensors[f"{key}.lora_magnitude_vector"] = host(f"{target}/lora_magnitude")[layer]
    for name, (path, layer) in _saved(build).items():
        value = arrays[path] if layer is None else arrays[path][layer]
        rows = arrays.get(path.replace("/weight", "/rows"))
        tensors[f"base_model.model.{name}"] = to_host(grown_table(value, rows, build) if path in TABLES else value).astype(
            np.float32
        )
    if build.arch.tied and "embed_tokens/weight" in build.whole:
        tensors[f"base_model.model.{HEAD}"] = tensors["base_model.model.model.embed_tokens.weight"]  # PEFT looks for both
    if build.row_ids:
        gaps = gap_ids(build)
        order = np.argsort(np.asarray((*build.row_ids, *gaps)), kind="stable")
        for table in _tables(build):
            rows = to_host(arrays[f"{table}/rows"]).astype(np.float32)
            fill = np.broadcast_to(to_host(gap_row(arrays[f"{table}/weight"])), (len(gaps), rows.shape[1]))
            where = "model.embed_tokens" if table == "embed_tokens" else table
            key = f"base_model.model.{where}.token_adapter.trainable_tokens_delta"
            tensors[key] = np.concatenate([rows, fill])[order]
    return tensors
