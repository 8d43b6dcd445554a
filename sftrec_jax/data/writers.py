"""How a history becomes tokens: what stands before it, each item of it, and what stands between it and the target.

Pieces are tokenised apart and joined, in training and inference alike, so a history is the same tokens whichever item follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sftrec_jax.config import PromptConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.templates import HistoryTemplate, Parts, field_name, item_mark, plain
from sftrec_jax.data.told import NOTHING, Told, gap_words
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.encode import TitleEncoder, encode_apart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_MARK = "\ue002"


class Writer(ABC):
    """Token runs of prompts.

    Args:
        before: int32 tokens before everything.
        after: int32 tokens between history and target.
        items: tokens of every item.
        encode: words to tokens.
    """

    numbers: Sequence[np.ndarray] = ()
    """int32 tokens before the first, second, ... item of a prompt; empty: none."""
    per_item = True
    """Whether an item is written the same wherever it stands."""
    shows_titles = False
    """Whether words of titles stand in prompts."""
    told: Sequence[str] = ()
    """What it says of interactions beside items, by name."""
    profile: Sequence[str] = ()
    """What it says of users, by name."""

    def __init__(self, before: np.ndarray, after: np.ndarray, items: ItemCodes, encode: TitleEncoder):
        self.before, self.after, self.items, self.encode = before, after, items, encode
        self._known: dict[int, np.ndarray] = {}

    @property
    def beginning(self) -> np.ndarray:
        """int32 tokens with which every prompt begins."""
        return self.before

    def head(self, profile: Mapping[str, str]) -> np.ndarray:
        """int32 tokens before the first item, `before` included."""
        return self.before

    @abstractmethod
    def written(self, items: list[int], told: Sequence[Mapping[str, Any]] | None = None) -> list[np.ndarray]:
        """int32 tokens of items in a history, with what separates each from the next; `told` of each item."""

    def runs(self, items: np.ndarray, told: Told = NOTHING) -> list[np.ndarray]:
        """int32 tokens of the items of one history."""
        if not self.per_item:
            return self.written(items.tolist(), self._values(items, told))
        missing = [i for i in dict.fromkeys(items.tolist()) if i not in self._known]
        self._known.update(zip(missing, self.written(missing), strict=True))
        return [self._known[i] for i in items.tolist()]

    def table(self, items: np.ndarray, told: Told) -> tuple[np.ndarray, list[np.ndarray] | None, np.ndarray]:
        """What each interaction is written as: index int64 [N] into runs, the runs, the item of each run.

        Runs are None where a run is the item's tokens and nothing else.
        """
        if self.per_item:
            some, entries = np.unique(items, return_inverse=True)
            return entries.astype(np.int64), self.written(some.tolist()), some.astype(np.int64)
        values = self._values(items, told)
        keys = [(item, *value.values()) for item, value in zip(items.tolist(), values, strict=True)]
        first = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))
        place = {key: at for at, key in enumerate(first)}
        owners = [key[0] for key in first]
        runs = self.written(owners, [values[at] for at in first.values()])
        return np.asarray([place[key] for key in keys], np.int64), runs, np.asarray(owners, np.int64)

    def _values(self, items: np.ndarray, told: Told) -> list[dict[str, Any]]:
        return [{} for _ in range(len(items))]

    def _codes(self, item: int) -> np.ndarray:
        row = self.items.codes[item]
        return row[row >= 0]


class PlainWriter(Writer):
    """Titles, item tokens, or both, with one text behind each."""

    def __init__(self, before: np.ndarray, after: np.ndarray, items: ItemCodes, separator: np.ndarray, shown: str,
                 encode: TitleEncoder):  # fmt: skip
        super().__init__(before, after, items, encode)
        self.separator, self.shown, self.shows_titles = separator, shown, shown != "tokens"

    def written(self, items: list[int], told: Sequence[Mapping[str, Any]] | None = None) -> list[np.ndarray]:
        if self.shown == "tokens":
            return [np.concatenate([self._codes(i), self.separator]) for i in items]
        words = self.encode([str(self.items.titles[i]) for i in items])
        if self.shown == "titles":
            return [np.concatenate([np.asarray(w, np.int32), self.separator]) for w in words]
        space = np.asarray(self.encode.texts([" "])[0], np.int32)
        parts = ((np.asarray(w, np.int32), space, self._codes(i)) for w, i in zip(words, items, strict=True))
        return [np.concatenate([*part, self.separator]) for part in parts]

    def table(self, items: np.ndarray, told: Told) -> tuple[np.ndarray, list[np.ndarray] | None, np.ndarray]:
        if self.shown == "tokens" and not len(self.separator) and not len(self.after):
            return items.astype(np.int64), None, np.arange(len(self.items.codes))
        return super().table(items, told)


class TemplateWriter(Writer):
    """Blocks of a template."""

    def __init__(self, before: np.ndarray, after: np.ndarray, items: ItemCodes, template: HistoryTemplate,
                 catalogue: Mapping[str, np.ndarray], encode: TitleEncoder, most: int):  # fmt: skip
        super().__init__(before, after, items, encode)
        self.template, self.catalogue = template, catalogue
        self.after = np.concatenate([self._tokens("tail", {}), after])
        self.shows_titles = bool(template.uses("entry") & {"title", *catalogue})
        self.told = sorted(template.uses("entry") - {"item", "title", *catalogue})
        self.per_item = not self.told
        if template.uses("number"):
            self.numbers = [self._tokens("number", {"number": n + 1}) for n in range(most)]
        self.profile = sorted(template.uses("head"))
        self._head = self._tokens("head", dict.fromkeys(self.profile))

    @property
    def beginning(self) -> np.ndarray:
        """Where the head tells of the user, what stands before it."""
        return self.before if self.profile else self.head({})

    def head(self, profile: Mapping[str, str]) -> np.ndarray:
        if not self.profile:
            return np.concatenate([self.before, self._head])
        values = {name: plain(profile.get(name, "")) for name in self.profile}
        return np.concatenate([self.before, self._tokens("head", values)])

    def written(self, items: list[int], told: Sequence[Mapping[str, Any]] | None = None) -> list[np.ndarray]:
        rendered = []
        for place, item in enumerate(items):
            values = item_values(item, self.items, self.catalogue) | dict.fromkeys(self.told)
            rendered.append(self.template.render("entry", {**values, **({} if told is None else told[place])}))
        return to_tokens(rendered, self.encode, self.items)

    def _tokens(self, block: str, values: Mapping[str, Any]) -> np.ndarray:
        return to_tokens([self.template.render(block, values)], self.encode, self.items)[0]

    def _values(self, items: np.ndarray, told: Told) -> list[dict[str, Any]]:
        columns: dict[str, list[Any]] = {}
        for name in self.told:
            columns[name] = [None] * len(items)
            if name == "rating" and told.ratings is not None:
                columns[name] = [plain(value) for value in told.ratings.tolist()]
            elif name == "gap" and told.gaps is not None:
                columns[name] = [gap_words(value) if value >= 0 else None for value in told.gaps.tolist()]
            elif name == "date" and told.times is not None:
                columns[name] = [_date(value) for value in told.times.tolist()]
            elif name in told.texts:
                columns[name] = [plain(str(value)) for value in told.texts[name]]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def item_values(item: int, codes: ItemCodes, catalogue: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What templates may say of an item: `catalogue` columns, its title, its tokens."""
    values: dict[str, Any] = {name: plain(str(column[item])) for name, column in catalogue.items()}
    return values | {"title": plain(str(codes.titles[item])), "item": item_mark(item)}


