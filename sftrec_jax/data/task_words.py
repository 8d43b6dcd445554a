"""Words of tasks to tokens: prompts from templates within the context, answers that end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sftrec_jax.config import RunConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.templates import Parts, PromptTemplate, find_templates
from sftrec_jax.data.writers import catalogue_fields, frame, to_tokens
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.encode import TitleEncoder, one_line
from sftrec_jax.items.naming import terminator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TaskWords:
    """What all tasks of a run write with.

    Args:
        context: most tokens of a prompt with its answer.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, codes: ItemCodes, tokenizer: PreTrainedTokenizerBase, context: int):
        self.config, self.dataset, self.codes, self.tokenizer, self.context = config, dataset, codes, tokenizer, context
        self.encode = TitleEncoder(tokenizer, codes.new_tokens)
        self.catalogue = catalogue_fields(dataset)
        self.before, self.after = frame(config.prompt, tokenizer)

    @cached_property
    def end(self) -> int:
        """The token that ends an answer in words, as it ends titles."""
        return terminator(self.tokenizer)

    def templates(self, task: str, fields: Sequence[str], unseen: bool = False) -> list[PromptTemplate]:
        """Those of a task to train with, or those kept for evaluation."""
        return find_templates(task, self.config.tasks.templates, tuple(fields))[unseen]

    def item(self, item: int) -> np.ndarray:
        """int32 tokens of an item."""
        row = self.codes.codes[item]
        return row[row >= 0]

    def answers(self, values: Sequence[str]) -> list[np.ndarray]:
        """int32 tokens of texts: cut like titles, ended like them."""
        most = self.config.items.max_title_tokens
        return [np.asarray([t for t in ids if t != self.end][:most] + [self.end], np.int32) for ids in self.encode(values)]

    def read(self, tokens: np.ndarray) -> str:
        """The words of an answer, from its tokens (-1 and what follows the end are passed over)."""
        ids = tokens[tokens >= 0].tolist()
        until = ids.index(self.end) if self.end in ids else len(ids)
        return str(self.tokenizer.decode(ids[:until], skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()

    def shortened(self, values: Sequence[str]) -> list[str]:
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

    def prompts(self, rendered: Sequence[Parts]) -> list[np.ndarray]:
        """int32 tokens of rendered templates, framed as every prompt of the run is."""
        words = to_tokens(rendered, self.encode, self.codes)
        return [np.concatenate([self.before, run, self.after]).astype(np.int32) for run in words]

    def fitting(self, template: PromptTemplate, values: Mapping[str, Any], room: int) -> tuple[np.ndarray, int]:
        """The prompt with as many of the newest entries of `history` as fit `room` tokens, and how many were left out.

        Items are never written in part. Where none fits, the prompt is what it is without a history.
        """
        history = values.get("history", [])
        kept = len(history)
        while True:
            prompt = self.prompts([template.render({**values, "history": history[len(history) - kept :]})])[0]
            if len(prompt) <= room or kept == 0:
                return prompt, len(history) - kept
            # By tokens an item on average, then one by one.
            kept = min(kept - 1, kept * room // len(prompt))
