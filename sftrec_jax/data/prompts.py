"""Histories to tokens: the prompt that asks for the next item, and the training examples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from sftrec_jax.config import PromptConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.segments import Example, Heads, Pieces, Segments
from sftrec_jax.data.told import NOTHING, Many, Told
from sftrec_jax.data.windows import Windows, back_to_back, one_by_one, with_history
from sftrec_jax.data.writers import Writer, make_writer
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 60
"""Characters of a title in messages."""


@dataclass(frozen=True, eq=False)
class PromptBuilder:
    """Writes histories in one format. Made by `prompt_builder`."""

    format: Literal["stream", "instruct"]
    windows: Literal["last", "all"]
    max_history: int
    stride: int
    context: int
    """Longest prompt with its answer, in tokens."""
    writer: Writer
    codes: ItemCodes
    """Answers."""
    counts: Counter[str] = field(default_factory=Counter)
    """What was written and what was left out so far:

    `prompts`, `prompts_cut_to_context`, `items_cut_to_context` (dropped though within `max_history`);
    `examples`, `targets`, `examples_cut_to_context`, `training_items_left_out` (training items that are no target).
    """

    @property
    def beginning(self) -> np.ndarray:
        """int32 tokens with which every prompt begins."""
        return self.writer.beginning

    @property
    def suffix(self) -> np.ndarray:
        """int32 tokens between history and target."""
        return self.writer.after

    def prompt(self, history: np.ndarray, told: Told = NOTHING) -> np.ndarray:
        """Tokens to feed for predicting the item after `history`.

        The newest `max_history` items are written; the oldest of them are dropped while the prompt and the longest item
        code exceed `context`. An item is never written in part.

        Args:
            history: int [h] item indices, oldest first; empty for a user without history.
            told: what the source tells of them and of the user.

        Returns: int32 [n].
        Raises: UserError where not even the newest item fits.
        """
        items = np.asarray(history)[max(0, len(history) - self.max_history) :]
        runs = self.writer.runs(items, told.last(len(items)))
        head = self.writer.head(told.profile)
        lengths = np.asarray([len(run) for run in runs], np.int64) + self._longest_number
        fit = int((np.cumsum(lengths[::-1]) + self._frame(head) <= self.context).sum())
        if len(items) and fit == 0:
            raise self._too_long(int(items[-1]))
        cut = len(items) - fit
        self.counts["prompts"] += 1
        self.counts["prompts_cut_to_context"] += cut > 0
        self.counts["items_cut_to_context"] += cut
        pieces = [head]
        for place, run in enumerate(runs[cut:]):
            pieces += [self.writer.numbers[place]] if self.writer.numbers else []
            pieces.append(run)
        return np.concatenate([*pieces, self.suffix])

    def segments(self, items: np.ndarray, histories: Windows, told: Many | None = None) -> Segments:
        """Training targets of many histories, those that are asked for with the same prompt's beginning in one segment.

        `stream`: a segment is a window of a history, every item in it a target. `instruct`: a target is a training item with a
        predecessor, and its prompt what `prompt` gives for the items before it; or, with `stride` above 1 and a history longer
        than `max_history` or the context, for fewer of them.

        Args:
            items: int32 [N] item indices of all histories, one after the other, oldest first.
            histories: where the training part of each begins and ends in `items`; those before `first` are context and no target.
            told: what the source tells of all interactions, and of the user of each history.

        Raises: UserError where a single item does not fit into the context.
        """
        told = Many(NOTHING) if told is None else told
        entries, runs, owners = self.writer.table(items, told.told)
        heads, head_of = self._heads(len(histories.begin), told)
        pieces = Pieces.of(heads, self.suffix, runs, self.codes.codes, owners, self.writer.numbers)
        sums = np.concatenate([[0], np.cumsum(np.diff(pieces.texts)[entries] + self._longest_number)])
        ends = histories.end
        if self.format == "stream":
            room = self.context - len(self.beginning) + 1  # the last token of a window is not fed
            windows = back_to_back(sums, histories, self.max_history, room, self.windows == "last")
            cut = (windows.end - windows.begin < self.max_history) & ~np.isin(windows.begin, histories.begin)
            too_long = windows.begin == windows.end
            examples, item = len(windows), windows.end - 1
        else:
            last_only = ends - self.max_history if self.windows == "last" else histories.begin
            first = np.maximum(histories.first, np.maximum(histories.begin + 1, last_only))
            wanted = Windows(histories.begin, np.minimum(first, ends), ends)
            rooms = self.context - np.asarray([self._frame(head) for head in heads], np.int64)[head_of]
            windows = with_history(sums, wanted, self.max_history, rooms, self.stride)
            too_long = windows.begin == windows.first
            examples, item = int((windows.end - windows.first).sum()), windows.first - 1
            free = with_history(sums, wanted, self.max_history, int(sums[-1]) * self.max_history, self.stride)
            # One that is too long ends the search for windows.
            cut = np.zeros(0) if too_long.any() else one_by_one(windows).begin > one_by_one(free).begin
        if too_long.any():
            raise self._too_long(int(items[item[too_long.argmax()]]))
        order = np.argsort(histories.begin, kind="stable")
        made = Segments(items, windows, pieces, entries, Heads(histories.begin[order], head_of[order]))
        targets = int(made.target_items.sum())
        self.counts["examples"] += examples
        self.counts["targets"] += int(made.targets.sum())
        self.counts["examples_cut_to_context"] += int(cut.sum())  # against the same windows in any number of tokens
        self.counts["training_items_left_out"] += int(np.maximum(ends - histories.first, 0).sum()) - targets
        return made

    def examples(self, train_history: np.ndarray, begin: int = 0) -> list[Example]:
        """The training examples of one history, each by itself; arguments and errors as `segments`."""
        items = np.asarray(train_history, np.int32)
        return self.examples_of(items, Windows(*(np.asarray([at], np.int64) for at in (0, begin, len(items)))))

    def examples_of(self, items: np.ndarray, histories: Windows) -> list[Example]:
        """The same of many histories; of what `segments` costs, much is for the catalogue and not for a history."""
        made = self.segments(items, histories)
        return (made if self.format == "stream" else made.apart()).examples()

    def written(self, item: int) -> np.ndarray:
        """int32 tokens of an item in a history of which nothing else is told, with what separates it from the next."""
        return self.writer.runs(np.asarray([item]))[0]

    @property
    def _longest_number(self) -> int:
        return max((len(number) for number in self.writer.numbers), default=0)

    def _heads(self, count: int, told: Many) -> tuple[list[np.ndarray], np.ndarray]:
        """Different heads, and which of them each of so many histories has (int64)."""
        numbers = np.zeros(count, np.int64)
        if told.profiles is None:
            return [self.writer.head({})], numbers
        places: dict[bytes, int] = {}
        heads: list[np.ndarray] = []
        for history, profile in enumerate(told.profiles):
            head = self.writer.head(profile)
            if (place := places.setdefault(head.tobytes(), len(heads))) == len(heads):
                heads.append(head)
            numbers[history] = place
        return heads, numbers

    def _frame(self, head: np.ndarray) -> int:
        """Tokens of a worded prompt without any item, and of the longest answer."""
        frame = len(head) + len(self.suffix) + self.codes.codes.shape[1]
        if frame > self.context:
            raise UserError(
                f"the prompt without any item and the answer take {frame} tokens but the context has {self.context} (the "
                "smaller of the model's and train.row_length); raise train.row_length, shorten prompt.prefix and "
                "prompt.suffix, or lower items.max_title_tokens"
            )
        return frame

    def _too_long(self, item: int) -> UserError:
        title = str(self.codes.titles[item])
        shown = title if len(title) <= SHOWN else f"{title[:SHOWN]}..."
        return UserError(
            f"item {shown!r} (row {item} of prepared/catalogue.parquet, from 0), the words around it and the answer do not fit "
            f"into the context of {self.context} tokens, the smaller of the model's and train.row_length; raise that, shorten "
            "the title in the catalogue or the words of the prompt, or write histories in item tokens"
        )


def prompt_builder(
    config: PromptConfig,
    codes: ItemCodes,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    dataset: Dataset | None = None,
    template: str | None = None,
) -> PromptBuilder:
    """The builder of a run.

    Args:
        config: the format.
        codes: tokens of every item.
        tokenizer: fast tokenizer, with or without the item tokens.
        context: most tokens that the model may see, answer included.
        dataset: what templates may name is what it has.
        template: a file in place of `prompt.prefix`, `separator`, `suffix` and `history`.

    Raises: UserError as `make_writer`.
    """
    return PromptBuilder(
        format=config.format,
        windows=config.windows,
        max_history=config.max_history,
        stride=config.stride,
        context=context,
        writer=make_writer(config, codes, tokenizer, dataset, template),
        codes=codes,
    )
