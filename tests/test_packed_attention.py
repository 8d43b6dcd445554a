"""Which attention packed rows get, and that each gives what the whole mask does."""

import jax
import numpy as np
import pytest
from random_trees import by_mask, errors, long_axes, random_arrays, random_rows, with_gradients

from sftrec_jax.config import MeshConfig
from sftrec_jax.model import packed_attention as module
from sftrec_jax.model.mesh import make_mesh
from sftrec_jax.model.packed_attention import attention_path, packed_attention


@pytest.mark.parametrize("t", [48, 100])
@pytest.mark.parametrize("mesh", [None, make_mesh(MeshConfig(), jax.devices()[:1])])
def test_equals_the_whole_mask(t: int, mesh: jax.sharding.Mesh | None) -> None:
    marks, arrays = random_rows(0, t), random_arrays(0, 2, t, 3, 1, 16)
    found = with_gradients(lambda q, k, v, *m: packed_attention(m, mesh)(q, k, v), arrays, marks)  # type: ignore[arg-type]
    assert all(error < 1e-5 for error in errors(found, by_mask(arrays, marks)))


def test_long_rows_have_no_square_of_scores() -> None:
    marks, arrays = random_rows(0, 2048, (5,)), random_arrays(0, 1, 2048, 2, 1, 8)
    assert long_axes(lambda q, k, v: packed_attention(marks, None)(q, k, v), *arrays[:3]) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_accelerators_take_the_kernels(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    asked: list[str] = []

    def record(name: str) -> None:
        def call(query: jax.Array, *_: object, **__: object) -> jax.Array:
            asked.append(name)
            return query

        monkeypatch.setattr(module, name, call)

    for name in ("attend", "tree_attention", "block_attention"):
        record(name)
    # Keys and values of a row in float32 fill 14 MiB twice with 6,528 tokens of head-dim 128 or less, with 3,328 of 256.
    for t, head_dim in ((100, 2), (128, 2), (6528, 128), (6529, 128), (3328, 256), (3329, 256), (128, 257)):
        marks = tuple(np.zeros((1, t), np.int32) for _ in range(4))
        query = np.zeros((1, t, 1, head_dim), np.float32)
        packed_attention(tuple(map(jax.numpy.asarray, marks)), None)(*(jax.numpy.asarray(query),) * 3)  # type: ignore[arg-type]
    kernels, blocks = "tree_attention", "block_attention"
    assert asked == ["attend", kernels, kernels, blocks, kernels, blocks, blocks]
    path, why = attention_path(6529, 128, jax.numpy.float32, backend)
    assert path == "blocks" and "rows of 6528 tokens" in why
