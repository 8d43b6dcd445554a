"""Sizes and kinds of a decoder, whatever its family."""

import json
from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["silu", "gelu_tanh"]
"""Of the gate: SiLU, or GELU in its tanh approximation."""


@dataclass(frozen=True)
class RopeScaling:
    """`linear` divides positions by `factor`; `llama3` slows low frequencies only (Llama 3.1, `rope_type: llama3`); `yarn` blends
    by turns within the context and scales queries and keys by `attention_factor` (Peng et al. 2023, arXiv:2309.00071).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """A decoder of Llama's shape with what other families change; `raw` keeps the config it was read from, for export."""

    vocab_size: int
    hidden_size: int
    ffw_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rope_theta: float
    rms_eps: float
    tied: bool
    rope_scaling: RopeScaling | None = None
    family: str = "llama"
    """`model_type` of config.json."""
    activation: Activation = "silu"
    biases: tuple[str, ...] = ()
    """Projections that add a bias."""
    qk_norm: bool = False
    """Queries and keys are normed per head before rotation."""
    norms_after: bool = False
    """Outputs of attention and of the feed-forward part are normed too (Gemma 2 and 3)."""
    unit_norms: bool = False
    """Norms multiply by 1 + weight (Gemma)."""
    embed_scale: float = 1.0
    """Input embeddings are multiplied by it (Gemma: the root of `hidden_size`)."""
    query_scale: float | None = None
    """Scores are multiplied by it; None: head_dim ** -0.5."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap) (Gemma 2)."""
    final_softcap: float | None = None
    """The same for logits."""
    window: int | None = None
    """In sliding layers a token sees positions less than this before it; None: no layer slides within the context."""
    sliding: tuple[bool, ...] = ()
    """Which layers slide; empty without `window`."""
    local_rope_theta: float | None = None
    """Of sliding layers, unscaled (Gemma 3); None: that of all."""
    unrotated: tuple[bool, ...] = ()
    """Layers without rotary embedding (SmolLM3); empty: none."""
    raw: str = "{}"

    @property
    def raw_config(self) -> dict[str, Any]:
        """The dictionary of `config.json`."""
        return json.loads(self.raw)
