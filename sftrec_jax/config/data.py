"""Where interactions, the catalogue and what is known of users come from."""

from dataclasses import dataclass
from typing import Literal

from sftrec_jax.config.check import require


@dataclass(frozen=True)
class DataConfig:
    """Where interactions and the catalogue come from, and how they are filtered and split."""

    source: str = "movielens-latest-small"
    """`movielens-latest-small` (embedded), a file (.csv, .tsv, .parquet, .jsonl, .json, .inter, .txt), a folder of shards or of
    Hugging Face datasets, or `tfds:NAME[:SPLIT]`."""
    catalogue: str | None = None
    """One row an item (.csv, .tsv, .parquet, .jsonl, .item); null: the ids in the log serve as titles."""
    user_column: str = "user_id"
    """Column of the log that names the user."""
    item_column: str = "item_id"
    """Column of the log that names the item."""
    time_column: str | None = "timestamp"
    """Column of the log with the time (number or ISO date); null: rows of a user are in order already."""
    rating_column: str | None = None
    """Column of the log with a rating; null: none is read."""
    review_column: str | None = None
    """Column of the log with what the user wrote of the item; null: none is read."""
    summary_column: str | None = None
    """Column of the log with that in a few words."""
    explanation_column: str | None = None
    """Column of the log with why the user took the item."""
    catalogue_item_column: str = "item_id"
    """Column of the catalogue that names the item."""
    title_column: str = "title"
    """Column of the catalogue with the title."""
    keyphrase_column: str | None = None
    """Column of the catalogue with a keyphrase (`items.tokenizer: keyphrase`); null: none is read."""
    history_column: str | None = None
    """Column with the items before `item_column`, as a list: the sources then hold examples, split already, and filters, times
    and `split` do not apply (BIGRec, D3, MiniOneRec); null: the source is a log."""
    valid_source: str | None = None
    """Examples of validation, where `history_column` is set; `source` has those of train."""
    test_source: str | None = None
    """Examples of test, where `history_column` is set."""
    text_columns: tuple[str, ...] = ()
    """Columns of the catalogue that are joined to the text of an item (`embedding.text`), and that templates may name; empty: the
    title alone."""
    repair_text: bool = True
    """Mend HTML entities (`R&amp;B`) and UTF-8 that was once read as another encoding (`cafÃ©`) in titles and texts."""
    missing_items: Literal["error", "drop"] = "error"
    """Interactions with items that the catalogue lacks: an error, or left out and counted."""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """What numbers in `time_column` count."""
    min_rating: float | None = None
    """Interactions rated lower are left out; needs `rating_column`."""
    user_core: int = 3
    """Users with fewer interactions are left out (repeated together with `item_core` until stable)."""
    item_core: int = 0
    """Items with fewer interactions are left out, from the catalogue too; 0 keeps items that nobody took."""
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """`leave_one_out`: a user's last item is test, the one before validation. `temporal`: two global points in time."""
    valid_fraction: float = 0.1
    """Temporal split: share of interactions between the two points in time."""
    test_fraction: float = 0.1
    """Temporal split: share of interactions after the second point in time."""
    tie_seed: int = 0
    """Interactions of a user with equal times are ordered by a hash of (tie_seed, user, item)."""
    layout: str | None = None
    """Names of columns that a known source has: amazon2014, amazon2018, amazon2023, recbole, minionerec, d3, lcrec. Columns that
    are named here go before them."""

    def __post_init__(self) -> None:
        require(self.user_core >= 0, f"data.user_core is {self.user_core}; use 0 or more")
        require(self.item_core >= 0, f"data.item_core is {self.item_core}; use 0 or more")
        fractions = (self.valid_fraction, self.test_fraction)
        require(
            all(0 < f < 1 for f in fractions) and sum(fractions) < 1,
            f"data.valid_fraction {fractions[0]} and data.test_fraction {fractions[1]} must lie in (0, 1) and sum below 1",
        )
        require(
            self.min_rating is None or self.rating_column is not None,
            f"data.min_rating is {self.min_rating} but data.rating_column is not set; name the column",
        )
        require(
            self.history_column is not None
            or self.layout is not None
            or (self.valid_source is None and self.test_source is None),
            "data.valid_source or data.test_source is set but data.history_column is not; name the column with the histories",
        )


@dataclass(frozen=True)
class ProfileConfig:
    """What is known of users: fields that the head of a template may name, and that the tasks of profiles are about."""

    source: str | None = None
    """One row a user (.csv, .tsv, .parquet, .jsonl, .user); null: none is read."""
    user_column: str = "user_id"
    """Column of `source` that names the user."""
    columns: tuple[str, ...] = ()
    """Columns of `source` that become fields: age, occupation, free text."""
    favourites: str | None = None
    """One of `data.text_columns`, such as genres: the field `favourites` has the values that most of a user's training
    interactions have."""
    favourites_separator: str = "|"
    """What divides the values of that column."""
    favourites_count: int = 3
    """At most so many values."""
    tags: str | None = None
    """A log of tags with the columns `data.user_column`, `item_column` and (unless null) `time_column`: the field `tags` has
    those that a user gave to items of training, until the last training interaction. `movielens-latest-small`: embedded."""
    tag_column: str = "tag"
    """Column of `tags` with the words."""
    complete: str | None = None
    """A sparse field: what `filler` fills in where it is empty, and what the task `profile_completion` trains."""
    filler: str | None = None
    """Who fills in the field `complete` before anything is trained (LGIR): a base as in `model.base`, or the folder of a run over
    the same items that was trained for it; null: nobody."""
    filler_items: int = 20
    """At most so many of the newest training items are shown to it,"""
    filler_tokens: int = 24
    """and it writes at most so many tokens."""
    tags_count: int = 8
    """At most so many tags, the most frequent first."""

    def __post_init__(self) -> None:
        require(
            (self.source is None) == (not self.columns),
            f"profile.source is {self.source} and profile.columns {list(self.columns)}; set both, or neither",
        )
        for name in ("favourites_count", "tags_count", "filler_items", "filler_tokens"):
            require(getattr(self, name) >= 1, f"profile.{name} is {getattr(self, name)}; use 1 or more")
        require(self.favourites_separator != "", "profile.favourites_separator is empty; name what divides values, such as '|'")
        require(
            self.filler is None or self.complete is not None, "profile.filler is set but profile.complete is not; name a field"
        )
        own = [name for name, value in (("favourites", self.favourites), ("tags", self.tags)) if value is not None]
        for name in own:
            require(name not in self.columns, f"profile.columns has {name}, as profile.{name} has; leave one of the two out")
