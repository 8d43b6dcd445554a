"""Checks for held-out answers that reach a model by way of ids, order, rows, prompts or training examples.

Held-out targets are those of validation and of test. Most checks count how often something points to a user's own target and
compare that with targets of other users, or with a direction that says nothing; a check fires where the count is both large
and beyond chance (`P_VALUE`), so that legitimate regularities (clusters, popularity, sequels) do not set it off.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.parts import SIZE
from sftrec_jax.data.prompts import PromptBuilder
from sftrec_jax.data.windows import Windows
from sftrec_jax.evaluate.sequences import Sequences, window_hashes

NAMES: tuple[str, ...] = (
    "numbering",
    "target_in_prompt",
    "target_in_user_id",
    "fitted_on_held_out",
    "tie_order",
    "duplicate_rows",
    "test_answer_in_training",
)
P_VALUE = 1e-6
TARGETS = 20_000
"""Held-out targets whose prompts are written."""
EXCHANGES = 5
"""Targets of other users that each is compared with."""
USERS = 256
"""Histories whose examples are written at once."""
TOKENS = 4_000_000
"""Training tokens that are searched for answers."""
TIMES_CHANCE = 3
LEAST_SHARE = 0.005
"""Share of targets that points to a leak and not to a few odd rows. Of those of Amazon Beauty 0.17 % stand, with the five items
before them, in the history of another account that reviewed the same things."""
TIED_SHARE = 0.6
"""Of ties in a direction that says nothing, 0.5 go up."""
FAR, GAP, SLOPE = 5, 0.02, 0.02
"""Ids rise through a history also where newer items have higher ids. Then items `FAR` steps apart rise more often than
neighbours; where ties are sorted, less often. Shares that rise, neighbours and five steps apart: MovieLens with ties sorted by
id 54.3 % and 50.7 %, by a hash 49.5 and 50.3; Amazon Beauty 53.3 and 53.5, Games 50.0 and 49.2, Industrial 54.0 and 57.1. So
neighbours must lie `SLOPE` off one half, and `GAP` further than items `FAR` apart."""
REPEATS = 0.01
ALIKE = 5
"""Items before a target that must agree, too, for two examples to be alike."""
_WORD = re.compile(r"[^\W_]+")
_WIDTH = 4


@dataclass(frozen=True)
class Finding:
    """One leak. `name` is one of `NAMES`; `message` one line: what, how often against what chance says, an example, a way out."""

    name: str
    message: str


Outcome = Finding | str | None
"""A finding; or why nothing could be checked; or None where nothing was found."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Validation and test targets that have an item before them, n of them, user after user."""

    users: np.ndarray
    """int64 [n]"""
    at: np.ndarray
    """int64 [n] places of the targets in `Dataset.items`."""

    @classmethod
    def of(cls, dataset: Dataset) -> HeldOut:
        """All of a data set."""
        pairs = [(np.flatnonzero(position >= 1), position) for position in (dataset.valid_position, dataset.test_position)]
        users = np.concatenate([user for user, _ in pairs])
        at = np.concatenate([dataset.offsets[user] + position[user] for user, position in pairs])
        order = np.argsort(at, kind="stable")
        return cls(users[order].astype(np.int64), at[order].astype(np.int64))

    def sample(self, most: int, seed: int) -> HeldOut:
        """At most `most` of them, drawn at random."""
        if len(self.at) <= most:
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self.at), most, replace=False))
        return HeldOut(self.users[chosen], self.at[chosen])


