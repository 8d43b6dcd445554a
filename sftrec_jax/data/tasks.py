"""What is trained beside the recommendation itself: which tasks a config asks for, and their examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftrec_jax.config import RunConfig, TasksConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.item_tasks import PAIRS, SEQUENCES, ItemTasks
from sftrec_jax.data.mixture import Pairs
from sftrec_jax.data.segments import Segments
from sftrec_jax.data.task_words import TaskWords
from sftrec_jax.data.user_tasks import KINDS, UserTasks
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDED = ("title", "keyphrase")
"""Tokenisers that name items in words, for which tasks between words and item tokens say nothing."""


@dataclass(frozen=True, eq=False)
class Task:
    """Examples of one task."""

    name: str
    weight: float
    examples: Pairs | Segments
    left_out: str
    """What has no example since it lacks what the task is about; empty: nothing."""


def wanted_tasks(config: TasksConfig) -> dict[str, float]:
    """Weights above 0, without that of `sequential`."""
    return {name: getattr(config, name) for name in (*PAIRS, *SEQUENCES, *KINDS) if getattr(config, name) > 0}


def make_tasks(
    config: RunConfig, dataset: Dataset, codes: ItemCodes, tokenizer: PreTrainedTokenizerBase, context: int
) -> list[Task]:
    """The tasks that a config asks for beside `sequential`. From training interactions, profiles and the catalogue alone.

    Raises: UserError for a task whose fields the data lack, for one between words and item tokens where items are named in
        words already, and for templates that cannot be used.
    """
    wanted = wanted_tasks(config.tasks)
    if not wanted:
        return []
    if config.profile.filler is not None and "profile_completion" in wanted:
        raise UserError("tasks.profile_completion would train on what profile.filler wrote; train it in a run without a filler")
    words = TaskWords(config, dataset, codes, tokenizer, context)
    of_items, of_users = ItemTasks(words), UserTasks(words)
    made = []
    for name, weight in wanted.items():
        if name in KINDS:
            made.append(Task(name, weight, *of_users.examples(name)))
            continue
        if config.items.tokenizer in WORDED:
            raise UserError(f"tasks.{name}: items.tokenizer {config.items.tokenizer} names items in words already; set it to 0")
        made.append(Task(name, weight, *(of_items.pairs(name) if name in PAIRS else of_items.sequence(name))))
    return made
