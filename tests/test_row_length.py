"""Which length of rows is recommended, against trying them all."""

import dataclasses

import numpy as np
import pytest
from tiny_tokenizers import byte_level

from sftrec_jax.config import PromptConfig, TrainConfig
from sftrec_jax.data.prompts import prompt_builder
from sftrec_jax.data.segments import Segments
from sftrec_jax.data.windows import Windows
from sftrec_jax.items.naming import title_codes
from sftrec_jax.train.batches import BatchPlan
from sftrec_jax.train.row_length import better_row_length

TITLES = np.asarray(["Toy Story (1995)", "Heat (1995)", "War of the Worlds (2005)", "the quick brown fox", "Toy", "Heat"], object)


def histories(lengths: list[int], suffix: str, kinds: int) -> Segments:
    """Histories of so many items, of the first `kinds` alone."""
    tokenizer = byte_level()
    config = PromptConfig("instruct", 100, prefix="", suffix=suffix)
    made = prompt_builder(config, title_codes(TITLES, tokenizer), tokenizer, 10_000)
    edges = np.cumsum([0, *lengths])
    items = np.random.default_rng(0).integers(0, kinds, edges[-1]).astype(np.int32)
    return made.segments(items, Windows(edges[:-1], edges[:-1], edges[1:]))


def positions(segments: Segments, length: int) -> int:
    return len(BatchPlan(segments, TrainConfig(row_length=length)).rows(0)) * length


@pytest.mark.parametrize("suffix", ["", "Next:\n"])
def test_no_length_tried_is_better(suffix: str) -> None:
    """Segments of like size, of which a row of the configured length holds one and much padding."""
    segments = histories([8, 8, 9] * 40, suffix, 1)
    configured = int(segments.lengths.max() * 1.5) // 8 * 8
    found = better_row_length(segments, TrainConfig(row_length=configured))
    assert found is not None
    length, share = found
    assert share == positions(segments, length) / positions(segments, configured) < 0.8
    longest = int(segments.apart().lengths.max())
    best = min(positions(segments, tried) for tried in range(-(-longest // 8) * 8, 2 * configured + 1, 8))
    # Of some hundred lengths it tries a part.
    assert positions(segments, length) <= 1.05 * best


def test_a_length_that_is_good_enough_is_left_alone() -> None:
    segments = histories([8, 8, 9] * 40, "", 1)
    length, _ = better_row_length(segments, TrainConfig(row_length=256)) or (0, 0.0)
    assert length and better_row_length(segments, TrainConfig(row_length=length)) is None


def test_a_length_that_divides_no_segment_is_found() -> None:
    """Rows that are full, but of beginnings that stand there again and again."""
    segments = histories([20] * 30, "Next:\n", len(TITLES))
    configured = -(-int(segments.apart().lengths.max()) // 8) * 8
    plan = BatchPlan(segments, TrainConfig(row_length=configured))
    assert plan.lengths.sum() > 1.5 * segments.lengths.sum() and plan.efficiency() > 0.8
    found = better_row_length(segments, dataclasses.replace(plan.config))
    assert found is not None and found[0] > configured and found[1] < 0.8
