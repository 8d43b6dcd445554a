"""Pooled hidden states against transformers on torch, and how texts are put into batches."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from helpers import make_case, save_llama
from transformers import LlamaModel

from sftrec_jax.config import MeshConfig
from sftrec_jax.model import pool
from sftrec_jax.model.mesh import make_mesh
from sftrec_jax.model.pool import mean_pooled

HERE = Path(__file__).parent
LENGTHS = [5, 0, 40, 1, 64, 17, 100, 3, 3, 30, 0]  # the context of `save_llama` is 64

# A process of its own, since the number of devices is fixed when jax starts; without torch, which takes long to import.
ON_EIGHT = """
import sys
from pathlib import Path
import numpy as np
from sftrec_jax.config import LoraConfig, MeshConfig, ModelConfig, TrainConfig
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.hub import BaseSource
from sftrec_jax.model.load import load_decoder, make_build, source_architecture
from sftrec_jax.model.pool import mean_pooled
from sftrec_jax.model.mesh import make_mesh

folder, out = map(Path, sys.argv[1:])
source = BaseSource(folder, None, folder, "llama")
codes = ItemCodes(np.array([[5], [6]], np.int32), (), np.zeros(0, np.int32), (), np.array(["a", "b"], object))
config = ModelConfig(compute_dtype="float32")
build = make_build(config, LoraConfig(), TrainConfig(method="full"), source_architecture(source), codes)
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
with np.load(out / "texts.npz") as stored:
    texts = [stored[f"arr_{i}"] for i in range(len(stored.files))]
np.save(out / "pooled.npy", mean_pooled(load_decoder(build, source, codes, mesh, 0, False), texts, mesh, 400))
"""


def texts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 512, n).astype(np.int32) for n in LENGTHS]


def by_torch(folder: Path) -> np.ndarray:
    model = LlamaModel.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for text in texts():
        with torch.no_grad():
            hidden = model(torch.tensor(text[None, :64]).long()).last_hidden_state[0] if len(text) else torch.zeros(1, 48)
        rows.append(hidden.mean(0).numpy())
    return np.stack(rows)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), kv_heads=2, tied=True, vocab=512)


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 4096])
def test_means_equal_those_of_torch(llama: Path, tokens_per_batch: int) -> None:
    decoder = make_case(llama, None, trained=False).decoder
    finished: list[int] = []
    found = mean_pooled(decoder, texts(), make_mesh(MeshConfig(), jax.devices()[:1]), tokens_per_batch, finished.append)
    expected = by_torch(llama)
    assert found.dtype == np.float32 and expected[0].std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not found[[1, 10]].any()
    assert sum(finished) == 9  # empty texts are not computed


def test_nothing_to_pool(llama: Path) -> None:
    decoder = make_case(llama, None, trained=False).decoder
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mean_pooled(decoder, [], mesh).shape == (0, 48)
    assert not mean_pooled(decoder, [np.zeros(0, np.int32)], mesh).any()


def test_batches_hold_every_text_once_in_few_shapes() -> None:
    rng = np.random.default_rng(1)
    for multiple in (1, 8):
        for n in (1, 9, 3000):
            lengths = np.minimum(rng.geometric(0.03, n) - 1, 200)
            batches = list(pool._batches(lengths, 2048, multiple))
            placed = [int(row) for rows, _, _ in batches for row in rows]
            assert sorted(placed) == np.flatnonzero(lengths).tolist()
            for rows, size, width in batches:
                assert len(rows) <= size and size % multiple == 0 and lengths[rows].max() <= width
                assert size * width <= 2048 or size == multiple
            sizes = {(size, width) for _, size, width in batches}
            assert len(sizes) == len({width for _, width in sizes}) <= 9
            if n == 3000:
                padded = sum(size * width for _, size, width in batches)
                assert padded < 1.5 * lengths.sum()


def test_eight_devices_give_what_torch_gives(llama: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "texts.npz", *texts())
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, str(llama), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(np.load(tmp_path / "pooled.npy"), by_torch(llama), atol=1e-4)
