"""Hostile models and configurations: GGUF, safetensors, config.json, YAML."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from hostile_bytes import BINARY, NUMBERS, TEXT, WORDS, damaged
from safetensors.numpy import save

from sftrec_jax.config import RunConfig
from sftrec_jax.config_file import dump_config, load_config, to_dict
from sftrec_jax.errors import UserError
from sftrec_jax.model.gguf_file import read_gguf
from sftrec_jax.model.hf_config import parse_architecture, read_architecture
from sftrec_jax.model.peft_read import configured_spec
from sftrec_jax.model.tensor_files import TensorSource, open_tensors

KINDS = [GGMLQuantizationType[name] for name in ("F32", "F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0", "Q5_1")]
HIDDEN, HEADS, FFN, VOCAB = 32, 2, 32, 40
SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN, HIDDEN),
    "attn_v": (HIDDEN, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}
_GGUF: dict[int, bytes] = {}


def _gguf_seed(rng: random.Random, folder: Path) -> bytes:
    which = rng.randrange(8)
    if which not in _GGUF:
        draw = random.Random(which)
        writer = GGUFWriter(folder / "seed", "llama")
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(FFN)
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_token_list(["a", "▁b", "\0"] * 3)
        if which % 2:
            writer.add_string("llama.rope.scaling.type", draw.choice(["linear", "none", "yarn"]))
            writer.add_array("llama.attention.head_count_kv", [HEADS] * 2) if which == 3 else None
        kind = draw.choice(KINDS)
        shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)} | {
            f"blk.0.{name}": shape for name, shape in SHAPES.items()
        }
        if which == 5:
            shapes["rope_freqs"] = (HIDDEN // HEADS // 2,)
        for name, shape in shapes.items():
            stored = KINDS[0] if len(shape) == 1 else kind
            writer.add_tensor(f"{name}.weight", quantize(np.ones(shape, np.float32), stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _GGUF[which] = (folder / "seed").read_bytes()
        (folder / "seed").unlink()
    return _GGUF[which]


def make_gguf(rng: random.Random, folder: Path) -> Path:
    path = folder / "m.gguf"
    path.write_bytes(damaged(rng, _gguf_seed(rng, folder), BINARY, 0.05))
    return path


def read_model(rng: random.Random, folder: Path, path: Path) -> None:
    """Everything that is read of it; NaN in tensors are refused while they are read."""
    if path.suffix == ".gguf":
        parse_architecture(read_gguf(path).config, str(path))
    _read_all(open_tensors(path))


def _read_all(source: TensorSource) -> None:
    for name, shape in source.shapes.items():
        assert np.prod(shape) < 1 << 24, f"{name} is larger than its file"
        out = np.zeros(shape, np.float32)
        if shape:
            source.fill(out, name, tuple(slice(0, n) for n in shape), False, "m")


def make_safetensors(rng: random.Random, folder: Path) -> Path:
    (made := folder / "model").mkdir()
    tensors = {
        f"t{n}": np.ones(
            [rng.choice([0, 1, 3, 4]) for _ in range(rng.choice([0, 1, 2]))], rng.choice(["f4", "f2", "i8", "u1", "?"])
        )
        for n in range(rng.choice([0, 1, 3]))
    }
    data = save(tensors)
    if rng.random() < 0.5:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        _spoil(rng, header)
        head = json.dumps(header).encode()
        data = (len(head) if rng.random() < 0.8 else rng.choice(NUMBERS)).to_bytes(8, "little") + head + data[8 + length :]
    (made / "model.safetensors").write_bytes(damaged(rng, data, BINARY, 0.4))
    if rng.random() < 0.3:
        names = [
            "model.safetensors",
            "model.safetensors",
            "../model.safetensors",
            "/etc/passwd",
            "none.safetensors",
            "",
            "..",
            ".",
            "a\0b",
            "a" * 5000,
            1,
            None,
            [],
            {},
            "pytorch_model.bin",
            "model.safetensors\n",
        ]
        index: Any = {"weight_map": {name: rng.choice(names) for name in tensors}}
        index = rng.choice([index, index, index, [], {"weight_map": rng.choice([[], 1, None, {}])}])
        (made / "model.safetensors.index.json").write_bytes(damaged(rng, json.dumps(index).encode(), TEXT, 0.7))
    return made


def _spoil(rng: random.Random, header: dict[str, Any]) -> None:
    for name in list(header):
        entry = header[name]
        if rng.random() < 0.5 or not isinstance(entry, dict):
            continue
        change = rng.randrange(6)
        if change == 0:
            entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.choice([0, 1, 2, 300]))]
        elif change == 1:
            entry["data_offsets"] = [rng.choice([*NUMBERS, -1, -8]), rng.choice([*NUMBERS, -1])]
        elif change == 2:
            entry["dtype"] = rng.choice(["F64", "BF16", "F8_E4M3", "F8_E8M0", "F4", "U64", "BOOL", "X", "", 3, "C64"])
        elif change == 3:
            header[f"{name} twice"] = dict(entry)
        elif change == 4:
            header[rng.choice(WORDS)] = entry
        else:
            entry.pop(rng.choice(list(entry)))


BASE = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_scaling": None,
}
MORE = {
    "model_type": ["mistral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3_text"],
    "rope_scaling": [
        {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 32}
        for kind in ("llama3", "linear", "yarn", "dynamic")
    ],
    "rope_parameters": [
        {"rope_theta": 1e4},
        {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}},
    ],
    "sliding_window": [4, 1 << 40],
    "use_sliding_window": [True],
    "layer_types": [["sliding_attention", "full_attention"], []],
    "no_rope_layers": [[1, 0]],
    "no_rope_layer_interval": [2, 0],
    "sliding_window_pattern": [2, 0],
    "max_window_layers": [1],
    "query_pre_attn_scalar": [16, 0, -1],
    "quantization_config": [{"bits": 4}],
    "attention_bias": [True],
    "partial_rotary_factor": [0.5, "x"],
    "auto_map": [{"AutoModel": "evil--evil.Evil"}],
    "trust_remote_code": [True],
}
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    2**40,
    2**70,
    10**400,
    "",
    "1",
    "a",
    [],
    [1],
    {},
    {"a": 1},
    [None],
    {"rope_type": 1},
    {"factor": 0},
    {"rope_type": "yarn", "factor": -1},
    {"rope_type": "linear", "factor": "x"},
]


def make_model_config(rng: random.Random, folder: Path) -> Path:
    values: dict[str, Any] = dict(BASE)
    for name in rng.sample(list(MORE), rng.choice([0, 1, 2, 3])):
        values[name] = rng.choice(MORE[name])
    for name in rng.sample(list(values), rng.choice([0, 1, 1, 2])):
        values[name] = rng.choice(ODD)
    if rng.random() < 0.1:
        values.pop(rng.choice(list(values)))
    adapter = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {},
        "layers_to_transform": None,
    }
    for name in rng.sample(list(adapter), rng.choice([0, 1, 2])):
        adapter[name] = rng.choice(ODD)
    (folder / "adapter_config.json").write_bytes(damaged(rng, json.dumps(adapter).encode(), TEXT, 0.8))
    path = folder / "config.json"
    path.write_bytes(damaged(rng, json.dumps(values).encode(), TEXT, 0.7))
    return path


def read_model_config(rng: random.Random, folder: Path, path: Path) -> None:
    if rng.random() < 0.5:
        read_architecture(path)
        return
    config = RunConfig()
    lora = type(config.lora)(start=str(folder))
    configured_spec(lora, parse_architecture({**BASE}, "config"))


STEPS = list(zip("abcdefghijkl", "bcdefghijklm", strict=True))
LAUGHS = "&a [x, x, x], " + ", ".join(f"&{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in STEPS)
MERGES = "&a {x: 1}, " + ", ".join(f"&{b} {{<<: [{', '.join([f'*{a}'] * 9)}], y{b}: 1}}" for a, b in STEPS)
YAML = [
    "!!python/object/apply:os.mkdir ['escaped']",
    "!!python/name:os.system",
    "!!python/object/new:os.mkdir [escaped]",
    "!!python/module:os",
    "data: !!python/object/apply:os.mkdir ['escaped']",
    "data: &a [*a]",
    "data: &a {source: *a}",
    "? [1, 2]\n: 3",
    "? {a: 1}\n: 3",
    "data: {<<: *none}",
    "data: {<<: 3}",
    "data: {<<: [1]}",
    "data: {source: 2001-99-99}",
    "data: {source: 2001-12-12 99:99:99}",
    "data: {source: 0b_}",
    "data: {source: 0x_}",
    "data: {source: 1:99}",
    "data: {source: !!int x}",
    "data: {source: !!float x}",
    "data: {source: !!timestamp x}",
    "data: {source: !!bool x}",
    "data: {source: !!binary x}",
    "data: {source: !!set {a, b}}",
    "data: {source: !!omap [a]}",
    "data: {source: !!pairs [a]}",
    "data: !!str {a: 1}",
    "data: !!map [a]",
    "data: {source: " + "9" * 5000 + "}",
    "data: {source: 1e400}",
    "data: {user_core: .nan}",
    "train: {learning_rate: .nan}",
    "train: {epochs: 1e400}",
    "train: {learning_rate: 0x" + "f" * 5000 + "}",
    "[" * 5000,
    "{a: " * 2000,
    "- " * 3000,
    "a:\n" + "".join(" " * n + "a:\n" for n in range(1, 500)),
    "%YAML 9.9\n---\na: 1",
    "%TAG ! tag:x,2000:\n---\n!a b",
    "--- a\n--- b",
    "...",
    "|\n a",
    "\t",
    "data: {source: ./" + "a" * 5000 + "}",
    'data: {source: "./a\\0b"}',
    'data: {source: "\\ud800"}',
    'data: {source: "\\x1b[2J"}',
    "data: {source: $SFTREC_DATA/../../x}",
    "data: {source: 'tfds:./x'}",
    "model: {base: '" + "a" * 5000 + "'}",
    "data: {text_columns: [[a]]}",
    "data: {text_columns: {a: b}}",
    "lora: {rank_pattern: {a: b}}",
    "lora: {rank_pattern: {1: 2}}",
    "lora: {rank_pattern: &a {x: *a}}",
    "mesh: auto",
    "mesh: [auto]",
    "1: 2",
    "null: 1",
    "true: {}",
    "data: {1: 2}",
    "data: {null: 2}",
    f"data: {{source: [{LAUGHS}]}}",
    f"data: {{source: [{MERGES}]}}",
    f"[{LAUGHS}]",
    f"data: {{text_columns: [{LAUGHS}]}}",
    f"? [{MERGES}]\n: 1",
    f"data: [{LAUGHS}]",
    "data: {user_column: &u who, item_column: *u}",
    "train: &t {epochs: 1}\nlora: {<<: {r: 4}}",
]


def make_yaml(rng: random.Random, folder: Path) -> Path:
    kind = rng.random()
    if kind < 0.4:
        text = rng.choice(YAML)
    else:
        values = to_dict(RunConfig())
        sections = rng.sample(list(values), rng.choice([1, 3, len(values)]))
        chosen: dict[str, Any] = {}
        for section in sections:
            fields = values[section]
            names = rng.sample(list(fields), min(len(fields), rng.choice([1, 3, 50])))
            chosen[section] = {name: fields[name] if rng.random() < 0.9 else rng.choice([*ODD, *WORDS]) for name in names}
        if rng.random() < 0.1:
            chosen[rng.choice(WORDS)] = rng.choice([*ODD, *WORDS])
        if rng.random() < 0.1:
            chosen[rng.choice(sections)] = rng.choice([*ODD, *WORDS])
        text = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=rng.random() < 0.5)
    path = folder / "c.yaml"
    path.write_bytes(damaged(rng, text.encode("utf-8", "surrogatepass"), TEXT, 0.4))
    return path


def read_yaml(rng: random.Random, folder: Path, path: Path) -> None:
    config = load_config(path)
    again = folder / "again.yaml"
    text = dump_config(config)
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    try:
        assert to_dict(load_config(path)) == to_dict(config) or "nan" in text, "reads back as another config"
    except UserError as error:
        raise AssertionError(f"cannot read back what was accepted: {error}") from None
    assert not again.exists()
