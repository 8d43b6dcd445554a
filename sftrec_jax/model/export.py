"""Export: a merged model in Hugging Face format, or the adapter in PEFT format; each folder appears complete or not at all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np

from sftrec_jax.distributed import to_host
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.cards import CardInfo, merged_card
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.export_files import (
    LazyTensors,
    check_target,
    replacing,
    write_json,
    write_text,
    write_weights,
)
from sftrec_jax.model.families import weight_map
from sftrec_jax.model.hf_config import FAMILIES
from sftrec_jax.model.load import Build
from sftrec_jax.model.merge import (
    arrays_of,
    exported_vocab_size,
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
    check_tokenizer(tokenizer, codes)
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
        write_text(folder / "README.md", merged_card(card, card.example or example_prompt(codes, tokenizer), notes))
        if more is not None:
            more(folder)
        total = write_weights(folder, _hub_tensors(merged), max_shard_bytes)
    return ExportReport(out, total, exported_vocab_size(build), dtype, merge_change, round_change, largest)


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
            value = to_host(array if layer is None else array[layer])
            return value.T if transposed else value

        return array.nbytes // (1 if layer is None else len(array)), read

    return {
        name: reader(path, i if tensor.stacked else None, tensor.transposed)
        for path, tensor in weight_map(decoder.arch).items()
        for i, name in enumerate(tensor.names(decoder.arch.layers))
    }


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


def example_prompt(codes: ItemCodes, tokenizer: "PreTrainedTokenizerBase") -> str:
    first = codes.codes[:3]
    ids = [int(i) for i in first[first >= 0]]
    if set(ids) <= set(codes.new_token_ids.tolist()):
        spelt = tokenizer.convert_ids_to_tokens(ids)
        return str(tokenizer.bos_token or tokenizer.eos_token or "") + "".join(spelt)
    return str(tokenizer.decode(ids))


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", codes: ItemCodes) -> None:
    vocabulary = tokenizer.get_vocab()
    for name, i in zip(codes.new_tokens, codes.new_token_ids.tolist(), strict=True):
        if vocabulary.get(name) != i:
            raise UserError(
                f"the tokenizer has {name} as id {vocabulary.get(name)}, the item codes as {i}; use the tokenizer of the run"
            )