def numbering(dataset: Dataset, numbers: np.ndarray) -> Outcome:
    """Whether items are numbered in the order in which a log was read, held-out items included (P5, Geng et al. 2022).

    A reader that walks whole histories gives an item that it meets first as a target the number after the item before it.
    Clusters put such numbers side by side as well, but as often below as above.

    Args:
        dataset: histories and split.
        numbers: int64 [n_items], the place of each item's code in the order of codes; equal codes have equal numbers.
    """
    held = HeldOut.of(dataset)
    before, target = dataset.items[held.at - 1].astype(np.int64), dataset.items[held.at].astype(np.int64)
    fresh = ~_neighbours_in_training(before, target, dataset)
    if not fresh.any():
        return "every held-out pair stands side by side in training, too"
    step = numbers[target] - numbers[before]
    up, down = int((fresh & (step == 1)).sum()), int((fresh & (step == -1)).sum())
    if up < TIMES_CHANCE * down or binom.sf(up - 1, up + down, 0.5) >= P_VALUE:
        return None
    at = int((fresh & (step == 1)).argmax())
    return Finding(
        "numbering",
        f"items are numbered in the order of a log that holds the answers: of {fresh.sum():,} held-out pairs that training "
        f"never puts side by side, {up:,} targets have the number after the item before them, {down:,} the number before it "
        f"(chance: as many); for example {_shown(dataset, held, at)}; set items.order: random or sequential, or number from "
        "training alone",
    )


def target_in_prompt(dataset: Dataset, prompts: PromptBuilder, seed: int = 0) -> Outcome:
    """Whether prompts name the target: its code, or its title where prompts show titles, though it is not in the history."""
    prompts = dataclasses.replace(prompts, counts=Counter())
    titled = prompts.writer.shows_titles
    known: dict[int, tuple[bytes, ...]] = {}

    def names(item: int) -> tuple[bytes, ...]:
        if item not in known:
            row = prompts.codes.codes[item]
            rows = [row[row >= 0].tolist()]
            if titled:
                title = str(prompts.codes.titles[item])
                rows += prompts.writer.encode([title, f" {title}"])  # within a text its first word often has another token
            known[item] = tuple(_bytes(tokens) for tokens in rows if tokens)
        return known[item]

    held = HeldOut.of(dataset).sample(TARGETS, seed)
    others = _exchanged(dataset, held, seed)
    found: list[int] = []
    exchanged = by_chance = 0
    for i, (user, at) in enumerate(zip(held.users, held.at, strict=True)):
        history = dataset.items[dataset.offsets[user] : at]
        prompt = _bytes(prompts.prompt(history, dataset.told(int(user), int(at - dataset.offsets[user]))))
        own = int(dataset.items[at])
        taken = set(history.tolist())
        for target in {own, *others[i]} - taken:
            hit = any(_contains(prompt, name) for name in names(target))
            # An item may share its code or title with one of the history.
            hit = hit and not any(name in names(item) for item in taken for name in names(target))
            if target != own:
                exchanged, by_chance = exchanged + 1, by_chance + hit
            elif hit:
                found.append(i)
    if not _beyond_chance(len(found), len(held.at), by_chance, exchanged):
        return None
    return Finding(
        "target_in_prompt",
        f"prompts name the answer: {len(found):,} of {len(held.at):,} held-out targets stand in their own prompt, though not in "
        f"the history ({_per(by_chance, exchanged, len(held.at))} would by chance); for example "
        f"{_shown(dataset, held, found[0])}; take the text about later items out of the catalogue, and prepare again",
    )


def target_in_user_id(dataset: Dataset, seed: int = 0) -> Outcome:
    """Whether ids of users contain the id, title or keyphrase of their target, between characters that are no letter or digit."""
    fields = {"id": dataset.item_ids, "title": dataset.titles}
    if dataset.text is not None:
        fields["keyphrase"] = dataset.text.keyphrases
    held = HeldOut.of(dataset).sample(TARGETS, seed)
    others = _exchanged(dataset, held, seed)
    users = {user: _words(dataset.user_ids[user]) for user in np.unique(held.users).tolist()}
    for field, values in fields.items():
        texts = [_words(value) for value in values]
        found: list[int] = []
        exchanged = by_chance = 0
        for i, (user, at) in enumerate(zip(held.users.tolist(), held.at.tolist(), strict=True)):
            own = int(dataset.items[at])
            taken = set(dataset.items[dataset.offsets[user] : at].tolist())
            for target in {own, *others[i]} - taken:
                hit = texts[target] != "  " and texts[target] in users[user]
                if target != own:
                    exchanged, by_chance = exchanged + 1, by_chance + hit
                elif hit:
                    found.append(i)
        if _beyond_chance(len(found), len(held.at), by_chance, exchanged):
            return Finding(
                "target_in_user_id",
                f"ids of users name the answer: {len(found):,} of {len(held.at):,} contain the {field} of their held-out target "
                f"({_per(by_chance, exchanged, len(held.at))} would by chance); for example "
                f"{_shown(dataset, held, found[0])}; give users ids that say nothing",
            )
    return None


