"""What is computed again: chosen by memory, whose estimate is held against what XLA allocates."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import packed, save_llama, source_of

from sftrec_jax.config import LoraConfig, MeshConfig, ModelConfig, TrainConfig
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model import remat as module
from sftrec_jax.model.decoder import Decoder, Remat
from sftrec_jax.model.load import load_decoder, make_build, source_architecture, trainable_filter
from sftrec_jax.model.mesh import make_mesh
from sftrec_jax.model.remat import choose_remat, device_bytes, kept_bytes
from sftrec_jax.train.loss import target_loss

CODES = ItemCodes(np.array([[5], [6]], np.int32), (), np.zeros(0, np.int32), (), np.array(["a", "b"], object))
ROWS, LENGTH = 8, 128


def decoder_of(folder: Path, remat: Remat, targets: str | tuple[str, ...]) -> Decoder:
    source = source_of(folder)
    model, train = ModelConfig(compute_dtype="float32", remat=remat), TrainConfig(batch_rows=ROWS, row_length=LENGTH)
    build = make_build(model, LoraConfig(r=4, targets=targets), train, source_architecture(source), CODES)
    return load_decoder(build, source, CODES, make_mesh(MeshConfig(), jax.devices()[:1]), 0, False)


def temporary_bytes(decoder: Decoder, rows: int) -> int:
    """What XLA allocates beside arguments and results for the gradients of the adapters."""
    tokens = np.arange(LENGTH, dtype=np.int32) % 500
    batch = packed([[tokens]] * rows, LENGTH)
    graphdef, trained, frozen = nnx.split(decoder, trainable_filter("lora"), ...)
    gradient = jax.jit(jax.grad(lambda trained, batch: target_loss(nnx.merge(graphdef, trained, frozen), batch)))
    return gradient.lower(trained, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("targets", [pytest.param("all-linear", marks=pytest.mark.slow), ("q_proj", "v_proj")])
def test_the_estimate_is_near_what_xla_allocates(tmp_path: Path, targets: str | tuple[str, ...]) -> None:
    """The difference of eight rows and four, so that what does not grow with rows drops out."""
    folder = save_llama(tmp_path / "base", 2, True, 512)
    decoder = decoder_of(folder, "none", targets)
    measured = (temporary_bytes(decoder, ROWS) - temporary_bytes(decoder, ROWS // 2)) / (ROWS // 2 * LENGTH)
    build = make_build(ModelConfig(), LoraConfig(r=4, targets=targets), TrainConfig(), decoder.arch, CODES)
    estimate = kept_bytes(decoder.arch, build.adapters, jnp.float32)
    assert 0.6 < estimate / measured < 1.5
    assert temporary_bytes(decoder_of(folder, "full", targets), ROWS) < temporary_bytes(decoder, ROWS)


def test_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = source_architecture(source_of(Path(__file__).parent / "fixtures" / "stories260k"))
    train = TrainConfig(batch_rows=8, row_length=512)
    need = 8 * 512 * kept_bytes(arch, None, jnp.float32)

    def chosen(memory: float, mesh: MeshConfig | None = None, **model: str) -> Remat:
        monkeypatch.setattr(module, "device_bytes", lambda *_: int(memory))
        made = None if mesh is None else make_mesh(mesh, jax.devices()[:1])
        return choose_remat(ModelConfig(**model), train, arch, None, jnp.dtype(jnp.float32), made)[0]  # type: ignore[arg-type]

    assert chosen(need * 4.01) == "none" and chosen(need * 3.99) == "full"
    assert chosen(need * 4.01, MeshConfig()) == "none"
    assert [chosen(1, remat=remat) for remat in ("none", "dots", "full")] == ["none", "dots", "full"]
    assert kept_bytes(arch, None, jnp.bfloat16) * 2 == kept_bytes(arch, None, jnp.float32)


def test_memory_of_a_device_is_that_of_the_machine_on_a_cpu() -> None:
    assert 1e8 < device_bytes() * jax.local_device_count() < 1e14
