"""Alignment tasks: what an item's tokens have to do with words, trained beside the recommendation itself.

LC-Rec (Zheng et al. 2024, arXiv:2311.09049) and MiniOneRec (Kong et al. 2025, arXiv:2510.24431) mix such tasks, so that tokens
which the base has never seen take part in its language.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sftrec_jax.config import RunConfig, TasksConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.mixture import Pairs
from sftrec_jax.data.prompts import prompt_builder
from sftrec_jax.data.segments import Pieces, Segments
from sftrec_jax.data.templates import PromptTemplate, find_template
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.encode import TitleEncoder, one_line
from sftrec_jax.items.naming import title_codes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRS = ("title_to_item", "item_to_title", "text_to_item", "item_to_text")
SEQUENCES = ("titles_to_item", "items_to_title")
WORDED = ("title", "keyphrase")
"""Tokenisers that name items in words, for which these tasks say nothing."""


@dataclass(frozen=True, eq=False)
class Task:
    """Examples of one task."""

    name: str
    weight: float
    examples: Pairs | Segments
    left_out: int
    """Items that lack what the task is about."""


def wanted_tasks(config: TasksConfig) -> dict[str, float]:
    """Weights above 0, without that of `sequential`."""
    return {name: getattr(config, name) for name in (*PAIRS, *SEQUENCES) if getattr(config, name) > 0}


def make_tasks(
    config: RunConfig, dataset: Dataset, codes: ItemCodes, tokenizer: "PreTrainedTokenizerBase", context: int
) -> list[Task]:
    """The tasks that a config asks for beside `sequential`. From training interactions and the catalogue alone.

    Raises: UserError for a task whose fields the data lack, and where items are named in words already.
    """
    wanted = wanted_tasks(config.tasks)
    if wanted and config.items.tokenizer in WORDED:
        name = next(iter(wanted))
        raise UserError(f"tasks.{name}: items.tokenizer {config.items.tokenizer} names items in words already; set it to 0")
    maker = _Maker(config, dataset, codes, tokenizer, context)
    return [maker.pairs(n, w) if n in PAIRS else maker.sequence(n, w) for n, w in wanted.items()]


class _Maker:
    def __init__(self, config: RunConfig, dataset: Dataset, codes: ItemCodes, tokenizer: "PreTrainedTokenizerBase", context: int):
        self.config, self.dataset, self.codes, self.tokenizer, self.context = config, dataset, codes, tokenizer, context
        self.encode = TitleEncoder(tokenizer, codes.new_tokens)
        bos = tokenizer.bos_token_id
        self.bos = np.asarray([] if bos is None else [bos], np.int32)

    def pairs(self, name: str, weight: float) -> Task:
        """One example an item."""
        field = "text" if "text" in name else "title"
        values = self._texts() if field == "text" else [str(t) for t in self.codes.titles]
        some = [i for i, value in enumerate(values) if value.strip()]
        if not some:
            raise UserError(f"tasks.{name}: the catalogue says nothing of its items; name columns with data.text_columns")
        names_item = name.startswith("item_to")
        template = find_template(name, self.config.tasks.templates, ("item",) if names_item else (field,))
        answers = self._words([values[i] for i in some]) if names_item else [self._item(i) for i in some]
        prompts = self._prompts(template, field, [values[i] for i in some], some, names_item)
        return Task(name, weight, Pairs.of(prompts, answers, name), len(values) - len(some))

    def sequence(self, name: str, weight: float) -> Task:
        """A history in words and the next item in tokens, or the other way round."""
        prompt = self.config.prompt
        history = "titles" if name == "titles_to_item" else "tokens"
        if name == "titles_to_item" and prompt.format == "instruct" and prompt.history == "titles":
            raise UserError("tasks.titles_to_item is what prompt.history: titles trains already; set one of the two otherwise")
        suffix = "The next item:\n" if history == "titles" else "The title of the next item:\n"
        asked = dataclasses.replace(prompt, format="instruct", history=history, suffix=suffix, stride=1)
        codes = self.codes
        if history == "tokens":
            answers = title_codes(codes.titles, self.tokenizer, self.config.items.max_title_tokens, self.dataset.item_ids)
            codes = dataclasses.replace(codes, codes=answers.codes)
        builder = prompt_builder(asked, codes, self.tokenizer, self.context)
        if history == "tokens":  # written in item tokens, answered in words
            texts = [self._item(i) for i in range(len(self.codes.codes))]
            builder._pieces.append(Pieces.of(builder.beginning, builder.separator, builder.suffix, texts, codes.codes))
        return Task(name, weight, builder.segments(self.dataset.items, self.dataset.training), 0)

    def _texts(self) -> list[str]:
        text = self.dataset.text
        return [] if text is None else [str(t) for t in text.texts]

    def _item(self, item: int) -> np.ndarray:
        row = self.codes.codes[item]
        return row[row >= 0]

    def _words(self, values: list[str]) -> list[np.ndarray]:
        """Texts as answers: cut like titles, ended like them."""
        most = self.config.items.max_title_tokens
        end = title_codes(np.asarray(["x"], object), self.tokenizer).codes[0, -1]
        return [np.asarray([*(t for t in ids if t != end)][:most] + [int(end)], np.int32) for ids in self.encode(values)]

    def _shortened(self, values: list[str]) -> list[str]:
        """Texts on one line, without the last words of those that exceed `items.max_title_tokens` tokens."""
        most = self.config.items.max_title_tokens
        lines = [one_line(value) for value in values]
        for at, ids in enumerate(self.encode(lines)):
            words = lines[at].split()
            while len(ids) > most and len(words) > 1:
                words = words[: max(1, len(words) * most // len(ids))]
                ids = self.encode([" ".join(words)])[0]
            lines[at] = " ".join(words)
        return lines

    def _prompts(
        self, template: PromptTemplate, field: str, values: list[str], items: list[int], names_item: bool
    ) -> list[np.ndarray]:
        cut = values if names_item else self._shortened(values)
        pieces = [template.pieces({} if names_item else {field: value}) for value in cut]
        encoded = iter(self.encode.texts([piece for row in pieces for piece in row]))
        prompts = []
        for item, row in zip(items, pieces, strict=True):
            runs: list[np.ndarray] = [self.bos]
            for at in range(len(row)):
                runs += [self._item(item)] if at else []
                runs.append(np.asarray(next(encoded), np.int32))
            prompts.append(np.concatenate(runs).astype(np.int32))
        return prompts
