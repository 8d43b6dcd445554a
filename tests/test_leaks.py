"""Every check of the leak linter finds its planted leak, and says nothing of data, codes and prompts without one."""

import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tiny_run import STORIES, WORDS
from tiny_tokenizers import byte_level

from sftrec_jax.config import DataConfig, PromptConfig
from sftrec_jax.data import parts
from sftrec_jax.data.dataset import Dataset, ItemText
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.data.prompts import PromptBuilder, prompt_builder
from sftrec_jax.data.segments import Example
from sftrec_jax.data.told import NOTHING, Told
from sftrec_jax.data.windows import Windows
from sftrec_jax.evaluate import leaks
from sftrec_jax.evaluate.leaks import Finding, HeldOut
from sftrec_jax.evaluate.sequences import Sequences
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.embed.clusters import cluster_paths
from sftrec_jax.items.embed.collaborative import cooccurrence
from sftrec_jax.items.naming import atomic_codes, numeric_codes, title_codes
from sftrec_jax.items.order import collaborative_order, random_order, sequential_order
from sftrec_jax.model.hub import load_tokenizer, resolve_base


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of tests take many parts, too."""
    monkeypatch.setattr(parts, "SIZE", 50)


def made(histories: list[list[int]], n_items: int, user_ids: list[str] | None = None, times: list[int] | None = None) -> Dataset:
    """Leave-one-out histories of items 0 to n_items - 1, ids `i0`, `i1` and so on; without times their positions."""
    lengths = np.asarray([len(h) for h in histories])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = np.concatenate(histories).astype(np.int32)
    ids = np.asarray([f"i{i:04d}" for i in range(n_items)], object)
    users = np.asarray(user_ids or [f"u{u:04d}" for u in range(len(lengths))], object)
    positions = np.arange(len(items)) - np.repeat(offsets[:-1], lengths)
    stamps = positions if times is None else np.asarray(times)
    return Dataset(users, ids, ids, offsets, items, stamps, lengths - 2, lengths - 2, lengths - 1, {})


def random_histories(seed: int, users: int = 400, n_items: int = 600, length: int = 7) -> list[list[int]]:
    """Users of ten tastes: two of three items are of the user's own, so that items cluster."""
    draw = random.Random(seed)
    out = []
    for _ in range(users):
        taste = draw.randrange(10)
        out.append([])
        while len(out[-1]) < length:
            item = draw.randrange(n_items)
            if item not in out[-1] and (item % 10 == taste or draw.random() < 0.05):
                out[-1].append(item)
    return out


def found(outcome: leaks.Outcome, name: str) -> str:
    """The message of a finding of this name."""
    assert isinstance(outcome, Finding) and outcome.name == name and "\n" not in outcome.message
    return outcome.message


# Numbering


def reading_order(dataset: Dataset) -> np.ndarray:
    """Numbers by first appearance, user after user, held-out items included: what P5 does."""
    numbers: dict[int, int] = {}
    for item in dataset.items.tolist():
        numbers.setdefault(item, len(numbers))
    return np.asarray([numbers.get(i, len(numbers) + i) for i in range(len(dataset.item_ids))])


def steps(dataset: Dataset, numbers: np.ndarray) -> tuple[int, int]:
    """Held-out pairs whose numbers rise by one and fall by one, and that no training history puts side by side."""
    together = set()
    for user in range(len(dataset.user_ids)):
        history = dataset.train_history(user).tolist()
        together |= {frozenset(pair) for pair in zip(history[:-1], history[1:], strict=True)}
    up = down = 0
    for user in range(len(dataset.user_ids)):
        history = dataset.history(user).tolist()
        for at in (dataset.valid_position[user], dataset.test_position[user]):
            if frozenset(history[at - 1 : at + 1]) not in together:
                step = numbers[history[at]] - numbers[history[at - 1]]
                up, down = up + (step == 1), down + (step == -1)
    return int(up), int(down)


