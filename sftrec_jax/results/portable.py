"""Configurations that leave the machine: paths as others can follow them."""

import os
from pathlib import Path
from typing import Any

from sftrec_jax.config import RunConfig
from sftrec_jax.config_file import PATH_FIELDS, parse_config, resolve_paths, to_dict
from sftrec_jax.data.known import VARIABLE, data_root, expand
from sftrec_jax.errors import UserError


def portable_config(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The configuration as nested dictionaries without a path of this machine; `configured` reads it back.

    Files under `data_root()` begin with `$SFTREC_DATA/`; others are relative to `folder` and must lie in the project, which
    is two folders up.

    Args:
        config: as a run has it, paths absolute.
        folder: of the published results, PROJECT/docs/results.

    Raises: UserError for a file elsewhere.
    """
    values = to_dict(config)
    for section, names in PATH_FIELDS.items():
        part = values[section]
        for name in names:
            value, field = part[name], f"{section}.{name}"
            if isinstance(value, list):
                part[name] = [_portable(one, folder, field) for one in value]
            elif value is not None:
                part[name] = _portable(value, folder, field)
    values["train"]["checkpoints"] = None  # where they lie changes no result
    return values


def configured(values: Any, file: Path) -> RunConfig:
    """The configuration that `portable_config` wrote into `file`, paths absolute.

    Raises: UserError for unknown keys and wrong types, and for data that are not there (see `data/known.py`).
    """
    return resolve_paths(parse_config(values, f"{file}: config"), file.absolute().parent)


def _portable(value: str, folder: Path, field: str) -> str:
    scheme, rest = ("tfds:", value[5:]) if value.startswith("tfds:") else ("", value)
    path = Path(os.path.expanduser(rest))
    if expand(value) != value or not path.is_absolute():
        return value  # a name such as smollm2-135m, an id of the hub, or portable as it stands
    below = _below(path, data_root())
    if below is not None and not scheme:
        return f"${VARIABLE}/{below}"
    project = folder.absolute().parent.parent
    below = _below(path, project)
    if below is None:
        raise UserError(
            f"{field}: {value} is a path of this machine; put it below {project} or $SFTREC_DATA ({data_root()}), then run again"
        )
    return scheme + Path(os.path.relpath(project / below, folder.absolute())).as_posix()


def _below(path: Path, root: Path) -> str | None:
    """`path` relative to `root`, links in either followed or not; None where it lies elsewhere."""
    for one in (Path(os.path.abspath(path)), path.resolve()):
        for other in (Path(os.path.abspath(root)), root.resolve()):
            if one.is_relative_to(other):
                return one.relative_to(other).as_posix()
    return None
