"""Export: a merged model in Hugging Face format, or the adapter in PEFT format; each folder appears complete or not at all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np

from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.cards import CardInfo, adapter_card, hub_name, merged_card
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.export_files import (
    LazyTensors,
    check_target,
    replacing,
    save_tensors,
    write_json,
    write_text,
    write_weights,
)
from sftrec_jax.model.families import module_of, weight_map
from sftrec_jax.model.hf_config import FAMILIES
from sftrec_jax.model.load import Build
from sftrec_jax.model.merge import (
    arrays_of,
    exported_vocab_size,
    gap_ids,
    gap_row,
    merged_decoder,
    probe_tokens,
    rounded,
    token_logits,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHARD_BYTES = 5_000_000_000
"""As transformers 4 and the hub recommend."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what merging did to the logits of prompts of random items (None for an adapter)."""

    folder: Path
    bytes: int
    """Size of all weights."""
    vocab_size: int
    """Rows of the token table that the exported model has (for an adapter: needs)."""
    dtype: str
    merge_change: float | None = None
    """Largest absolute logit difference between adapter and merged form, both in float32."""
    round_change: float | None = None
    """The same after the merged weights were rounded to `dtype`; arithmetic still in float32."""
    largest_logit: float | None = None
    """Largest absolute logit of the adapter form, to compare the changes with."""


def export_merged(
    decoder: Decoder,
    build: Build,
    codes: ItemCodes,
    tokenizer: "PreTrainedTokenizerBase",
    out: Path,
    card: CardInfo,
    dtype: Literal["float32", "bfloat16"] = "float32",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    more: Callable[[Path], None] | None = None,
) -> ExportReport:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Adapters are merged in float32 and the sum is rounded to `dtype` once. New token rows take their places in the
    table, which is grown where they lie past it and never cut.

    Args:
        decoder: trained, with adapters or without (`train.method: full`).
        build: how it was built.
        codes: its item codes.
        tokenizer: holds the item tokens.
        out: the folder; its parents are made. A non-empty one is refused, with `overwrite` it is replaced as a whole
            (an `adapter` folder inside it too) once the new one is complete, provided that it holds exported files only.
        card: texts of README.md.
        dtype: type of the weights.
        overwrite: see `out`.
        max_shard_bytes: larger models are written in several files.
        more: writes further files (`items.jsonl`, `prompt.json`) into the folder before it appears.

    Raises: UserError for a folder that must not be replaced or cannot be written, another `dtype`, or a tokenizer
        without the item tokens.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"export dtype is {dtype!r}; use float32 or bfloat16")
    _check_tokenizer(tokenizer, codes)
    out = check_target(out, overwrite)
    probe = probe_tokens(codes, build.arch.context)
    merged = merged_decoder(decoder, build)
    expected = token_logits(decoder, build, probe)
    merge_change = round_change = float(jnp.abs(token_logits(merged, build, probe) - expected).max())
    if dtype != "float32":
        merged = rounded(merged, jnp.dtype(dtype))
        round_change = float(jnp.abs(token_logits(merged, build, probe) - expected).max())
    largest = float(jnp.abs(expected).max())
    notes = f"Weights are {dtype}; merging changed logits by at most {merge_change:.1e}"
    notes += f", merging and rounding by {round_change:.1e}" if dtype != "float32" else ""
    notes += f" (prompts of random items, largest logit {largest:.1f})."
    with replacing(out) as folder:
        write_json(folder / "config.json", exported_config(build, dtype))
        write_json(folder / "generation_config.json", _generation_config(build, tokenizer))
        tokenizer.save_pretrained(str(folder))
        write_text(folder / "README.md", merged_card(card, card.example or _example_prompt(codes, tokenizer), notes))
        if more is not None:
            more(folder)
        total = write_weights(folder, _hub_tensors(merged), max_shard_bytes)
    return ExportReport(out, total, exported_vocab_size(build), dtype, merge_change, round_change, largest)


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
    _check_tokenizer(tokenizer, codes)
    out = check_target(out, overwrite)
    size, base_size = exported_vocab_size(build), build.arch.vocab_size
    spec = build.adapters
    notes = f"Rank {spec.r}, alpha {spec.alpha:g}, on {', '.join(spec.targets)}; weights are float32."
    prompt = card.example or _example_prompt(codes, tokenizer)
    with replacing(out) as folder:
        write_json(folder / "adapter_config.json", _peft_config(build, base_name))
        tokenizer.save_pretrained(str(folder))
        resize_to = size if size > base_size else None
        write_text(folder / "README.md", adapter_card(card, base_name, prompt, notes, base_size, resize_to))
        tensors = _peft_tensors(decoder, build)
        save_tensors(tensors, folder / "adapter_model.safetensors")
    return ExportReport(out, sum(t.nbytes for t in tensors.values()), size, "float32")


