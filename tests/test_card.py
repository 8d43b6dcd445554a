"""A card changes with what a metric depends on, and with nothing else."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import write_inputs

from sftrec_jax.cli import main
from sftrec_jax.run.card import protocol_card, source_hash
from sftrec_jax.run.session import Session, open_session


def prepared(folder: Path, *options: str) -> Session:
    folder.mkdir()
    assert main(["prepare", str(write_inputs(folder)), "--out", str(folder / "run"), *options]) == 0
    return open_session(folder / "run")


def differences(first: dict[str, Any], second: dict[str, Any], path: str = "") -> set[str]:
    """Paths of the values that differ."""
    out = set()
    for key in first.keys() | second.keys():
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out |= differences(a, b, f"{path}{key}.")
        elif a != b:
            out.add(f"{path}{key}")
    return out


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return prepared(tmp_path_factory.mktemp("card") / "one")


def test_the_same_protocol_elsewhere_has_the_same_card(session: Session, tmp_path: Path) -> None:
    card = protocol_card(session, 3, 40)
    assert card == protocol_card(prepared(tmp_path / "again"), 3, 40)
    assert json.loads(json.dumps(card, allow_nan=False)) == json.loads(json.dumps(card))
    assert str(session.folder.path.parent) not in json.dumps(card)


@pytest.mark.parametrize(
    ("section", "change", "expected"),
    [
        ("decode", {"beam": 33}, {"decode.beam"}),
        ("decode", {"normaliser": "children"}, {"decode.normaliser"}),
        ("decode", {"batch_users": 3, "layout": "csr"}, set()),
        ("prompt", {"max_history": 7}, {"prompt.max_history"}),
        ("prompt", {"suffix": "Next:"}, {"prompt.suffix"}),
        ("train", {"seed": 5}, {"seeds.train"}),
        ("train", {"validate_users": 7}, set()),
    ],
)
def test_settings(session: Session, section: str, change: dict[str, Any], expected: set[str]) -> None:
    config = session.config
    part = getattr(config, section)
    other = dataclasses.replace(config, **{section: dataclasses.replace(part, **change)})
    found = protocol_card(dataclasses.replace(session, config=other), 3, 40)
    assert differences(protocol_card(session, 3, 40), found) == expected


def test_data_and_codes(session: Session) -> None:
    card, dataset, codes = protocol_card(session, 3, 40), session.dataset, session.codes
    items = dataset.items.copy()
    items[[0, 1]] = items[[1, 0]]
    titles = dataset.titles.copy()
    titles[0] = "Another"
    swapped = dataclasses.replace(codes, codes=codes.codes[::-1].copy())
    changes: list[tuple[Session, set[str]]] = [
        (dataclasses.replace(session, dataset=dataclasses.replace(dataset, items=items)), {"data.histories_sha256"}),
        (dataclasses.replace(session, dataset=dataclasses.replace(dataset, titles=titles)), {"data.catalogue_sha256"}),
        (
            dataclasses.replace(session, dataset=dataclasses.replace(dataset, train_end=dataset.train_end - 1)),
            {"split.sha256"},
        ),
        (dataclasses.replace(session, codes=swapped), {"items.codes_sha256"}),
    ]
    for other, expected in changes:
        assert differences(card, protocol_card(other, 3, 40)) == expected
    assert differences(card, protocol_card(session, 4, 41)) == {"model.checkpoint_step", "users_evaluated"}
    wide = dataclasses.replace(dataset, items=dataset.items.astype(np.int64))
    assert protocol_card(dataclasses.replace(session, dataset=wide), 3, 40) == card


def test_data_without_times_says_so(session: Session) -> None:
    dataset = session.dataset
    positions = np.concatenate([np.arange(n) for n in np.diff(dataset.offsets)])
    card = protocol_card(dataclasses.replace(session, dataset=dataclasses.replace(dataset, timestamps=positions)), 3, 40)
    assert card["order"]["by"] == "the source's order" and protocol_card(session, 3, 40)["order"]["by"] == "time"


def test_the_program_is_hashed() -> None:
    assert source_hash() == source_hash() and len(source_hash()) == 64
