"""Histories to tokens: the prompt that asks for the next item, and the training examples.

Pieces (prefix, items, separators, suffix) are tokenised apart and joined, in training and inference alike, so a history
is the same tokens whichever item follows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from sftrec_jax.config import PromptConfig
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.encode import TitleEncoder, encode_apart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Example:
    """One training sequence. The hidden state at `target_positions[j]` predicts `labels[j]`; the last label is not fed."""

    tokens: np.ndarray
    """int32 [n]"""
    target_positions: np.ndarray
    """int32 [m], rising, below n"""
    labels: np.ndarray
    """int32 [m]"""
    weights: np.ndarray
    """float32 [m]"""


@dataclass(frozen=True, eq=False)
class PromptBuilder:
    """Writes histories in one format. Made by `prompt_builder`."""

    format: Literal["stream", "instruct"]
    history: Literal["titles", "tokens"]
    windows: Literal["last", "all"]
    max_history: int
    context: int
    """Longest prompt with its answer, in tokens."""
    bos: np.ndarray
    """int32 [0 or 1]"""
    prefix: np.ndarray
    separator: np.ndarray
    suffix: np.ndarray
    codes: ItemCodes
    encode: TitleEncoder
    counts: Counter[str] = field(default_factory=Counter)
    """What was written and what was left out so far:

    `prompts`, `prompts_cut_to_context`, `items_cut_to_context` (dropped though within `max_history`);
    `examples`, `targets`, `examples_cut_to_context`, `training_items_left_out` (training items that are no target).
    """
    _pieces: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def beginning(self) -> np.ndarray:
        """int32 tokens with which every prompt begins."""
        return np.concatenate([self.bos, self.prefix])

    def prompt(self, history: np.ndarray) -> np.ndarray:
        """Tokens to feed for predicting the item after `history`.

        The newest `max_history` items are written; the oldest of them are dropped while the prompt and the longest item
        code exceed `context`. An item is never written in part.

        Args:
            history: int [h] item indices, oldest first; empty for a user without history.

        Returns: int32 [n].
        Raises: UserError where not even the newest item fits.
        """
        items, cut = self._fitting(history)
        self.counts["prompts"] += 1
        self.counts["prompts_cut_to_context"] += cut > 0
        self.counts["items_cut_to_context"] += cut
        return self._write(items)

    def examples(self, train_history: np.ndarray, begin: int = 0) -> list[Example]:
        """Training examples of one user.

        `stream`: one example a window, every item in it a target. `instruct`: one example for each target, which is
        a training item with a predecessor; its prompt is what `prompt` gives for the items before it.

        Args:
            train_history: int [h] item indices of the user's training part, oldest first.
            begin: items before this position are context and no target (`Dataset.train_begin`).

        Raises: UserError where a single item does not fit into the context.
        """
        made = self._stream(train_history, begin) if self.format == "stream" else self._instruct(train_history, begin)
        self.counts["examples"] += len(made)
        self.counts["targets"] += sum(len(e.labels) for e in made)
        return made

    def _stream(self, history: np.ndarray, target_begin: int) -> list[Example]:
        lengths = self._lengths(history)
        made = []
        end = len(history)
        while end > target_begin:
            begin = max(0, end - self.max_history)
            fit = self._newest_that_fit(lengths[begin:end], len(self.bos) - 1)  # the last token of the window is not fed
            if fit == 0:
                raise self._too_long(int(history[end - 1]))
            self.counts["examples_cut_to_context"] += fit < end - begin
            begin = end - fit
            labels = self._items(history[begin:end])
            tokens = np.concatenate([self.bos, labels[:-1]])
            context = int(lengths[begin:target_begin].sum()) if begin < target_begin else 0
            made.append(_example(tokens, context, labels[context:]))
            end = begin
            if self.windows == "last":
                self.counts["training_items_left_out"] += max(0, begin - target_begin)
                break
        return made[::-1]

    def _instruct(self, history: np.ndarray, begin: int) -> list[Example]:
        first = max(begin, 1 if self.windows == "all" else max(1, len(history) - self.max_history))
        self.counts["training_items_left_out"] += min(first, len(history)) - min(begin, len(history))
        made = []
        for position in range(first, len(history)):
            items, cut = self._fitting(history[:position])
            self.counts["examples_cut_to_context"] += cut > 0
            prompt = self._write(items)
            labels = self._items(history[position : position + 1])
            made.append(_example(np.concatenate([prompt, labels[:-1]]), len(prompt) - 1, labels))
        return made

    def _fitting(self, history: np.ndarray) -> tuple[np.ndarray, int]:
        history = np.asarray(history)
        items = history[max(0, len(history) - self.max_history) :]
        lengths = self._lengths(items) + len(self.separator)
        frame = len(self.bos) + len(self.prefix) + len(self.suffix) + self.codes.codes.shape[1]
        if frame > self.context:
            raise UserError(
                f"the prompt without any item and the answer take {frame} tokens but the context has {self.context}; "
                "shorten prompt.prefix and prompt.suffix, or lower items.max_title_tokens"
            )
        fit = self._newest_that_fit(lengths, frame)
        if len(items) and fit == 0:
            raise self._too_long(int(items[-1]))
        return items[len(items) - fit :], len(items) - fit

    def _newest_that_fit(self, lengths: np.ndarray, frame: int) -> int:
        return int((np.cumsum(lengths[::-1]) + frame <= self.context).sum())

    def _write(self, items: np.ndarray) -> np.ndarray:
        pieces = [self.bos, self.prefix]
        for item in items:
            pieces += [self._item(int(item)), self.separator]
        return np.concatenate([*pieces, self.suffix])

    def _lengths(self, items: np.ndarray) -> np.ndarray:
        return np.asarray([len(self._item(int(i))) for i in items], np.int64)

    def _item(self, item: int) -> np.ndarray:
        tokens = self._pieces.get(item)
        if tokens is None:
            if self.format == "stream" or self.history == "tokens":
                tokens = self._items(np.asarray([item]))
            else:
                tokens = np.asarray(self.encode([str(self.codes.titles[item])])[0], np.int32)
            self._pieces[item] = tokens
        return tokens

    def _items(self, items: np.ndarray) -> np.ndarray:
        rows = self.codes.codes[items]
        return rows[rows >= 0]

    def _too_long(self, item: int) -> UserError:
        return UserError(
            f"item {str(self.codes.titles[item])!r} and the answer do not fit into the context of {self.context} tokens; "
            "shorten prompt.prefix, prompt.suffix or the title, or lower items.max_title_tokens"
        )


def prompt_builder(config: PromptConfig, codes: ItemCodes, tokenizer: PreTrainedTokenizerBase, context: int) -> PromptBuilder:
    """The builder of a run.

    Args:
        config: the format.
        codes: tokens of every item.
        tokenizer: fast tokenizer, with or without the item tokens.
        context: most tokens that the model may see, answer included.

    Raises: UserError for a `stream` with a tokenizer that has neither BOS nor EOS to begin with.
    """
    bos = tokenizer.bos_token_id
    stream = config.format == "stream"
    if stream and bos is None:
        bos = tokenizer.eos_token_id
        if bos is None:
            raise UserError("the tokenizer has neither BOS nor EOS to begin a stream with; use prompt.format: instruct")
    texts: Iterable[str] = ("", "", "") if stream else (config.prefix, config.separator, config.suffix)
    prefix, separator, suffix = (np.asarray(encode_apart(tokenizer, [t])[0] if t else [], np.int32) for t in texts)
    return PromptBuilder(
        format=config.format,
        history=config.history,
        windows=config.windows,
        max_history=config.max_history,
        context=context,
        bos=np.asarray([] if bos is None else [bos], np.int32),
        prefix=prefix,
        separator=separator,
        suffix=suffix,
        codes=codes,
        encode=TitleEncoder(tokenizer, codes.new_tokens),
    )


def _example(tokens: np.ndarray, first_target: int, labels: np.ndarray) -> Example:
    positions = np.arange(first_target, first_target + len(labels), dtype=np.int32)
    return Example(tokens.astype(np.int32), positions, labels.astype(np.int32), np.ones(len(labels), np.float32))
