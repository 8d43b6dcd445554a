"""The leak linter of a run: what `prepare` and `evaluate` look at, what they found, and what was accepted."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sftrec_jax.config import RunConfig
from sftrec_jax.console import console
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.errors import LeakError, UserError
from sftrec_jax.evaluate import leaks, membership
from sftrec_jax.evaluate.leaks import NAMES, Finding
from sftrec_jax.evaluate.membership import Membership
from sftrec_jax.items.embed.combine import load_vectors
from sftrec_jax.run.folder import write_json
from sftrec_jax.run.naming import SEMANTIC

if TYPE_CHECKING:
    from sftrec_jax.run.session import Session  # which calls this module

FITTED = "fitted.json"
"""In `prepared/`: of which training interactions codes and vectors were made; beside a FILE of somebody's: `FILE.fitted.json`."""
KEY = "train_interactions_sha256"
ACCEPT = "--evaluate.accept-leaks"
WITHOUT_WORDS = 0.5
"""Where more items than this have no text, words say too little for a benchmark."""


def check_leaks(session: Session) -> dict[str, Any]:
    """Looks for leaks, says in one line what was found, and stops at what `evaluate.accept_leaks` does not name.

    Returns: {"checked": names, "found": [{"name", "message", "accepted": true}], "not_checked": {name: why}}, for the card.
    Raises: LeakError with one line a finding that is not accepted; UserError for a name that is no check's.
    """
    return _settled(_look(session), session.config.evaluate.accept_leaks)


def check_data(dataset: Dataset, config: RunConfig) -> dict[str, Any]:
    """As `check_leaks`, but only what the data alone tell: for metrics without a model."""
    return _settled(_look_at_data(dataset, config.train.seed), config.evaluate.accept_leaks)


def _settled(outcomes: dict[str, leaks.Outcome], accepted: Sequence[str]) -> dict[str, Any]:
    """What `check_leaks` says, raises and returns of the outcomes of checks."""
    for name in accepted:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)[0]
            raise UserError(f"evaluate.accept_leaks: there is no check {name!r}; the nearest is {near} (all: {', '.join(NAMES)})")
    found = [outcome for outcome in outcomes.values() if isinstance(outcome, Finding)]
    not_checked = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, str)}
    refused = [finding for finding in found if finding.name not in accepted]
    if refused:
        lines = [f"{f.name}: {f.message}; or accept it, which the card records: {ACCEPT} {f.name}" for f in refused]
        raise LeakError("\n".join(lines))
    checked = [name for name in outcomes if name not in not_checked]
    says = ", ".join(f"{f.name} accepted ({f.message})" for f in found) or "none found"
    missing = "".join(f"; {name} not checked ({why})" for name, why in not_checked.items())
    console.print(f"leaks: {says} ({len(checked)} checks){missing}", markup=False)
    return {
        "checked": checked,
        "found": [{"name": f.name, "message": f.message, "accepted": True} for f in found],
        "not_checked": not_checked,
    }


def findings(session: Session) -> list[Finding]:
    """All findings of a session, accepted or not, in the order of `NAMES`."""
    return [outcome for outcome in _look(session).values() if isinstance(outcome, Finding)]


def record_fit(dataset: Dataset, folder: Path) -> None:
    """Writes into `folder` of which training interactions the codes were made that were just made; called right after naming."""
    write_json(folder / FITTED, {KEY: training_hash(dataset)})


def training_hash(dataset: Dataset) -> str:
    """SHA-256 of the training interactions (`Dataset.trains`): users, items, and their order within a user.

    It does not depend on items that nobody trains, on the order of the catalogue or on held-out interactions.
    """
    counts = np.maximum(dataset.train_end - dataset.train_begin, 0)
    present = np.flatnonzero(counts)
    taken = np.zeros(len(dataset.item_ids), bool)
    for part in dataset.parts():
        taken[dataset.items[part.where][dataset.trained(part)]] = True
    order = sorted(np.flatnonzero(taken).tolist(), key=lambda item: str(dataset.item_ids[item]))
    rank = np.zeros(len(taken), np.dtype("<i8"))
    rank[order] = np.arange(len(order))
    digest = hashlib.sha256()
    for texts in (dataset.user_ids[present], dataset.item_ids[order]):
        digest.update(len(texts).to_bytes(8, "little"))
        for text in texts:
            digest.update(_text(text))
    digest.update(counts[present].astype("<i8").tobytes())
    for part in dataset.parts():
        digest.update(rank[dataset.items[part.where][dataset.trained(part)]].tobytes())
    return digest.hexdigest()


