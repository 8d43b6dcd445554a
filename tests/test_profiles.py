"""What is known of users: from a table, and from training interactions alone; in prompts from log to list."""

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from tiny_run import CONFIG, ITEMS, USERS, histories, write_inputs, write_lines

from sftrec_jax.cli import main
from sftrec_jax.config import DataConfig, ProfileConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.errors import UserError

MOVIELENS = "movielens-latest-small"
PROMPTS = Path(__file__).parent.parent / "configs" / "prompts"
EMBEDDED = Path(__file__).parent.parent / "sftrec_jax" / "data" / "movielens"


@pytest.fixture(scope="module")
def movielens() -> Dataset:
    data = DataConfig(MOVIELENS, text_columns=("genres",), rating_column="rating")
    return prepare_dataset(data, ProfileConfig(favourites="genres", tags=MOVIELENS))


def table(name: str) -> pl.DataFrame:
    return pl.read_csv(gzip.decompress((EMBEDDED / name).read_bytes()))


def test_movielens_profiles_are_those_of_a_plain_loop(movielens: Dataset) -> None:
    genres = {str(m): g.split("|") for m, g in table("movies.csv.gz").select("movieId", "genres").rows()}
    tags = table("tags.csv.gz").rows()
    with_tags = 0
    for user, name in enumerate(movielens.user_ids.tolist()):
        train = [str(movielens.item_ids[i]) for i in movielens.train_history(user)]
        last = movielens.timestamps[movielens.offsets[user] + len(train) - 1]
        counts = Counter(g for item in train for g in genres[item])
        top = movielens.profiles["favourites"][user].split(", ")
        assert len(top) == min(3, len(counts)) and sorted((counts[g] for g in top), reverse=True) == [counts[g] for g in top]
        assert min(counts[g] for g in top) == sorted(counts.values(), reverse=True)[len(top) - 1]
        own = Counter(t.lower() for u, item, t, when in tags if str(u) == name and str(item) in train and when <= last)
        said = movielens.profiles["tags"][user]
        assert [own[t] for t in said.split(", ") if t] == sorted(own.values(), reverse=True)[:8]
        with_tags += bool(said)
    assert movielens.report["users_with_tags"] == with_tags and 20 < with_tags <= 58
    assert movielens.report["users_with_favourites"] == 610 and movielens.report["users_without_profile"] == 0


def test_nothing_of_validation_and_test_is_told(movielens: Dataset) -> None:
    """With held-out interactions exchanged for other items the profiles stay the same."""
    log = table("ratings.csv.gz").sort("userId", "timestamp", maintain_order=True)
    assert movielens.ratings is not None
    pairs = {(u, m): r for u, m, r in log.select("userId", "movieId", "rating").rows()}
    for user in (0, 17, 609):
        items, told = movielens.history(user), movielens.told(user).ratings
        assert told is not None
        name = int(movielens.user_ids[user])
        assert told.tolist() == [pairs[name, int(movielens.item_ids[i])] for i in items.tolist()]


def test_held_out_items_do_not_reach_profiles(tmp_path: Path) -> None:
    rows = [f"{u},{i},{10 * t}" for u in "ab" for t, i in enumerate("1234")]
    held = ["a,8,30", "b,9,30", "a,8,40", "b,9,40"]
    (tmp_path / "tags.csv").write_text("user_id,item_id,timestamp,tag\na,1,1,Red\na,1,2,red\na,8,2,no\nb,2,29,late\nb,2,1,ok\n")
    write_lines(tmp_path / "items.csv", ["item_id,title,kind", *(f"{i},t{i},k{i if i > 7 else i % 2}" for i in range(1, 10))])
    made = []
    for tail in (held, [h.replace(",8,", ",5,").replace(",9,", ",6,") for h in held]):
        write_lines(tmp_path / "log.csv", ["user_id,item_id,timestamp", *(r for r in rows if not r.endswith(",30")), *tail])
        config = DataConfig(str(tmp_path / "log.csv"), str(tmp_path / "items.csv"), text_columns=("kind",))
        profile = ProfileConfig(favourites="kind", tags=str(tmp_path / "tags.csv"))
        made.append(prepare_dataset(config, profile).profiles)
    assert {n: v.tolist() for n, v in made[0].items()} == {n: v.tolist() for n, v in made[1].items()}
    assert made[0]["favourites"].tolist() == ["k1, k0", "k1, k0"] and made[0]["tags"].tolist() == ["red", "ok"]


