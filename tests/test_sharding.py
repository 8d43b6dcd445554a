"""Eight virtual devices give what one gives. A process of its own: the number of devices is fixed when jax starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sharded_run import MESHES
from tiny_training import assert_close

from sftrec_jax.config import MeshConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model.mesh import make_mesh
from sftrec_jax.model.sharding import spec_for

HERE = Path(__file__).parent
Results = dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Arrays and facts of each mesh."""
    out = tmp_path_factory.mktemp("sharded")
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    # Compiling takes nearly all of the time; without LLVM's optimisation it is half as long.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(HERE / "sharded_run.py"), str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    stored = dict(np.load(out / "arrays.npz"))
    return {
        mesh: ({n.removeprefix(f"{mesh}/"): v for n, v in stored.items() if n.startswith(f"{mesh}/")}, facts[mesh])
        for mesh in MESHES
    }


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


MANY = [name for name in MESHES if name != "one"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MANY)
def test_loss_gradients_and_parameters_equal_one_device(results: Results, mesh: str) -> None:
    one, many = results["one"][0], results[mesh][0]
    for step in ("step0/", "step1/"):
        for name, value in part(one, step).items():
            np.testing.assert_allclose(many[step + name], value, rtol=1e-5)
    assert_close(part(many, "gradient/"), part(one, "gradient/"))
    assert_close(part(many, "after/"), part(one, "after/"))
    before = part(one, "before/")
    assert all(np.abs(value - before[name]).max() > 1e-3 for name, value in part(one, "after/").items())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MANY)
def test_shared_prompts_equal_one_device(results: Results, mesh: str) -> None:
    one, many = results["one"][0], results[mesh][0]
    for name, value in part(one, "shared/").items():
        np.testing.assert_allclose(many[f"shared/{name}"], value, rtol=1e-5)
    gradient = {name: value for name, value in part(one, "shared gradient/").items() if np.abs(value).max() > 0}
    assert len(gradient) > 10
    assert_close({name: part(many, "shared gradient/")[name] for name in gradient}, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MANY)
def test_a_seed_gives_the_same_start_on_every_mesh(results: Results, mesh: str) -> None:
    for name, value in part(results["one"][0], "initial/").items():
        # First values of rows are scaled by norms, sums that each mesh adds up in its own order.
        tolerance = 1e-6 if name.endswith("/rows") else 0.0
        np.testing.assert_allclose(results[mesh][0][f"initial/{name}"], value, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MANY)
def test_everything_lies_where_the_table_says(results: Results, mesh: str) -> None:
    facts = results[mesh][1]
    for name, axes in (facts["base"] | facts["placed"]).items():
        expected = list(spec_for(name))
        while expected and expected[-1] is None:
            expected.pop()
        assert axes == expected, name
    for name, axes in facts["placed"].items():
        if name.endswith("lora_a"):  # [layer, in, rank] beside [layer, in, out]
            assert [*axes, None, None][:2] == [*facts["base"][name.replace("lora_a", "kernel")], None, None][:2]
        elif name.endswith("lora_b"):
            assert [*axes, None, None, None][2] == [*facts["base"][name.replace("lora_b", "kernel")], None, None, None][2]
    # Steps leave arrays and moments where they were, or the second step would be compiled again.
    assert facts["trained"] == facts["trace"] == facts["mu"] == facts["nu"] == facts["placed"]
    assert facts["compiled"] == 1
    assert facts["shards"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MANY)
def test_ranking_equals_one_device(results: Results, mesh: str) -> None:
    one, many = results["one"][0], results[mesh][0]
    np.testing.assert_array_equal(many["items"], one["items"])
    np.testing.assert_allclose(many["scores"], one["scores"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MANY)
def test_ranking_with_lists_of_items_equals_one_device(results: Results, mesh: str) -> None:
    """Users are divided, with their lists; every device has the whole index."""
    (one, _), (many, facts) = results["one"], results[mesh]
    np.testing.assert_array_equal(many["items/left"], one["items/left"])
    np.testing.assert_allclose(many["scores/left"], one["scores/left"], rtol=1e-5, atol=1e-5)
    for items, gone in zip(many["items/left"], facts["gone"], strict=True):
        assert (items >= 0).sum() == min(5, 7 - len(gone)) and not set(items.tolist()) & set(gone)
    assert facts["whole_index"] and all(facts["whole_index"])
    assert facts["users_a_device"] == 8 // {"tensor": 2, "fsdp and tensor": 4, "all": 4}.get(mesh, 8)


@pytest.mark.slow
def test_sizes_that_do_not_divide(results: Results) -> None:
    facts = results["data"][1]
    assert facts["uneven"] == "train.batch_rows is 6, which data x fsdp = 8 devices cannot divide; use 8"
    assert facts["indivisible"] == "mesh axis tensor of size 8 does not divide 172 of layers/down_proj/kernel; choose a divisor"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            MeshConfig(data=-1, fsdp=2),
            "mesh data -1, fsdp 2, context 1, tensor 1: 3 devices cannot be divided by 2; lower fsdp, ",
        ),
        (MeshConfig(data=2), "mesh data 2, fsdp 1, context 1, tensor 1 needs 2 devices, 3 are there; set one size to -1, "),
    ],
)
def test_meshes_that_do_not_fit_the_devices(config: MeshConfig, text: str) -> None:
    with pytest.raises(UserError) as raised:
        make_mesh(config, ["a", "b", "c"])
    assert str(raised.value).startswith(text) and str(raised.value).endswith("or use --mesh auto")


def test_an_unknown_parameter_has_no_silent_rule() -> None:
    with pytest.raises(KeyError, match="no sharding rule"):
        spec_for("layers/q_proj/other")