def catalogue_fields(dataset: Dataset) -> dict[str, np.ndarray]:
    """Columns of the catalogue by the names that templates write."""
    fields = {field_name(name): values for name, values in dataset.item_fields.items()}
    return {name: values for name, values in fields.items() if name not in ("title", "item")}


def to_tokens(rendered: Sequence[Parts], encode: TitleEncoder, codes: ItemCodes) -> list[np.ndarray]:
    """int32 tokens of rendered templates, the words between items tokenised apart."""
    encoded = iter(encode.texts([part for parts in rendered for part in parts if isinstance(part, str)]))
    out = []
    for parts in rendered:
        runs = [codes.codes[part][codes.codes[part] >= 0] if isinstance(part, int) else next(encoded) for part in parts]
        out.append(np.concatenate([np.asarray(run, np.int32) for run in runs]))
    return out


def _date(seconds: int) -> str | None:
    try:
        return datetime.fromtimestamp(seconds, UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):
        return None


def make_writer(
    config: PromptConfig,
    codes: ItemCodes,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | None,
    template: str | None = None,
) -> Writer:
    """The writer of a run: the blocks of `template` (a file), or what `config` says.

    Args:
        dataset: what templates may name is what it has; not needed without a template.

    Raises: UserError for a `stream` with a tokenizer that has neither BOS nor EOS to begin with, and for a template that cannot
        be used.
    """
    encode = TitleEncoder(tokenizer, codes.new_tokens)
    bos = tokenizer.bos_token_id
    nothing = np.zeros(0, np.int32)
    if config.format == "stream":
        bos = tokenizer.eos_token_id if bos is None else bos
        if bos is None:
            raise UserError("the tokenizer has neither BOS nor EOS to begin a stream with; use prompt.format: instruct")
        return PlainWriter(np.asarray([bos], np.int32), nothing, codes, nothing, "tokens", encode)
    before, after = frame(config, tokenizer)
    if template is None:
        prefix, separator, suffix = _plain_texts(tokenizer, (config.prefix, config.separator, config.suffix))
        return PlainWriter(
            np.concatenate([before, prefix]), np.concatenate([suffix, after]), codes, separator, config.history, encode
        )
    assert dataset is not None
    catalogue = catalogue_fields(dataset)
    entry = ("title", "item", *catalogue, *(field_name(name) for name in dataset.interaction_fields))
    fields = {"head": tuple(dataset.profiles), "number": ("number",), "entry": entry, "tail": ()}
    hints = {
        "head": "; profile.columns, profile.favourites and profile.tags bring more",
        "entry": "; data.text_columns, data.rating_column, data.time_column and data.review_column bring more",
    }
    made = HistoryTemplate(Path(template), fields, hints)
    return TemplateWriter(before, after, codes, made, catalogue, encode, config.max_history)


