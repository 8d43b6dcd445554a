"""What several tests of the model need: small bases, packed rows, decoders with trained-looking parts, torch's logits."""

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sftrec_jax.config import LoraConfig, MeshConfig, ModelConfig, TrainConfig
from sftrec_jax.data.segments import PackedBatch
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.naming import atomic_codes
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.hub import BaseSource
from sftrec_jax.model.load import Build, load_decoder, make_build, source_architecture
from sftrec_jax.model.mesh import make_mesh
from sftrec_jax.model.sharding import path_name
from sftrec_jax.model.token_table import TokenRows

# Many cases compile the same programs; a cache for this one process halves the time of the tests.
_CACHE = tempfile.mkdtemp(prefix="compiled-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

FIXTURE = Path(__file__).parent / "fixtures" / "stories260k"
ITEMS = [f"i{n}" for n in range(7)]
TITLES = np.array(["Once", "A time", "The big dog", "Red ball", "Lily", "Tim", "The end"], object)


@dataclass
class Case:
    """A decoder with all that an export needs."""

    decoder: Decoder
    build: Build
    codes: ItemCodes
    tokenizer: PreTrainedTokenizerBase
    base: Path


def source_of(folder: Path) -> BaseSource:
    return BaseSource(folder=folder, gguf=None, tokenizer=folder, label=str(folder))


def save_llama(folder: Path, kv_heads: int, tied: bool, vocab: int, seed: int = 0, **changes: Any) -> Path:
    """A random Llama with logits that differ; q and o projections are square (48 x 48)."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12}
    config = LlamaConfig(
        **{**sizes, **changes}, vocab_size=vocab, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_case(
    base: Path, lora: LoraConfig | None, atomic: bool = True, trained: bool = True, skip_ids: int = 0, quantise: str = "none"
) -> Case:
    """Loads `base` with the tokenizer of stories260K (512 tokens) and item tokens; `lora` None: full fine-tuning.

    With `trained`, B, the token rows and (full) every other parameter are moved from where they start. `skip_ids`
    tokens without rows come before the item tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    tokenizer.add_tokens([f"<|unused_{n}|>" for n in range(skip_ids)])
    codes = ItemCodes(np.array([[5], [6]], np.int32), (), np.zeros(0, np.int32), (), np.array(["a", "b"], object))
    if atomic:
        codes = atomic_codes(ITEMS, TITLES, tokenizer)
    source = source_of(base)
    train = TrainConfig(method="full" if lora is None else "lora")
    arch = source_architecture(source)
    build = make_build(ModelConfig(compute_dtype="float32", quantise=quantise), lora or LoraConfig(), train, arch, codes)
    mesh, start = make_mesh(MeshConfig(), jax.devices()[:1]), None if lora is None else lora.start
    decoder = load_decoder(build, source, codes, mesh, 0, False, start=start)
    return Case(randomised(decoder, lora is None) if trained else decoder, build, codes, tokenizer, base)


def randomised(decoder: Decoder, everything: bool) -> Decoder:
    graphdef, state = nnx.split(decoder)
    rng = np.random.default_rng(7)
    flat = []
    for path, leaf in nnx.to_flat_state(state):
        value = np.asarray(leaf[...])
        if isinstance(leaf, TokenRows):
            leaf = leaf.replace(jnp.asarray(rng.normal(0, 0.3, value.shape), jnp.float32))
        elif everything or path_name(path).endswith(("lora_b", "lora_magnitude")):
            leaf = leaf.replace(jnp.asarray(value + rng.normal(0, 0.1, value.shape), jnp.float32))
        flat.append((path, leaf))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def packed(rows: list[list[np.ndarray]], length: int) -> PackedBatch:
    """Each inner list holds the token sequences (segments) of one row; the rest of the row is padding."""
    shape = (len(rows), length)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    for b, parts in enumerate(rows):
        at = 0
        for s, part in enumerate(parts, start=1):
            n = len(part)
            tokens[b, at : at + n], positions[b, at : at + n], segments[b, at : at + n] = part, np.arange(n), s
            at += n
    none = np.zeros((shape[0], 1), np.int32)
    return PackedBatch(tokens, positions, segments, np.zeros_like(tokens), positions + 1, none, none, none.astype(np.float32))


def prompts(case: Case, seed: int = 0) -> list[list[np.ndarray]]:
    """Three rows of prompts of base tokens and item tokens in turn."""
    rng = np.random.default_rng(seed)
    pool = np.concatenate([rng.integers(3, 512, 20), np.repeat(case.codes.codes[case.codes.codes >= 0], 3)])
    return [[rng.choice(pool, n).astype(np.int32) for n in lengths] for lengths in ([9, 11], [24], [1, 2, 14])]


def by_token(decoder: Decoder, batch: PackedBatch) -> np.ndarray:
    """Our float32 logits [B, T, ids]: one column for each token id."""
    return np.asarray(_by_token(*nnx.split(decoder), batch))


@partial(jax.jit, static_argnums=0)
def _by_token(graphdef: Any, state: Any, batch: PackedBatch) -> jax.Array:
    model = nnx.merge(graphdef, state)
    return model.logits(model.packed_hidden(batch))[..., model.head.column_of()]


def largest_difference(case: Case, model: Any) -> float:
    """Between our logits on packed prompts and torch's on each prompt alone, over the ids that have an embedding."""
    rows = prompts(case)
    ours = by_token(case.decoder, packed(rows, 32))
    known = np.union1d(np.arange(case.build.arch.vocab_size), case.codes.new_token_ids).astype(int)
    largest = 0.0
    for b, parts in enumerate(rows):
        at = 0
        for part in parts:
            with torch.no_grad():
                theirs = model(torch.tensor(part[None]).long()).logits[0].float().numpy()
            assert theirs[:, known].std() > 0.1  # logits that differ from one another are compared
            largest = max(largest, float(np.abs(ours[b, at : at + len(part)][:, known] - theirs[:, known]).max()))
            at += len(part)
    return largest


def greedy(case: Case, prompt: list[int], steps: int = 8) -> list[int]:
    """The most likely token, again and again, until EOS."""
    tokens = list(prompt)
    known = np.union1d(np.arange(case.build.arch.vocab_size), case.codes.new_token_ids).astype(int)
    for _ in range(steps):
        logits = by_token(case.decoder, packed([[np.array(tokens)], [], []], 32))[0, len(tokens) - 1]
        tokens.append(int(known[logits[known].argmax()]))
        if tokens[-1] == case.tokenizer.eos_token_id:
            break
    return tokens[len(prompt) :]


def python_block(readme: Path) -> str:
    """The first python block of a README."""
    return readme.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
