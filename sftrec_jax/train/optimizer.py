"""optax AdamW with warm-up and cosine; token rows and adapters may have different peak rates and starts."""

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
import optax

from sftrec_jax.config import TrainConfig


def schedule(peak: float, steps: int, config: TrainConfig) -> optax.Schedule:
    """Linear from 0 over the warm-up share of `steps`, then a cosine to `final_fraction` of the peak."""
    # At least one step comes after the warm-up: a run of a single step would have the rate 0.
    warmup = min(max(1, round(config.warmup_fraction * steps)), steps - 1) if config.warmup_fraction else 0
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=peak * config.final_fraction,
    )


def rows_only_steps(config: TrainConfig, steps: int) -> int:
    """Steps, from the first, in which only new token rows are trained: `train.rows_first` of `steps`, rounded.

    At least one step is left to the rest, so that a run ends with what it was configured to train. 0 with method `rows`,
    which trains nothing else in any step.
    """
    return 0 if config.method == "rows" else min(round(config.rows_first * steps), steps - 1)


def learning_rates(config: TrainConfig, steps: int) -> dict[str, np.ndarray]:
    """The rates of every step, float32 [steps]: `learning_rate` (0 while only rows are trained) and `rows_learning_rate`."""
    rows_only = steps if config.method == "rows" else rows_only_steps(config, steps)

    def rates(peak: float, count: int) -> np.ndarray:
        return np.asarray(jax.vmap(schedule(peak, count, config))(np.arange(count))) if count else np.zeros(0, np.float32)

    return {
        "learning_rate": np.concatenate([np.zeros(rows_only, np.float32), rates(config.learning_rate, steps - rows_only)]),
        "rows_learning_rate": rates(config.rows_learning_rate or config.learning_rate, steps),
    }


def is_rows(name: str) -> bool:
    """Whether an array, by its path name, holds new token rows."""
    return name.endswith("/rows")


def _labels(trained: dict[str, Any]) -> dict[str, str]:
    def label(name: str) -> str:
        if is_rows(name):
            return "rows"
        if name.endswith("/lora_magnitude"):
            return "b_vectors"
        if name.endswith("/lora_b"):
            return "b"
        return "vectors" if name.endswith(("norm/weight", "/bias")) else "matrices"

    return {name: label(name) for name in trained}


def make_optimizer(config: TrainConfig, steps: int, rows_only: bool = False) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW: one rate for token rows, one for the rest, of adapters' B (and DoRA's lengths)
    `train.loraplus_lr_ratio` times that; rows, norms, biases and lengths never decay.

    With `train.rows_first` the rest has a warm-up and a cosine of its own over the steps that rows_only_steps leaves. Until
    then the optimizer with `rows_only` is used: its state has the same structure, but what belongs to the rest (moments and
    counts) stays at its start, and of gradients it takes the rows' with `optax.MaskedNode()` in the place of others.
    """
    rows_peak = config.rows_learning_rate or config.learning_rate
    late = steps - rows_only_steps(config, steps)

    def adamw(peak: float, decay: float, steps: int) -> optax.GradientTransformation:
        return optax.adamw(schedule(peak, steps, config), config.beta1, config.beta2, weight_decay=decay)

    def rest(decay: float, ratio: float | None = None) -> optax.GradientTransformation:
        moving = adamw(config.learning_rate * (ratio or 1.0), decay, late)
        return optax.GradientTransformation(moving.init, _nothing) if rows_only else moving

    rates: dict[Hashable, optax.GradientTransformation] = {
        "matrices": rest(config.weight_decay),
        "vectors": rest(0.0),
        "b": rest(config.weight_decay, config.loraplus_lr_ratio),
        "b_vectors": rest(0.0, config.loraplus_lr_ratio),
        "rows": adamw(rows_peak, 0.0, steps),
    }
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.partition(rates, _labels))


def _nothing(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None) -> tuple[Any, Any]:
    return updates, state
