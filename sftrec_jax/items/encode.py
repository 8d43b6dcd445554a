"""Titles to token ids, each title apart, so that no merge crosses from one piece of a prompt to the next."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from sftrec_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LINE_BREAKS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
_CHUNK = 65_536


def one_line(title: str) -> str:
    """The title with each run of line breaks written as one space."""
    return _LINE_BREAKS.sub(" ", title)


def encode_apart(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text by itself, without BOS or EOS. Special tokens written in a text are read as such."""
    texts = list(texts)
    ids: list[list[int]] = []
    for start in range(0, len(texts), _CHUNK):
        ids += tokenizer(
            texts[start : start + _CHUNK],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    return ids


class TitleEncoder:
    """Token ids of titles as plain text, as the base model's tokenizer gives them.

    A title may happen to contain the spelling of a special token (`</s>`) or of a token in `reserved` (item tokens that
    were added to the vocabulary). It is catalogue text, not a command, so a private copy of the tokenizer is used that
    does not know the latter and reads the former letter by letter.

    Args:
        tokenizer: fast tokenizer, with or without the item tokens; it is not changed.
        reserved: tokens that were added to the base model's tokenizer.

    Raises: UserError for a tokenizer that is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reserved: Iterable[str] = ()) -> None:
        from transformers import PreTrainedTokenizerFast  # takes a second, and the caller has done it already

        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(f"the tokenizer is a {type(tokenizer).__name__}; use a model that has a tokenizer.json")
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        names = set(reserved)
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in names]
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """One list of ids a text, line breaks and all."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def __call__(self, titles: Sequence[str]) -> list[list[int]]:
        """One list of ids a title, line breaks read as spaces; empty for white space or where the tokenizer finds nothing."""
        ids = []
        for start in range(0, len(titles), _CHUNK):
            lines = [one_line(t) for t in titles[start : start + _CHUNK]]
            encoded = self._tokenizer.encode_batch_fast(lines, add_special_tokens=False)
            ids += [e.ids if line.strip() else [] for e, line in zip(encoded, lines, strict=True)]
        return ids
