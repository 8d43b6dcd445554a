"""slow.txt names tests that exist; a renamed one would silently be back in the default suite."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_name_is_that_of_a_test() -> None:
    names = (HERE / "slow.txt").read_text(encoding="utf-8").splitlines()
    assert names == sorted(set(names))
    for name in names:
        file, _, test = name.partition("::")
        text = (HERE.parent / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {re.escape(test.partition('[')[0])}\(", text, re.MULTILINE), name