def exported_config(build: Build, dtype: str) -> dict[str, Any]:
    """`config.json` of the merged model: the base's own, whatever its layout, with what the export changes."""
    config = build.arch.raw_config
    config["architectures"] = [FAMILIES[build.arch.family].hf_class]
    config["vocab_size"] = exported_vocab_size(build)
    config["tie_word_embeddings"] = build.arch.tied
    # transformers 5 writes `dtype`; transformers 4 and other readers know `torch_dtype`.
    config["dtype"] = config["torch_dtype"] = dtype
    return config


def _hub_tensors(decoder: Decoder) -> LazyTensors:
    """Hugging Face name -> (bytes, how to read it), so that one file's tensors are on the host at a time."""
    arrays = arrays_of(decoder)

    def reader(path: str, layer: int | None, transposed: bool) -> tuple[int, Callable[[], np.ndarray]]:
        array = arrays[path]

        def read() -> np.ndarray:
            value = np.asarray(array if layer is None else array[layer])
            return value.T if transposed else value

        return array.nbytes // (1 if layer is None else len(array)), read

    return {
        name: reader(path, i if tensor.stacked else None, tensor.transposed)
        for path, tensor in weight_map(decoder.arch).items()
        for i, name in enumerate(tensor.names(decoder.arch.layers))
    }


def _peft_tables(build: Build) -> tuple[str, ...]:
    return ("embed_tokens",) if build.arch.tied else ("embed_tokens", "lm_head")


def _peft_config(build: Build, base_name: str) -> dict[str, Any]:
    adapters = build.adapters
    assert adapters is not None
    ids = sorted({*build.row_ids, *gap_ids(build)})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_name(base_name),
        "r": adapters.r,
        "lora_alpha": int(adapters.alpha) if float(adapters.alpha).is_integer() else adapters.alpha,
        "lora_dropout": adapters.dropout,
        "target_modules": list(adapters.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "trainable_token_indices": {table: ids for table in _peft_tables(build)} if ids else None,
    }


def _peft_tensors(decoder: Decoder, build: Build) -> dict[str, np.ndarray]:
    """Names and layout as peft 0.21 saves them: A [r, in], B [out, r]; the token `delta` holds whole rows, in id order."""
    assert build.adapters is not None
    arrays = arrays_of(decoder)
    tensors: dict[str, np.ndarray] = {}
    for target in build.adapters.targets:
        for part, name in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            for i, value in enumerate(np.asarray(arrays[f"layers/{target}/{part}"], np.float32)):
                tensors[f"base_model.model.model.layers.{i}.{module_of(build.arch, target)}.{name}.weight"] = value.T
    if build.row_ids:
        gaps = gap_ids(build)
        order = np.argsort(np.asarray((*build.row_ids, *gaps)), kind="stable")
        for table in _peft_tables(build):
            rows = np.asarray(arrays[f"{table}/rows"], np.float32)
            fill = np.broadcast_to(np.asarray(gap_row(arrays[f"{table}/weight"])), (len(gaps), rows.shape[1]))
            where = "model.embed_tokens" if table == "embed_tokens" else table
            key = f"base_model.model.{where}.token_adapter.trainable_tokens_delta"
            tensors[key] = np.concatenate([rows, fill])[order]
    return tensors


def _generation_config(build: Build, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    config = build.arch.raw_config
    eos = config.get("eos_token_id")
    if not isinstance(eos, list):  # a list names several ends, which a tokenizer cannot
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos
    first = eos[0] if isinstance(eos, list) and eos else eos
    values = {
        "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.get("bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first,
    }
    return {"do_sample": False, **{name: value for name, value in values.items() if value is not None}}


def _example_prompt(codes: ItemCodes, tokenizer: "PreTrainedTokenizerBase") -> str:
    first = codes.codes[:3]
    ids = [int(i) for i in first[first >= 0]]
    if set(ids) <= set(codes.new_token_ids.tolist()):
        spelt = tokenizer.convert_ids_to_tokens(ids)
        return str(tokenizer.bos_token or tokenizer.eos_token or "") + "".join(spelt)
    return str(tokenizer.decode(ids))


def _check_tokenizer(tokenizer: "PreTrainedTokenizerBase", codes: ItemCodes) -> None:
    vocabulary = tokenizer.get_vocab()
    for name, i in zip(codes.new_tokens, codes.new_token_ids.tolist(), strict=True):
        if vocabulary.get(name) != i:
            raise UserError(
                f"the tokenizer has {name} as id {vocabulary.get(name)}, the item codes as {i}; use the tokenizer of the run"
            )
