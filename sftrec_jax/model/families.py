"""One table a family from parameters of the decoder to tensors of a Hugging Face checkpoint; it drives loading and export."""

from dataclasses import dataclass

from sftrec_jax.model.architecture import Architecture


@dataclass(frozen=True)
class Tensor:
    """One tensor, or one of every layer, as a Hugging Face checkpoint holds it."""

    name: str
    """With `{i}` for the layer where the parameter is stacked over layers."""
    shape: tuple[int, ...]
    """In Hugging Face's layout, of one layer."""
    transposed: bool = False
    """Whether the decoder holds it transposed (Hugging Face stores kernels [out, in])."""

    @property
    def stacked(self) -> bool:
        """Whether every layer has one."""
        return "{i}" in self.name

    def names(self, layers: int) -> list[str]:
        """The tensor's name, or those of all layers."""
        return [self.name.format(i=i) for i in range(layers)] if self.stacked else [self.name]


HEAD = "lm_head.weight"


def weight_map(arch: Architecture) -> dict[str, Tensor]:
    """Path of every base parameter, such as `layers/q_proj/kernel` -> its tensor. A tied model has no head of its own."""
    d, f = arch.hidden_size, arch.ffw_size
    wide, narrow = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim

    def kernel(module: str, outputs: int, inputs: int) -> Tensor:
        return Tensor(f"model.layers.{{i}}.{module}.weight", (outputs, inputs), True)

    def norm(module: str, size: int = d) -> Tensor:
        return Tensor(f"model.layers.{{i}}.{module}.weight", (size,))

    modules = {
        "q_proj": ("self_attn.q_proj", wide, d),
        "k_proj": ("self_attn.k_proj", narrow, d),
        "v_proj": ("self_attn.v_proj", narrow, d),
        "o_proj": ("self_attn.o_proj", d, wide),
        "gate_proj": ("mlp.gate_proj", f, d),
        "up_proj": ("mlp.up_proj", f, d),
        "down_proj": ("mlp.down_proj", d, f),
    }
    table = {
        "embed_tokens/weight": Tensor("model.embed_tokens.weight", (arch.vocab_size, d)),
        "norm/weight": Tensor("model.norm.weight", (d,)),
        "layers/input_norm/weight": norm("input_layernorm"),
        **{f"layers/{name}/kernel": kernel(*shape) for name, shape in modules.items()},
    }
    for name in arch.biases:
        module, outputs, _ = modules[name]
        table[f"layers/{name}/bias"] = Tensor(f"model.layers.{{i}}.{module}.bias", (outputs,))
    if arch.qk_norm:
        table |= {f"layers/{x}_norm/weight": norm(f"self_attn.{x}_norm", arch.head_dim) for x in "qk"}
    if arch.norms_after:  # Gemma calls by Llama's name for the norm before the feed-forward part one that follows attention
        table |= {
            "layers/attention_out_norm/weight": norm("post_attention_layernorm"),
            "layers/post_norm/weight": norm("pre_feedforward_layernorm"),
            "layers/ffw_out_norm/weight": norm("post_feedforward_layernorm"),
        }
    else:
        table["layers/post_norm/weight"] = norm("post_attention_layernorm")
    return table if arch.tied else {**table, "lm_head/weight": Tensor(HEAD, (arch.vocab_size, d))}


def tensor_names(arch: Architecture) -> list[str]:
    """Every tensor that a checkpoint of this architecture must hold."""
    return [name for tensor in weight_map(arch).values() for name in tensor.names(arch.layers)]


def module_of(arch: Architecture, projection: str) -> str:
    """`q_proj` -> `self_attn.q_proj`: the module's name inside a Hugging Face layer."""
    return weight_map(arch)[f"layers/{projection}/kernel"].name.split("{i}.")[1].removesuffix(".weight")
