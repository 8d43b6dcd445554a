"""The files of a published result, `docs/results/NAME.json` and `NAME.top10.parquet`: where they are, and what they must hold."""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sftrec_jax
from sftrec_jax.config import RunConfig
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.comparison import BASELINES
from sftrec_jax.results.portable import configured

FOLDER = Path("docs") / "results"
ROWS = ("model", *BASELINES)
JUDGED = ("recall@10", "ndcg@10")
"""What a repetition is judged by."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

_KEYS = {
    "name": str, "command": str, "date": str, "hardware": dict, "config": dict, "seeds": list, "metrics": dict, "ci": dict,
    "paired": dict, "below_counter": bool, "range": dict, "range_is": str, "protocol": dict, "top10": dict,
}  # fmt: skip
_SEED_KEYS = {"seed": int, "tie_seed": int, "checkpoint_step": int, "histories_sha256": str, "split_sha256": str, "metrics": dict}
_CARD_KEYS = {"data": dict, "split": dict, "order": dict, "users_evaluated": int, "code": dict}


@dataclass(frozen=True, eq=False)
class Published:
    """A result that was read by `read_published`."""

    path: Path
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """NAME."""
        return self.path.stem

    @property
    def lists(self) -> Path:
        """The top ten of every seed and user."""
        return lists_path(self.path)

    @cached_property
    def config(self) -> RunConfig:
        """The configuration with paths of this machine; UserError where the data are not here."""
        return configured(self.values["config"], self.path)

    @property
    def seeds(self) -> list[int]:
        """`train.seed` of each run."""
        return [one["seed"] for one in self.values["seeds"]]

    @property
    def tied(self) -> bool:
        """Whether another `data.tie_seed` is another order."""
        return bool(self.values["protocol"]["order"].get("tied_timestamp_share"))

    def tie_seed(self, seed: int) -> int:
        """`data.tie_seed` of a seed, published or new."""
        ties = {one["seed"]: one["tie_seed"] for one in self.values["seeds"]}
        if seed in ties:
            return ties[seed]
        alike = len(set(ties.values())) == 1 and (len(ties) > 1 or not self.tied)
        return next(iter(ties.values())) if alike else seed


def lists_path(path: Path) -> Path:
    """`NAME.top10.parquet` beside `NAME.json`."""
    return path.with_name(f"{path.stem}.top10.parquet")


def roots() -> list[Path]:
    """Projects whose results are known: the current folder, and the checkout that the package is used from."""
    here, checkout = Path.cwd(), Path(sftrec_jax.__file__).resolve().parent.parent
    return [here] if here.resolve() == checkout else [here, checkout]


def find_published(name: str) -> Path:
    """The JSON file of a result by its NAME or path; UserError with the nearest name for one that is not there."""
    if name.endswith(".json"):
        return Path(name)
    for root in roots():
        if (root / FOLDER / f"{name}.json").is_file():
            return root / FOLDER / f"{name}.json"
    known = sorted({path.stem for root in roots() for path in (root / FOLDER).glob("*.json")})
    raise UserError(f"{name}: no result of that name in {FOLDER}; {_nearest(name, known)}, or publish it with --publish")


def find_config(name: str) -> tuple[Path, Path]:
    """The YAML file of a NAME (or a path to one), and the folder `docs/results` that its result goes to."""
    if name.endswith((".yaml", ".yml")):
        return Path(name), Path.cwd() / FOLDER
    for root in roots():
        if (root / "configs" / f"{name}.yaml").is_file():
            return root / "configs" / f"{name}.yaml", root / FOLDER
    known = sorted({path.stem for root in roots() for path in (root / "configs").glob("*.yaml")})
    raise UserError(f"{name}: there is no configs/{name}.yaml; {_nearest(name, known)}, or give the path of a YAML file")


def check_name(name: str) -> str:
    """`name`, or UserError where it would be no good name of a file."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name of a result; use letters, digits, `_`, `-` and dots")
    return name


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"the nearest is {close[0]}" if close else "there is none yet"


def read_published(path: Path) -> Published:
    """Reads and checks a result; UserError that names the first thing that is missing or of the wrong type."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a file such as {FOLDER}/quick.json") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; fetch the file again") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch the file again") from None
    _need(values, _KEYS, path, "")
    _need(values["protocol"], _CARD_KEYS, path, "protocol.")
    _need(values["top10"], {"file": str, "sha256": str}, path, "top10.")
    if not values["seeds"]:
        raise UserError(f"{path}: seeds is empty; publish at least one run")
    for at, seed in enumerate(values["seeds"]):
        _need(seed, _SEED_KEYS, path, f"seeds[{at}].")
        _need_metrics(seed["metrics"], path, f"seeds[{at}].metrics.")
        if any(seed["metrics"][row].keys() != values["seeds"][0]["metrics"][row].keys() for row in ROWS):
            raise UserError(f"{path}: seeds[{at}] has other metrics than seeds[0]; publish the runs again")
    _need_metrics(values["metrics"], path, "metrics.")
    _need(values["ci"], {"model": dict}, path, "ci.")
    for part, where in ((values["range"], "range."), (values["ci"]["model"], "ci.model.")):
        _need(part, dict.fromkeys(JUDGED, list), path, where)
        for name, bounds in part.items():
            if not isinstance(bounds, list) or len(bounds) != 2 or not all(isinstance(b, int | float) for b in bounds):
                raise UserError(f"{path}: {where}{name} is {bounds!r}; expected [low, high]")
            if name not in values["seeds"][0]["metrics"]["model"]:
                raise UserError(f"{path}: {where}{name} is of a metric that seeds[0] lacks; publish the runs again")
    if len({one["seed"] for one in values["seeds"]}) < len(values["seeds"]):
        raise UserError(f"{path}: mixed runs: a seed is there twice; publish runs of different train.seed")
    _check_names(path, values)
    return Published(path, values)


def _check_names(path: Path, values: dict[str, Any]) -> None:
    """UserError where the JSON stands under the name of another result."""
    expected = {"name": path.stem, "top10.file": lists_path(path).name}
    for key, found in (("name", values["name"]), ("top10.file", values["top10"]["file"])):
        if found != expected[key]:
            raise UserError(
                f"{path}: mixed runs: {key} is {found!r}, expected {expected[key]!r}; publish again instead of renaming"
            )


def _need(values: Any, keys: dict[str, Any], path: Path, where: str) -> None:
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: {where.rstrip('.') or 'the file'} is no object; it was not written by `sftrec reproduce --publish`"
        )
    for key, kind in keys.items():
        if key not in values:
            raise UserError(f"{path}: lacks {where}{key}; it was not written by `sftrec reproduce --publish`")
        value = values[key]
        if not isinstance(value, kind) or kind is int and isinstance(value, bool):
            raise UserError(f"{path}: {where}{key} is {value!r}; expected {kind.__name__}")


def _need_metrics(values: Any, path: Path, where: str) -> None:
    _need(values, dict.fromkeys(ROWS, dict), path, where)
    for row in ROWS:
        for name, value in values[row].items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{path}: {where}{row}.{name} is {value!r}; expected a number")
        _need(values[row], dict.fromkeys(JUDGED, float | int), path, f"{where}{row}.")


def plain_metrics(result: dict[str, Any], rows: Iterable[str] = ROWS) -> dict[str, dict[str, float]]:
    """The metrics of each row of a `metrics.json` under the run's own masking, without those of the other."""
    return {row: {n: v for n, v in result[row].items() if not n.endswith(("_unmasked", "_masked"))} for row in rows}
