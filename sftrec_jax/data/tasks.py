"""What is trained beside the recommendation itself: which tasks a config asks for, and their examples."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sftrec_jax.config import RunConfig, TasksConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.item_tasks import PAIRS, SEQUENCES, ItemTasks
from sftrec_jax.data.mixture import Pairs
from sftrec_jax.data.segments import Segments
from sftrec_jax.data.task_words import TaskWords
from sftrec_jax.data.user_tasks import FILLER, KINDS, UserTasks
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDED = ("title", "keyphrase")
"""Tokenisers that name items in words, for which tasks between words and item tokens say nothing."""
ALIKE = 0.8
"""A template whose name is so much like a task's is taken for a slip of the pen; others in its folder may be of prompts."""


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
    words = TaskWords(config, dataset, codes, tokenizer, context)
    of_items, of_users = ItemTasks(words), UserTasks(words)
    check_tasks(config, dataset, codes, tokenizer, context)
    made = []
    for name, weight in wanted_tasks(config.tasks).items():
        if name in KINDS:
            made.append(Task(name, weight, *of_users.examples(name)))
        else:
            made.append(Task(name, weight, *(of_items.pairs(name) if name in PAIRS else of_items.sequence(name))))
    return made


def check_tasks(config: RunConfig, dataset: Dataset, codes: ItemCodes, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    """Raises what `make_tasks` would of fields and templates, without writing an example; and for templates of no task."""
    wanted = wanted_tasks(config.tasks)
    if config.tasks.templates is not None:
        known = (*PAIRS, *SEQUENCES, *KINDS, FILLER)
        for path in sorted(Path(config.tasks.templates).glob("*.j2")):
            task = path.name.split(".")[0]
            near = [] if task in known else difflib.get_close_matches(task, known, n=1, cutoff=ALIKE)
            if near:
                raise UserError(
                    f"{path}: there is no task {task!r}, so it would not be used; name it {near[0]}.j2 or {near[0]}.*.j2"
                )
    if config.profile.filler is not None and "profile_completion" in wanted:
        raise UserError("tasks.profile_completion would train on what profile.filler wrote; train it in a run without a filler")
    words = TaskWords(config, dataset, codes, tokenizer, context)
    of_items, of_users = ItemTasks(words), UserTasks(words)
    for name in wanted:
        in_words = KINDS[name].answer != "item" if name in KINDS else name.startswith(("item_to", "items_to"))
        if in_words and config.train.normaliser == "level":
            raise UserError(
                f"tasks.{name} answers in words, but train.normaliser: level trains item tokens alone; set it to full"
            )
        if name in KINDS:
            for unseen in (False, True):
                of_users.templates(name, unseen)
            continue
        if config.items.tokenizer in WORDED:
            raise UserError(f"tasks.{name}: items.tokenizer {config.items.tokenizer} names items in words already; set it to 0")
        of_items.check(name)