def code_numbers(session: Session) -> np.ndarray | str:
    """int64 [n_items], the place of each item's code among the codes in their order (equal codes have equal numbers); or why
    codes have no order that could be read off them.

    Codes compare place by place by token id, which rises with the number in a token's name (`<a_2>` before `<a_10>`); numbers
    in the model's own tokens compare as numbers.
    """
    kind, codes = session.config.items.tokenizer, session.codes
    if kind in ("title", "keyphrase"):
        return f"items.tokenizer {kind}: words are no numbers"
    if codes.codes.shape[1] == 1:
        return "one token an item: a model cannot read a number off it"
    if kind == "numeric":
        return _numerals(session)
    return np.unique(codes.codes, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _look_at_data(dataset: Dataset, seed: int) -> dict[str, leaks.Outcome]:
    return {
        "target_in_user_id": leaks.target_in_user_id(dataset, seed),
        "tie_order": leaks.tie_order(dataset),
        "duplicate_rows": leaks.duplicate_rows(dataset),
    }


def _look(session: Session) -> dict[str, leaks.Outcome]:
    """By the name of the check, in the order of `NAMES`."""
    dataset, prompts, seed = session.dataset, session.prompts, session.config.train.seed
    numbers = code_numbers(session)
    outcomes = _look_at_data(dataset, seed) | {
        "numbering": numbers if isinstance(numbers, str) else leaks.numbering(dataset, numbers),
        "target_in_prompt": leaks.target_in_prompt(dataset, prompts, seed),
        "fitted_on_held_out": _fitted(session),
        "test_answer_in_training": leaks.answers_in_training(dataset, prompts, seed),
    }
    return {name: outcomes[name] for name in NAMES}


def _fitted(session: Session) -> leaks.Outcome:
    """The record of our own fits first, then files of somebody's; what can be checked is checked, what cannot is told."""
    expected, own = training_hash(session.dataset), session.folder.prepared / FITTED
    outcomes: list[leaks.Outcome] = [
        _recorded(own, "codes and vectors", expected)
        if own.exists()
        else "the run has no record of the interactions that its codes were made of; prepare it again"
    ]
    for path, said in _files(session):
        record = path.with_name(f"{path.name}.{FITTED}")
        outcomes.append(_recorded(record, said, expected) if record.exists() else _membership(session, path, said))
    for kind in (Finding, str):
        for outcome in outcomes:
            if isinstance(outcome, kind):
                return outcome
    return None


def _files(session: Session) -> Iterable[tuple[Path, str]]:
    items, embedding = session.config.items, session.config.embedding
    if items.codes_file is not None:
        yield Path(items.codes_file), "codes"
    vectors_used = items.tokenizer in SEMANTIC or (items.tokenizer == "atomic" and items.init == "codebook")
    if vectors_used and embedding.file is not None:
        yield Path(embedding.file), "vectors"


def _recorded(record: Path, said: str, expected: str) -> leaks.Outcome:
    try:
        value = json.loads(record.read_text(encoding="utf-8"))[KEY]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f'{record}: no record of a fit; write {{"{KEY}": "SHA-256"}}, or remove the file') from None
    if value == expected:
        return None
    return Finding(
        "fitted_on_held_out",
        f"{said} were fitted on other interactions than those that train now: {record} has {str(value)[:12]}, training "
        f"{expected[:12]}; prepare again, or fit the file on the training interactions of this split",
    )


def _membership(session: Session, path: Path, said: str) -> leaks.Outcome:
    dataset, text = session.dataset, session.dataset.text
    if text is None or (text.texts == "").mean() > WITHOUT_WORDS:
        return f"{path.name} has no {path.name}.{FITTED}, and items have no text to compare its knowledge with"
    if said == "codes":
        result = membership.of_codes(session.codes.codes, dataset, text.texts.tolist())
    else:
        read = int(dataset.report["catalogue_items_read"])
        vectors = load_vectors(path, read)
        known = text.rows < read  # not those of `add-items`
        rows = np.where(known[:, None], vectors[np.where(known, text.rows, 0)], 0.0)
        result = membership.of_vectors(rows, dataset, text.texts.tolist())
    return _suspicion(path, said, result)


def _suspicion(path: Path, said: str, result: Membership) -> leaks.Outcome:
    if not result.pairs:
        return f"{path.name} has no {path.name}.{FITTED}, and training shows every held-out pair"
    if not result.suspect:
        return None
    return Finding(
        "fitted_on_held_out",
        f"{path}: its {said} put the target near the item before it in {result.hits:,} of {result.pairs:,} held-out pairs that "
        f"training never shows, {result.ratio:.1f} times what words and training explain ({result.benchmark:,}); fit it on "
        f"training interactions alone and write their hash to {path.name}.{FITTED}",
    )


def _numerals(session: Session) -> np.ndarray | str:
    rows = [row[row >= 0][:-1].tolist() for row in session.codes.codes]  # the last token ends the item
    texts = [str(session.tokenizer.decode(row)).strip() for row in rows]
    if not all(text.isdecimal() for text in texts):
        return "items.tokenizer numeric: the tokenizer does not spell the numbers back"
    return np.asarray([int(text) for text in texts], np.int64)


def _text(text: object) -> bytes:
    data = str(text).encode("utf-8")
    return len(data).to_bytes(4, "little") + data