def tie_order(dataset: Dataset) -> Outcome:
    """Whether interactions of equal times, or of a source that has lost its times, stand in the order of ids, rows or the file.

    With times: neighbours of equal time. Without: all neighbours up to a target, against pairs `FAR` steps apart that begin
    with the same item (see `FAR`).
    """
    share, tied = dataset.report.get("tied_in_file_order_share"), int(dataset.report.get("tied_pairs") or 0)
    if share is not None and _one_sided(round(share * tied), tied):
        return Finding(
            "tie_order",
            f"ties follow the file: of {tied:,} neighbours of equal time, {share:.1%} stand in the order of the file's rows "
            "(chance: 50 %); prepare the data again, which orders ties by a hash of data.tie_seed",
        )
    for what, rank in _ranks(dataset).items():
        message = _tied(dataset, rank) if dataset.timed else _sorted_runs(dataset, rank)
        if message is not None:
            without = "use the times of the source (data.time_column), or mix items of equal time before they lose it"
            way_out = "order ties by a hash of user and item" if dataset.timed else without
            return Finding("tie_order", f"ties follow the {what}: {message}; {way_out}")
    return None


def duplicate_rows(dataset: Dataset) -> Outcome:
    """Whether held-out rows stand in training, too.

    With times: a user, item and time that is held out and trains. Without: targets that repeat the item before them,
    `REPEATS` of them or more and beyond what training does; a log in which rows are doubled everywhere looks like one of users
    who repeat. In either: a target and the `ALIKE` items before it that another history has in its training part.
    """
    held = HeldOut.of(dataset)
    if not len(held.at):
        return "no held-out target has an item before it"
    way_out = "drop the doubled rows before the split"
    if dataset.timed:
        again = np.flatnonzero(_in_training(dataset, held))
        if len(again):
            return Finding(
                "duplicate_rows",
                f"{len(again):,} of {len(held.at):,} held-out rows have a twin of the same user, item and time in training; for "
                f"example {_shown(dataset, held, int(again[0]))}; {way_out}",
            )
    else:
        repeats = dataset.items[held.at] == dataset.items[held.at - 1]
        usual, pairs = _repeats_in_training(dataset)
        chance = (usual + 1) / (pairs + 1)
        count = int(repeats.sum())
        if count >= max(REPEATS, 2 * chance) * len(held.at) and binom.sf(count - 1, len(held.at), chance) < P_VALUE:
            return Finding(
                "duplicate_rows",
                f"{count:,} of {len(held.at):,} held-out targets repeat the item before them, which {usual:,} of {pairs:,} "
                f"training targets do; for example {_shown(dataset, held, int(repeats.argmax()))}; {way_out}",
            )
    alike = _alike(dataset, held)
    if len(alike) < max(3, LEAST_SHARE * len(held.at)):
        return None
    return Finding(
        "duplicate_rows",
        f"{len(alike):,} of {len(held.at):,} held-out targets stand, with the {ALIKE} items before them, in the training part of "
        f"another history; for example {_shown(dataset, held, alike[0])}; {way_out}",
    )


