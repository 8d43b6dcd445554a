"""Files of histories: what a cell may hold, and who a row is."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sftrec_jax.errors import UserError
from sftrec_jax.run.history_files import Histories, file_shards

SESSION: Any = SimpleNamespace(
    codes=SimpleNamespace(titles=np.array(["Heat (1995)", "Her; or Him", "Up"], object)),
    dataset=SimpleNamespace(item_ids=np.array(["6", "20", "31"], object)),
    prompts=SimpleNamespace(writer=SimpleNamespace(profile=("age",))),
)


def file_histories(path: Path) -> Histories:
    (shard,) = file_shards(SESSION, path, 100)
    return shard.read()


def read(path: Path, rows: list[dict[str, Any]]) -> tuple[list[str], list[list[int]]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names, histories, _ = file_histories(path)
    return names, [h.tolist() for h in histories]


def test_rows_without_a_user_are_numbered(tmp_path: Path) -> None:
    rows = [{"user": "ann", "history": ["6"]}, {"history": ["Up"]}, {"user": None, "history": None}]
    assert read(tmp_path / "h.jsonl", rows) == (["ann", "2", "3"], [[0], [2], []])


def test_titles_may_hold_semicolons_and_ids_mix_with_titles(tmp_path: Path) -> None:
    assert read(tmp_path / "h.jsonl", [{"history": ["31", "Her; or Him", "heat (1995)"]}])[1] == [[2, 1, 0]]
    assert read(tmp_path / "h.jsonl", [{"history": "Up; Her; or Him"}])[1] == [[2, 1]]
    assert read(tmp_path / "h.jsonl", [{"history": ["", "Up"]}])[1] == [[2]]


def test_other_cells_are_refused_with_their_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 2: history is 5; write a list"):
        read(tmp_path / "h.jsonl", [{"history": None}, {"history": 5}])


def test_what_else_is_told_comes_with_the_row(tmp_path: Path) -> None:
    rows = [
        {"history": ["6", "Up"], "ratings": [4, 2.5], "timestamps": [60, 7260], "age": "40", "city": "Rome"},
        {"history": ["Up"], "ratings": None, "timestamps": None, "age": None, "city": None},
    ]
    path = tmp_path / "h.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    one, two = file_histories(path).told
    assert one.ratings is not None and one.gaps is not None and one.times is not None
    assert one.ratings.tolist() == [4, 2.5] and one.gaps.tolist() == [-1, 7200] and one.times.tolist() == [60, 7260]
    assert one.profile == {"age": "40"} and two.ratings is None and two.gaps is None and two.profile == {}
    for name in ("ratings", "timestamps"):
        for value in ([1], ["x", "y"], 3):
            path.write_text(json.dumps({"history": ["6", "Up"], name: value}) + "\n", encoding="utf-8")
            with pytest.raises(UserError, match=f"row 1: {name} is .*; write a list of 2 numbers"):
                file_histories(path)
