"""What `prepare` refuses of templates and tasks, before anything is trained, and with the names that the user gave."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from sftrec_jax.cli import main

ROOT = Path(__file__).parent.parent
WORDS = "--prompt.format instruct --data.time-column null --data.user-core 1 --model.base {base} --train.row-length 128"
GOOD = "{% block entry %}{{ title }}\n{% endblock %}"

CASES: dict[str, tuple[Mapping[str, str], str, str]] = {
    "a field of the prompt": (
        {"own.j2": "{% block entry %}{{ titel }}{% endblock %}"}, "--prompt.templates own.j2",
        "error: {here}/own.j2, block entry: there is no field 'titel'",
    ),
    "a field of a task": (
        {"own/title_to_item.b.j2": "{{ titel }}"}, "--tasks.title-to-item 1 --tasks.templates own",
        "error: {here}/own/title_to_item.b.j2: there is no field 'titel'",
    ),
    "a field of an unseen template": (
        {"own/direct.j2": "{{ history[0].item }}", "own/direct.unseen.j2": "{{ nothing }}"},
        "--tasks.direct 1 --tasks.candidates 2 --tasks.templates own",
        "error: {here}/own/direct.unseen.j2: there is no field 'nothing'",
    ),
    "a task misspelt": (
        {"own/ratingg.j2": "{{ title }}"}, "--tasks.templates own",
        "error: {here}/own/ratingg.j2: there is no task 'ratingg', so it would not be used; name it rating.j2",
    ),
    "what the data lack": ({}, "--tasks.explanation 1", "error: tasks.explanation: the data have no explanation; name"),
    "no attribute": ({}, "--tasks.attribute-to-item 1", "error: tasks.attribute_to_item: tasks.attribute is None; name one of"),
    **{
        f"{name} by level": (
            {}, f"--tasks.{name.replace('_', '-')} 1 --train.normaliser level --decode.normaliser level",
            f"error: tasks.{name} answers in words, but train.normaliser: level trains item tokens alone",
        )
        for name in ("rating", "items_to_title", "item_to_title", "explanation")
    },
    "items in words": (
        {}, "--items.tokenizer title --tasks.title-to-item 1",
        "error: tasks.title_to_item: items.tokenizer title names items in words already",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_by_prepare(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files, words, said = CASES[case]
    rows = [f"u{user},i{(5 * user + step) % 30}" for user in range(6) for step in range(5)]
    Path("log.csv").write_text("user_id,item_id\n" + "\n".join(rows) + "\n")
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    Path("run.yaml").write_text("data: {source: log.csv}\n")
    base = WORDS.format(base=ROOT / "tests" / "fixtures" / "stories260k")
    assert main(["prepare", "run.yaml", "--out", "run", *base.split(), *words.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error:")] == [lines[-1]] and lines[-1].startswith(
        said.format(here=tmp_path)
    )
    assert not Path("run").exists()
