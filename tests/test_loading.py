"""Reading checkpoints: values against transformers' own, only the parts that a device holds, errors before anything is read."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from family_models import save_family
from helpers import make_case, source_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sftrec_jax.config import MeshConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model import tensor_files
from sftrec_jax.model.families import weight_map
from sftrec_jax.model.hf_config import read_architecture
from sftrec_jax.model.merge import arrays_of
from sftrec_jax.model.mesh import make_mesh
from sftrec_jax.model.sharding import sharding_for
from sftrec_jax.model.tensor_files import TensorSource, open_tensors
from sftrec_jax.model.weights import base_arrays


@pytest.mark.parametrize("chunk", [2**25, 1000], ids=["whole", "in chunks"])
@pytest.mark.parametrize(("stored", "held"), [("float32", "float32"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_values_are_those_of_transformers(
    stored: str, held: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", chunk)
    save_family("gemma3", tmp_path, 512, getattr(torch, stored), "60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    arch = read_architecture(tmp_path)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    table = weight_map(arch)
    shardings = {path: sharding_for(path, _shape(arch, path), mesh) for path in table}
    found = dict(base_arrays(open_tensors(tmp_path), arch, "x", shardings, jnp.dtype(held)))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, held)).state_dict()
    assert found.keys() == table.keys()
    for path, tensor in table.items():
        values = [reference[name].float().numpy() for name in tensor.names(arch.layers)]
        values = [value.T if tensor.transposed else value for value in values]
        expected = np.stack(values) if tensor.stacked else values[0]
        assert found[path].dtype == jnp.dtype(held)
        np.testing.assert_array_equal(np.asarray(found[path].astype(jnp.float32)), expected, err_msg=path)


def _shape(arch: Any, path: str) -> tuple[int, ...]:
    tensor = weight_map(arch)[path]
    shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
    return (arch.layers, *shape) if tensor.stacked else shape


def test_devices_read_their_parts_alone(tmp_path: Path) -> None:
    """On eight devices, fsdp 4 and tensor 2: every read of a kernel is of an eighth, each part is read once, values are right."""
    save_family("qwen3", tmp_path, 512)
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", f"import test_loading; test_loading.count_reads({str(tmp_path)!r})"]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def count_reads(folder: str) -> None:
    """In the process with eight devices."""
    arch = read_architecture(Path(folder))
    whole, asked = open_tensors(Path(folder)), {}

    def read(name: str, part: tuple[slice, ...]) -> np.ndarray:
        value = whole.read(name, part)
        asked.setdefault(name, []).append(value.size)
        return value

    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    table = weight_map(arch)
    shardings = {path: sharding_for(path, _shape(arch, path), mesh) for path in table}
    found = dict(base_arrays(replace(whole, read=read), arch, "x", shardings, jnp.dtype(jnp.float32)))
    for path, tensor in table.items():
        assert found[path].sharding.is_equivalent_to(shardings[path], found[path].ndim)
        size = int(np.prod(tensor.shape))
        for layer, name in enumerate(tensor.names(arch.layers)):
            if path.endswith("kernel"):
                assert asked[name] == [size // 8] * 8, (name, asked[name], size)
            assert max(asked[name]) <= size and sum(asked[name]) <= 2 * size, (name, asked[name])
            value = whole.read(name, tuple(slice(0, s) for s in tensor.shape))
            ours = found[path][layer] if tensor.stacked else found[path]
            np.testing.assert_array_equal(ours, value.T if tensor.transposed else value)


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata={"format": "pt"})


K = "model.layers.1.self_attn.k_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: damage(f, lambda t: t.pop(K)), f"1 tensors are missing, first {K}"),
    "unexpected": (lambda f: damage(f, lambda t: t.update({"model.layers.9.x": t[K] * 1})), "unexpected .*layers.9.x"),
    "duplicate": (lambda f: shutil.copy(f / "model.safetensors", f / "other.safetensors"), "duplicate tensor .* remove one"),
    "shape": (lambda f: damage(f, lambda t: t.update({K: t[K][:-1]})), f"{K} has shape .* implies"),
    "transposed": (lambda f: damage(f, lambda t: t.update({K: t[K].T})), f"{K} has shape .* implies"),
    "nan": (lambda f: damage(f, lambda t: t[K].view(-1)[-1:].fill_(float("nan"))), f"{K} holds NaN"),
    "cut short": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-40]), "damaged"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle.*save_pretrained"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), r"no \.safetensors file"),
    "index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "no weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wrong_checkpoint_costs_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_family("qwen3", tmp_path, 512)
    harm, expected = DAMAGES[name]
    harm(tmp_path)
    if name != "nan":  # found before a value is read
        monkeypatch.setattr(TensorSource, "fill", lambda *_: pytest.fail("read a tensor"))
    with pytest.raises(UserError, match=expected) as error:
        make_case(tmp_path, None, atomic=False, trained=False)
    assert "\n" not in str(error.value) and re.search(re.escape(str(tmp_path)), str(error.value))


def test_a_copy_of_the_tied_head_and_old_buffers_are_passed_over(tmp_path: Path) -> None:
    save_family("qwen2", tmp_path, 512)
    expected = arrays_of(make_case(tmp_path, None, atomic=False, trained=False).decoder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    damage(tmp_path, change)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    found = arrays_of(make_case(tmp_path, None, atomic=False, trained=False).decoder)
    assert all(np.array_equal(found[path], value) for path, value in expected.items())
    assert open_tensors(source_of(tmp_path).folder).shapes["lm_head.weight"] == (512, 48)
