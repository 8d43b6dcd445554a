"""optax AdamW with warm-up and cosine; token rows and adapters may have different peak rates."""

from collections.abc import Hashable
from typing import Any

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


def _labels(trained: dict[str, Any]) -> dict[str, str]:
    def label(name: str) -> str:
        if name.endswith("/rows"):
            return "rows"
        return "norms" if name.endswith("norm/weight") else "matrices"

    return {name: label(name) for name in trained}


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW: one rate for token rows, one for the rest; rows and norms never decay."""
    rows_peak = config.rows_learning_rate or config.learning_rate

    def adamw(peak: float, decay: float) -> optax.GradientTransformation:
        return optax.adamw(schedule(peak, steps, config), config.beta1, config.beta2, weight_decay=decay)

    rates: dict[Hashable, optax.GradientTransformation] = {
        "matrices": adamw(config.learning_rate, config.weight_decay),
        "norms": adamw(config.learning_rate, 0.0),
        "rows": adamw(rows_peak, 0.0),
    }
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.partition(rates, _labels))
