"""`sftrec compile`: programs for slices that are not there. In processes of their own: libtpu reads its surroundings once."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftrec_jax.cli import main

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (Linux only)")


def sftrec(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "sftrec_jax.cli", "compile", *words], env=environment, capture_output=True, text=True
    )


def compiled(tmp_path: Path, config: str, *words: str) -> tuple[dict[str, Any], str]:
    (tmp_path / "run.yaml").write_text(config, encoding="utf-8")
    done = sftrec(str(tmp_path / "run.yaml"), "--json", *words)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return json.loads(done.stdout), done.stderr


MODEL = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
CONFIG = """
model: {base: BASE, remat: full}
items: {tokenizer: rqkmeans}
prompt: {format: instruct, history: tokens}
train: {row_length: 512, batch_rows: 8}
mesh: {data: 1, fsdp: 4}
decode: {batch_users: 8, beam: 20}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    return CONFIG.replace("BASE", str(tmp_path / "config.json"))


@pytest.mark.slow
def test_a_step_over_divided_parameters(config: str, tmp_path: Path) -> None:
    line, said = compiled(tmp_path, config, "--topology", "v5e:2x2", "--only", "train", "--items", "5000", "--hlo", str(tmp_path))
    assert line["fits"] and line["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
    layer = 4 * 1024 * 1024 + 3 * 1024 * 2048
    head = 32000 * 1024
    # bfloat16 weights, a quarter on each chip; float32 adapters and their moments are some percent.
    weights = 2 * (6 * layer + 2 * head) / 4
    assert weights < line["train"]["arguments"] < 1.5 * weights
    # Each layer's kernels are gathered forward, in remat and backward; XLA may keep one of them. The head is gathered once.
    gathered = line["collective_bytes"]["all-gather"]
    assert 2 * 6 * layer * 2 * 3 / 4 < gathered < (3 * 6 * layer + 2 * head) * 2 * 3 / 4 * 1.2
    tokens = 8 * 512
    # 4 P a token: forward, and gradients of activations; P without the input table, the head for targets alone.
    assert line["flops"] == pytest.approx(4 * tokens * 6 * layer, rel=0.25)
    assert line["flops_again"] == pytest.approx(2 * tokens * 6 * layer, rel=0.2)
    assert 0 < line["mfu_bound"] < 0.68
    assert "bound by" in said and "fits" in said
    _no_whole_base_outside_the_scan((tmp_path / "train.txt").read_text(encoding="utf-8"), layer)


def _no_whole_base_outside_the_scan(text: str, layer: int) -> None:
    from sftrec_jax.compile.hlo import Module

    outside = [c for c in Module(text).collectives() if c.kind == "all-gather" and c.times == 1]
    # A layer's first gather may be started ahead of the loop; of the stack of six none is gathered whole.
    assert sum(c.bytes for c in outside if len(c.parts[0].shape) == 3 and c.parts[0].shape[0] == 6) < 2 * layer


@pytest.mark.slow
def test_the_search_compiles_too(config: str, tmp_path: Path) -> None:
    line, _ = compiled(tmp_path, config, "--topology", "v5e:2x2", "--only", "search", "--items", "100000")
    assert line["fits"] and line["mfu_bound"] is None and line["search"]["memory_bytes"] > 0


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_to_change(config: str, tmp_path: Path) -> None:
    more = config.replace("batch_rows: 8", "batch_rows: 4096").replace("remat: full", "remat: none")
    line, said = compiled(tmp_path, more, "--topology", "v5e:2x2", "--only", "train", "--items", "5000")
    assert not line["fits"] and line["hbm_bytes_per_chip"] > line["hbm_capacity"]
    assert "does NOT fit" in said and "--model.remat full" in said and "--train.batch-rows" in said


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--topology", "v5e-16"], "--topology v5e-16: not a TPU slice; write its kind and shape, such as v5e:4x4"),
        (["--topology", "v9:4x4"], "--topology v9:4x4: libtpu does not know it"),
        (["--topology", "v5e:2x2", "--items", "0"], "--items 0: use 1 or more"),
        (["--topology", "v5e:2x2", "--hlo", "nowhere"], "--hlo nowhere: there is no such folder"),
        (["--topology", "v5e:2x2", "--mesh.fsdp", "3"], "4 devices cannot be divided by 3"),
        (["--topology", "v5e:2x2", "--model.base", "org/unknown"], "its config.json is not here; save it as"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(config: str, tmp_path: Path, words: list[str], text: str) -> None:
    (tmp_path / "run.yaml").write_text(config.replace("{data: 1, fsdp: 4}", "{data: -1}"), encoding="utf-8")
    done = sftrec(str(tmp_path / "run.yaml"), *words)
    assert done.returncode == 2 and text in done.stderr and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


def test_without_libtpu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("JAX_PLATFORMS", "TPU_LOG_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, "cpu"))
    assert main(["compile", "configs/quick.yaml", "--topology", "v5e:2x2"]) == 2
    assert "pip install 'sftrec-jax[tpu]'" in capsys.readouterr().err


@pytest.mark.parametrize("preset", sorted(p.name for p in (ROOT / "configs").glob("*_lora.yaml")))
def test_every_preset_has_its_config(preset: str) -> None:
    from sftrec_jax.compile.stage import _parameters, shipped_architecture
    from sftrec_jax.config_file import load_config

    config = load_config(ROOT / "configs" / preset)
    arch = shipped_architecture(config.model.base, ROOT / "configs")
    size = float(preset.split("_lora")[0].split("_", 1)[1].removeprefix("2_").replace("_", ".").removesuffix("b"))
    assert _parameters(arch) / 1e9 == pytest.approx(size, rel=0.25)