def test_numbers_in_reading_order() -> None:
    dataset = made(random_histories(0), 600)
    numbers = reading_order(dataset)
    up, down = steps(dataset, numbers)
    assert up > 50
    message = found(leaks.numbering(dataset, numbers), "numbering")
    assert f" {up:,} targets have the number after the item before them, {down:,} the number before it" in message


def test_numbers_that_training_or_nothing_decides() -> None:
    dataset = made(random_histories(0), 600)
    clusters = collaborative_order(cluster_paths(cooccurrence(dataset, 20), dataset.item_ids, 4, 200, 0))
    for numbers in (np.arange(600), sequential_order(dataset), random_order(dataset.item_ids, 0), clusters):
        assert leaks.numbering(dataset, numbers) is None
    # Neighbours in both directions, as clusters give them to a user who goes back and forth: pairs, but no order.
    pairs = made([[u, 300 + (7 * u) % 299, 2 * u, 2 * u + (1 if u % 2 else -1)] for u in range(2, 150)], 600)
    assert sum(steps(pairs, np.arange(600))) > 100 and leaks.numbering(pairs, np.arange(600)) is None


def test_pairs_that_training_shows_are_no_evidence() -> None:
    pairs = [[50 + 2 * u, 51 + 2 * u] for u in range(100)]
    held = [[700 + u, *pair, 999] for u, pair in enumerate(pairs)]
    unseen, shown = made(held, 1000), made([[*pair, 900, 950] for pair in pairs] + held, 1000)
    assert steps(unseen, np.arange(1000)) == (100, 0) and steps(shown, np.arange(1000)) == (0, 0)
    assert isinstance(leaks.numbering(unseen, np.arange(1000)), Finding)
    assert leaks.numbering(shown, np.arange(1000)) is None
    only = made([[*pair, *pair] for pair in pairs], 1000)  # validation and test take the training pair again
    assert "side by side in training" in str(leaks.numbering(only, np.arange(1000)))


# Prompts


@pytest.fixture(scope="module")
def base() -> Callable:
    """Makes tokenizers: naming items changes them."""
    return lambda: load_tokenizer(resolve_base(str(STORIES), None), None)


def builder(config: PromptConfig, codes: ItemCodes, tokenizer) -> PromptBuilder:
    return prompt_builder(config, codes, tokenizer, 256)


def titles(n_items: int) -> np.ndarray:
    draw = random.Random(1)
    return np.asarray([f"The {draw.choice(WORDS)} {draw.choice(WORDS)} {1000 + i}" for i in range(n_items)], object)


INSTRUCT = PromptConfig(format="instruct", max_history=10)


def test_titles_that_name_the_next_item(base: Callable) -> None:
    # Each user's last two items before the test target are hers alone, so that a title can tell of one user's answer.
    histories = [[*h[:4], 600 + 3 * u, 601 + 3 * u, 602 + 3 * u] for u, h in enumerate(random_histories(2, 60))]
    dataset = made(histories, 780)
    names = np.asarray([title.replace("The", "the") for title in titles(780)], object)
    tells = names.copy()
    for history in histories:
        tells[history[5]] = f"{names[history[5]]}, bought with: {names[history[6]]}"
    # In `byte_level` the first word of a title has other tokens where a text goes before it.
    for make, words in itertools.product((base, byte_level), (tells, names)):
        tokenizer = make()
        for codes in (title_codes(words, tokenizer), atomic_codes(dataset.item_ids, words, make())):
            outcome = leaks.target_in_prompt(dataset, builder(INSTRUCT, codes, tokenizer))
            if words is tells:
                assert "60 of 120 held-out targets" in found(outcome, "target_in_prompt")
            else:
                assert outcome is None


