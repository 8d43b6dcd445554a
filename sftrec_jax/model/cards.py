"""Texts of README.md beside an exported model: YAML front matter as the Hugging Face hub reads it, then what a user needs."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import Any

import yaml

from sftrec_jax.model.hub import SMOLLM2, SMOLLM2_FILE

# The built-in base is known under another name on the hub.
_SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_VERSIONS = ("sftrec-jax", "jax", "flax", "optax", "transformers")


@dataclass(frozen=True)
class CardInfo:
    """What the card says of a run."""

    name: str
    """Heading, such as the name of the run."""
    base: str
    """The base model as the configuration names it."""
    data: str
    """One or more sentences: source, users, items, interactions, split."""
    command: str
    """The command that made the model."""
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Rows (`model`, `popularity`, ...) of metrics by name; names that end in `_unmasked` are left out of the table."""
    license: str | None = None
    """Licence identifier of the hub, such as `apache-2.0`; None: known for the built-in base, else `other`."""
    example: str | None = None
    """A prompt for the usage lines; None: three items one after the other."""


def hub_name(base: str) -> str:
    """The base as other libraries should be told it: the hub id of the built-in one, else the name itself."""
    return _SMOLLM2_HUB_ID if base == SMOLLM2 else base


def _front_matter(info: CardInfo, library: str, adapter: bool) -> str:
    licence = info.license or ("apache-2.0" if info.base == SMOLLM2 else "other")
    values: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "base_model": hub_name(info.base)}
    values["base_model_relation"] = "adapter" if adapter else "finetune"
    values["license"] = licence
    if licence == "other":
        values["license_name"] = "as-the-base-model"
    values["tags"] = ["recommendation", "generative-recommendation", "sftrec-jax", *(["lora"] if adapter else [])]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(n for row in metrics.values() for n in row if not n.endswith("_unmasked")))
    if not names:
        return "Not evaluated."
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for label, row in metrics.items():
        lines.append(f"| {label} | " + " | ".join(f"{row[n]:.4f}" if n in row else "" for n in names) + " |")
    return "\n".join(lines)


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in _VERSIONS:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue  # run from a source tree that is not installed
    return ", ".join(found)


def _licence_text(info: CardInfo) -> str:
    return (
        f"The weights derive from {hub_name(info.base)} and stay under its licence. "
        "The terms of the data apply to what was learnt from it."
    )


def _card(info: CardInfo, front: str, intro: str, use: str, notes: str) -> str:
    return f"""{front}
# {info.name}

{intro}

## Use

{use}

Free generation can name items that do not exist; `sftrec recommend` decodes under the constraint that they do.

## Data

{info.data}

## Metrics

{_metrics_table(info.metrics)}

## Made by

```
{info.command}
```

{_versions()}. {notes}

## Licence

{_licence_text(info)}
"""


def _generation_lines(prompt: str) -> str:
    return f"""inputs = tokenizer({prompt!r}, add_special_tokens=False, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=8)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]))"""


def merged_card(info: CardInfo, prompt: str, notes: str) -> str:
    """README.md of a merged model. `prompt` goes into the usage lines, `notes` is one sentence or more on the weights."""
    use = f"""```python
MODEL = "."  # this folder

from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL).eval()

{_generation_lines(prompt)}
```"""
    intro = f"{hub_name(info.base)}, fine-tuned to recommend: given the items that a user took, it generates the next one."
    return _card(info, _front_matter(info, "transformers", False), intro, use, notes)


def _base_lines(base: str) -> tuple[str, str]:
    """The lines that define BASE, and the arguments of `from_pretrained` that load it."""
    if base == SMOLLM2:
        resolve = f'BASE = resolve_base("{SMOLLM2}").folder  # fetched if it is not here yet'
        return f"from sftrec_jax.model.hub import resolve_base\n\n{resolve}", f'BASE, gguf_file="{SMOLLM2_FILE}"'
    if base.endswith(".gguf"):
        path = PurePath(base)
        return f"BASE = {str(path.parent)!r}  # folder of the GGUF file", f"BASE, gguf_file={path.name!r}"
    return f"BASE = {base!r}", "BASE"


def adapter_card(info: CardInfo, base: str, prompt: str, notes: str, table_rows: int, resize_to: int | None) -> str:
    """README.md of a PEFT adapter.

    Args:
        info: the run.
        base: how `from_pretrained` finds the base: a folder, a hub id, a `.gguf` file or the built-in name.
        prompt: goes into the usage lines.
        notes: one sentence or more on the weights.
        table_rows: rows of the base's token table.
        resize_to: rows that the table needs before the adapter is loaded; None: the item rows lie inside it.
    """
    define, arguments = _base_lines(base)
    resize = ""
    if resize_to is not None:
        why = f"item rows lie past the base's table of {table_rows}"
        resize = f"model.resize_token_embeddings({resize_to}, mean_resizing=False)  # {why}\n"
    use = f"""```python
{define}
ADAPTER = "."  # this folder

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
model = AutoModelForCausalLM.from_pretrained({arguments}, dtype=torch.float32)
{resize}model = PeftModel.from_pretrained(model, ADAPTER).eval()

{_generation_lines(prompt)}
```"""
    if base == SMOLLM2 or base.endswith(".gguf"):
        use += (
            "\n\nThe adapter was trained on the dequantised weights of the GGUF file (transformers reads it with the "
            "package `gguf`); other weights of the same model give slightly different scores."
        )
    intro = (
        f"A LoRA adapter that turns {hub_name(info.base)} into a recommender: given the items that a user took, "
        "it generates the next one."
    )
    return _card(info, _front_matter(info, "peft", True), intro, use, notes)
