"""Alignment tasks: the texts that are trained, decoded; templates in their sandbox; weights in a run."""

from pathlib import Path

import numpy as np
import pytest
from helpers import FIXTURE
from transformers import AutoTokenizer

from sftrec_jax.cli import main
from sftrec_jax.config import DataConfig, ItemsConfig, PromptConfig, RunConfig, TasksConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.data.segments import Segments
from sftrec_jax.data.tasks import Task, make_tasks
from sftrec_jax.data.templates import PromptTemplate
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.naming import atomic_codes

TITLES = ["Red ball", "The </s> cat", "Lily", "A big tree"]
TEXTS = ["It is red.", "", "A girl.", "Birds sit in it."]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    rows = [
        f"u{user},{item}"
        for user in range(3)
        for item in ("i0", "i1", "i2", "i3", "i0")[user : user + 4]
        if user < 2 or item != "i1"
    ]
    (tmp_path / "log.csv").write_text("user_id,item_id\n" + "\n".join(dict.fromkeys(rows)) + "\n", encoding="utf-8")
    lines = [f"i{i},{title},{text}" for i, (title, text) in enumerate(zip(TITLES, TEXTS, strict=True))]
    (tmp_path / "items.csv").write_text("item_id,title,about\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return prepare_dataset(
        DataConfig(source=str(tmp_path / "log.csv"), catalogue=str(tmp_path / "items.csv"), time_column=None, user_core=0,
                   text_columns=("about",))
    )  # fmt: skip


