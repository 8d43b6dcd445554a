"""A language model fills in profiles from what users did in training: a base shown examples, or a run trained for it."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import FIXTURE
from test_user_tasks import write_reviews
from tiny_run import TITLES, histories, trained
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftrec_jax.cli import main
from sftrec_jax.data.dataset import Dataset

ITEMS_SHOWN, TOKENS = 3, 6


def prepared(
    folder: Path, name: str, filler: object, capsys: pytest.CaptureFixture[str], **changes: Any
) -> tuple[int, str, Path]:
    """`sftrec prepare` of the small log with half of the profiles; the exit code, what it said, and the folder."""
    config = write_reviews(folder)
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    values["prompt"] = {"format": "instruct", "max_history": 8, "stride": 8}
    values["profile"] |= {"filler": str(filler), "filler_items": ITEMS_SHOWN, "filler_tokens": TOKENS, **changes}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    out = folder / name
    code = main(["prepare", str(config), "--out", str(out)])
    return code, capsys.readouterr().err, out


def people(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "people.csv").open(encoding="utf-8", newline="") as file:
        return {row["user_id"]: row for row in csv.DictReader(file)}


def test_a_base_goes_on_with_examples_as_torch_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every other user has the field; the rest gets what transformers writes greedily after the same words, in which nothing of
    validation or test stands."""
    code, said, out = prepared(tmp_path, "run", FIXTURE, capsys)
    assert code == 0 and "fills in taste of 20 of 40 users" in said
    dataset, known = Dataset.load(out / "prepared"), people(tmp_path)
    titles = {**TITLES, "i08": "Twice; said [2]"}
    logs = histories()

    def asked(user: str) -> str:
        lines = [f"- {titles[item]}" for item in logs[user][:-2][-ITEMS_SHOWN:]]
        return "\n".join(["A user who took", *lines, "", f"age: {known[user]['age']}", "", "calls them:"])

    tastes = dict(zip(dataset.user_ids.tolist(), dataset.profiles["taste"].tolist(), strict=True))
    shown = [user for user in dataset.user_ids.tolist() if known[user]["taste"]]
    examples = "".join(f"{asked(user)} {known[user]['taste']}\n\n" for user in shown[:3])
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    model = AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32).eval()
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    filled = 0
    for user, taste in tastes.items():
        if known[user]["taste"]:
            assert taste == known[user]["taste"]
            continue
        ids = torch.asarray([tokenizer(examples + asked(user))["input_ids"]])
        rest = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=newline, pad_token_id=0)[
            0, ids.shape[1] :
        ]
        text = tokenizer.decode(rest, skip_special_tokens=True).strip()
        parts = [part.strip(" .;\"'") for part in " ".join(text.split()).split(",")]
        assert taste == ", ".join(dict.fromkeys(part for part in parts if part))
        filled += bool(taste)
    assert dataset.report["users_with_taste_filled_in"] == filled and dataset.report["users_with_taste_left_empty"] == 20 - filled


@pytest.mark.slow
def test_a_run_fills_in_what_it_was_trained_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that learnt that every user's taste is the same begins so of those whose taste is not known."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    config = write_reviews(teacher)
    rows = people(teacher)
    with (teacher / "people.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, ["user_id", "age", "taste"])
        out.writeheader()
        out.writerows({**row, "taste": row["taste"] and "dog, cat"} for row in rows.values())
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    values["prompt"] = {"format": "instruct", "max_history": 4}
    values["tasks"] = {"sequential": 0.0, "profile_completion": 1.0}
    values["train"] = {
        "epochs": 100,
        "max_steps": 25,
        "row_length": 128,
        "batch_rows": 4,
        "learning_rate": 2e-2,
        "validate_users": 4,
    }
    values["evaluate"] = {"unconstrained_users": 0, "task_users": 2}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["run", str(config), "--out", str(tmp_path / "filler")]) == 0
    pupil = tmp_path / "pupil"
    pupil.mkdir()
    code, said, made = prepared(pupil, "run", tmp_path / "filler", capsys, filler_tokens=12)
    assert code == 0, said
    dataset = Dataset.load(made / "prepared")
    tastes = dict(zip(dataset.user_ids.tolist(), dataset.profiles["taste"].tolist(), strict=True))
    filled = [tastes[user] for user, row in people(pupil).items() if not row["taste"]]
    assert len(filled) == 20 and np.mean([taste.startswith("dog, cat") for taste in filled]) > 0.9


def test_a_filler_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, out = prepared(tmp_path, "run", FIXTURE, capsys, complete="hobby")
    assert (
        code == 2
        and "profile.complete is hobby; name the field to fill in (age, taste)" in said
        and not (out / "prepared").exists()
    )
    code, said, _ = prepared(tmp_path, "other", tmp_path / "nowhere", capsys)
    assert code == 2 and "nowhere" in said and "Traceback" not in said


def test_a_filler_that_was_trained_for_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = prepared(tmp_path, "run", trained(), capsys)
    assert code == 2 and "was not trained for it; set tasks.profile_completion there" in said
    for name in ("log.csv", "items.csv"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("i29", "i30"), encoding="utf-8")
    assert main(["prepare", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "other")]) == 2
    assert "was trained over other items; train it with the same catalogue" in capsys.readouterr().err
