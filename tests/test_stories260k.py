"""The stories260K fixture and its conversion, against plain restatements of llama2.c's tokenizer and forward pass."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "stories260k"
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, "
    "red ball. She wanted to play with it, but it was too high"
)


def reference_encode(text: str, ids: dict[str, int], score: dict[int, float]) -> list[int]:
    """llama2.c: a space in front, one token a character (or its UTF-8 bytes), then the best adjacent join until none is left."""
    if not text:
        return []
    pieces = {index: piece for piece, index in ids.items()}
    tokens = []
    for character in " " + text:
        tokens += [ids[character]] if character in ids else [3 + byte for byte in character.encode("utf-8")]
    while True:
        joins = [(ids.get(pieces[a] + pieces[b]), i) for i, (a, b) in enumerate(zip(tokens, tokens[1:], strict=False))]
        best = max(((score[new], -i, new) for new, i in joins if new is not None), default=None)
        if best is None:
            return tokens
        tokens[-best[1] : -best[1] + 2] = [best[2]]


def reference_logits(tokens: list[int], w: dict[str, np.ndarray], heads: int, kv_heads: int) -> np.ndarray:
    """llama2.c's forward pass in float64, with RoPE over interleaved pairs; returns [T, V]."""

    def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def rope(x: np.ndarray) -> np.ndarray:
        steps, _, size = x.shape
        angle = np.arange(steps)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = w["embedding"][tokens]
    steps, dim = x.shape
    size = dim // heads
    for i in range(len(w["wq"])):
        h = rms(x, w["attention_norm"][i])
        q = rope((h @ w["wq"][i].T).reshape(steps, heads, size))
        k = rope((h @ w["wk"][i].T).reshape(steps, kv_heads, size)).repeat(heads // kv_heads, 1)
        v = (h @ w["wv"][i].T).reshape(steps, kv_heads, size).repeat(heads // kv_heads, 1)
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(size)
        scores = np.where(np.tri(steps, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("nts,snh->tnh", weights, v).reshape(steps, dim) @ w["wo"][i].T
        h = rms(x, w["ffn_norm"][i])
        gate = h @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][i].T)) @ w["w2"][i].T
    return rms(x, w["norm"]) @ w["embedding"].T


def random_text(rng: random.Random) -> str:
    words = "Once upon a time, there was little girl named Lily She loved to play! said \"Yes\" don't Timmy's mom. 1234".split()
    odd = [*"é😀…\n\t<ß\u00a0$", "Zoë", "日本", "“hi”", "  ", "naïve", "€5", "ABC", "aaaaaa", "hehehe"]
    parts = []
    for _ in range(rng.randrange(12)):
        parts.append(rng.choice(words) if rng.random() < 0.7 else rng.choice(odd))
        parts.append(rng.choice([" ", " ", " ", "", ", ", ". "]))
    return "".join(parts)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_greedy_text(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokens = torch.tensor([[tokenizer.bos_token_id]])
    with torch.no_grad():
        for _ in range(len(tokenizer(STORY).input_ids) - 1):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == STORY


def test_encoding_is_llama2c(tokenizer):
    ids = {piece.replace("▁", " "): index for piece, index in tokenizer.get_vocab().items()}
    score = {index: float(259 - index) for index in range(259, 512)}  # tok512: 0, -1, -2, ... from the first piece on
    rng = random.Random(0)
    for _ in range(200):
        text = random_text(rng)
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert encoded == reference_encode(text, ids, score), repr(text)
        assert tokenizer.decode(encoded) == text


def test_special_tokens(tokenizer):
    assert len(tokenizer) == 512
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2, 0)
    assert tokenizer("Once").input_ids == [1, 403]
    assert tokenizer("").input_ids == [1]


def write_llama2c(folder: Path, heads: int, kv_heads: int) -> tuple[dict[str, np.ndarray], list[tuple[str, float]]]:
    """A random llama2.c checkpoint and tokenizer; returns the weights (float64) and (piece, score) of each token."""
    rng = np.random.default_rng(heads * 10 + kv_heads)
    dim, hidden, layers, steps = 8 * heads, 12, 2, 16
    letters = ["a", "b", " ", "c"]
    joined = ["ab", "abc", "bc", " a", "ca", " ab", "aa", "aaaa"]
    texts = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *joined]
    scores = [0.0] * 259 + [-100.0 - i for i in range(len(letters))] + [float(s) for s in rng.permutation(len(joined))]
    kv = dim // heads * kv_heads
    shapes = {
        "embedding": (len(texts), dim), "attention_norm": (layers, dim), "wq": (layers, dim, dim), "wk": (layers, kv, dim),
        "wv": (layers, kv, dim), "wo": (layers, dim, dim), "ffn_norm": (layers, dim), "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden), "w3": (layers, hidden, dim), "norm": (dim,), "rope": (2, steps, dim // heads // 2),
    }  # fmt: skip
    weights = {name: rng.normal(size=shape).astype("<f4") for name, shape in shapes.items()}
    header = struct.pack("<7i", dim, hidden, layers, heads, kv_heads, len(texts), steps)
    (folder / "m.bin").write_bytes(header + b"".join(weight.tobytes() for weight in weights.values()))
    records = [struct.pack("<fi", s, len(t.encode())) + t.encode() for t, s in zip(texts, scores, strict=True)]
    (folder / "t.bin").write_bytes(struct.pack("<i", 7) + b"".join(records))
    return {name: weight.astype(np.float64) for name, weight in weights.items()}, list(zip(texts, scores, strict=True))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (4, 2), (2, 2)])
def test_conversion_of_random_checkpoint(tmp_path, heads, kv_heads):
    weights, pieces = write_llama2c(tmp_path, heads, kv_heads)
    script = [sys.executable, str(FIXTURES / "convert_stories260k.py")]
    subprocess.run([*script, tmp_path / "m.bin", tmp_path / "t.bin", tmp_path / "out"], check=True, capture_output=True)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    tokens = np.random.default_rng(0).integers(0, len(pieces), 9).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(logits, reference_logits(tokens, weights, heads, kv_heads), rtol=1e-4, atol=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = {text: index for index, (text, _) in enumerate(pieces)}
    score = {index: value for index, (_, value) in enumerate(pieces)}
    rng = random.Random(1)
    for _ in range(100):
        text = "".join(rng.choices("aabbc dé", k=rng.randrange(10)))
        assert tokenizer.encode(text, add_special_tokens=False) == reference_encode(text, ids, score), repr(text)


def test_folder_is_complete():
    tensors = load_file(FOLDER / "model.safetensors")
    config = json.loads((FOLDER / "config.json").read_text())
    assert sum(tensor.size for tensor in tensors.values()) == 260_032
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    assert config["tie_word_embeddings"] and config["rope_theta"] == 10000.0
    assert "Copyright (c) 2023 Andrej" in (FOLDER / "LICENSE").read_text()