def answers_in_training(dataset: Dataset, prompts: PromptBuilder, seed: int = 0) -> Outcome:
    """Whether training examples, as tokens, show a history's end followed by its held-out target.

    Histories end with 3 to 5 items that are written one after another (`stream`), or are the whole prompt (`instruct`). At most
    `TOKENS` tokens of examples are searched, those of users drawn at random, for the answers of these users; where the data came
    as examples, for all answers.
    """
    prompts = dataclasses.replace(prompts, counts=Counter())
    order = np.random.default_rng(seed).permutation(np.flatnonzero(dataset.train_end > 0))
    sequences: list[np.ndarray] = []
    read = np.zeros(len(dataset.user_ids), bool)
    size = 0
    for users in np.array_split(order, -(-len(order) // USERS)) if len(order) else ():
        if size >= TOKENS:
            break
        read[users] = True
        ends = np.cumsum(dataset.train_end[users])
        begins = ends - dataset.train_end[users]
        items = np.concatenate([dataset.train_history(user) for user in users.tolist()])
        for example in prompts.examples_of(items, Windows(begins, begins + dataset.train_begin[users], ends)):
            sequences.append(np.append(example.tokens, example.labels[-1:]))
            size += len(sequences[-1])
    held = HeldOut.of(dataset)
    if not dataset.given:
        chosen = read[held.users]
        held = HeldOut(held.users[chosen], held.at[chosen])
    held = held.sample(TARGETS, seed)
    long = held.at - dataset.offsets[held.users] >= 3
    held = HeldOut(held.users[long], held.at[long])
    others = _exchanged(dataset, held, seed)
    own: list[np.ndarray] = []
    foreign: list[np.ndarray] = []
    rows: list[int] = []
    for i, (user, at) in enumerate(zip(held.users, held.at, strict=True)):
        shown = _shown_before(prompts, dataset.items[dataset.offsets[user] : at])
        if shown is not None:
            rows.append(i)
            own.append(np.concatenate([shown, _code(prompts, int(dataset.items[at]))]))
            foreign += [np.concatenate([shown, _code(prompts, target)]) for target in others[i]]
    if not own or not sequences:
        return "no training example can hold three items and the one after them (prompt.max_history, train.row_length)"
    index = Sequences(sequences, min(map(len, [*own, *foreign])))
    found = [i for i, hit in zip(rows, index.hold(own), strict=True) if hit]
    by_chance = sum(index.hold(foreign))
    if not _beyond_chance(len(found), len(own), by_chance, len(foreign)):
        return None
    return Finding(
        "test_answer_in_training",
        f"training shows the answers: of {len(own):,} held-out targets with the items before them, {len(found):,} stand so in a "
        f"training example ({_per(by_chance, len(foreign), len(own))} would by chance); for example "
        f"{_shown(dataset, held, found[0])}; make training examples from the training part alone",
    )


def _unordered(first: np.ndarray, second: np.ndarray, dataset: Dataset) -> np.ndarray:
    return np.minimum(first, second).astype(np.int64) * len(dataset.item_ids) + np.maximum(first, second)


def _neighbours_in_training(first: np.ndarray, second: np.ndarray, dataset: Dataset) -> np.ndarray:
    """bool [n], whether two items (int64 [n] each) ever stand side by side, in either order, in a training part."""
    wanted, index = np.unique(_unordered(first, second, dataset), return_inverse=True)
    found = np.zeros(len(wanted), bool)
    for part in dataset.parts() if len(wanted) else ():
        items = dataset.items[part.where]
        later = np.flatnonzero((part.position >= 1) & (part.position < dataset.train_end[part.owner]))
        at, there = _among(wanted, _unordered(items[later - 1], items[later], dataset))
        found[at[there]] = True
    return found[index]


def _among(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where values [n] stand among keys, which rise (int64 [n]), and whether they do (bool [n])."""
    at = np.minimum(np.searchsorted(keys, values), len(keys) - 1)
    return at, keys[at] == values


def _exchanged(dataset: Dataset, held: HeldOut, seed: int) -> list[list[int]]:
    """For each target those of `EXCHANGES` others, without the user's own."""
    n = len(held.at)
    rng = np.random.default_rng(seed)
    others = np.stack([rng.permutation(n) for _ in range(EXCHANGES)], axis=1)
    targets = dataset.items[held.at]
    foreign = (held.users[others] != held.users[:, None]) & (targets[others] != targets[:, None])
    return [row[keep].tolist() for row, keep in zip(targets[others], foreign, strict=True)]


def _beyond_chance(found: int, asked: int, by_chance: int, exchanged: int) -> bool:
    """Whether `found` of `asked` is at least `LEAST_SHARE` and well beyond `by_chance` of `exchanged`."""
    if not asked or not exchanged or found < LEAST_SHARE * asked or found * exchanged < TIMES_CHANCE * by_chance * asked:
        return False
    return float(binom.sf(found - 1, asked, (by_chance + 1) / (exchanged + 1))) < P_VALUE


def _one_sided(up: int, count: int) -> bool:
    """Whether `up` of `count` lies beyond `TIED_SHARE` on either side."""
    most = max(up, count - up)
    return most >= TIED_SHARE * count and 2 * float(binom.sf(most - 1, count, 0.5)) < P_VALUE


def _per(by_chance: int, exchanged: int, asked: int) -> str:
    return f"{by_chance / exchanged * asked:,.1f}"


def _shown(dataset: Dataset, held: HeldOut, i: int) -> str:
    user, at = held.users[i], held.at[i]
    before, target = (str(dataset.item_ids[dataset.items[place]]) for place in (at - 1, at))
    return f"user {str(dataset.user_ids[user])!r}, item {before!r} and then {target!r}"


def _words(text: object) -> str:
    return f" {' '.join(_WORD.findall(str(text).casefold()))} "


def _bytes(tokens: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(tokens, "<i4").tobytes()


def _contains(tokens: bytes, part: bytes) -> bool:
    at = tokens.find(part)
    while at >= 0 and at % _WIDTH:
        at = tokens.find(part, at + 1)
    return at >= 0


def _ranks(dataset: Dataset) -> dict[str, np.ndarray]:
    ids = [str(item) for item in dataset.item_ids]
    numeric = all(item.isdecimal() for item in ids)
    order = np.asarray(sorted(range(len(ids)), key=lambda i: (int(ids[i]), ids[i]) if numeric else (0, ids[i])), np.int64)
    rank = np.empty(len(ids), np.int64)
    rank[order] = np.arange(len(ids))
    return {"ids of items": rank, "rows of the catalogue": np.arange(len(ids))}


def _tied(dataset: Dataset, rank: np.ndarray) -> str | None:
    up = count = 0
    for part in dataset.parts():
        items, times = dataset.items[part.where], dataset.timestamps[part.where]
        later = np.flatnonzero((part.position[1:] > 0) & (times[1:] == times[:-1])) + 1
        step = rank[items[later]] - rank[items[later - 1]]
        up, count = up + int((step > 0).sum()), count + int((step != 0).sum())
    return f"of {count:,} neighbours of equal time, {up / count:.1%} rise (chance: 50 %)" if _one_sided(up, count) else None


def _sorted_runs(dataset: Dataset, rank: np.ndarray) -> str | None:
    rises: list[np.ndarray] = []
    for part in dataset.parts():
        last = part.position >= FAR
        if dataset.given:  # rows of a user overlap: each target once
            last &= part.position == np.diff(dataset.offsets)[part.owner] - 1
        ranks, last = rank[dataset.items[part.where]], np.flatnonzero(last)
        steps = np.stack([np.sign(ranks[last] - ranks[last - step]) for step in (1, FAR)])
        rises.append(steps[:, (steps != 0).all(axis=0)] > 0)
    near, far = np.concatenate(rises, axis=1) if rises else np.zeros((2, 0), bool)
    if not len(near):
        return None
    share, gap = float(near.mean()), float(near.mean() - far.mean())
    side = 1 if share >= 0.5 else -1
    out, gap = side * (share - 0.5), side * gap
    apart = near != far
    first = int((apart & (near if side > 0 else far)).sum())
    closer = out >= SLOPE and gap >= GAP and float(binom.sf(first - 1, int(apart.sum()), 0.5)) < P_VALUE
    throughout = gap > -GAP and _one_sided(int(near.sum()), len(near))
    if not closer and not throughout:
        return None
    why = " (chance: the same)" if closer else "; accept it if ids truly rise with time, as those of news do"
    return f"of {len(near):,} neighbours, {share:.1%} rise, of items {FAR} steps apart {far.mean():.1%}{why}"


def _in_training(dataset: Dataset, held: HeldOut) -> np.ndarray:
    """bool [n], whether user, item and time of a target are those of a training interaction."""
    twins: list[np.ndarray] = []
    for position in (dataset.valid_position, dataset.test_position):
        target = np.where(position >= 1, dataset.offsets[:-1] + position, -1)
        for part in dataset.parts():
            at = target[part.owner]
            same = dataset.trained(part) & (at >= 0) & (dataset.items[part.where] == dataset.items[at])
            twins.append(np.unique(at[same & (dataset.timestamps[part.where] == dataset.timestamps[at])]))
    return np.isin(held.at, np.concatenate(twins))


def _repeats_in_training(dataset: Dataset) -> tuple[int, int]:
    """Of training targets with an item before them, how many repeat it, and their number."""
    repeats = pairs = 0
    for part in dataset.parts():
        items = dataset.items[part.where]
        later = np.flatnonzero(dataset.trained(part) & (part.position >= 1))
        repeats, pairs = repeats + int((items[later] == items[later - 1]).sum()), pairs + len(later)
    return repeats, pairs


def _alike(dataset: Dataset, held: HeldOut) -> list[int]:
    """Targets (places in `held`) that stand with the `ALIKE` items before them in another history's training part."""
    width = ALIKE + 1
    asked = np.flatnonzero(held.at - dataset.offsets[held.users] >= ALIKE)
    hashes = np.empty(len(asked), np.uint64)
    for begin in range(0, len(asked), SIZE):
        windows = dataset.items[held.at[asked[begin : begin + SIZE], None] + np.arange(-ALIKE, 1)]
        hashes[begin : begin + SIZE] = window_hashes(windows.astype(np.uint64).ravel(), width)[::width]
    by_key = np.argsort(hashes, kind="stable")
    keys, first = np.unique(hashes[by_key], return_index=True)
    after = np.append(first[1:], len(asked))
    found = np.zeros(len(asked), bool)
    for part in dataset.parts() if len(keys) else ():
        items = dataset.items[part.where]
        trained = np.flatnonzero((part.position >= ALIKE) & (part.position < dataset.train_end[part.owner]))
        values = window_hashes(items.astype(np.uint64), width)[trained - ALIKE]
        order = np.argsort(values, kind="stable")
        key_of, there = _among(keys, values[order])
        trained, key_of = trained[order][there], key_of[there]
        for key in np.unique(key_of).tolist():
            places = trained[np.searchsorted(key_of, key) : np.searchsorted(key_of, key, "right")].tolist()
            for i in by_key[first[key] : after[key]].tolist():
                if found[i]:
                    continue
                user, at = held.users[asked[i]], held.at[asked[i]]
                window = dataset.items[at - ALIKE : at + 1]
                found[i] = any(part.owner[p] != user and np.array_equal(items[p - ALIKE : p + 1], window) for p in places)
    return asked[found].tolist()


def _code(prompts: PromptBuilder, item: int) -> np.ndarray:
    row = prompts.codes.codes[item]
    return row[row >= 0]


def _shown_before(prompts: PromptBuilder, history: np.ndarray) -> np.ndarray | None:
    """Tokens that stand before the target in an example; None where fewer than three items do."""
    if prompts.format == "instruct":
        prompt = prompts.prompt(history)
        return None if np.array_equal(prompt, prompts.prompt(history[-2:])) else prompt
    for count in range(min(5, len(history), prompts.max_history - 1), 2, -1):
        shown = np.concatenate([_code(prompts, int(item)) for item in history[-count:]])
        if len(shown) + prompts.codes.codes.shape[1] + len(prompts.beginning) <= prompts.context:
            return shown
    return None