class Made:
    """Tasks of a config over the data set, and their texts."""

    def __init__(
        self, dataset: Dataset, tasks: TasksConfig, prompt: PromptConfig | None = None, items: ItemsConfig | None = None
    ):
        self.tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
        self.codes: ItemCodes = atomic_codes(dataset.item_ids, dataset.titles, self.tokenizer)
        config = RunConfig(prompt=prompt or PromptConfig(), tasks=tasks, items=items or ItemsConfig())
        self.tasks: list[Task] = make_tasks(config, dataset, self.codes, self.tokenizer, 128)

    def texts(self, task: Task) -> list[tuple[str, str]]:
        """Prompt and answer of every example, as the tokenizer reads them back."""
        found = task.examples
        if isinstance(found, Segments):
            return [(self.read(e.tokens[: e.target_positions[0] + 1]), self.read(e.labels)) for e in found.apart().examples()]
        examples = found.pack([np.arange(len(found))], 4096, 1024)
        out = []
        for segment in range(1, len(found) + 1):
            inside = np.flatnonzero(examples.segments[0] == segment)
            mine = [j for j in np.flatnonzero(examples.weights[0]) if examples.target_positions[0, j] in inside]
            first = examples.target_positions[0, mine[0]]
            out.append((self.read(examples.tokens[0, inside[0] : first + 1]), self.read(examples.labels[0, mine])))
        return out

    def read(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def words(answer: str) -> str:
    """Without the token that ends it, which of this tokenizer is EOS."""
    assert answer.endswith("</s>")
    return answer.removesuffix("</s>").strip()


def test_pairs_say_what_their_templates_say(dataset: Dataset) -> None:
    made = Made(dataset, TasksConfig(title_to_item=1.0, item_to_title=0.5, text_to_item=2.0, item_to_text=1.0))
    assert [(t.name, t.weight, len(t.examples), t.left_out) for t in made.tasks] == [
        ("title_to_item", 1.0, 4, ""), ("item_to_title", 0.5, 4, ""),
        ("text_to_item", 2.0, 3, "1 items lack it"), ("item_to_text", 1.0, 3, "1 items lack it"),
    ]  # fmt: skip
    names = [made.tokenizer.decode([i]) for i in made.codes.codes[:, 0]]
    to_item, to_title, text_to_item, item_to_text = (made.texts(t) for t in made.tasks)
    assert to_item[0] == ("<s> An item has the title:\nRed ball\nThe item:\n", names[0])
    # The spelling of a special token in a title is letters, as anywhere.
    assert "</s>" in to_item[1][0] and 2 not in made.tasks[0].examples.tokens.tolist()  # type: ignore[union-attr]
    assert [answer for _, answer in to_item] == names
    # This tokenizer begins each piece with a space.
    assert [prompt.replace(" ", "") for prompt, _ in to_title] == [f"<s>Anitem:\n{name}\nItstitle:\n" for name in names]
    assert [words(answer) for _, answer in to_title] == TITLES
    assert [answer for _, answer in text_to_item] == [names[0], names[2], names[3]] and "Birds sit in it." in text_to_item[2][0]
    assert [words(answer) for _, answer in item_to_text] == ["It is red.", "A girl.", "Birds sit in it."]


def test_sequences_answer_in_the_other_language(dataset: Dataset) -> None:
    made = Made(dataset, TasksConfig(titles_to_item=1.0, items_to_title=1.0), PromptConfig("stream"))
    names = [made.tokenizer.decode([i]) for i in made.codes.codes[:, 0]]
    by_title, by_item = (made.texts(t) for t in made.tasks)
    training = [dataset.train_history(u).tolist() for u in range(len(dataset.user_ids))]
    wanted = [(history[:at], history[at]) for history in training for at in range(1, len(history))]
    assert len(by_title) == len(by_item) == len(wanted) > 0
    for (history, target), (prompt, answer) in zip(wanted, by_title, strict=True):
        assert answer == names[target] and prompt.endswith("The next item:\n")
        assert [prompt.index(TITLES[i]) for i in history] == sorted(prompt.index(TITLES[i]) for i in history)
    for (history, target), (prompt, answer) in zip(wanted, by_item, strict=True):
        assert words(answer) == TITLES[target] and prompt.endswith("The title of the next item:\n")
        assert [name for name in names if name in prompt] and all(names[i] in prompt for i in history)
        assert not any(title in prompt for title in TITLES)


def test_no_task_trains_held_out_interactions(dataset: Dataset) -> None:
    made = Made(dataset, TasksConfig(titles_to_item=1.0, items_to_title=1.0), PromptConfig("stream"))
    for task in made.tasks:
        assert isinstance(task.examples, Segments)
        targets = sum(max(0, len(dataset.train_history(u)) - 1) for u in range(len(dataset.user_ids)))
        assert int(task.examples.target_items.sum()) == targets


def test_a_template_of_ones_own(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "item_to_title.j2").write_text("{{ item }} is{% if item %} called{% endif %}: ", encoding="utf-8")
    (tmp_path / "title_to_item.j2").write_text("{{ title | upper }}?", encoding="utf-8")
    made = Made(dataset, TasksConfig(title_to_item=1.0, item_to_title=1.0, templates=str(tmp_path)))
    to_item, to_title = (made.texts(t) for t in made.tasks)
    assert to_item[0][0] == "<s> RED BALL?"
    assert to_title[2][0].startswith("<s>") and to_title[2][0].rstrip().endswith("is called:")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("{{ titel }}", "there is no field 'titel'; it has title"),
        ("{{ title ", "line 1: "),
        ("{% for x in ().__class__.__bases__[0].__subclasses__() %}{{ x }}{% endfor %}", "SecurityError"),
        ("{{ title.__init__.__globals__ }}", "SecurityError"),
        ("{{ title | nosuch }}", "line 1: No filter named 'nosuch'"),
        ("{{ 1 / 0 }}{{ title }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_cannot_be(text: str, wrong: str, tmp_path: Path) -> None:
    (tmp_path / "t.j2").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        PromptTemplate(tmp_path / "t.j2", ("title",)).render({"title": "x"})
    assert str(raised.value).startswith(f"{tmp_path / 't.j2'}") and wrong in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("tasks", "prompt", "items", "text"),
    [
        ({"title_to_item": 1.0}, {}, {"tokenizer": "title"}, "tasks.title_to_item: items.tokenizer title names items in words"),
        (
            {"titles_to_item": 1.0},
            {"format": "instruct"},
            {},
            "tasks.titles_to_item is what prompt.history: titles trains already",
        ),
    ],
)
def test_tasks_that_say_nothing_new(
    dataset: Dataset, tasks: dict[str, float], prompt: dict[str, str], items: dict[str, str], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        Made(dataset, TasksConfig(**tasks), PromptConfig(**prompt), ItemsConfig(**items))  # type: ignore[arg-type]


def test_weights_that_sum_to_nothing_or_are_none() -> None:
    with pytest.raises(UserError, match="every weight is 0, so nothing would be trained; set tasks.sequential to 1"):
        TasksConfig(sequential=0.0)
    for value in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="tasks.item_to_title is"):
            TasksConfig(item_to_title=value)


def test_a_task_whose_fields_the_data_lack(dataset: Dataset) -> None:
    import dataclasses

    assert dataset.text is not None
    empty = dataclasses.replace(dataset.text, texts=np.asarray([""] * 4, object))
    with pytest.raises(UserError, match=r"tasks.text_to_item: the catalogue says nothing .* data.text_columns"):
        Made(dataclasses.replace(dataset, text=empty), TasksConfig(text_to_item=1.0))


@pytest.mark.slow
def test_a_run_with_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--train.max-steps 2 --train.epochs 1 --evaluate.users 3 --train.validate-users 3 --tasks.title-to-item 0.5"
    more = "--tasks.items-to-title 0.1 --tasks.sequential 0.5 --train.row-length 128 --train.batch-rows 4"
    config = Path(__file__).parent.parent / "configs" / "quick.yaml"
    assert main(["run", str(config), "--out", str(tmp_path / "run"), *words.split(), *more.split()]) == 0
    said = capsys.readouterr().err
    assert "task sequential: weight 0.5" in said and "task title_to_item: an epoch takes 0.5 times 9,742 examples" in said
    assert "task items_to_title: an epoch takes 0.1 times" in said