def test_a_prompt_with_the_answer(base: Callable) -> None:
    dataset = made(random_histories(3, 60), 600)
    answers = {
        dataset.history(u)[:at].tobytes(): dataset.history(u)[at]
        for u in range(60)
        for at in (dataset.valid_position[u], dataset.test_position[u])
    }

    class Cheat(PromptBuilder):
        def prompt(self, history: np.ndarray, told: Told = NOTHING) -> np.ndarray:
            code = self.codes.codes[answers[history.tobytes()]]
            return np.concatenate([super().prompt(history, told), code[code >= 0]])

    tokenizer = base()
    codes = numeric_codes(np.arange(600), titles(600), tokenizer)
    honest = builder(PromptConfig(), codes, tokenizer)
    assert leaks.target_in_prompt(dataset, honest) is None
    cheat = Cheat(**{f.name: getattr(honest, f.name) for f in dataclasses.fields(honest)})
    message = found(leaks.target_in_prompt(dataset, cheat), "target_in_prompt")
    assert message.startswith("prompts name the answer: 120 of 120 held-out targets")
    assert not honest.counts and not cheat.counts  # what `sftrec run` prints of its own prompts stays as it is


def test_items_that_share_a_code_are_no_answer(base: Callable) -> None:
    """A user takes an item and then another of the same code: the prompt has the code, not the answer."""
    dataset = made([[u, 100 + u, 200 + 2 * u, 201 + 2 * u] for u in range(60)], 400)
    tokenizer = base()
    codes = atomic_codes(dataset.item_ids, titles(400), tokenizer, "mean")
    shared = codes.codes[np.arange(400) // 2 * 2]
    assert leaks.target_in_prompt(dataset, builder(PromptConfig(), dataclasses.replace(codes, codes=shared), tokenizer)) is None


def test_aligned_search() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        tokens = [draw.choice([0, 1, 256, 65536, 257]) for _ in range(draw.randrange(8))]
        part = [draw.choice([0, 1, 256, 65536, 257]) for _ in range(draw.randint(1, 3))]
        expected = any(tokens[i : i + len(part)] == part for i in range(len(tokens)))
        assert leaks._contains(leaks._bytes(tokens), leaks._bytes(part)) == expected


# Ids of users


def test_ids_of_users() -> None:
    plain = made(random_histories(4, 60), 600)
    plain = dataclasses.replace(
        plain,
        titles=titles(600),
        text=ItemText(plain.titles, np.asarray([f"gel-no {i}" for i in range(600)], object), np.arange(600)),
    )
    assert plain.text is not None
    assert leaks.target_in_user_id(plain) is None
    last = [int(plain.history(u)[-1]) for u in range(60)]
    for field, values in (("id", plain.item_ids), ("title", plain.titles), ("keyphrase", plain.text.keyphrases)):
        ids = np.asarray([f"u_{u}-{str(values[item]).upper()}_x" for u, item in enumerate(last)], object)
        message = found(leaks.target_in_user_id(dataclasses.replace(plain, user_ids=ids)), "target_in_user_id")
        assert f"60 of 120 contain the {field} of their held-out target" in message
    glued = np.asarray([f"u{u}{plain.item_ids[item]}" for u, item in enumerate(last)], object)
    assert leaks.target_in_user_id(dataclasses.replace(plain, user_ids=glued)) is None  # no separate word


def test_equal_numbers_are_chance() -> None:
    """Users and items are both called 0, 1, 2: some user takes the item of her own number."""
    histories = random_histories(5, 400, 400)
    histories[7][-1] = histories[9][-1] = 0
    histories[7][-1], histories[9][-1] = 7, 9
    dataset = made(histories, 400, [str(u) for u in range(400)])
    dataset = dataclasses.replace(dataset, item_ids=np.asarray([str(i) for i in range(400)], object))
    assert leaks.target_in_user_id(dataset) is None


# Ties


def tied(order: Callable[[list[int]], list[int]], users: int = 300) -> Dataset:
    """Nine items on three days each, those of one day in the order that is given."""
    draw = random.Random(6)
    histories, times = [], []
    for _ in range(users):
        items = draw.sample(range(500), 9)
        histories.append([item for day in range(3) for item in order(items[3 * day : 3 * day + 3])])
        times += [86_400 * (100 + day) for day in range(3) for _ in range(3)]
    return made(histories, 500, times=times)


def test_ties_of_a_timed_source() -> None:
    assert leaks.tie_order(tied(lambda day: day)) is None
    for order in (sorted, lambda day: sorted(day)[::-1]):
        assert "ties follow the ids of items: of 1,800 neighbours of equal time" in found(
            leaks.tie_order(tied(order)), "tie_order"
        )
    # Ids in another order than the catalogue, whose rows the ties follow.
    other = dataclasses.replace(tied(sorted), item_ids=random_order(np.arange(500), 1).astype(object))
    assert "ties follow the rows of the catalogue" in found(leaks.tie_order(other), "tie_order")


def test_ties_in_the_order_of_the_file() -> None:
    for share, pairs, expected in (
        (0.97, 500, True),
        (0.03, 500, True),
        (0.52, 50_000, False),
        (0.9, 10, False),
        (None, 0, False),
    ):
        report = {"tied_in_file_order_share": share, "tied_pairs": pairs}
        outcome = leaks.tie_order(dataclasses.replace(tied(lambda day: day), report=report))
        assert (outcome is not None) == expected
        if expected:
            assert "ties follow the file" in found(outcome, "tie_order")


def untimed(dataset: Dataset) -> Dataset:
    positions = np.arange(len(dataset.items)) - np.repeat(dataset.offsets[:-1], np.diff(dataset.offsets))
    return dataclasses.replace(dataset, timestamps=positions, report={})


@pytest.mark.parametrize("descending", [False, True])
def test_movielens_in_file_order_without_its_times(tmp_path: Path, descending: bool) -> None:
    dataset = prepare_dataset(DataConfig())
    assert leaks.tie_order(dataset) is None and leaks.tie_order(untimed(dataset)) is None
    owner = np.repeat(dataset.user_ids, np.diff(dataset.offsets)).tolist()
    log = pl.DataFrame({"user_id": owner, "item_id": dataset.item_ids[dataset.items].tolist(), "t": dataset.timestamps})
    log = log.with_columns(n=pl.col("item_id").cast(pl.Int64)).sort("user_id", "t", "n", descending=[False, False, descending])
    log.write_csv(tmp_path / "log.csv")
    again = prepare_dataset(DataConfig(source=str(tmp_path / "log.csv"), time_column=None))
    assert "ties follow the ids of items" in found(leaks.tie_order(again), "tie_order")


def test_items_that_rise_with_time_are_no_ties() -> None:
    """Ids that follow the day an item came out, and users who take what is new: far items rise even more often."""
    draw = random.Random(7)
    histories = []
    for _ in range(500):
        begin = draw.randrange(300)
        items = [begin + 20 * step + draw.randrange(120) for step in range(12)]
        histories.append([item for at, item in enumerate(items) if item not in items[:at]])
    dataset = made(histories, 700)
    rises = np.mean([b > a for h in histories for a, b in zip(h[:-1], h[1:], strict=True)])
    assert rises > 0.6 and leaks.tie_order(dataset) is None
    assert leaks.tie_order(made([sorted(h) for h in random_histories(8)], 600)) is not None  # sorted throughout


# Duplicate rows


def test_a_row_on_both_sides_of_the_split() -> None:
    dataset = tied(lambda day: day)
    assert leaks.duplicate_rows(dataset) is None
    items, times = dataset.items.copy(), dataset.timestamps.copy()
    times[8] = times[6] = times[5] = times[4]
    items[8] = items[4]
    message = found(leaks.duplicate_rows(dataclasses.replace(dataset, items=items, timestamps=times)), "duplicate_rows")
    assert "1 of 600 held-out rows" in message and f"user 'u0000', item 'i{items[7]:04d}' and then 'i{items[8]:04d}'" in message
    later = dataclasses.replace(dataset, items=items)  # the same item on another day
    assert leaks.duplicate_rows(later) is None


def test_targets_that_repeat() -> None:
    histories = random_histories(9)
    assert leaks.duplicate_rows(made(histories, 600)) is None
    twice = [[*h, h[-1]] if u % 4 == 0 else h for u, h in enumerate(histories)]
    message = found(leaks.duplicate_rows(made(twice, 600)), "duplicate_rows")
    assert message.startswith("100 of 800 held-out targets repeat the item before them, which 0 of ")
    habit = [[h[0], h[0], h[1], h[1], *h[2:], h[-1]] if u % 4 == 0 else h for u, h in enumerate(histories)]
    assert leaks.duplicate_rows(made(habit, 600)) is None  # users who always do


def test_examples_alike() -> None:
    histories = random_histories(10, 300)
    for count, expected in ((20, True), (1, False)):
        copies = [[*h, 590 + i % 10, 580 + i % 10, 570 + i % 10] for i, h in enumerate(histories[:count])]
        dataset = made([*histories, *copies], 600)
        outcome = leaks.duplicate_rows(dataset)
        # Twice as many targets as copies: the copied history's test target stands after six items, validation after five.
        alike = leaks._alike(dataset, HeldOut.of(dataset))
        assert alike == brute_alike(dataset) and len(alike) == 2 * count
        assert (outcome is not None) == expected
        if expected:
            assert "stand, with the 5 items before them, in the training part of another history" in found(
                outcome, "duplicate_rows"
            )


def test_a_history_that_repeats_itself_is_not_another() -> None:
    histories = random_histories(17, 200)
    own = [[*h[:6], 590, *h[:6], 591] for h in histories]  # validation and the five before it stand in the same history
    dataset = made(own, 600)
    assert brute_alike(dataset) == [] and leaks.duplicate_rows(dataset) is None
    ends = [[590 + u, *histories[u // 2], 580 + u % 7] for u in range(400)]  # twins whose sixes end where both are held out
    assert brute_alike(made(ends, 1000)) == [] and leaks.duplicate_rows(made(ends, 1000)) is None


def brute_alike(dataset: Dataset) -> list[int]:
    windows: dict[tuple[int, ...], set[int]] = {}
    for user in range(len(dataset.user_ids)):
        history = dataset.train_history(user).tolist()
        for at in range(5, len(history)):
            windows.setdefault(tuple(history[at - 5 : at + 1]), set()).add(user)
    held, out = HeldOut.of(dataset), []
    for i, (user, at) in enumerate(zip(held.users.tolist(), held.at.tolist(), strict=True)):
        position = at - int(dataset.offsets[user])
        window = tuple(dataset.history(user)[max(0, position - 5) : position + 1].tolist())
        out += [i] if windows.get(window, set()) - {user} else []
    return out


# Answers in training


@pytest.mark.parametrize("config", [PromptConfig(), PromptConfig(max_history=4), INSTRUCT], ids=["stream", "short", "instruct"])
def test_a_training_part_that_holds_the_answers(config: PromptConfig, base: Callable) -> None:
    dataset, tokenizer = made(random_histories(11, 60), 600), base()
    prompts = builder(config, numeric_codes(np.arange(600), titles(600), tokenizer), tokenizer)
    assert leaks.answers_in_training(dataset, prompts) is None
    message = found(leaks.answers_in_training(dataclasses.replace(dataset, train_end=dataset.train_end + 2), prompts),
                    "test_answer_in_training")  # fmt: skip
    assert (
        "of 120 held-out targets with the items before them" in message and "120 stand so" in message or config.max_history == 4
    )
    half = dataclasses.replace(dataset, train_end=dataset.train_end + 1)  # validation trains, test does not
    assert "60 stand so" in found(leaks.answers_in_training(half, prompts), "test_answer_in_training")
    assert not prompts.counts


def test_a_task_that_shows_the_test_answer(base: Callable) -> None:
    dataset, tokenizer = made(random_histories(12, 60), 600), base()
    whole = {dataset.train_history(u).tobytes(): dataset.history(u) for u in range(60)}

    class Task(PromptBuilder):
        def examples_of(self, items: np.ndarray, histories: Windows) -> list[Example]:
            shown = [whole[items[a:b].tobytes()] for a, b in zip(histories.begin, histories.end, strict=True)]
            more = [example for history in shown for example in self.last_of(history)]
            return [*super().examples_of(items, histories), *more]

        def last_of(self, history: np.ndarray) -> list[Example]:
            return super().examples_of(history, Windows(*(np.asarray([at]) for at in (0, 6, len(history)))))

    honest = builder(INSTRUCT, atomic_codes(dataset.item_ids, titles(600), tokenizer), tokenizer)
    task = Task(**{f.name: getattr(honest, f.name) for f in dataclasses.fields(honest)})
    assert leaks.answers_in_training(dataset, honest) is None
    assert "60 stand so in a training example" in found(leaks.answers_in_training(dataset, task), "test_answer_in_training")


def test_rows_of_train_that_are_rows_of_test(base: Callable) -> None:
    """Data that come as examples: test rows in the file of training rows."""
    histories, tokenizer = random_histories(13, 200), base()
    rows = [*histories, *histories[:100]]
    dataset = made(rows, 600)
    kind = np.repeat(["train", "test"], [200, 100])
    last = np.full(300, 6)
    given = dataclasses.replace(
        dataset,
        report={"split": "given"},
        train_end=np.where(kind == "train", 7, 0),
        train_begin=np.where(kind == "train", 6, 0),
        valid_position=np.full(300, -1),
        test_position=np.where(kind == "test", last, -1),
    )
    prompts = builder(PromptConfig(), atomic_codes(dataset.item_ids, titles(600), tokenizer), tokenizer)
    assert "100 stand so" in found(leaks.answers_in_training(given, prompts), "test_answer_in_training")
    items = given.items.copy()
    items[given.offsets[200:-1] + 6] = (items[given.offsets[200:-1] + 6] + 300) % 600
    assert leaks.answers_in_training(dataclasses.replace(given, items=items), prompts) is None


def test_windows_too_short_for_a_verdict(base: Callable) -> None:
    dataset, tokenizer = made(random_histories(14, 60), 600), base()
    codes = atomic_codes(dataset.item_ids, titles(600), tokenizer)
    outcome = leaks.answers_in_training(dataset, builder(PromptConfig(max_history=3), codes, tokenizer))
    assert isinstance(outcome, str) and "max_history" in outcome
    two = dataclasses.replace(INSTRUCT, max_history=2)
    assert isinstance(leaks.answers_in_training(dataset, builder(two, codes, tokenizer)), str)


def test_a_few_twins_are_no_leak(base: Callable) -> None:
    """Eight users of 1,000 have the history of another one, as accounts that review the same things do."""
    histories = random_histories(18, 992)
    dataset = made([*histories, *([*h, 599] for h in histories[:8])], 600)
    tokenizer = base()
    prompts = builder(PromptConfig(), atomic_codes(dataset.item_ids, titles(600), tokenizer), tokenizer)
    assert leaks.answers_in_training(dataset, prompts) is None
    assert leaks.answers_in_training(made([*histories[:92], *([*h, 599] for h in histories[:8])], 600), prompts) is not None


def test_parts_of_sequences() -> None:
    draw = random.Random(15)
    for _ in range(100):
        sequences = [np.asarray([draw.randrange(4) for _ in range(draw.randrange(1, 30))]) for _ in range(6)]
        parts = [np.asarray([draw.randrange(4) for _ in range(draw.randint(2, 22))]) for _ in range(20)]
        parts += [s[-k:] for s in sequences for k in (2, 18) if len(s) >= k] + [sequences[0], sequences[1][:2]]
        parts = [p for p in parts if len(p) > 1]
        texts = ["".join(map(str, s)) for s in sequences]
        expected = [any("".join(map(str, p)) in text for text in texts) for p in parts]
        assert Sequences(sequences, min(map(len, parts))).hold(parts) == expected and any(expected)
