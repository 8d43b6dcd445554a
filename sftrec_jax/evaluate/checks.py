"""Whether a data set can be evaluated at all: asked before anything is trained."""

from pathlib import Path

from sftrec_jax.config import RunConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.errors import UserError


def check_evaluable(where: Path, config: RunConfig, dataset: Dataset) -> None:
    """UserError for a data set of which `evaluate` can say nothing: no test target, or fewer items than `decode.top_k`.

    `where`: the run or the source, for messages.
    """
    check_targets(where, config, dataset)
    k, n_items = config.decode.top_k, len(dataset.item_ids)
    if k > n_items:
        raise UserError(
            f"decode.top_k is {k} but the catalogue has {n_items} items; set decode.top_k (and decode.beam) to at most {n_items}"
        )


def check_targets(where: Path, config: RunConfig, dataset: Dataset) -> None:
    """UserError where no user has a test target."""
    if (dataset.test_position >= 0).any():
        return
    users, split = len(dataset.user_ids), "given" if dataset.given else config.data.split
    longest = max((len(dataset.history(user)) for user in range(users)), default=0)
    if dataset.given:
        way_out = "set data.test_source to a file of test examples and prepare again"
    elif split == "temporal":
        way_out = "raise data.test_fraction, or set data.split: leave_one_out, and prepare again"
    else:
        lower = [f"data.item_core ({config.data.item_core})"] if config.data.item_core else []
        if config.data.min_rating is not None:
            lower.append(f"data.min_rating ({config.data.min_rating})")
        lowered = f"lower {' or '.join(lower)}, " if lower else ""
        way_out = (
            f"this split needs users with 3 interactions, which data.user_core ({config.data.user_core}) does not ask for; "
            f"{lowered}take a log with longer histories, or set data.split: temporal, and prepare again"
        )
    raise UserError(
        f"{where}: no user has a test target (split {split}, {users:,} users, longest history {longest} items); {way_out}"
    )
