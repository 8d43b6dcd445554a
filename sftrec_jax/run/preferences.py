"""`sftrec recommend --preferences`: what users took against what the model would have named, for preference optimisation."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sftrec_jax.console import console, progress
from sftrec_jax.decode.recommender import Recommender
from sftrec_jax.errors import UserError
from sftrec_jax.model.dtype import compute_dtype
from sftrec_jax.run.session import Session, recommender

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

USERS_AT_ONCE = 512


@dataclass(frozen=True)
class PreferenceReport:
    """What was written and what was left out."""

    pairs: int
    users: int
    """Users with at least one pair."""
    too_short: int
    """Users of the run with fewer than two training items."""
    missing: int
    """Pairs that the catalogue was too small for."""
    inexact: int
    """Pairs whose text the tokenizer reads as other tokens than the model was given (`text_is_exact` is false)."""


def check_preferences(out: Path, users: int | None, negatives: int, seed: int, overwrite: bool) -> None:
    """UserError for what `write_preferences` would refuse whatever the run."""
    if out.suffix != ".jsonl":
        raise UserError(f"--preferences {out}: unknown ending {out.suffix!r}; use .jsonl")
    if not out.parent.is_dir():
        raise UserError(f"--preferences {out}: there is no folder {out.parent}; make it or choose another place")
    if out.is_dir():
        raise UserError(f"--preferences {out}: is a folder; name a file")
    if out.exists() and not overwrite:
        raise UserError(f"--preferences {out}: exists already; name another file or add --overwrite")
    if users is not None and users < 1:
        raise UserError(f"--users {users}: use 1 or more, or leave it out for all")
    if negatives < 1:
        raise UserError(f"--negatives {negatives}: use 1 or more")
    if seed < 0:
        raise UserError(f"--seed {seed}: use 0 or more")


def write_preferences(
    session: Session, out: Path, users: int | None = None, negatives: int = 1, seed: int = 0, overwrite: bool = False
) -> PreferenceReport:
    """Writes JSON lines, one for each user and rejected item, with what TRL's DPOTrainer reads (named as in TRL 1.16).

    `prompt` is the user's history before the last training item, `chosen` that item, `rejected` an item drawn from the
    model. Nothing is read of validation and test interactions, not even to keep such an item from being drawn: a list of
    rejected items that spares them would give them away. `ref_chosen_logps` and `ref_rejected_logps` are the sums of the
    model's log-probabilities over the item's tokens. Each text stands beside its tokens (`prompt_ids`, `chosen_ids`,
    `rejected_ids`); where the exported tokenizer does not read prompt + answer as exactly these, `text_is_exact` is false.

    TRL puts EOS behind each text that is not conversational. The model was not trained to end there, so let TRL use the
    tokens (`trainer.train_dataset = dataset` after its construction), or give it messages and a chat template without EOS.

    Args:
        out: a `.jsonl` file; its folder must exist.
        users: this many, drawn by `seed` from those with two training items or more; None: all of these.
        negatives: rejected items a user, drawn without replacement; never one of the user's training items, nor one that
            shares all tokens with such an item or with another rejected one.
        seed: draws users and rejected items.
        overwrite: replace a file that exists.

    Raises: UserError for wrong arguments, a run without such users, or where the file cannot be written.
    """
    check_preferences(out, users, negatives, seed, overwrite)
    n_items = len(session.dataset.item_ids)
    if negatives >= n_items:
        raise UserError(f"--negatives {negatives}: the catalogue has {n_items:,} items; use a number from 1 to {n_items - 1}")
    able = np.flatnonzero(session.dataset.train_end >= 2)
    too_short = len(session.dataset.train_end) - len(able)
    if not len(able):
        raise UserError(f"{session.folder.path}: no user has two training items, which a pair needs; prepare more data")
    chosen_users = able
    if users is not None and users < len(able):
        chosen_users = np.sort(np.random.default_rng(seed).permutation(able)[:users])
    elif users is not None and users > len(able):
        console.print(f"--users {users:,}: only {len(able):,} users have two training items; all of these are taken")
    decoder, step = session.trained_decoder()
    dtype, why = compute_dtype(session.config.model)
    console.print(f"model of {session.folder.path}, step {step}; log-probabilities in {dtype.name} ({why})")
    pairs = with_pairs = inexact = 0
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for lines in _users(session, recommender(session, decoder), chosen_users, negatives, seed):
                pairs, with_pairs = pairs + len(lines), with_pairs + bool(lines)
                inexact += sum(not line["text_is_exact"] for line in lines)
                file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        temporary.unlink(missing_ok=True)
    report = PreferenceReport(pairs, with_pairs, too_short, len(chosen_users) * negatives - pairs, inexact)
    _say(report, out, len(session.dataset.train_end))
    return report


def _say(report: PreferenceReport, out: Path, all_users: int) -> None:
    console.print(f"wrote {report.pairs:,} pairs of {report.users:,} users to {out}")
    if report.too_short:
        console.print(f"left out: {report.too_short:,} of {all_users:,} users, who have fewer than two training items")
    if report.missing:
        console.print(f"{report.missing:,} pairs fewer than asked for: nothing else was left to draw from the catalogue")
    if report.inexact:
        console.print(
            f"{report.inexact:,} pairs have a text that the tokenizer reads as other tokens than the model was given "
            "(text_is_exact is false); train on prompt_ids, chosen_ids and rejected_ids"
        )


def _users(session: Session, decode: Recommender, users: np.ndarray, negatives: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """The lines of one user after the other."""
    twins = Twins(decode.groups.group)
    report = progress("preferences", len(users))
    for begin in range(0, len(users), USERS_AT_ONCE):
        some = users[begin : begin + USERS_AT_ONCE].tolist()
        histories = [session.dataset.train_history(user) for user in some]
        told = [session.dataset.told(user, len(h) - 1) for user, h in zip(some, histories, strict=True)]
        prompts = [session.prompts.prompt(h[:-1], t) for h, t in zip(histories, told, strict=True)]
        own_seed = int(np.random.SeedSequence((seed, begin)).generate_state(1)[0])
        rejected = decode.sample(prompts, [twins.of(h) for h in histories], negatives, own_seed).items
        answers = np.concatenate([[[h[-1]] for h in histories], rejected], axis=1).astype(np.int32)
        logps = decode.log_probabilities(prompts, answers)
        for user, prompt, items, scores in zip(some, prompts, answers, logps, strict=True):
            yield _lines(session, user, prompt, items[items >= 0], scores[items >= 0])
        report(len(some))


def _lines(session: Session, user: int, prompt: np.ndarray, items: np.ndarray, logps: np.ndarray) -> list[dict[str, Any]]:
    """A line for each item but the first, which is the chosen one."""
    codes, item_ids = session.codes.codes[items], session.dataset.item_ids
    tokens = [row[row >= 0].tolist() for row in codes]
    text, answers, exact = texts_of(session.tokenizer, prompt.tolist(), tokens)
    return [
        {
            "user": str(session.dataset.user_ids[user]),
            "prompt": text,
            "chosen": answers[0],
            "rejected": answers[at],
            "ref_chosen_logps": float(logps[0]),
            "ref_rejected_logps": float(logps[at]),
            "chosen_item": str(item_ids[items[0]]),
            "rejected_item": str(item_ids[items[at]]),
            "prompt_ids": prompt.tolist(),
            "chosen_ids": tokens[0],
            "rejected_ids": tokens[at],
            "text_is_exact": exact[0] and exact[at],
        }
        for at in range(1, len(items))
    ]


class Twins:
    """What may not be rejected beside some items: all that share their tokens, and of other such items all but the first.

    Args:
        group: int64 [n_items] the same number for items with equal tokens.
    """

    def __init__(self, group: np.ndarray):
        self._group = group
        _, first = np.unique(group, return_index=True)
        self._later = np.setdiff1d(np.arange(len(group)), first)

    def of(self, items: np.ndarray) -> np.ndarray:
        """int64, rising."""
        if not len(self._later):
            return np.unique(items).astype(np.int64)
        return np.union1d(self._later, np.flatnonzero(np.isin(self._group, self._group[items])))


def texts_of(
    tokenizer: "PreTrainedTokenizerFast", prompt: list[int], answers: Sequence[list[int]]
) -> tuple[str, list[str], list[bool]]:
    """Texts of a prompt and of answers to it, without the BOS that the tokenizer adds by itself.

    Returns: the prompt, the answers, and for each whether the tokenizer reads the prompt, and the prompt with the answer
        behind it, as exactly the tokens given.
    """
    begins = prompt[:1] == [tokenizer.bos_token_id] and tokenizer("")["input_ids"] == prompt[:1]
    rest = prompt[begins:]
    text = _text(tokenizer, rest)
    whole = [_text(tokenizer, rest + answer) for answer in answers]
    parts = [w[len(text) :] if w.startswith(text) else _text(tokenizer, a) for w, a in zip(whole, answers, strict=True)]
    # No special treatment: the tokenizer reads them as TRL lets it.
    read: Any = tokenizer([text, *(text + part for part in parts)])["input_ids"]
    return text, parts, [read[0] == prompt and ids == prompt + a for ids, a in zip(read[1:], answers, strict=True)]


def _text(tokenizer: "PreTrainedTokenizerFast", ids: list[int]) -> str:
    # A tokenizer of the SentencePiece kind puts a space before each stretch between added tokens, and takes it off when it
    # decodes such a stretch alone.
    added = tokenizer.added_tokens_decoder
    parts = []
    for known, run in groupby(ids, key=lambda i: i in added):
        tokens = list(run)
        parts += [added[i].content for i in tokens] if known else [_decoded(tokenizer, tokens)]
    return "".join(parts)


def _decoded(tokenizer: "PreTrainedTokenizerFast", ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
