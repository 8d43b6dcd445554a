"""P5's and LGIR's tasks: what prompts and answers say, what they must not know, and how they are scored."""

import csv
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import FIXTURE, source_of
from tiny_run import CONFIG, ITEMS, TITLES, USERS, histories, write_inputs
from transformers import AutoTokenizer

from sftrec_jax.cli import main
from sftrec_jax.config import DecodeConfig, LoraConfig, MeshConfig, ModelConfig, PromptConfig, RunConfig, TasksConfig, TrainConfig
from sftrec_jax.config_file import load_config
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.mixture import Pairs
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.data.task_words import TaskWords
from sftrec_jax.data.tasks import make_tasks
from sftrec_jax.data.user_tasks import UserTasks
from sftrec_jax.decode.recommender import Recommender
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.text_metrics import overlap, rating_errors, read_rating
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.naming import atomic_codes
from sftrec_jax.items.titles import distinct_titles
from sftrec_jax.model.load import load_decoder, make_build, source_architecture
from sftrec_jax.model.mesh import make_mesh

EVERY = ("direct", "rating", "review_to_rating", "review_to_summary", "review_to_item", "explanation", "profile_to_item")


def write_reviews(folder: Path) -> Path:
    """The small log with reviews, summaries, explanations (generated; some are empty), profiles and tags of some users."""
    config = write_inputs(folder)
    draw = random.Random(1)
    with (folder / "log.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["user_id", "item_id", "timestamp", "rating", "review", "short", "why"])
        for n, (user, items) in enumerate(histories().items()):
            for at, item in enumerate(items):
                mark = f"{user}{item}"
                said = [f"Review of {mark}.\nGood & <b>long</b> 🎬", f"Short {mark}", f"Because {mark}"]
                said = [text if draw.random() < 0.7 else "" for text in said]
                out.writerow([user, item, 1000 * at + n, 1 + (at + n) % 5, *said])
    with (folder / "items.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["item_id", "title", "kind"])
        out.writerows([item, TITLES[item], f"kind {i % 3}" if i % 4 else ""] for i, item in enumerate(ITEMS))
    with (folder / "people.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["user_id", "age", "taste"])
        out.writerows([user, 20 + n, f"taste of {user}" if n % 2 else ""] for n, user in enumerate(USERS))
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    values["data"] |= {"rating_column": "rating", "review_column": "review", "summary_column": "short"}
    values["data"] |= {"explanation_column": "why", "text_columns": ["kind"]}
    values["profile"] = {"source": "people.csv", "columns": ["age", "taste"], "complete": "taste"}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return config


def named(dataset: Dataset, tokenizer: Any) -> ItemCodes:
    return atomic_codes(dataset.item_ids, distinct_titles(dataset.titles, dataset.item_ids), tokenizer)


class Made:
    def __init__(self, folder: Path, **changes: Any):
        loaded = load_config(write_reviews(folder))
        self.dataset: Dataset = prepare_dataset(loaded.data, loaded.profile)
        self.tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
        self.codes = named(self.dataset, self.tokenizer)
        self.tasks = TasksConfig(**{name: 1.0 for name in (*EVERY, "profile_completion", "attribute_to_item")}, attribute="kind",
                                 candidates=5, targets_per_user=2, **changes)  # fmt: skip
        self.config = RunConfig(loaded.data, loaded.profile, tasks=self.tasks, prompt=PromptConfig("instruct", 4))
        self.made = {t.name: t for t in make_tasks(self.config, self.dataset, self.codes, self.tokenizer, 400)}

    def texts(self, name: str) -> list[tuple[str, str]]:
        """Prompt and answer of each example; this tokenizer begins pieces with a space."""
        pairs = self.made[name].examples
        assert isinstance(pairs, Pairs)
        read = lambda ids: self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # noqa: E731
        return [
            (read(pairs.tokens[a:b]).removeprefix("<s>").strip(), read(pairs.tokens[b:c]).removesuffix("</s>").strip())
            for a, b, c in zip(pairs.starts[:-1], pairs.answers, pairs.starts[1:], strict=True)
        ]

    def names(self) -> dict[str, str]:
        """Item token -> item id."""
        tokens = (self.tokenizer.decode([i]) for i in self.codes.codes[:, 0])
        return dict(zip(tokens, map(str, self.dataset.item_ids), strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("reviews"))


def rows(folder_of: Made) -> dict[tuple[str, str], list[dict[str, str]]]:
    """Rows of the log by (user, item), those of training alone."""
    found = defaultdict(list)
    with Path(folder_of.config.data.source).open(encoding="utf-8", newline="") as file:
        by_user = defaultdict(list)
        for row in csv.DictReader(file):
            by_user[row["user_id"]].append(row)
    for user, items in by_user.items():
        for row in items[:-2]:
            found[user, row["item_id"]].append(row)
    return found


def test_reviews_are_asked_about_once_each(made: Made) -> None:
    train = [row for group in rows(made).values() for row in group]
    flat = lambda text: text.replace("\n", " ")  # noqa: E731
    expected = {
        "review_to_summary": [
            (f"A review of {TITLES[r['item_id']]}:\n{flat(r['review'])}\nIn a few words:", r["short"])
            for r in train if r["review"] and r["short"]
        ],
        "review_to_rating": [
            (f"A review of {TITLES[r['item_id']]}:\n{flat(r['review'])}\nIts rating:", r["rating"]) for r in train if r["review"]
        ],
        "explanation": [
            (f"Why the user rates this item {r['rating']}:\n{TITLES[r['item_id']]}", r["why"]) for r in train if r["why"]
        ],
    }  # fmt: skip
    for name, pairs in expected.items():
        # The two items that are `Twice; said` got numbers.
        same = [(p.replace(" [2]", ""), a) for p, a in made.texts(name)]
        assert sorted(same) == sorted(pairs) and len(pairs) > 20
        assert str(len(train) - len(pairs)) in made.made[name].left_out
    names = made.names()
    by_review = {flat(r["review"]): r["item_id"] for r in train if r["review"]}
    found = made.texts("review_to_item")
    assert len(found) == sum(bool(r["review"]) for r in train)
    assert all(names[answer] == by_review[prompt.split("\n")[1]] for prompt, answer in found)


def test_candidates_hold_the_answer_and_nothing_that_was_taken(made: Made) -> None:
    names, taken = made.names(), {u: set(items[:-2]) for u, items in histories().items()}
    found = made.texts("direct")
    assert len(found) == 2 * len(USERS)
    places = []
    for at, (prompt, answer) in enumerate(found):
        user = USERS[at // 2]
        listed = [word for word in prompt.replace("\n", " ").split() if word in names]
        assert len(listed) == len(set(listed)) == 5 and answer in listed
        assert names[answer] in taken[user] and not {names[w] for w in listed} - {names[answer]} & taken[user]
        assert not [w for w in listed if w != answer and names[w] in taken[user]]
        places.append(listed.index(answer))
    assert len(set(places)) == 5  # not always in the same place


def test_ratings_are_asked_after_the_history_before(made: Made) -> None:
    for at, (prompt, answer) in enumerate(made.texts("rating")):
        items, n = histories()[USERS[at // 2]], at // 2
        lines = prompt.split("\n")
        asked = lines[-1].replace(" [2]", "").strip()
        candidates = [p for p in range(1, len(items) - 2) if TITLES[items[p]] == asked and answer == str(1 + (p + n) % 5)]
        assert candidates
        shown = [line.replace(" [2]", "").strip() for line in lines[1:-2]]
        assert any(shown == [f"{TITLES[items[q]]}: {1 + (q + n) % 5}" for q in range(max(0, p - 4), p)] for p in candidates), (
            prompt,
            answer,
        )


def test_profiles(made: Made) -> None:
    found = made.texts("profile_completion")
    with_taste = [user for n, user in enumerate(USERS) if n % 2]
    assert 10 < len(found) < len(with_taste)
    for prompt, answer in found:
        user = answer.removeprefix("taste of ")
        assert user in with_taste and "taste" not in prompt and f"age: {20 + USERS.index(user)}" in prompt
        last = histories()[user][-3]
        assert prompt.replace(" [2]", "").split("\n")[-3].strip() == TITLES[last]
    tasks = UserTasks(TaskWords(made.config, made.dataset, made.codes, made.tokenizer, 400))
    held = {one.answer for one in tasks.held_out("profile_completion", None, 0)}
    assert held | {answer for _, answer in found} == {f"taste of {user}" for user in with_taste}
    assert not held & {answer for _, answer in found}
    names = made.names()
    for at, (prompt, answer) in enumerate(made.texts("profile_to_item")):
        user = USERS[at // 2]
        assert f"age: {20 + at // 2}" in prompt and names[answer] in histories()[user][:-2]


def test_attributes(made: Made) -> None:
    names = made.names()
    expected = {(f"An item of this kind:\nkind {i % 3}\nThe item:", item) for i, item in enumerate(ITEMS) if i % 4}
    assert {(prompt, names[answer]) for prompt, answer in made.texts("attribute_to_item")} == expected
    assert made.made["attribute_to_item"].left_out == "8 items lack it"


def test_nothing_held_out_is_trained_on(made: Made) -> None:
    """Words of validation and test interactions stand in no example."""
    held = {f"{user}{item}" for user, items in histories().items() for item in items[-2:] if item not in items[:-2]}
    words = [text for name in made.made for pair in made.texts(name) for text in pair]
    assert held and not [word for word in held for text in words if word in text]


def test_what_is_asked_in_evaluation_is_the_test_interaction(made: Made) -> None:
    tasks = UserTasks(TaskWords(made.config, made.dataset, made.codes, made.tokenizer, 400))
    for name in EVERY:
        for one in tasks.held_out(name, None, 0):
            assert one.at == len(histories()[USERS[one.user]]) - 1
    assert len(tasks.held_out("rating", 7, 0)) == 7 and len(tasks.held_out("rating", None, 0)) == len(USERS)


@pytest.mark.parametrize(
    ("values", "data", "profile", "error"),
    [
        (
            {"rating": 1.0},
            {"rating_column": None},
            {},
            "the data have no rating; name its column with data.rating_column, or set it",
        ),
        ({"explanation": 1.0}, {"explanation_column": None}, {}, "tasks.explanation: the data have no explanation"),
        ({"review_to_rating": 1.0}, {"review_column": None}, {}, "tasks.review_to_rating: the data have no review"),
        ({"attribute_to_item": 1.0}, {}, {}, "tasks.attribute is None; name one of data.text_columns (kind)"),
        ({"attribute_to_item": 1.0, "attribute": "colour"}, {}, {}, "tasks.attribute is colour; name one of"),
        ({"profile_completion": 1.0}, {}, {"complete": None}, "profile.complete is None; name the field to fill in (age, taste)"),
        ({"profile_to_item": 1.0}, {}, {"source": None, "columns": ()}, "nothing is known of users; set profile.columns"),
        ({"direct": 1.0, "candidates": 30}, {}, {}, "but the context has 100"),
    ],
)
def test_tasks_whose_fields_the_data_lack(
    values: dict[str, Any], data: dict[str, Any], profile: dict[str, Any], error: str, tmp_path: Path
) -> None:
    import dataclasses

    loaded = load_config(write_reviews(tmp_path))
    loaded = dataclasses.replace(
        loaded,
        data=dataclasses.replace(loaded.data, **data),
        profile=dataclasses.replace(loaded.profile, **profile),
        tasks=TasksConfig(**values),
    )
    dataset = prepare_dataset(loaded.data, loaded.profile)
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    codes = named(dataset, tokenizer)
    with pytest.raises(UserError) as caught:
        make_tasks(loaded, dataset, codes, tokenizer, 100)
    assert error in str(caught.value) and "\n" not in str(caught.value)


def test_examples_draw_among_templates_and_unseen_ones_wait(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "rating.1.j2").write_text("One {{ title }}?")
    (folder / "rating.2.j2").write_text("Two {{ title }}?")
    (folder / "rating.unseen.j2").write_text("Three {{ title }}?")
    made = Made(tmp_path, templates=str(folder))
    first = [prompt.split()[0] for prompt, _ in made.texts("rating")]
    assert set(first) == {"One", "Two"} and min(first.count("One"), first.count("Two")) > 20
    (folder / "direct.unseen.j2").write_text("x")
    with pytest.raises(UserError, match="direct has unseen templates only; add direct.j2 to train with"):
        Made(tmp_path, templates=str(folder))


def test_ratings_are_read_and_their_errors_counted() -> None:
    assert [read_rating(t) for t in ("4", "rated 3.5 of 5", "about 2,5", "none", "", "-1")] == [4, 3.5, 2.5, None, None, -1]
    found = rating_errors(["4", "9", "?"], np.asarray([3.0, 5.0, 1.0]), np.asarray([0.0, 0.0, 3.0]), 1.0, 5.0)
    assert found == pytest.approx({"rmse": np.sqrt((1 + 0 + 4) / 3), "mae": 1.0, "unreadable": 1 / 3})


def test_overlap() -> None:
    texts = ["a very good film indeed", "the plot is thin but fun to watch"]
    assert overlap(texts, texts) == pytest.approx(dict.fromkeys(("bleu", "rouge1", "rouge2", "rougeL"), 100.0))
    found = overlap(["good film plot"], ["film good bad"])
    # By hand: two of three words, no pair of neighbours, a common subsequence of one.
    assert found["rouge1"] == pytest.approx(200 / 3) and found["rouge2"] == 0 and found["rougeL"] == pytest.approx(100 / 3)


def test_words_are_written_greedily_as_torch_writes_them(made: Made) -> None:
    """Against transformers' greedy search; tokens that name items are no words."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(FIXTURE).eval()
    mesh = make_mesh(MeshConfig())
    source = source_of(FIXTURE)
    build = make_build(ModelConfig(), LoraConfig(), TrainConfig(), source_architecture(source), made.codes, mesh)
    decoder = load_decoder(build, source, made.codes, mesh, 0, False)
    decode = Recommender(decoder, made.codes, DecodeConfig(beam=3, top_k=3, batch_users=2), mesh)
    prompts = [
        np.asarray([1, *made.tokenizer.encode(text, add_special_tokens=False)], np.int32) for text in ("", "Lily", "A dog")
    ]
    stop = int(made.tokenizer.encode("a.", add_special_tokens=False)[-1])
    written = decode.write(prompts, 20, stop)
    with torch.no_grad():
        for prompt, found in zip(prompts, written, strict=True):
            ids = torch.asarray(prompt[None], dtype=torch.int64)
            own = reference.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=stop, pad_token_id=0)[0, len(prompt) :]
            assert found[found >= 0].tolist() == own.tolist()
    assert (written[:, -1] == -1).any()  # some text ends early


@pytest.mark.slow
def test_a_run_with_every_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the log to metrics of each task, held-out templates too."""
    config = write_reviews(tmp_path)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "rating.unseen.j2").write_text("Rate {{ title }}: ")
    (folder / "rating.j2").write_text("How is {{ title }}? ")
    (folder / "zero.j2").write_text("{% block entry %}{{ title }};{% endblock %}{% block tail %} then {% endblock %}")
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    values["tasks"] = {**dict.fromkeys((*EVERY, "profile_completion"), 1.0), "candidates": 4, "templates": "own"}
    values["prompt"] = {"format": "instruct", "max_history": 4}
    values["train"] = {**CONFIG["train"], "row_length": 256}
    values["items"] = {"max_title_tokens": 8}
    values["evaluate"] |= {"task_users": 5, "templates": ["own/zero.j2"]}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["run", str(config), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    metrics = yaml.safe_load((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics["tasks"]) == {*EVERY, "profile_completion", "rating (unseen rating.unseen)"}
    assert set(metrics["tasks"]["rating"]) == {"questions", "rmse", "mae", "unreadable", "rmse_of_user_mean", "mae_of_user_mean"}
    assert metrics["tasks"]["direct"]["recall@1_of_chance"] == 0.25
    assert {"bleu", "rougeL"} <= set(metrics["tasks"]["explanation"]) and "recall@10" in metrics["templates"]["zero.j2"]
    assert "task rating (unseen rating.unseen): 5 questions" in said and "unseen template zero.j2: R@10" in said
