"""Preference pairs: what stands in them, what does not, and that TRL's DPOTrainer gives the same reference log-probabilities."""

import functools
import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import ITEMS, STORIES, TITLES, USERS, histories, trained
from tiny_tokenizers import byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftrec_jax.cli import main
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.decode.recommender import Ranking, Recommender
from sftrec_jax.items.encode import encode_apart
from sftrec_jax.items.naming import add_tokens
from sftrec_jax.run import preferences
from sftrec_jax.run.preferences import Twins, texts_of

# TRL 1.16 uses names that transformers 5.23 changed; this can go once TRL uses the new ones.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning")

COLUMNS = [
    "user", "prompt", "chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps", "chosen_item", "rejected_item",
    "prompt_ids", "chosen_ids", "rejected_ids", "text_is_exact",
]  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(run: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    assert main(["recommend", str(run), "--preferences", str(out), *options]) == 0
    return lines(out)


@functools.cache
def three_each() -> list[dict[str, Any]]:
    """Three rejected items for each user of the tiny run."""
    with tempfile.TemporaryDirectory() as folder:
        return write(trained(), Path(folder) / "pairs.jsonl", "--negatives", "3", "--seed", "5")


def changed(folder: Path, change: Any) -> Path:
    """The tiny run with other arrays in its data set."""
    run = folder / "run"
    shutil.copytree(trained(), run, dirs_exist_ok=True)
    dataset = Dataset.load(trained() / "prepared")
    replace(dataset, **change(dataset)).save(run / "prepared")
    return run


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main(["recommend", str(trained()), *options]) == 2
    *_, message = capsys.readouterr().err.splitlines()
    assert message.startswith("error: ")
    return message


def test_pairs_come_from_the_training_part_of_the_log() -> None:
    log = histories()
    rows = three_each()
    assert [row["user"] for row in rows] == [user for user in USERS for _ in range(3)]
    for at, row in enumerate(rows):
        assert list(row) == COLUMNS
        train = log[row["user"]][:-2]  # the last item is the test target, the one before it the validation target
        assert row["prompt"] == "".join(f"<|item_{item}|>" for item in train[:-1])
        assert row["chosen_item"] == train[-1] and row["chosen"] == f"<|item_{train[-1]}|>"
        assert row["rejected"] == f"<|item_{row['rejected_item']}|>" and row["rejected_item"] in set(ITEMS) - set(train)
        assert row["ref_chosen_logps"] < 0 and row["ref_rejected_logps"] < 0 and row["text_is_exact"]
        assert row["ref_chosen_logps"] == rows[at - at % 3]["ref_chosen_logps"]
    assert len({(row["user"], row["rejected_item"]) for row in rows}) == 3 * len(USERS)


def test_validation_and_test_items_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever users took later, the file is the same to the last byte: it can hold nothing of it."""

    def others(dataset: Dataset) -> dict[str, np.ndarray]:
        later = np.concatenate([dataset.offsets[:-1] + at for at in (dataset.valid_position, dataset.test_position)])
        assert len(later) == 2 * len(USERS)
        items = dataset.items.copy()
        items[later] = (items[later] + 1) % len(ITEMS)
        return {"items": items}

    run = changed(tmp_path, others)
    monkeypatch.setattr("sftrec_jax.run.fingerprint.check_readable", lambda *_: None)  # such a change is refused
    assert write(run, tmp_path / "pairs.jsonl", "--negatives", "3", "--seed", "5") == three_each()


def test_a_sample_of_users_and_other_seeds(tmp_path: Path) -> None:
    def some(name: str, *options: str) -> list[dict[str, Any]]:
        return write(trained(), tmp_path / name, "--users", "20", "--negatives", "3", *options)

    first, again = some("a.jsonl"), some("b.jsonl", "--seed", "0")
    assert first == again and len(first) == 60
    users = [row["user"] for row in first]
    assert users == sorted(users) and len(set(users)) == 20
    other = some("a.jsonl", "--seed", "1", "--overwrite")
    assert [row["user"] for row in other] != users
    assert len(lines(tmp_path / "a.jsonl")) == 60


def test_chunks_do_not_draw_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preferences, "USERS_AT_ONCE", 16)
    seeds: list[int] = []
    sample = Recommender.sample

    def noted(self: Recommender, prompts: Any, exclude: Any, k: int, seed: int) -> Ranking:
        seeds.append(seed)
        return sample(self, prompts, exclude, k, seed)

    monkeypatch.setattr(Recommender, "sample", noted)
    rows = write(trained(), tmp_path / "pairs.jsonl", "--negatives", "3", "--seed", "6")
    assert len(set(seeds)) == len(seeds) == 3
    assert [row["rejected_item"] for row in rows] != [row["rejected_item"] for row in three_each()]
    fixed = ("user", "prompt", "chosen_item", "text_is_exact")
    assert [[row[name] for name in fixed] for row in rows] == [[row[name] for name in fixed] for row in three_each()]


def test_short_histories_and_a_small_catalogue_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shorten(dataset: Dataset) -> dict[str, np.ndarray]:
        ends = dataset.train_end.copy()
        ends[[0, 3]] = (1, 0)
        return {"train_end": ends}

    run = changed(tmp_path, shorten)
    rows = write(run, tmp_path / "pairs.jsonl", "--users", "39", "--negatives", "29")
    said = capsys.readouterr().err
    train = {user: set(items[:-2]) for user, items in histories().items() if user not in ("u00", "u03")}
    assert {row["user"] for row in rows} == set(train)
    for user, seen in train.items():
        assert {row["rejected_item"] for row in rows if row["user"] == user} == set(ITEMS) - seen
    assert "only 38 users" in said and "left out: 2 of 40 users" in said
    assert f"{38 * 29 - len(rows)} pairs fewer" in said and f"wrote {len(rows):,} pairs of 38 users" in said

    run = changed(tmp_path, lambda dataset: {"train_end": np.ones_like(dataset.train_end)})
    assert main(["recommend", str(run), "--preferences", str(tmp_path / "none.jsonl")]) == 2
    assert "no user has two training items" in capsys.readouterr().err and not (tmp_path / "none.jsonl").exists()


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "pairs.jsonl"
    out.write_text("mine")
    assert "exists already; name another file or add --overwrite" in refused(capsys, "--preferences", str(out))
    (tmp_path / "x.jsonl").mkdir()
    assert "is a folder" in refused(capsys, "--preferences", str(tmp_path / "x.jsonl"))
    assert "use .jsonl" in refused(capsys, "--preferences", str(tmp_path / "pairs.json"))
    assert "there is no folder" in refused(capsys, "--preferences", str(tmp_path / "no" / "pairs.jsonl"))
    new = ("--preferences", str(tmp_path / "new.jsonl"))
    for option, value in (("--users", "0"), ("--negatives", "0"), ("--negatives", "30"), ("--seed", "-1")):
        assert f"{option} {value}: " in refused(capsys, *new, option, value)
    for option in ("--user u03", "--history Heat", "--k 0", "--keep-seen", "--json", "--to a.jsonl"):
        assert f"{option.split()[0]} says nothing beside --preferences" in refused(capsys, *new, *option.split())
    for option in ("--users 5", "--negatives 2", "--seed 0"):
        assert f"{option.split()[0]} needs --preferences" in refused(capsys, "--user", "u03", *option.split())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preferences.os, "replace", full)
    assert "cannot be written (No space left" in refused(capsys, "--preferences", str(out), "--overwrite")
    assert out.read_text() == "mine" and {p.name for p in tmp_path.iterdir()} == {"pairs.jsonl", "x.jsonl"}


def test_items_with_equal_tokens_stand_for_one_another_once() -> None:
    group = np.array([2, 0, 1, 0, 3, 1, 0, 4])
    twins = Twins(group)
    for items in ([4], [1], [6, 7], [5, 0]):
        left = set(range(8)) - set(twins.of(np.array(items)).tolist())
        own = {group[i] for i in items}
        assert left == {i for i in range(8) if group[i] not in own and i == group.tolist().index(group[i])}
    assert Twins(np.arange(4)).of(np.array([2, 0, 2])).tolist() == [0, 2]


TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""Without EOS; `bos_token` because the tokenizer of stories260K begins every text with it, so that `prompt` is without."""


@pytest.mark.parametrize("form", ["tokens", "messages"])
def test_trl_agrees_on_the_reference_and_takes_a_step(form: str, tmp_path: Path) -> None:
    import datasets
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    rows = [three_each()[i] for i in range(0, 3 * len(USERS), 13)]
    export = trained() / "export"
    policy, reference = (AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(export)
    data = given = datasets.Dataset.from_list(rows)
    if form == "messages":
        tokenizer.chat_template = TEMPLATE
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        given = data.map(lambda row: {name: [{"role": role, "content": row[name]}] for name, role in roles.items()})
    options = DPOConfig(
        output_dir=str(tmp_path / "dpo"), per_device_train_batch_size=len(rows), max_steps=1, learning_rate=1e-2,
        warmup_steps=0, report_to="none", use_cpu=True, bf16=False, save_strategy="no",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer: Any = DPOTrainer(policy, reference, args=options, train_dataset=given, processing_class=tokenizer)
    if form == "tokens":
        # What TRL makes of the texts is these tokens and EOS.
        for row, made in zip(rows, trainer.train_dataset, strict=True):
            assert made["prompt_ids"] == row["prompt_ids"]
            assert made["chosen_ids"] == [*row["chosen_ids"], tokenizer.eos_token_id]
        trainer.train_dataset = data
    found = 0
    for batch in trainer.get_train_dataloader():
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        assert (batch["ref_chosen_logps"] - chosen).abs().max() < 1e-3
        assert (batch["ref_rejected_logps"] - rejected).abs().max() < 1e-3
        assert chosen.std() > 0.01 and rejected.std() > 0.01
        found += len(chosen)
    assert found == len(rows)
    before = {name: value.detach().clone() for name, value in policy.named_parameters()}
    loss = trainer.train().training_loss
    assert loss == pytest.approx(math.log(2), abs=1e-3)  # the policy begins as the reference
    moved = [float((value.detach() - before[name]).abs().max()) for name, value in policy.named_parameters()]
    assert all(math.isfinite(m) for m in moved) and max(moved) > 1e-3
    assert all(torch.equal(p, q) for p, q in zip(before.values(), reference.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["llama 2", "gpt 2"])
def test_texts_are_read_back_or_marked(kind: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(STORIES) if kind == "llama 2" else byte_level()
    add_tokens(["<|item_1|>", "<|item_2|>"], tokenizer, "12")

    def ids(*pieces: str) -> list[int]:
        return [i for part in encode_apart(tokenizer, pieces) for i in part]

    bos = [tokenizer.bos_token_id]
    told = ids("Items that the user took:\n", TITLES["i03"], "\n", "Déjà vu", "\n", "The next item:\n")
    tokens = ids("Items that the user took:\n", "<|item_2|>", "\n", "<|item_1|>", "\n", "The next item:\n")
    answers = [ids(TITLES["i07"], "\n"), ids("<|item_1|>", "<|item_2|>"), ids("<|item_2|>")]
    for prompt in (bos + told, bos + tokens, bos + ids("<|item_1|>", "<|item_2|>"), bos):
        text, parts, exact = texts_of(tokenizer, prompt, answers)
        assert exact == [True] * 3
        for answer, part in zip(answers, parts, strict=True):
            assert tokenizer(text)["input_ids"] == prompt and tokenizer(text + part)["input_ids"] == prompt + answer
    # Pieces that the tokenizer makes one of, inside the prompt and between prompt and answer.
    first, rest = ids("t"), tokenizer.convert_tokens_to_ids(["h", "e"])
    assert len(ids("the")) == 1
    assert texts_of(tokenizer, bos + first + rest, [answers[2]])[2] == [False]
    assert texts_of(tokenizer, bos + ids("<|item_1|>", "t"), [rest, answers[2]])[2] == [False, True]
