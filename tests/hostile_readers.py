"""Every reader of outside files, with what makes its inputs."""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hostile_logs
import hostile_models
import hostile_texts


class Reader(NamedTuple):
    """`make` writes files into a folder that is empty and gives what `read` takes; `read` gives up with a UserError alone."""

    make: Callable[[random.Random, Path], Any]
    read: Callable[[random.Random, Path, Any], None]


READERS: dict[str, Reader] = {
    "gguf": Reader(hostile_models.make_gguf, hostile_models.read_model),
    "safetensors": Reader(hostile_models.make_safetensors, hostile_models.read_model),
    "model_config": Reader(hostile_models.make_model_config, hostile_models.read_model_config),
    "yaml": Reader(hostile_models.make_yaml, hostile_models.read_yaml),
    **{name: Reader(make, hostile_logs.read_file) for name, make in hostile_logs.MAKERS.items()},
    "index": Reader(hostile_texts.make_index, hostile_texts.read_codes),
    "titles": Reader(hostile_texts.make_titles, hostile_texts.read_titles),
    "templates": Reader(hostile_texts.make_template, hostile_texts.read_template),
}


def prepare() -> None:
    """Reads one of each, so that what libraries load and start on first use is there before memory is limited."""
    for name, reader in READERS.items():
        for number in range(3):
            with tempfile.TemporaryDirectory() as folder:
                rng = random.Random(f"{name} {number}")
                try:
                    reader.read(rng, Path(folder), reader.make(rng, Path(folder)))
                except Exception:  # judged when it is fed
                    pass
