"""Tasks about what users do with items: choosing among candidates, ratings, reviews, explanations, profiles.

P5's families (Geng et al. 2022, arXiv:2203.13366) and LGIR's completion of sparse profiles (Du et al. 2024, arXiv:2307.10747).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sftrec_jax.data.mixture import Pairs
from sftrec_jax.data.task_words import TaskWords
from sftrec_jax.data.templates import PromptTemplate, plain
from sftrec_jax.data.told import gap_words
from sftrec_jax.data.writers import item_values
from sftrec_jax.errors import UserError

Answer = Literal["item", "rating", "summary", "explanation", "profile"]
IN_WORDS = ("summary", "explanation", "profile")
"""Answers that are scored by what they share with what people wrote."""
HELD_OUT_PROFILES = 5
"""Of the users with the field that `profile_completion` is about, one in so many is kept for evaluation."""


@dataclass(frozen=True)
class Kind:
    """What a task asks and what it answers."""

    answer: Answer
    target: tuple[str, ...] = ()
    """What its templates may say of the target: `item` (its fields), and what the user gave it."""
    history: bool = False
    candidates: bool = False
    every: bool = False
    """Every training interaction that has the fields is an example; else some of each user."""


KINDS = {
    "direct": Kind("item", history=True, candidates=True),
    "rating": Kind("rating", ("item",), history=True),
    "review_to_rating": Kind("rating", ("item", "review"), every=True),
    "review_to_summary": Kind("summary", ("item", "review"), every=True),
    "review_to_item": Kind("item", ("review",), every=True),
    "explanation": Kind("explanation", ("item", "rating"), every=True),
    "profile_to_item": Kind("item"),
    "profile_completion": Kind("profile", history=True),
}
FILLER = "filler"
"""The template that asks a base to do what `profile_completion` trains; no task."""
TOLD = ("rating", "review", "summary", "explanation")
"""What a source may tell of interactions; the column of each is named by data.NAME_column."""


@dataclass(frozen=True)
class Asked:
    """One question: what user `user` does with the item at `at` in the history, told what was before."""

    user: int
    at: int
    answer: str | int
    """Words, or an item."""


def kind_of(name: str) -> Kind:
    """What a task, or the filler, asks and answers."""
    return KINDS["profile_completion" if name == FILLER else name]


class UserTasks:
    """Makes examples for training, and questions for evaluation."""

    def __init__(self, words: TaskWords):
        self.words, self.config, self.dataset, self.codes = words, words.config, words.dataset, words.codes
        self.history_fields = ("title", "item", *words.catalogue, *self.dataset.interaction_fields)

    def examples(self, name: str) -> tuple[Pairs, str]:
        """Prompts with answers from training interactions; and what was left out."""
        templates = self.templates(name)
        self.templates(name, unseen=True)  # an error now and not after training
        asked, left_out = self._training(name)
        if not asked:
            raise UserError(f"tasks.{name}: no training interaction has what it is about; set it to 0")
        rng = np.random.default_rng([self.config.train.seed, *name.encode()])
        drawn = rng.integers(len(templates), size=len(asked))
        answers = self.answers(asked)
        longest = max(len(answer) for answer in answers)
        prompts = [
            self.prompt(name, templates[which], one, longest, rng)[0] for which, one in zip(drawn.tolist(), asked, strict=True)
        ]
        return Pairs.of(prompts, answers, name), left_out

    def templates(self, name: str, unseen: bool = False) -> list[PromptTemplate]:
        """UserError for a task whose fields the data lack."""
        self._check(name)
        return self.words.templates(name, self.fields(name), unseen)

    def fields(self, name: str) -> tuple[str, ...]:
        """What templates of a task may name."""
        kind = kind_of(name)
        own: list[str] = ["history"] if kind.history else []
        own += ["candidates"] if kind.candidates else []
        for field in kind.target:
            own += ["title", "item", *self.words.catalogue] if field == "item" else [field]
        own += ["examples"] if name == FILLER else []
        return (*own, "profile", *self._shown(name))

    def _shown(self, name: str) -> list[str]:
        """Fields of profiles that a task may see."""
        hidden = self.config.profile.complete if kind_of(name).answer == "profile" else None
        return [field for field in self.dataset.profiles if field != hidden]

    def held_out(self, name: str, users: int | None, seed: int) -> list[Asked]:
        """Questions that no training example answers: about test interactions, or profiles of users kept for this."""
        if kind_of(name).answer == "profile":
            asked = [one for one in self._profiles() if self._kept(one.user)]
        else:
            positions = self.dataset.test_position
            asked = [
                one for user in np.flatnonzero(positions >= 0).tolist() for one in self._ask(name, user, int(positions[user]))
            ]
        if users is not None and len(asked) > users:
            chosen = np.sort(np.random.default_rng(seed).choice(len(asked), users, replace=False))
            asked = [asked[i] for i in chosen]
        return asked

    def prompt(
        self,
        name: str,
        template: PromptTemplate,
        one: Asked,
        answer_tokens: int,
        rng: np.random.Generator,
        more: Mapping[str, Any] | None = None,
    ) -> tuple[np.ndarray, list[int]]:
        """int32 tokens of a question, and the candidates that it lists; `more` values for the template.

        Raises: UserError where it does not fit the context without any history.
        """
        kind = kind_of(name)
        values: dict[str, Any] = self.profile(name, one.user)
        values |= more or {}
        item = int(self.dataset.items[self.dataset.offsets[one.user] + one.at]) if kind.answer != "profile" else -1
        place = int(self.dataset.offsets[one.user]) + one.at
        for field in kind.target:
            values |= (
                item_values(item, self.codes, self.words.catalogue) if field == "item" else {field: self._remark(field, place)}
            )
        if kind.history:
            values["history"] = self.entries(one.user, one.at)
        candidates = self._candidates(one, item, rng) if kind.candidates else []
        if kind.candidates:
            values["candidates"] = [item_values(i, self.codes, self.words.catalogue) for i in candidates]
        room = self.words.context - answer_tokens
        prompt, _ = self.words.fitting(template, values, room)
        if len(prompt) > room:
            raise UserError(
                f"tasks.{name}: a prompt takes {len(prompt)} tokens and answers up to {answer_tokens}, but the context has "
                f"{self.words.context} (the smaller of the model's and train.row_length); raise train.row_length"
                + (", or lower tasks.candidates" if kind.candidates else "")
            )
        return prompt, candidates

    def profile(self, name: str, user: int) -> dict[str, Any]:
        """The fields of a user's profile that a task may see, and all that are known as one text, `profile`."""
        known = self.dataset.profile(user)
        values = {field: plain(known[field]) for field in self._shown(name)}
        return values | {"profile": "; ".join(f"{field}: {text}" for field, text in values.items() if text) or None}

    def entries(self, user: int, end: int) -> list[dict[str, Any]]:
        """The newest `prompt.max_history` items before `end`, as templates name them."""
        begin = max(0, end - self.config.prompt.max_history)
        data = self.dataset
        told = data.told(user, end).last(end - begin)
        out = []
        for place, item in enumerate(data.history(user)[begin:end].tolist()):
            entry = item_values(item, self.codes, self.words.catalogue)
            if told.ratings is not None:
                entry["rating"] = plain(float(told.ratings[place]))
            if told.gaps is not None:
                gap = int(told.gaps[place])
                entry["gap"] = gap_words(gap) if gap >= 0 else None
            out.append(entry | {name: plain(str(values[place])) for name, values in told.texts.items()})
        return out

    def answers(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """int32 tokens."""
        words = iter(self.words.answers([one.answer for one in asked if isinstance(one.answer, str)]))
        return [self.words.item(one.answer) if isinstance(one.answer, int) else next(words) for one in asked]

    def _check(self, name: str) -> None:
        kind = kind_of(name)
        needed = [field for field in (kind.answer, *kind.target) if field in TOLD]
        for field in needed:
            # An explanation may go without the rating.
            if field not in self.dataset.interaction_fields and (field == kind.answer or field != "rating"):
                raise UserError(
                    f"tasks.{name}: the data have no {field}; name its column with data.{field}_column, or set it to 0"
                )
        if kind.answer == "profile":
            field = self.config.profile.complete
            if field is None or field not in self.dataset.profiles:
                known = ", ".join(self.dataset.profiles) or "none"
                raise UserError(f"tasks.{name}: profile.complete is {field}; name the field to fill in ({known})")
        if name == "profile_to_item" and not self.dataset.profiles:
            raise UserError(f"tasks.{name}: nothing is known of users; set profile.columns, profile.favourites or profile.tags")

    def _training(self, name: str) -> tuple[list[Asked], str]:
        kind, data = kind_of(name), self.dataset
        if kind.answer == "profile":
            asked = [one for one in self._profiles() if not self._kept(one.user)]
            return asked, f"{len(data.user_ids) - len(asked):,} users lack it or are kept for evaluation"
        asked, lacking = [], 0
        rng = np.random.default_rng([self.config.train.seed, *name.encode(), 1])
        for user in range(len(data.user_ids)):
            first = max(int(data.train_begin[user]), int(kind.history))
            places = np.arange(first, int(data.train_end[user]))
            if not kind.every and len(places) > self.config.tasks.targets_per_user:
                places = np.sort(rng.choice(places, self.config.tasks.targets_per_user, replace=False))
            for at in places.tolist():
                found = list(self._ask(name, user, at))
                asked += found
                lacking += not found
        return asked, f"{lacking:,} interactions or profiles lack it" if lacking else ""

    def _ask(self, name: str, user: int, at: int) -> Iterator[Asked]:
        """The question about one interaction; none where it lacks what the task needs."""
        kind, place = kind_of(name), int(self.dataset.offsets[user]) + at
        if name == "profile_to_item" and not any(self.dataset.profile(user).values()):
            return
        if any(self._remark(field, place) is None for field in kind.target if field not in ("item", "rating")):
            return
        if kind.answer == "item":
            yield Asked(user, at, int(self.dataset.items[place]))
        elif (answer := self._remark(kind.answer, place)) is not None:
            yield Asked(user, at, str(answer))

    def _profiles(self) -> list[Asked]:
        field = self.config.profile.complete
        assert field is not None
        texts = self.dataset.profiles[field]
        return [Asked(user, int(self.dataset.train_end[user]), str(text)) for user, text in enumerate(texts) if text]

    def _kept(self, user: int) -> bool:
        rng = np.random.default_rng([self.config.train.seed, user])
        return int(rng.integers(HELD_OUT_PROFILES)) == 0

    def _remark(self, field: str, place: int) -> Any:
        if field == "rating":
            return None if self.dataset.ratings is None else plain(float(self.dataset.ratings[place]))
        return plain(str(self.dataset.remarks[field][place])) if field in self.dataset.remarks else None

    def _candidates(self, one: Asked, item: int, rng: np.random.Generator) -> list[int]:
        """The item among others that the user did not take in training, in random order."""
        n_items, wanted = len(self.codes.codes), self.config.tasks.candidates
        taken = {item, *self.dataset.train_history(one.user).tolist()}
        others = np.asarray([i for i in rng.permutation(n_items)[: wanted + len(taken)].tolist() if i not in taken][: wanted - 1])
        return rng.permutation(np.concatenate([[item], others]).astype(np.int64)).tolist()
