"""The base model, its adapters, and the devices that hold them."""

from dataclasses import dataclass, field
from typing import Literal

from sftrec_jax.config.check import require


@dataclass(frozen=True)
class ModelConfig:
    """The base model and the numeric types."""

    base: str = "smollm2-135m"
    """`smollm2-135m`, a local Hugging Face folder, a `.gguf` file, a hub id, or a `config.json` with `from_scratch`."""
    revision: str | None = None
    """Hub revision; null: the default branch."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; null: the base's own."""
    from_scratch: bool = False
    """Initialise the base at random from its config instead of reading weights."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and of frozen weights; `auto`: bfloat16 on TPU and GPU, on CPU what measured faster."""
    quantise: Literal["none", "int8", "int4", "nf4"] = "none"
    """Hold the frozen kernels of the layers in 8 or 4 bits with a scale for every 64 inputs (QLoRA; extra `quant`)."""
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """What the backward pass computes again: nothing (`none`, most memory), all but products with weights (`dots`), or whole
    layers (`full`). `auto`: none where the activations of the layers take at most a quarter of a device's memory, else full."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters, with the meaning that PEFT gives these names."""

    r: int = 16
    """Rank."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`, module names such as `q_proj`, `v_proj`, or a regular expression that module paths such as
    `model.layers.3.self_attn.q_proj` match as a whole; one that matches nothing is an error."""
    use_rslora: bool = False
    """The update is scaled by alpha / sqrt(r)."""
    use_dora: bool = False
    """Train the lengths of the kernel's columns too (DoRA)."""
    init: Literal["default", "pissa"] = "default"
    """`default`: A random, B zero. `pissa`: A and B take the principal part of the kernel, the base keeps the rest."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of other modules than most: name, end of a path or regular expression -> rank; the first that matches counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """The same for alpha."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers, from 0, that get adapters; null: all."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained as a whole beside the adapters: `embed_tokens`, `lm_head`, norms such as `input_layernorm`."""
    trainable_token_indices: tuple[int, ...] = ()
    """Ids of tokens of the base whose rows are trained beside those of new tokens."""
    start: str | None = None
    """Folder of a PEFT adapter, or of an earlier run, to begin with; it says rank, alpha, targets and kind."""

    def __post_init__(self) -> None:
        for name, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
            for key, value in getattr(self, name).items():
                require(value >= least and value > 0, f"lora.{name}: {key} is {value}; use a positive number")
        require(self.r >= 1, f"lora.r is {self.r}; use 1 or more (train.method: full trains without adapters)")
        require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; use a value in [0, 1)")
        require(self.alpha > 0, f"lora.alpha is {self.alpha}; use a positive value")


@dataclass(frozen=True)
class MeshConfig:
    """Devices. Axis sizes multiply to the number of devices; -1 takes what is left."""

    data: int = -1
    """Rows of a batch are divided."""
    fsdp: int = 1
    """Rows of a batch and parameters are divided."""
    context: int = 1
    """Tokens of each row are divided, for rows longer than a device holds; in attention, heads are."""
    tensor: int = 1
    """Heads and hidden units are divided."""
    auto: bool = False
    """Choose the sizes by what the model needs and a device holds (`mesh: auto` in a file, `--mesh auto`)."""

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.context, self.tensor)
        said = f"data {sizes[0]}, fsdp {sizes[1]}, context {sizes[2]}, tensor {sizes[3]}"
        require(
            all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
            f"mesh is {said}; sizes are 1 or more, at most one is -1",
        )
        require(not self.auto or sizes == (-1, 1, 1, 1), f"mesh is auto and {said}; leave one of the two out")
