"""Data that come as rows of history and target count as the log that they were cut from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import CONFIG, ITEMS, TITLES, write_lines
from tiny_tokenizers import byte_level

from sftrec_jax.cli import main
from sftrec_jax.config import DataConfig, PromptConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.known import data_root
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.data.prompts import prompt_builder
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.baselines import Markov
from sftrec_jax.evaluate.comparison import fit_baselines
from sftrec_jax.evaluate.item_item import ItemItem
from sftrec_jax.evaluate.metrics import ranking_metrics
from sftrec_jax.items.embed.collaborative import cooccurrence
from sftrec_jax.items.naming import atomic_codes

HISTORIES = st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=8), min_size=2, max_size=6)
FILES = {"source": "train.csv", "valid_source": "valid.csv", "test_source": "test.csv"}


def config(folder: Path, **changes: Any) -> DataConfig:
    files = {setting: str(folder / name) for setting, name in FILES.items()}
    return DataConfig(**{"history_column": "history", "item_column": "target", **files, **changes})


def write_rows(folder: Path, histories: list[list[Any]], literal: bool = False) -> None:
    """Every user's last item to test, the one before to valid, each of the others but the first to train."""
    parts: dict[str, list[str]] = {name: ["history,target"] for name in FILES.values()}
    for items in histories:
        for at in range(1, len(items)):
            name = {len(items) - 1: "test.csv", len(items) - 2: "valid.csv"}.get(at, "train.csv")
            shown = str(items[:at]) if literal else json.dumps(items[:at])
            parts[name].append('"' + shown.replace('"', '""') + f'",{items[at]}')
    for name, lines in parts.items():
        write_lines(folder / name, lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@settings(max_examples=25, deadline=None)
@given(histories=HISTORIES, literal=st.booleans())
def test_rows_count_as_the_log_they_were_cut_from(folder: Path, histories: list[list[int]], literal: bool) -> None:
    histories = [*histories, list(range(7))]  # every part has rows, every item occurs
    write_rows(folder, histories, literal)
    rows = prepare_dataset(config(folder))
    write_lines(folder / "log.txt", [f"u{u} " + " ".join(map(str, items)) for u, items in enumerate(histories)])
    log = prepare_dataset(DataConfig(source=str(folder / "log.txt"), time_column=None))
    assert rows.item_ids.tolist() == log.item_ids.tolist() and rows.given and not log.given
    for make in (Markov.fit, ItemItem.fit):
        first, second = (make(d.offsets, d.items, d.trains, 7) for d in (rows, log))
        name = "follows" if isinstance(first, ItemItem) else "next_counts"
        np.testing.assert_allclose(getattr(first, name).toarray(), getattr(second, name).toarray(), atol=1e-12)
    np.testing.assert_allclose(cooccurrence(rows, 5).toarray(), cooccurrence(log, 5).toarray(), atol=1e-12)
    # The first item of a user is no target of any row.
    assert rows.trains.sum() == sum(max(0, len(h) - 3) for h in histories)
    asked = {
        (tuple(d.history(u)[: d.test_position[u]].tolist()), int(d.history(u)[d.test_position[u]]))
        for d in (rows, log)
        for u in np.flatnonzero(d.test_position >= 0)
    }
    assert asked == {(tuple(h[:-1]), h[-1]) for h in histories}
    rows.save(folder / "saved")
    again = Dataset.load(folder / "saved")
    assert again.given and (again.train_begin == rows.train_begin).all() and (again.trains == rows.trains).all()


@pytest.mark.parametrize("prompt", ["stream", "instruct"])
@settings(max_examples=25, deadline=None)
@given(history=st.lists(st.integers(0, 5), min_size=1, max_size=9), most=st.integers(1, 6), back=st.integers(1, 9))
def test_context_is_no_target(prompt: Any, history: list[int], most: int, back: int) -> None:
    tokenizer = byte_level()
    codes = atomic_codes([str(i) for i in range(6)], np.asarray([f"item {i}" for i in range(6)], object), tokenizer)
    builder = prompt_builder(PromptConfig(format=prompt, max_history=most), codes, tokenizer, 1000)
    begin = max(0, len(history) - back)
    made = builder.examples(np.asarray(history, np.int32), begin)
    labels = [token for example in made for token in example.labels.tolist()]
    first = max(begin, 1) if prompt == "instruct" else begin
    assert labels == [int(codes.codes[i][0]) for i in history[first:]]
    for example in made:
        fed = np.append(example.tokens, example.labels[-1])
        assert fed[example.target_positions + 1].tolist() == example.labels.tolist()
        if prompt == "instruct":  # the target's own prompt, from the items before it alone
            assert len(example.labels) == 1
    if begin == len(history) - 1 and begin > 0:
        prompt_tokens = builder.prompt(np.asarray(history[:-1], np.int32))
        kept = made[0].tokens if prompt == "instruct" or most > 1 else None
        if kept is not None and (prompt == "instruct" or len(history) <= most):
            assert kept.tolist() == prompt_tokens.tolist()[: len(kept)]


def test_counter_reaches_its_published_figures_on_games() -> None:
    """HR@10 .0993 N@10 .0589 within 1 %, popularity .0140 .0095 .0256 .0132, 174 targets in their own history."""
    folder = data_root() / "amazon-games"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    files = {setting: str(folder / f"{name}.gz") for setting, name in FILES.items()}
    data = DataConfig(history_column="history_item_id", catalogue=str(folder / "items.jsonl.gz"), **files)
    dataset = prepare_dataset(data)
    users = np.flatnonzero(dataset.test_position >= 0)
    asked = [dataset.history(u)[: dataset.test_position[u]] for u in users]
    targets = np.asarray([dataset.history(u)[dataset.test_position[u]] for u in users])
    assert len(users) == 6142 and sum(t in h for h, t in zip(asked, targets, strict=True)) == 174
    fitted = fit_baselines(dataset, 0.7)
    published = {
        "popularity": {"recall@5": 0.0140, "ndcg@5": 0.0095, "recall@10": 0.0256, "ndcg@10": 0.0132},
        "item_item": {"recall@5": 0.0707, "ndcg@5": 0.0498, "recall@10": 0.0993, "ndcg@10": 0.0589},
    }
    for name, figures in published.items():
        found = ranking_metrics(fitted[name].rank(asked, 10, False), targets, (5, 10))
        assert {m: found[m] for m in figures} == pytest.approx(figures, rel=0.01), name


def test_a_run_over_examples(tmp_path: Path) -> None:
    """Trains on targets alone, evaluates the rows of test with repeats allowed, recommends to none of the training rows."""
    draw = np.random.default_rng(0)
    write_rows(tmp_path, [[ITEMS[(s + 3 * i) % 30] for i in range(6)] for s in draw.integers(0, 30, 12)])
    write_lines(tmp_path / "items.csv", ["target,title", *(f"{item},{title}" for item, title in TITLES.items())])
    data = {"history_column": "history", "item_column": "target", **FILES}
    data |= {"catalogue": "items.csv", "catalogue_item_column": "target"}
    settings = CONFIG | {"data": data, "evaluate": {"unconstrained_users": 0, "mask_seen": False}}
    settings["train"] = CONFIG["train"] | {"max_steps": 2}
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(["run", str(tmp_path / "rows.yaml"), "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    card = metrics["protocol"]
    assert metrics["users"] == 12 and card["split"]["kind"] == "given" and card["candidates"] == "all items of the catalogue"
    assert "recall@10_masked" in metrics["model"] and "recall@10_unmasked" not in metrics["model"]
    lists = pl.read_parquet(tmp_path / "run" / "recommendations.parquet")
    assert lists["user"].n_unique() == 12 and lists["user"].str.starts_with("test:").all()


@pytest.mark.parametrize(
    ("train", "changes", "parts"),
    [
        (["history,target", '"[1, 2]",3', "7,3"], {}, ["train.csv", "row 3", "'7'", "no list", "[12, 7]"]),
        (["history,target", '"[1, {}]",3'], {}, ["row 2", "no list"]),
        (["history,target", "\"__import__('os').getcwd()\",3"], {}, ["row 2", "no list"]),
        (["history,target", '"[1]",'], {}, ["row 2", "no item id"]),
        (["history,target"], {}, ["train.csv", "no row", "data.source"]),
        (["past,target", '"[1]",2'], {}, ["'history'", "past, target", "data.history_column"]),
        (["history,target", '"[1, 99]",2'], {"catalogue": "items.csv", "catalogue_item_column": "target"}, ["'99'", "row 2"]),
    ],
)
def test_mistakes_in_examples(tmp_path: Path, train: list[str], changes: dict[str, str], parts: list[str]) -> None:
    write_rows(tmp_path, [[1, 2, 3, 4], [2, 3, 4, 1]])
    write_lines(tmp_path / "train.csv", train)
    write_lines(tmp_path / "items.csv", ["target,title", *(f"{i},title {i}" for i in range(1, 5))])
    if "catalogue" in changes:
        changes = changes | {"catalogue": str(tmp_path / changes["catalogue"])}
    with pytest.raises(UserError) as error:
        prepare_dataset(config(tmp_path, **changes))
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), error.value


def test_sources_of_examples_need_their_column() -> None:
    with pytest.raises(UserError, match="data.history_column is not"):
        dataclasses.replace(DataConfig(), test_source="test.csv")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("[1]", ["items.json", "object of objects", '{"ITEM"']),
        ('{"1": "Heat"}', ["object of objects"]),
        ('{"1": {', ["not JSON"]),
        ('{"1": {"name": "Heat"}}', ["'title'", "item_id, name"]),
    ],
)
def test_catalogue_as_a_json_object(tmp_path: Path, content: str, parts: list[str]) -> None:
    write_rows(tmp_path, [[1, 2, 3, 4], [2, 3, 4, 1]])
    path = tmp_path / "items.json"
    path.write_text(json.dumps({str(i): {"title": f"title {i}", "brand": None} for i in (4, 3, 2, 1)}), encoding="utf-8")
    dataset = prepare_dataset(config(tmp_path, catalogue=str(path)))
    assert dataset.item_ids.tolist() == ["4", "3", "2", "1"] and dataset.titles.tolist()[0] == "title 4"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        prepare_dataset(config(tmp_path, catalogue=str(path)))
    assert all(part in str(error.value) for part in parts), error.value