def frame(config: PromptConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens before and after the words of every prompt: those of a chat, or BOS where the tokenizer has one."""
    bos = tokenizer.bos_token_id
    first, last = chat_frame(tokenizer, config.system) if config.chat else ([] if bos is None else [bos], [])
    return np.asarray(first, np.int32), np.asarray(last, np.int32)


def _plain_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[np.ndarray]:
    return [np.asarray(encode_apart(tokenizer, [t])[0] if t else [], np.int32) for t in texts]


def chat_frame(tokenizer: PreTrainedTokenizerBase, system: str | None) -> tuple[list[int], list[int]]:
    """Token ids before and after what the user says, as the tokenizer's chat template writes a conversation of one turn.

    Raises: UserError for a tokenizer without a chat template, and for one that does not write the user's words as they are.
    """
    if not tokenizer.chat_template:
        raise UserError("prompt.chat: the tokenizer has no chat template; use an instruct model, or prompt.chat: false")
    turns = [{"role": "user", "content": CHAT_MARK}]
    if system is not None:
        turns = [{"role": "system", "content": system}, *turns]
    try:
        # Models that think first are told not to.
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    except Exception as error:  # a template may raise anything
        raise UserError(f"prompt.chat: the chat template fails ({str(error).splitlines()[0]}); use prompt.chat: false") from None
    parts = str(text).split(CHAT_MARK)
    if len(parts) != 2:
        raise UserError("prompt.chat: the chat template does not write the user's words once; use prompt.chat: false")
    first, last = (encode_apart(tokenizer, [part])[0] if part else [] for part in parts)
    return first, last
