"""Tasks between words and item tokens, so that tokens which the base has never seen take part in its language.

As in LC-Rec (Zheng et al. 2024, arXiv:2311.09049) and MiniOneRec (Kong et al. 2025, arXiv:2510.24431).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sftrec_jax.data.mixture import Pairs
from sftrec_jax.data.prompts import prompt_builder
from sftrec_jax.data.segments import Segments
from sftrec_jax.data.task_words import TaskWords
from sftrec_jax.data.templates import PromptTemplate, item_mark
from sftrec_jax.errors import UserError
from sftrec_jax.items.naming import title_codes

PAIRS = ("title_to_item", "item_to_title", "text_to_item", "item_to_text", "attribute_to_item")
SEQUENCES = ("titles_to_item", "items_to_title")


class ItemTasks:
    """Makes the examples."""

    def __init__(self, words: TaskWords):
        self.words, self.config, self.dataset, self.codes = words, words.config, words.dataset, words.codes

    def pairs(self, name: str) -> tuple[Pairs, str]:
        """One example an item; and what was left out."""
        field, values, templates = self._material(name)
        names_item = name.startswith("item_to")
        some = [i for i, value in enumerate(values) if value.strip()]
        said = [values[i] for i in some]
        answers = self.words.answers(said) if names_item else [self.words.item(i) for i in some]
        shown = [""] * len(some) if names_item else self.words.shortened(said)
        drawn = np.random.default_rng(self.config.train.seed).integers(len(templates), size=len(some))
        rendered = [
            templates[which].render({"item": item_mark(item)} if names_item else {field: value})
            for which, item, value in zip(drawn.tolist(), some, shown, strict=True)
        ]
        left = len(values) - len(some)
        return Pairs.of(self.words.prompts(rendered), answers, name), f"{left:,} items lack it" if left else ""

    def check(self, name: str) -> None:
        """UserError for fields that the data lack, and for templates that cannot be used."""
        if name in PAIRS:
            self._material(name)
            return
        prompt = self.config.prompt
        if name == "titles_to_item" and prompt.format == "instruct" and prompt.history == "titles" and not prompt.templates:
            raise UserError("tasks.titles_to_item is what prompt.history: titles trains already; set one of the two otherwise")

    def _material(self, name: str) -> tuple[str, list[str], list[PromptTemplate]]:
        """The field that a task pairs with items, its value of each item, and the templates."""
        names_item = name.startswith("item_to")
        field = name.removeprefix("item_to_") if names_item else name.removesuffix("_to_item")
        values = self._values(name, field)
        if not any(value.strip() for value in values):
            raise UserError(f"tasks.{name}: the catalogue says nothing of its items; name columns with data.text_columns")
        return field, values, self.words.templates(name, ("item",) if names_item else (field,))

    def sequence(self, name: str) -> tuple[Segments, str]:
        """A history in words and the next item in tokens, or the other way round."""
        self.check(name)
        prompt = self.config.prompt
        history = "titles" if name == "titles_to_item" else "tokens"
        suffix = "The next item:\n" if history == "titles" else "The title of the next item:\n"
        asked = dataclasses.replace(prompt, format="instruct", history=history, suffix=suffix, stride=1, templates=())
        codes, tokenizer = self.codes, self.words.tokenizer
        if history == "tokens":
            answers = title_codes(codes.titles, tokenizer, self.config.items.max_title_tokens, self.dataset.item_ids)
            codes = dataclasses.replace(codes, codes=answers.codes)
        # Written in the items' own tokens, answered in `codes`.
        builder = dataclasses.replace(prompt_builder(asked, self.codes, tokenizer, self.words.context), codes=codes)
        return builder.segments(self.dataset.items, self.dataset.training), ""

    def _values(self, task: str, field: str) -> list[str]:
        if field == "title":
            return [str(t) for t in self.codes.titles]
        if field == "text":
            return [] if self.dataset.text is None else [str(t) for t in self.dataset.text.texts]
        column = self.config.tasks.attribute
        known = ", ".join(self.dataset.item_fields) or "none"
        if column is None or column not in self.dataset.item_fields:
            raise UserError(f"tasks.{task}: tasks.attribute is {column}; name one of data.text_columns ({known})")
        return [str(value) for value in self.dataset.item_fields[column]]
