"""Titles with wrong encodings, HTML entities, scripts from right to left, and emoji."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tiny_tokenizers import byte_level

from sftrec_jax.config import DataConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.data.repair import repaired
from sftrec_jax.items.naming import title_codes

WORDS_AS_MEANT = [
    "café",
    "naïve",
    "Zürich — die Stadt",
    "Владимир",
    "東京物語",
    "“quoted” it’s",
    "Ærø",
    "10 €",
]
AS_THEY_ARE = [
    "Toy Story (1995)",
    "Rock & Roll",
    "a < b > c",
    "Ocean's Eleven",
    "“curly” ‘quotes’",
    "fullwidth ＡＢＣ",
    "ﬁne ligature",
    "שלום עולם",
    "مرحبا بالعالم",
    "\u200fעברית (2020)\u200e",
    "👩\u200d👩\u200d👧\u200d👦 family",
    "🎬 🏳️\u200d🌈 ❤️",
    "e\u0301 decomposed",
    "AT&T, R&B",
    "SÃO PAULO",
]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_utf8_that_was_read_as_another_encoding(encoding: str) -> None:
    """Broken here as programs break it, word by word."""
    broken, meant = [], []
    for text in WORDS_AS_MEANT:
        try:
            broken.append(text.encode("utf-8").decode(encoding))
            meant.append(text)
        except UnicodeDecodeError:
            assert encoding == "cp1252"  # which has no character for some bytes
    values, changed = repaired(pl.Series(broken))
    assert values.to_list() == meant and changed == len(meant) >= 4


def test_html_entities() -> None:
    given = ["R&amp;B", "Tom &quot;T&quot;", "It&#39;s", "caf&eacute;", "a&nbsp;b", "&lt;i&gt;", None, "plain"]
    values, changed = repaired(pl.Series(given))
    assert values.to_list() == ["R&B", 'Tom "T"', "It's", "café", "a b", "<i>", None, "plain"] and changed == 6


def test_right_texts_stay() -> None:
    values, changed = repaired(pl.Series(AS_THEY_ARE))
    assert values.to_list() == AS_THEY_ARE and changed == 0


def prepared(folder: Path, titles: list[str], **settings: Any) -> Dataset:
    items = [f"i{number}" for number in range(len(titles))]
    pl.DataFrame({"item_id": items, "title": titles, "about": titles}).write_parquet(folder / "items.parquet")
    (folder / "log.txt").write_text(f"u {' '.join(items)}\nv {' '.join(items[::-1])}\n")
    config = {"source": str(folder / "log.txt"), "catalogue": str(folder / "items.parquet"), "text_columns": ("about",)}
    return prepare_dataset(DataConfig(**config | settings))


def test_a_catalogue_is_mended_and_says_so(tmp_path: Path) -> None:
    broken = [text.encode("utf-8").decode("latin-1") for text in WORDS_AS_MEANT] + ["R&amp;B"]
    meant = [*WORDS_AS_MEANT, "R&B"]
    dataset = prepared(tmp_path, broken + AS_THEY_ARE)
    dataset.save(tmp_path / "saved")
    for each in (dataset, Dataset.load(tmp_path / "saved")):
        assert each.titles.tolist() == meant + AS_THEY_ARE == each.item_fields["about"].tolist()
        assert each.report["repaired_titles"] == len(meant)
    as_given = prepared(tmp_path, broken + AS_THEY_ARE, repair_text=False)
    assert as_given.titles.tolist() == broken + AS_THEY_ARE and as_given.report["repaired_titles"] == 0


def test_titles_of_every_script_as_tokens(tmp_path: Path) -> None:
    dataset, tokenizer = prepared(tmp_path, AS_THEY_ARE), byte_level()
    codes = title_codes(dataset.titles, tokenizer)
    assert [tokenizer.decode(row[row >= 0][:-1]) for row in codes.codes] == AS_THEY_ARE