def people(folder: Path) -> Path:
    rows = [f"{user},{20 + n},{'baker' if n % 2 else ''},Likes <b>things</b> & 🎬 {n}" for n, user in enumerate(USERS[:30])]
    return write_lines(folder / "people.csv", ["user_id,age,occupation,about", *rows, "nobody,9,,"])


@pytest.mark.parametrize(
    ("text", "values", "error"),
    [
        ("user_id,age\nu00,1\nu01,2\nu00,3", {}, "user 'u00' stands in rows 2 and 4; keep one a user"),
        ("user_id,ages\nu00,1", {}, "no column 'age'; it has user_id, ages; set profile.columns (nearest: 'ages')"),
        ("user_id,age\nu00,1", {"favourites": "genre"}, "profile.favourites is 'genre'; use one of data.text_columns (none)"),
        ("user_id,age\nu00,1", {"tags": "missing.csv"}, "missing.csv: cannot read the file"),
    ],
)
def test_profiles_that_cannot_be(text: str, values: dict[str, str], error: str, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    (tmp_path / "people.csv").write_text(text)
    config = ProfileConfig(str(tmp_path / "people.csv"), columns=("age",), **values)  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        prepare_dataset(DataConfig(str(tmp_path / "log.csv"), str(tmp_path / "items.csv")), config)
    assert error in str(caught.value)


@pytest.mark.slow
def test_a_run_with_profiles_and_two_templates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Age, occupation and free text (generated), from the table to the lists, in the templates of the repository."""
    write_inputs(tmp_path)
    people(tmp_path)
    templates = [str(PROMPTS / "people.j2"), str(PROMPTS / "rated.j2")]
    config = {
        **CONFIG,
        "data": {**CONFIG["data"], "rating_column": "rating"},
        "profile": {"source": "people.csv", "columns": ["age", "occupation", "about"]},
        "prompt": {"format": "instruct", "max_history": 6, "templates": templates},
        "train": {**CONFIG["train"], "row_length": 300},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    out = tmp_path / "run"
    assert main(["run", str(tmp_path / "tiny.yaml"), "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "templates: 2, of which an epoch draws each for 1 in 2 of its prompts" in said
    assert "users_with_age: 30" in said and "users_with_occupation: 15" in said and "profiles_of_other_users: 1" in said
    assert sorted(p.name for p in (out / "prepared" / "templates").iterdir()) == ["0_people.j2", "1_rated.j2"]
    assert main(["inspect", str(out), "--rows", "4", "--step", "2"]) == 0
    said = capsys.readouterr().err
    assert "Works as baker." in said and "Likes <b>things</b> & 🎬" in said and "with the user's rating:" in said
    history = "; ".join(histories()["u00"][:3])
    assert main(["recommend", str(out), "--history", history, "--user", "u01", "--profile", "age=33", "--json"]) == 0
    shown = capsys.readouterr()
    assert "1 of 2 prompts do not say occupation, which is not known" in shown.err and "say age" not in shown.err
    assert shown.out.count("\n") == 20
    for words, error in (
        (["--profile", "agee=3"], "--profile agee=3: prompts of this run say about, age, occupation of a user; write FIELD=TEXT"),
        (["--profile", "age"], "write FIELD=TEXT"),
    ):
        assert main(["recommend", str(out), "--history", ITEMS[0], *words]) == 2
        assert error in capsys.readouterr().err
    assert main(["recommend", str(out), "--user", "u01", "--profile", "age=3"]) == 2
    assert "--profile goes with --history" in capsys.readouterr().err


def test_profiles_stay_in_the_prepared_folder(movielens: Dataset, tmp_path: Path) -> None:
    movielens.save(tmp_path)
    again = Dataset.load(tmp_path)
    assert {n: v.tolist() for n, v in again.profiles.items()} == {n: v.tolist() for n, v in movielens.profiles.items()}
    assert (
        np.array_equal(again.ratings, movielens.ratings) and again.item_fields["genres"][0] == movielens.item_fields["genres"][0]
    )
