"""Configurations in YAML files: read with every key and type checked, paths resolved, written back.

Every relative path in a YAML file is relative to that file; a leading `$SFTREC_DATA/` is the folder of public data (see
`data/known.py`). `load_config` resolves them.
"""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from sftrec_jax.config import RunConfig
from sftrec_jax.data.known import check_present, expand
from sftrec_jax.errors import UserError
from sftrec_jax.safe_yaml import load_yaml

PLACES = {"train": ("checkpoints",)}
"""Folders that need not exist yet, or are named by scheme and bucket."""
PATH_FIELDS = {
    "data": ("source", "valid_source", "test_source", "catalogue"),
    "items": ("codes_file",),
    "embedding": ("file", "sentence_model"),
    "model": ("base", "tokenizer"),
    "lora": ("start",),
    "profile": ("source", "tags", "filler"),
    "prompt": ("templates",),
    "tasks": ("templates",),
    "evaluate": ("templates",),
}


LARGEST = 4_000_000
"""Bytes of a config."""


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return close[0] if close else ""


def _matches(value: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, arm) for arm in typing.get_args(annotation))
    if origin is Literal:
        return value in typing.get_args(annotation)
    if origin is dict:
        of_key, of_value = typing.get_args(annotation)
        return isinstance(value, dict) and all(_matches(k, of_key) and _matches(v, of_value) for k, v in value.items())
    if origin is tuple:
        element = typing.get_args(annotation)[0]
        return isinstance(value, tuple | list) and all(_matches(v, element) for v in value)
    if annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _describe(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(annotation))
    return getattr(annotation, "__name__", str(annotation)).replace("NoneType", "null").replace("None", "null")


def _section(cls: type, values: Any, name: str, where: str) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: section {name} is {values!r}; write `{name}:` with indented `key: value` lines below")
    hints = typing.get_type_hints(cls)
    clean = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {name}.{key}; the nearest known key is {name}.{_nearest(str(key), hints)}")
        if isinstance(value, str) and _matches(0.5, hints[key]) and not _matches(value, hints[key]):
            try:
                value = float(value)  # YAML 1.1 reads 1e-4 as text
            except ValueError:
                pass
        if not _matches(value, hints[key]):
            raise UserError(f"{where}: {name}.{key} is {value!r}; expected {_describe(hints[key])}")
        clean[key] = tuple(value) if isinstance(value, list) else value
    return cls(**clean)


def parse_config(values: Any, where: str) -> RunConfig:
    """Builds a RunConfig from nested dictionaries; `where` names the source in errors."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected sections such as `data:` and `train:`, found {type(values).__name__}")
    hints = typing.get_type_hints(RunConfig)
    for key in values:
        if key not in hints:
            raise UserError(f"{where}: unknown key {key}; the nearest known key is {_nearest(str(key), hints)}")
    if values.get("mesh") == "auto":
        values = {**values, "mesh": {"auto": True}}
    return RunConfig(**{k: _section(hints[k], v, k, where) for k, v in values.items()})


def load_config(path: str | Path) -> RunConfig:
    """Reads a YAML file. Values that name an existing path relative to the file become absolute paths."""
    path = Path(path)
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{path}: {size:,} bytes; name a YAML file of less than {LARGEST:,}, such as configs/quick.yaml")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the config ({error.strerror}); name a YAML file such as configs/quick.yaml"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the config as UTF-8") from None
    try:
        values = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    config = parse_config(values, str(path))
    return resolve_paths(config, path.parent)


def resolve_paths(config: RunConfig, folder: Path) -> RunConfig:
    """Makes path-like values absolute when they exist below `folder` or look like paths; those of `PLACES` in any case."""
    for section, names in PLACES.items():
        part = getattr(config, section)
        local = {n: v for n in names if (v := getattr(part, n)) is not None and "://" not in v}
        absolute = {n: str((folder / Path(v).expanduser()).resolve()) for n, v in local.items()}
        config = dataclasses.replace(config, **{section: dataclasses.replace(part, **absolute)})
    for section, names in PATH_FIELDS.items():
        part = getattr(config, section)
        for name in names:
            value = getattr(part, name)
            found = tuple(_resolved(v, folder) for v in value) if isinstance(value, tuple) else _resolved(value, folder)
            if found != value:
                part = dataclasses.replace(part, **{name: found})
        config = dataclasses.replace(config, **{section: part})
    return config


def _resolved(value: str | None, folder: Path) -> str | None:
    if value is None:
        return None
    if value.startswith("tfds:") and not value.startswith(("tfds:.", "tfds:/")):
        return value
    scheme, rest = ("tfds:", value[5:]) if value.startswith("tfds:") else ("", value)
    try:
        if expand(value) != value:
            path = Path(expand(value))
            check_present(path)
            return str(path.absolute())
        if (folder / rest).exists() or rest.startswith(("./", "../")):
            return scheme + str((folder / rest).resolve())
    except (OSError, ValueError) as error:  # too long a name, or one with a zero byte
        raise UserError(f"{value!r} cannot be the name of a file ({getattr(error, 'strerror', None) or error})") from None
    return value


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dictionaries (tuples become lists), ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def dump_config(config: RunConfig) -> str:
    """The YAML text that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def nearest_field(option: str) -> str | None:
    """None for `--section.field` that exists; else the nearest option that does."""
    known = [
        f"--{section}.{name}" for section, cls in typing.get_type_hints(RunConfig).items() for name in typing.get_type_hints(cls)
    ]
    option = option.replace("-", "_").replace("__", "--", 1) if option.startswith("--") else option
    positive = option.replace(".no_", ".")
    return None if option in known or positive in known else _nearest(option, known)
