"""Column names of sources that many use."""

import dataclasses
import difflib
from typing import Any

from sftrec_jax.config import DataConfig
from sftrec_jax.errors import UserError

LAYOUTS: dict[str, dict[str, Any]] = {
    # McAuley lab, Amazon reviews, each with its meta_Beauty.json.gz or .jsonl.gz: reviews_Beauty_5.json.gz (2014), Beauty.json.gz
    # (2018), Beauty.jsonl.gz (2023).
    "amazon2014": {
        "user_column": "reviewerID", "item_column": "asin", "time_column": "unixReviewTime", "catalogue_item_column": "asin",
        "text_columns": ("title", "brand", "categories"), "missing_items": "drop",
    },
    "amazon2018": {
        "user_column": "reviewerID", "item_column": "asin", "time_column": "unixReviewTime", "catalogue_item_column": "asin",
        "text_columns": ("title", "brand", "category"), "missing_items": "drop",
    },
    "amazon2023": {
        "user_column": "user_id", "item_column": "parent_asin", "time_column": "timestamp", "time_unit": "ms",
        "catalogue_item_column": "parent_asin", "text_columns": ("title", "store", "categories"), "missing_items": "drop",
    },
    # RecBole's atomic files NAME.inter and NAME.item.
    "recbole": {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp"},
    # AkaliKong/MiniOneRec: train, valid and test CSV with item.json.
    "minionerec": {"history_column": "history_item_id", "text_columns": ("title", "description", "brand")},
    # BIGRec, D3 and Flower.
    "d3": {"history_column": "history_item_id"},
    # LC-Rec and LETTER: NAME.inter.json, {"USER": [ITEM, ...]} in time order, with NAME.item.json.
    "lcrec": {"time_column": None, "text_columns": ("title", "description", "brand", "categories")},
}  # fmt: skip


def with_layout(config: DataConfig) -> DataConfig:
    """The config with the columns of `data.layout` where it has its defaults. UserError for a layout that there is not."""
    if config.layout is None:
        return config
    if config.layout not in LAYOUTS:
        near = difflib.get_close_matches(config.layout, LAYOUTS, n=1, cutoff=0.0)[0]
        raise UserError(f"data.layout is {config.layout!r}; the nearest is {near!r}, all are {', '.join(LAYOUTS)}")
    defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    own = {name: value for name, value in LAYOUTS[config.layout].items() if getattr(config, name) == defaults[name]}
    return dataclasses.replace(config, **own)
