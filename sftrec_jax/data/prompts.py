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
from sftrec_jax.data.segments import Example, Pieces, Segments
from sftrec_jax.data.windows import Windows, back_to_back, one_by_one, with_history
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.encode import TitleEncoder, encode_apart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class PromptBuilder:
    """Writes histories in one format. Made by `prompt_builder`."""

    format: Literal["stream", "instruct"]
    history: Literal["titles", "tokens"]
    windows: Literal["last", "all"]
    max_history: int
    stride: int
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
    _texts: dict[int, np.ndarray] = field(default_factory=dict, repr=False)
    _pieces: list[Pieces] = field(default_factory=list, repr=False)

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

    def segments(self, items: np.ndarray, histories: Windows) -> Segments:
        """Training targets of many histories, those that are asked for with the same prompt's beginning in one segment.

        `stream`: a segment is a window of a history, every item in it a target. `instruct`: a target is a training item with a
        predecessor, and its prompt what `prompt` gives for the items before it; or, with `stride` above 1 and a history longer
        than `max_history` or the context, for fewer of them.

        Args:
            items: int32 [N] item indices of all histories, one after the other, oldest first.
            histories: where the training part of each begins and ends in `items`; those before `first` are context and no target.

        Raises: UserError where a single item does not fit into the context.
        """
        sums = np.concatenate([[0], np.cumsum(np.diff(self.pieces.texts)[items] + len(self.separator))])
        ends = histories.end
        if self.format == "stream":
            room = self.context - len(self.bos) + 1  # the last token of a window is not fed
            windows = back_to_back(sums, histories, self.max_history, room, self.windows == "last")
            cut = (windows.end - windows.begin < self.max_history) & ~np.isin(windows.begin, histories.begin)
            too_long = windows.begin == windows.end
            examples, item = len(windows), windows.end - 1
        else:
            last_only = ends - self.max_history if self.windows == "last" else histories.begin
            first = np.maximum(histories.first, np.maximum(histories.begin + 1, last_only))
            wanted = Windows(histories.begin, np.minimum(first, ends), ends)
            windows = with_history(sums, wanted, self.max_history, self.context - self._frame(), self.stride)
            too_long = windows.begin == windows.first
            examples, item = int((windows.end - windows.first).sum()), windows.first - 1
            free = with_history(sums, wanted, self.max_history, int(sums[-1]) * self.max_history, self.stride)
            # One that is too long ends the search for windows.
            cut = np.zeros(0) if too_long.any() else one_by_one(windows).begin > one_by_one(free).begin
        if too_long.any():
            raise self._too_long(int(items[item[too_long.argmax()]]))
        made = Segments(items, windows, self.pieces)
        targets = int(made.target_items.sum())
        self.counts["examples"] += examples
        self.counts["targets"] += int(made.targets.sum())
        self.counts["examples_cut_to_context"] += int(cut.sum())  # against the same windows in any number of tokens
        self.counts["training_items_left_out"] += int(np.maximum(ends - histories.first, 0).sum()) - targets
        return made

    def examples(self, train_history: np.ndarray, begin: int = 0) -> list[Example]:
        """The training examples of one history, each by itself; arguments and errors as `segments`."""
        items = np.asarray(train_history, np.int32)
        histories = Windows(*(np.asarray([at], np.int64) for at in (0, begin, len(items))))
        made = self.segments(items, histories)
        return (made if self.format == "stream" else made.apart()).examples()

    def written(self, item: int) -> np.ndarray:
        """int32 tokens of an item in a history, with the separator after it."""
        return np.concatenate([self._item(item), self.separator])

    @property
    def pieces(self) -> Pieces:
        """What segments are written from; made once."""
        if not self._pieces:
            texts = None
            if self.format == "instruct" and self.history == "titles":
                texts = [np.asarray(t, np.int32) for t in self.encode([str(t) for t in self.codes.titles])]
            self._pieces.append(Pieces.of(self.beginning, self.separator, self.suffix, texts, self.codes.codes))
        return self._pieces[0]

    def _frame(self) -> int:
        """Tokens of a worded prompt without any item, and of the longest answer."""
        frame = len(self.bos) + len(self.prefix) + len(self.suffix) + self.codes.codes.shape[1]
        if frame > self.context:
            raise UserError(
                f"the prompt without any item and the answer take {frame} tokens but the context has {self.context} (the "
                "smaller of the model's and train.row_length); raise train.row_length, shorten prompt.prefix and "
                "prompt.suffix, or lower items.max_title_tokens"
            )
        return frame

    def _fitting(self, history: np.ndarray) -> tuple[np.ndarray, int]:
        history = np.asarray(history)
        items = history[max(0, len(history) - self.max_history) :]
        lengths = self._lengths(items) + len(self.separator)
        frame = self._frame()
        fit = self._newest_that_fit(lengths, frame)
        if len(items) and fit == 0:
            raise self._too_long(int(items[-1]))
        return items[len(items) - fit :], len(items) - fit

    def _newest_that_fit(self, lengths: np.ndarray, frame: int) -> int:
        return int((np.cumsum(lengths[::-1]) + frame <= self.context).sum())

    def _write(self, items: np.ndarray) -> np.ndarray:
        pieces = [self.bos, self.prefix]
        for item in items:
            pieces.append(self.written(int(item)))
        return np.concatenate([*pieces, self.suffix])

    def _lengths(self, items: np.ndarray) -> np.ndarray:
        return np.asarray([len(self._item(int(i))) for i in items], np.int64)

    def _item(self, item: int) -> np.ndarray:
        tokens = self._texts.get(item)
        if tokens is None:
            if self.format == "stream" or self.history == "tokens":
                tokens = self._items(np.asarray([item]))
            else:
                tokens = np.asarray(self.encode([str(self.codes.titles[item])])[0], np.int32)
            self._texts[item] = tokens
        return tokens

    def _items(self, items: np.ndarray) -> np.ndarray:
        rows = self.codes.codes[items]
        return rows[rows >= 0]

    def _too_long(self, item: int) -> UserError:
        return UserError(
            f"item {str(self.codes.titles[item])!r} and the answer do not fit into the context of {self.context} tokens, the "
            "smaller of the model's and train.row_length; raise that, shorten prompt.prefix, prompt.suffix or titles, or lower "
            "items.max_title_tokens"
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
        stride=config.stride,
        context=context,
        bos=np.asarray([] if bos is None else [bos], np.int32),
        prefix=prefix,
        separator=separator,
        suffix=suffix,
        codes=codes,
        encode=TitleEncoder(tokenizer, codes.new_tokens),
    )
