"""Published lists of ten items a user, read back and scored beside the baselines, user by user."""

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from sftrec_jax.config import RunConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.comparison import fit_baselines
from sftrec_jax.evaluate.metrics import DEFAULT_KS, user_metrics

LENGTH = 10
CUTOFFS = tuple(k for k in DEFAULT_KS if k <= LENGTH)
"""What ten items tell; metrics at 20 and `mrr` need longer lists."""
SCHEMA = {"seed": pl.Int32, "user": pl.String, "rank": pl.Int32, "item_id": pl.String}

Values = Mapping[str, np.ndarray]
"""Of each metric float64 [U], a value a test user."""


@dataclass(frozen=True, eq=False)
class TestSet:
    """What is asked: every user with a test target, U of them, in the order of the data set."""

    __test__ = False  # no class of tests

    dataset: Dataset
    users: np.ndarray
    """Text (object) [U] ids."""
    targets: np.ndarray
    """int32 [U] items."""
    histories: list[np.ndarray]
    """[U] items before the target, oldest first."""
    baselines: dict[str, Values]
    """Of each baseline; cut-offs up to `decode.top_k`."""


class TestSets:
    """The test sets of a configuration by tie seed, each made once; one for all where no time is tied."""

    __test__ = False

    def __init__(self, config: RunConfig):
        self.config = config
        self._made: dict[int, TestSet] = {}

    def of(self, tie_seed: int) -> TestSet:
        """Reads the data and fits the baselines, or returns what is there."""
        if self._made and (not self.tied or tie_seed in self._made):
            return self._made.get(tie_seed) or next(iter(self._made.values()))
        data = dataclasses.replace(self.config.data, tie_seed=tie_seed)
        self._made[tie_seed] = _test_set(prepare_dataset(data), self.config)
        return self._made[tie_seed]

    @property
    def tied(self) -> bool:
        """Whether some times are equal, so that `data.tie_seed` changes histories."""
        made = next(iter(self._made.values()), None) or self.of(self.config.data.tie_seed)
        return bool(made.dataset.report.get("tied_timestamp_share"))


def _test_set(dataset: Dataset, config: RunConfig) -> TestSet:
    users = np.flatnonzero(dataset.test_position >= 0)
    if not len(users):
        raise UserError(f"{config.data.source}: no user has a test target, so there is nothing to publish")
    targets = dataset.items[dataset.offsets[users] + dataset.test_position[users]]
    histories = [dataset.history(int(u))[: dataset.test_position[u]] for u in users]
    most = max(DEFAULT_KS)
    k = min(config.decode.top_k, len(dataset.item_ids))
    baselines = {}
    for name, baseline in fit_baselines(dataset, config.evaluate.counter_decay).items():
        ranked = np.full((len(users), max(k, most)), -1, np.int32)
        ranked[:, :k] = baseline.rank(histories, k, config.evaluate.mask_seen)
        baselines[name] = user_metrics(ranked[:, :most], targets)
    return TestSet(dataset, dataset.user_ids[users], targets, histories, baselines)


def model_values(ranked: np.ndarray, targets: np.ndarray) -> Values:
    """Metrics up to `@10` of lists int32 [U, 10]; `mrr` would be cut at ten instead of twenty and is left out."""
    return {name: values for name, values in user_metrics(ranked, targets, CUTOFFS).items() if name != "mrr"}


def published_frame(seed: int, recommendations: pl.DataFrame, test: TestSet, where: Path) -> pl.DataFrame:
    """The lists of a run's test users as they are published, see `SCHEMA`; UserError for a file without its columns."""
    missing = [name for name in ("user", "rank", "item_id") if name not in recommendations.columns]
    if missing:
        raise UserError(f"{where}: lacks the column {missing[0]}; evaluate the run again")
    asked = pl.DataFrame({"user": pl.Series(test.users.tolist(), dtype=pl.String), "place": np.arange(len(test.users))})
    frame = recommendations.join(asked, on="user", how="inner").sort("place", "rank")
    return frame.with_columns(seed=pl.lit(seed)).select(pl.col(name).cast(kind) for name, kind in SCHEMA.items())


def read_frame(path: Path) -> tuple[pl.DataFrame, str]:
    """The lists of all seeds, and the SHA-256 of the file. UserError for what is no such file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); it belongs beside the JSON of the result") from None
    try:
        frame = pl.read_parquet(io.BytesIO(data))
    except PolarsError as error:
        raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); fetch it again") from None
    for name, kind in SCHEMA.items():
        if name not in frame.columns:
            raise UserError(f"{path}: lacks the column {name}; it needs {', '.join(SCHEMA)}")
        if frame[name].dtype != kind:
            raise UserError(f"{path}: column {name} holds {frame[name].dtype}, not {kind}; publish the runs again")
        if frame[name].null_count():
            raise UserError(f"{path}: row {frame[name].is_null().arg_max()} has no {name}; publish the runs again")
    return frame.select(list(SCHEMA)), hashlib.sha256(data).hexdigest()


def ranked_lists(frame: pl.DataFrame, test: TestSet, masked: bool, where: str) -> tuple[np.ndarray, list[str]]:
    """Lists of one seed as item indices.

    Args:
        frame: of the one seed, columns of `SCHEMA`.
        test: the users that must have a list, and no others.
        masked: whether items of the history may not be in it.
        where: for messages.

    Returns: int32 [U, 10], -1 after the end of a list; and a line for each kind of mistake with an example.
    Raises: UserError for a user or an item that the data do not have.
    """
    users = {str(user): at for at, user in enumerate(test.users)}
    items = {str(item): at for at, item in enumerate(test.dataset.item_ids)}
    rows = frame["user"].replace_strict(users, default=-1, return_dtype=pl.Int64).to_numpy()
    columns = frame["item_id"].replace_strict(items, default=-1, return_dtype=pl.Int64).to_numpy()
    for name, found in (("user", rows), ("item_id", columns)):
        if (found < 0).any():
            value = frame[name][int((found < 0).argmax())]
            known = "user with a test target" if name == "user" else "item"
            raise UserError(f"{where}: {name} {value!r} is no {known} of this data; mixed runs, or lists of other data")
    ranks = frame["rank"].to_numpy()
    out = np.full((len(test.users), LENGTH), -1, np.int32)
    usable = (ranks >= 1) & (ranks <= LENGTH)
    out[rows[usable], ranks[usable] - 1] = columns[usable]
    counts = np.bincount(rows, minlength=len(out))
    filled = (out >= 0).sum(axis=1)
    sound = np.arange(LENGTH) < counts[:, None]
    wrong = {
        "has no list": counts == 0,
        f"has ranks that are not 1, 2, ... up to {LENGTH}, each once": (filled != counts) | ((out >= 0) != sound).any(axis=1),
        "has an item twice": np.asarray([len(set(row[row >= 0].tolist())) < (row >= 0).sum() for row in out]),
    }
    if masked:
        seen = [bool(np.isin(row[row >= 0], history).any()) for row, history in zip(out, test.histories, strict=True)]
        wrong["has an item of the history"] = np.asarray(seen)
    return out, [
        f"{where}: user {test.users[int(found.argmax())]!r} {what} ({int(found.sum()):,} of {len(out):,} users)"
        for what, found in wrong.items()
        if found.any()
    ]
