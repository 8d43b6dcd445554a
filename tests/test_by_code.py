"""Lists scored by code string and by item, against enumeration; the figures of MiniOneRec's own codes."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import ITEMS, USERS, write_inputs

from sftrec_jax.cli import main
from sftrec_jax.data.known import data_root
from sftrec_jax.evaluate.by_code import CodeScoring

KS = (1, 3)
TITLES = np.asarray([f"title {i}" for i in range(8)], object)


def gain(name: str, place: int, k: int) -> float:
    return 0.0 if place > k else {"recall": 1.0, "ndcg": 1 / np.log2(place + 1), "mrr": 1 / place}[name]


@settings(max_examples=60, deadline=None)
@given(
    codes=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    ranked=st.permutations(range(8)),
    target=st.integers(0, 7),
    seen=st.sets(st.integers(0, 7), max_size=3),
)
def test_against_enumeration(codes: list[int], ranked: list[int], target: int, seen: set[int]) -> None:
    scoring = CodeScoring.of(np.asarray(codes, np.int32)[:, None], TITLES)
    ranked = [i for i in ranked if i not in seen]
    padded = np.asarray([ranked + [-1] * (8 - len(ranked))], np.int32)
    written = scoring.written(padded, 3)
    names = list(dict.fromkeys(codes[i] for i in ranked))[:3]
    assert [c for c in written[0] if c >= 0] == [scoring.groups.group[codes.index(name)] for name in names]
    by_string = scoring.by_string(written, np.asarray([target], np.int32), KS)
    left_out = np.asarray(sorted(seen), np.int32)
    by_item = scoring.by_item(written, np.asarray([target], np.int32), [left_out], KS)
    # Every order of the items of each code is equally likely.
    members = [[i for i in range(8) if codes[i] == name and i not in seen] for name in names]
    orders = [list(itertools.chain(*parts)) for parts in itertools.product(*(itertools.permutations(m) for m in members))]
    for k in KS:
        for name in ("recall", "ndcg", "mrr"):
            string = gain(name, names.index(codes[target]) + 1, k) if codes[target] in names else 0.0
            item = np.mean([gain(name, order.index(target) + 1, k) if target in order[:3] else 0.0 for order in orders])
            assert by_string[f"{name}@{k}"][0] == pytest.approx(string)
            assert by_item[f"{name}@{k}"][0] == pytest.approx(float(item))


def test_a_constant_tokeniser_scores_everything_by_string_and_chance_by_item() -> None:
    scoring = CodeScoring.of(np.zeros((8, 2), np.int32), TITLES)
    targets = np.arange(8, dtype=np.int32)
    written = scoring.written(np.tile(np.arange(8, dtype=np.int32), (8, 1)), 3)
    assert scoring.by_string(written, targets, KS)["recall@1"].mean() == 1.0
    assert scoring.by_item(written, targets, None, KS)["recall@3"].mean() == pytest.approx(3 / 8)


def test_baselines_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tie seeds of a log with tied times; the numbers are means over them, and those of `evaluate` for the first."""
    config, out = write_inputs(tmp_path), tmp_path / "numbers.json"
    lines = (tmp_path / "log.csv").read_text().splitlines()
    tied = [lines[0], *(",".join([*line.split(",")[:2], "7", line.split(",")[3]]) for line in lines[1:])]
    (tmp_path / "log.csv").write_text("\n".join(tied) + "\n")
    assert main(["baselines", str(config), "--to", str(out), "--tie-seeds", "3"]) == 0
    several = json.loads(out.read_text())
    assert several["tie_seeds"] == [0, 1, 2] and several["tied_timestamp_share"] == 1.0 and several["spread"]["markov"]["mrr"] > 0
    each = []
    for seed in range(3):
        assert main(["baselines", str(config), "--to", str(out), "--overwrite", "--data.tie-seed", str(seed)]) == 0
        each.append(json.loads(out.read_text()))
    for name in ("popularity", "recent_popularity", "markov", "item_item"):
        assert several[name]["ndcg@10"] == pytest.approx(np.mean([one[name]["ndcg@10"] for one in each]))
        assert several["spread"][name]["ndcg@10"] == pytest.approx(np.std([one[name]["ndcg@10"] for one in each], ddof=1))
    assert each[0]["protocol"]["data"]["histories_sha256"] != each[1]["protocol"]["data"]["histories_sha256"]
    capsys.readouterr()
    for extra, part in ((["--to", str(out)], "--overwrite"), (["--to", "x.csv"], ".json"), (["--tie-seeds", "0"], "1 or more")):
        assert main(["baselines", str(config), *extra]) == 2
        said = capsys.readouterr().err
        assert part in said and said.count("\n") == 1


def test_minionerecs_scoring_beside_ours(tmp_path: Path) -> None:
    """31 items share their code with another and are the target of 317 of 4,533 rows; by string the counter looks better."""
    if not (data_root() / "amazon-industrial").exists():
        pytest.skip("amazon-industrial is not there")
    out = tmp_path / "numbers.json"
    assert main(["baselines", str(Path(__file__).parents[1] / "configs" / "industrial_eval.yaml"), "--to", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["users"], found["items_sharing_a_code"], found["targets_sharing_a_code"]) == (4533, 31, 317)
    for name in ("popularity", "markov", "item_item"):
        string, item = found["by_code_string"][name], found["by_code_item"][name]
        assert string["recall@10"] >= item["recall@10"] and string["ndcg@10"] > 1.05 * item["ndcg@10"]


def test_baselines_and_lists_of_leaking_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids of users that name the target: refused without a model, too, and recorded where accepted."""
    config, out = write_inputs(tmp_path), tmp_path / "numbers.json"
    items = {user: [line.split(",")[1] for line in (tmp_path / "log.csv").read_text().splitlines()[1:] if line.startswith(user)]
             for user in USERS}  # fmt: skip
    text = (tmp_path / "log.csv").read_text()
    for user in USERS:
        text = text.replace(f"{user},", f"{user}-{items[user][-1]},")
    (tmp_path / "log.csv").write_text(text)
    capsys.readouterr()
    assert main(["baselines", str(config), "--to", str(out)]) == 3
    assert "target_in_user_id" in capsys.readouterr().err and not out.exists()
    accept = ["--evaluate.accept-leaks", "target_in_user_id"]
    assert main(["baselines", str(config), "--to", str(out), *accept]) == 0
    found = json.loads(out.read_text())["protocol"]["leaks"]
    assert [one["name"] for one in found["found"]] == ["target_in_user_id"] and len(found["checked"]) == 3
    run, lists = tmp_path / "run", tmp_path / "lists.csv"
    assert main(["prepare", str(config), "--out", str(run), *accept]) == 0
    rows = [f"{u}-{items[u][-1]},1,{next(i for i in ITEMS if i not in items[u][:-1])}" for u in USERS]
    lists.write_text("\n".join(["user,rank,item_id", *rows]) + "\n")
    assert main(["evaluate", str(run), "--lists", str(lists), "--to", str(tmp_path / "theirs.json")]) == 0
    record = json.loads((tmp_path / "theirs.json").read_text())["protocol"]["leaks"]["found"]
    assert [(one["name"], one["accepted"]) for one in record] == [("target_in_user_id", True)]
