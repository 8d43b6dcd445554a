import gzip
import json
from pathlib import Path

import pytest

from sftrec_jax.data.known import FILES, check_present, data_root, expand
from sftrec_jax.errors import UserError


def test_the_variable_is_replaced_at_the_beginning_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTREC_DATA", "/some where/sets")
    assert data_root() == Path("/some where/sets")
    for value in ("$SFTREC_DATA/amazon-beauty/items.jsonl.gz", "${SFTREC_DATA}/amazon-beauty/items.jsonl.gz"):
        assert expand(value) == "/some where/sets/amazon-beauty/items.jsonl.gz"
    for value in ("mine.csv", "/a/$SFTREC_DATA/b", "$SFTREC_DATA_2/a", "$SFTREC_DATA", "tfds:x", ""):
        assert expand(value) == value
    for unset in (lambda: monkeypatch.setenv("SFTREC_DATA", ""), lambda: monkeypatch.delenv("SFTREC_DATA")):
        unset()
        assert expand("$SFTREC_DATA/x/y") == "data/x/y"


def test_a_missing_file_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFTREC_DATA", raising=False)
    for name, file in FILES.items():
        with pytest.raises(UserError) as caught:
            check_present(Path(expand(f"$SFTREC_DATA/{name}")))
        message = str(caught.value)
        assert message.startswith(f"data/{name}: not found; it is {file.what}, SHA-256 {file.sha256}; put it there")
        assert "\n" not in message and "github.com/" in message
        assert message.endswith(f"set SFTREC_DATA to the folder that holds {name.split('/')[0]}/")
        assert len(file.sha256) == 64 and int(file.sha256, 16) > 0
    assert len({file.sha256 for file in FILES.values()}) == len(FILES)
    monkeypatch.setenv("SFTREC_DATA", str(tmp_path / "sets"))
    with pytest.raises(UserError, match="it is S3-Rec's Beauty.txt, gzipped"):
        check_present(tmp_path / "sets" / "amazon-beauty" / "sequences.txt.gz")
    with pytest.raises(
        UserError, match="not found; put it there, correct the path, or set SFTREC_DATA to the folder that holds mine/"
    ):
        check_present(tmp_path / "sets" / "mine" / "log.csv")
    with pytest.raises(UserError, match="the folder that holds log.csv$"):
        check_present(tmp_path / "sets" / "log.csv")


def test_files_elsewhere_and_files_that_exist_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFTREC_DATA", str(tmp_path / "sets"))
    check_present(tmp_path / "amazon-beauty" / "sequences.txt.gz")
    check_present(tmp_path / "sets" / ".." / "log.csv")
    there = tmp_path / "sets" / "amazon-beauty" / "items.jsonl.gz"
    there.parent.mkdir(parents=True)
    there.write_bytes(gzip.compress(json.dumps({"item_id": 1}).encode()))  # another content is not refused
    check_present(there)
    check_present(there.parent)
