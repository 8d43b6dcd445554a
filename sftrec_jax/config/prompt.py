"""What is asked, and what is answered."""

import math
from dataclasses import dataclass
from typing import Literal

from sftrec_jax.config.check import require


@dataclass(frozen=True)
class PromptConfig:
    """How a history is written, and what is a target."""

    format: Literal["stream", "instruct"] = "stream"
    """`stream`: item tokens only, every item a target. `instruct`: a worded prompt, then one target."""
    max_history: int = 100
    """At most this many of the newest items go into a prompt."""
    windows: Literal["last", "all"] = "all"
    """Training on histories longer than `max_history`: the `last` window only, or `all` of them, from the newest back."""
    history: Literal["titles", "tokens", "both"] = "titles"
    """`instruct`: items of the history as titles, as item tokens, or as a title and its tokens."""
    prefix: str = "Items that the user took, oldest first:\n"
    """`instruct`: text before the history."""
    separator: str = "\n"
    """`instruct`: text after each item of the history."""
    suffix: str = "The next item:\n"
    """`instruct`: text between history and target."""
    stride: int = 1
    """`instruct`, targets with more than `max_history` items before them: by how many items the beginning of their prompts moves
    at once. 1: each sees the newest `max_history`, as in inference; half of that: half of it to all, and neighbours share."""
    templates: tuple[str, ...] = ()
    """`instruct`: Jinja files such as those in configs/prompts, in place of `prefix`, `separator`, `suffix` and `history`. Of
    several, an epoch draws one for each history; recommending uses the first."""
    chat: bool = False
    """`instruct`: as what a user says to the model, in the tokenizer's chat template."""
    system: str | None = None
    """`chat`: what the system says before."""

    def __post_init__(self) -> None:
        require(self.max_history >= 1, f"prompt.max_history is {self.max_history}; use 1 or more")
        require(
            1 <= self.stride <= self.max_history,
            f"prompt.stride is {self.stride}; use 1 to prompt.max_history ({self.max_history}) items",
        )
        for name in ("templates", "chat"):
            require(
                self.format == "instruct" or not getattr(self, name),
                f"prompt.{name} is set, but prompt.format is stream, which has no words; use prompt.format: instruct",
            )
        require(self.system is None or self.chat, "prompt.system is set but prompt.chat is not; set prompt.chat: true")


@dataclass(frozen=True)
class TasksConfig:
    """What is trained, and how often an epoch sees each example: 1 once, 0.5 half of them, 2 each twice, 0 never."""

    sequential: float = 1.0
    """The next item of a history, as `prompt` says: what recommending asks for."""
    title_to_item: float = 0.0
    """An item's tokens from its title,"""
    item_to_title: float = 0.0
    """and its title from its tokens."""
    text_to_item: float = 0.0
    """An item's tokens from what `data.text_columns` say of it,"""
    item_to_text: float = 0.0
    """and that from its tokens, cut at `items.max_title_tokens`."""
    titles_to_item: float = 0.0
    """The next item's tokens after a history in titles,"""
    items_to_title: float = 0.0
    """and the next item's title after a history in item tokens."""
    attribute_to_item: float = 0.0
    """An item's tokens from what the column `attribute` says of it."""
    direct: float = 0.0
    """The next item among `candidates` that the prompt lists."""
    rating: float = 0.0
    """What the user will rate an item, after a history."""
    review_to_rating: float = 0.0
    """What the user rated an item, from the review,"""
    review_to_summary: float = 0.0
    """the review in a few words,"""
    review_to_item: float = 0.0
    """and the item that the review is of."""
    explanation: float = 0.0
    """Why the user took an item."""
    profile_to_item: float = 0.0
    """An item that the user took, from the profile alone."""
    profile_completion: float = 0.0
    """The field `profile.complete` of a profile, from the history."""
    attribute: str | None = None
    """`attribute_to_item`: one of `data.text_columns`."""
    candidates: int = 20
    """`direct`: items that a prompt lists, the next one among them."""
    targets_per_user: int = 5
    """`direct`, `rating`, `profile_to_item`: at most so many training interactions of a user, drawn by `train.seed`."""
    templates: str | None = None
    """Folder with Jinja templates in place of the built-in ones: `rating.j2`, or several `rating.NAME.j2`, of which examples draw
    one each; `rating.unseen.j2` is asked with in evaluation alone."""

    def __post_init__(self) -> None:
        settings = ("attribute", "candidates", "targets_per_user", "templates")
        weights = {name: value for name, value in vars(self).items() if name not in settings}
        for name, value in weights.items():
            require(value >= 0 and math.isfinite(value), f"tasks.{name} is {value}; use a weight of 0 or more")
        require(sum(weights.values()) > 0, "tasks: every weight is 0, so nothing would be trained; set tasks.sequential to 1")
        require(self.candidates >= 2, f"tasks.candidates is {self.candidates}; use 2 or more")
        require(self.targets_per_user >= 1, f"tasks.targets_per_user is {self.targets_per_user}; use 1 or more")
