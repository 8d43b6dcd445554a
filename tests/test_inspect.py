"""`sftrec inspect`: every target is shown once, where it belongs, and the counts are those of the run."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_training import Parts, stories

from sftrec_jax.cli import main
from sftrec_jax.config import PromptConfig
from sftrec_jax.data.prompts import prompt_builder
from sftrec_jax.data.segments import Segments
from sftrec_jax.data.windows import Windows
from sftrec_jax.run.inspect import pieces

QUICK = Path(__file__).parent.parent / "configs" / "quick.yaml"


@pytest.fixture(scope="module")
def parts() -> Parts:
    return stories()


def segments_of(parts: Parts, prompt: PromptConfig) -> Segments:
    builder = prompt_builder(prompt, parts.case.codes, parts.case.tokenizer, 64)
    begin = np.arange(0, 24, 6)
    items = np.random.default_rng(2).integers(0, 7, 24).astype(np.int32)
    return builder.segments(items, Windows(begin, begin, begin + 6))


PROMPTS = {
    "stream": PromptConfig("stream"),
    "tokens": PromptConfig("instruct", history="tokens", prefix="Once", separator=",", suffix=""),
    "text after": PromptConfig("instruct", history="titles", prefix="Once", separator=",", suffix="then"),
}


@pytest.mark.parametrize("name", list(PROMPTS))
def test_every_target_is_shown_once_after_its_own_prompt(parts: Parts, name: str) -> None:
    made = segments_of(parts, PROMPTS[name])
    batch = made.pack([np.arange(len(made))[:2], np.arange(len(made))[2:]], 400, 200)
    shown: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    total = 0
    for row in range(2):
        found = list(pieces(batch, row))
        assert all(
            a.target != b.target for a, b in zip(found, found[1:], strict=False) if (a.segment, a.branch) == (b.segment, b.branch)
        )
        trunks = {s: [i for p in found if p.segment == s and p.branch == 0 for i in p.ids] for s in {p.segment for p in found}}
        total += sum(len(p.ids) for p in found if p.target)
        for segment, branch in dict.fromkeys((p.segment, p.branch) for p in found if p.branch):
            own = [p for p in found if (p.segment, p.branch) == (segment, branch)]
            before = trunks[segment][: own[0].fork] + [i for p in own if not p.target for i in p.ids]
            shown[tuple(before), tuple(i for p in own if p.target for i in p.ids)] += 1
    assert total == int(batch.weights.sum()) == int(made.targets.sum())
    if name == "text after":  # all but each segment's last target are branches
        alone = made.apart().examples()
        expected = Counter((tuple(e.tokens[: e.target_positions[0] + 1].tolist()), tuple(e.labels.tolist())) for e in alone)
        assert not shown - expected and sum(shown.values()) == len(alone) - len(made)


def test_a_config_is_shown_without_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompt = "--prompt.format instruct --prompt.history tokens --prompt.stride 32 --train.row-length 256"
    words = [*prompt.split(), "--tasks.title-to-item", "0.5"]
    assert main(["inspect", str(QUICK), "--rows", "2", *words]) == 0
    said = capsys.readouterr().err
    assert "step 1, row 2 of" in said and "⟦" in said and "after" in said and "Items that the user took" in said
    assert (
        "task title_to_item: an epoch takes 0.5 times" in said
        and "(title_to_item)" in said
        and "distinct tokens of items" in said
    )
    assert re.search(r"^  <\|item_\d+\|> is \w.*\(\d{4}\)$", said, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_every_task_is_shown_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    """One row cannot hold an example of each of four tasks."""
    words = ["--prompt.format", "instruct", "--prompt.history", "tokens", "--train.row-length", "256"]
    words += ["--data.rating-column", "rating"]
    tasks = ("title_to_item", "item_to_title", "direct", "rating")
    for name in tasks:
        words += [f"--tasks.{name.replace('_', '-')}", "0.1"]
    assert main(["inspect", str(QUICK), *words, "--tasks.candidates", "3", "--tasks.targets-per-user", "1"]) == 0
    said = capsys.readouterr().err
    for name in ("sequential", *tasks):
        assert f"] ({name}) " in said, name


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--rows", "0"], "--rows 0 and --step 1: use 1 or more"),
        (["--step", "100000"], "--step 100000: the run has 98 steps; use 1 to 98"),
        (["--rwos", "2"], "unknown option --rwos"),
    ],
)
def test_wrong_words(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(QUICK), *words]) == 2
    assert text in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
