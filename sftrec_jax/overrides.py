"""Configuration from a file or a finished run, with options of the command line over it."""

import contextlib
import dataclasses
import difflib
import io
from collections.abc import Sequence
from pathlib import Path

import tyro

from sftrec_jax.config import RunConfig
from sftrec_jax.config_file import PATH_FIELDS, PLACES, load_config, nearest_field, resolve_paths
from sftrec_jax.errors import UserError

RUN_OPTIONS = ("--out", "--overwrite", "--resume", "--help-config")
"""Options of verbs that take a config, for suggestions."""


def show_config() -> None:
    """Prints every field of the config with its default, and leaves the program."""
    tyro.cli(RunConfig, prog="sftrec run CONFIG", args=["--help"])


def configure(path: Path | None, extra: Sequence[str]) -> RunConfig:
    """The config of a file with options over it. Raises UserError for no file, and for what `load_config` refuses."""
    if path is None:
        raise UserError("no CONFIG given; name a YAML file, such as configs/quick.yaml")
    return overridden(load_config(path), extra)


def overridden(base: RunConfig, extra: Sequence[str]) -> RunConfig:
    """`base` with options such as `--decode.beam 100` over it. Raises UserError for an unknown option or a wrong value."""
    extra = [_as_none(word) for word in _plain_mesh(extra)]
    _check_options(extra)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(RunConfig, prog="sftrec run CONFIG", default=base, args=list(extra))
    except SystemExit:
        raise UserError(f"{_in_box(said.getvalue())}; --help-config lists every field") from None
    return _resolve_changed(base, config)


def _as_none(word: str) -> str:
    """`null`, as YAML and messages say it, as the command line's parser says it."""
    if word == "null":
        return "None"
    return f"{word.removesuffix('null')}None" if word.startswith("--") and word.endswith("=null") else word


def _plain_mesh(extra: Sequence[str]) -> list[str]:
    """`--mesh auto` as the fields that it stands for; a size alone takes the place of `mesh: auto` in the file."""
    plain = list(extra)
    if any(word.startswith(("--mesh.data", "--mesh.fsdp", "--mesh.context", "--mesh.tensor")) for word in plain):
        return plain if any("auto" in word for word in plain) else [*plain, "--mesh.no-auto"]
    for at, word in enumerate(plain):
        if word == "--mesh=auto" or plain[at : at + 2] == ["--mesh", "auto"]:
            sizes = ["--mesh.data", "-1", "--mesh.fsdp", "1", "--mesh.context", "1", "--mesh.tensor", "1"]
            return [*plain[:at], *sizes, "--mesh.auto", *plain[at + (1 if "=" in word else 2) :]]
    return plain


def _check_options(extra: Sequence[str]) -> None:
    """UserError for an option that neither the verb nor the config has, with the nearest that exists."""
    for word in extra:
        option = word.split("=")[0]
        if not option.startswith("--"):
            continue
        near = nearest_field(option)
        if near and "." not in option:
            near = (difflib.get_close_matches(option, RUN_OPTIONS, n=1) or [near])[0]
        if near:
            raise UserError(f"unknown option {option}; the nearest known one is {near}")


def _in_box(text: str) -> str:
    """The message in the box that tyro draws (in ASCII where standard output is not UTF-8), as one line without its last dot."""
    lines = [line.strip("│| ") for line in text.splitlines() if line.startswith(("│", "|"))]
    until = next((i for i, line in enumerate(lines) if line and set(line) <= {"─", "-"}), len(lines))
    return " ".join(lines[:until]).rstrip(".") or " ".join(text.split())


def _resolve_changed(base: RunConfig, config: RunConfig) -> RunConfig:
    """Paths given as overrides are relative to the current folder; those of the file are resolved already."""
    here = resolve_paths(config, Path.cwd())
    for section, names in (PATH_FIELDS | PLACES).items():
        part, before = getattr(config, section), getattr(base, section)
        changed = {n: getattr(getattr(here, section), n) for n in names if getattr(part, n) != getattr(before, n)}
        config = dataclasses.replace(config, **{section: dataclasses.replace(part, **changed)})
    return config
