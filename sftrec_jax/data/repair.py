"""Texts as their writers meant them: HTML entities resolved, and UTF-8 that was once read as another encoding."""

import polars as pl
from ftfy import TextFixerConfig, fix_text

_CONFIG = TextFixerConfig(
    unescape_html=True,
    uncurl_quotes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    fix_line_breaks=False,
    normalization=None,
    explain=False,
)
_SUSPECT = r"&[#A-Za-z]|[^\x20-\x7e]"
"""Other texts are as they should be."""


def repaired(texts: pl.Series) -> tuple[pl.Series, int]:
    """The texts [n] with `R&amp;B` as `R&B` and `cafÃ©` as `café`, and how many changed; quotation marks, letters of any script
    and emoji stay. By ftfy (Speer 2019, doi:10.5281/zenodo.2591652)."""
    suspect = texts.str.contains(_SUSPECT).fill_null(False)
    if not suspect.any():
        return texts, 0
    some = texts.filter(suspect)
    fixed = pl.Series([fix_text(text, config=_CONFIG).replace("\xa0", " ") for text in some.to_list()], dtype=pl.String)
    changed = int((fixed != some).sum())
    if not changed:
        return texts, 0
    places = suspect.arg_true()
    return texts.scatter(places, fixed), changed
