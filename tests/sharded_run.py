"""Run by test_sharding.py with eight virtual devices: two steps and a ranking on several meshes, left in one .npz file."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from helpers import FIXTURE, Case, make_case, source_of
from tiny_training import split, start, stream_plan

from sftrec_jax.config import DecodeConfig, LoraConfig, MeshConfig, PromptConfig, TrainConfig
from sftrec_jax.data.prompts import prompt_builder
from sftrec_jax.data.windows import Windows
from sftrec_jax.decode.recommender import Recommender
from sftrec_jax.errors import UserError
from sftrec_jax.model.load import TRAINABLE, load_decoder
from sftrec_jax.model.mesh import make_mesh
from sftrec_jax.model.packed_attention import WHOLE
from sftrec_jax.model.sharding import named_arrays, with_arrays
from sftrec_jax.train.batches import BatchPlan
from sftrec_jax.train.optimizer import make_optimizer
from sftrec_jax.train.step import init_state

MESHES = {
    "one": MeshConfig(),
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=2, tensor=4),
    "fsdp and tensor": MeshConfig(data=1, fsdp=4, tensor=2),
    "context": MeshConfig(data=2, context=4),
    "all": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
}
CONFIG = TrainConfig(row_length=24, batch_rows=8, epochs=50.0)
LONG = TrainConfig(row_length=80, batch_rows=8)
SHARED = PromptConfig("instruct", history="tokens", prefix="Once", separator=",", suffix="then")
# Linear in the gradient, so that a bound on gradients bounds parameters; AdamW makes a full step of rounding where a gradient
# is near 0. Its moments are placed by the same function, which is asked apart.
SGD = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.9))


def spec(value: jax.Array) -> list:
    """What divides each axis, trailing undivided axes left out."""
    found: Any = value.sharding
    axes = [list(a) if isinstance(a, tuple) else a for a in found.spec]
    while axes and axes[-1] is None:
        axes.pop()
    return axes


def kept(optimizer: Any, kind: str) -> dict[str, jax.Array]:
    """Momentum (`trace`), first (`mu`) or second (`nu`) moments by the name of their array."""
    leaves = jax.tree_util.tree_leaves_with_path(optimizer)
    return {path[-1].key: leaf for path, leaf in leaves if f".{kind}" in jax.tree_util.keystr(path)}


def run(case: Case, name: str, config: MeshConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is compared as arrays, and what is said in words, of one mesh. `case` lies on one device."""
    mesh = make_mesh(config, jax.devices()[:1] if name == "one" else None)
    decoder = load_decoder(case.build, source_of(FIXTURE), case.codes, mesh, 0, False)
    graphdef, trained, frozen = nnx.split(decoder, TRAINABLE, ...)
    initial = named_arrays(trained)
    moved = named_arrays(nnx.split(case.decoder, TRAINABLE, ...)[1])
    trained = with_arrays(trained, {n: jax.device_put(np.asarray(moved[n]), v.sharding) for n, v in initial.items()})
    here = dataclasses.replace(case, decoder=nnx.merge(graphdef, trained, frozen))
    plan = stream_plan(here, CONFIG, 100)
    going = start(split(here), SGD, mesh=mesh)
    facts: dict[str, Any] = {"base": {n: spec(v) for n, v in named_arrays(frozen).items()}}
    facts["placed"] = {n: spec(v) for n, v in initial.items()}
    arrays: dict[str, Any] = {f"initial/{n}": v for n, v in initial.items()}
    for step in range(2):
        metrics = going.take(plan.batch(step))
        arrays |= {f"step{step}/{n}": np.float64(v) for n, v in metrics.items()}
        if step == 0:
            arrays |= {f"gradient/{n}": np.asarray(v) for n, v in kept(going.state.optimizer, "trace").items()}
    facts["trained"] = {n: spec(v) for n, v in going.state.trained.items()}
    facts["trace"] = {n: spec(v) for n, v in kept(going.state.optimizer, "trace").items()}
    adamw = init_state(initial, make_optimizer(CONFIG, 10), mesh).optimizer
    for kind in ("mu", "nu"):
        facts[kind] = {n: spec(v) for n, v in kept(adamw, kind).items()}
    facts["compiled"] = going.step._cache_size()
    facts["shards"] = len({s.device for s in going.state.trained["layers/q_proj/lora_a"].addressable_shards})
    arrays |= {f"before/{n}": v for n, v in moved.items()} | {f"after/{n}": v for n, v in going.arrays.items()}
    # Prompts that are shared, in rows long enough for attention in blocks.
    builder = prompt_builder(SHARED, case.codes, case.tokenizer, LONG.row_length)
    histories = np.arange(0, 120, 6)
    items = np.random.default_rng(4).integers(0, 7, 120).astype(np.int32)
    segments = builder.segments(items, Windows(histories, histories, histories + 6))
    going = start(split(here), SGD, mesh=mesh)
    batch = BatchPlan(segments, LONG).batch(0)
    assert batch.branches.any() and batch.tokens.shape[-1] > WHOLE
    arrays |= {f"shared/{n}": np.float64(v) for n, v in going.take(batch).items()}
    arrays |= {f"shared gradient/{n}": np.asarray(v) for n, v in kept(going.state.optimizer, "trace").items()}
    rng = np.random.default_rng(3)
    prompts = [np.concatenate([[1], rng.choice(case.codes.codes[:, 0], n)]).astype(np.int32) for n in rng.integers(0, 9, 11)]
    recommender = Recommender(here.decoder, case.codes, DecodeConfig(top_k=5, beam=5, batch_users=8), mesh)
    ranked = recommender.rank(prompts, None, 5)
    arrays |= {"items": ranked.items, "scores": ranked.scores}
    deny = [rng.choice(7, n, replace=False).astype(np.int32) for n in rng.integers(0, 5, 11)]
    allow = np.arange(7) != np.asarray([[2], [4], [6]])
    left = recommender.rank(prompts, deny, 5, allowed=(allow, np.arange(11) % 3))
    arrays |= {"items/left": left.items, "scores/left": left.scores}
    facts["gone"] = [sorted({*row.tolist(), 2 * (user % 3) + 2}) for user, row in enumerate(deny)]
    facts["whole_index"] = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(recommender.index)]
    facts["users_a_device"] = recommender._place(np.zeros((8, 3), np.int32)).addressable_shards[0].data.shape[0]
    if name == "data":
        uneven = jax.tree.map(lambda x: x[:, :6], plan.batch(0))
        facts["uneven"] = message(lambda: going.take(uneven))
        tensor = make_mesh(MeshConfig(data=1, tensor=8))
        facts["indivisible"] = message(lambda: load_decoder(case.build, source_of(FIXTURE), case.codes, tensor, 0, False))
    return arrays, facts


def message(action: Any) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def main(out: Path) -> None:
    assert len(jax.devices()) == 8
    case = make_case(FIXTURE, LoraConfig(r=4, alpha=8.0))
    arrays, facts = {}, {}
    for name, config in MESHES.items():
        found, facts[name] = run(case, name, config)
        arrays |= {f"{name}/{key}": np.asarray(value) for key, value in found.items()}
    np.savez(out / "arrays.npz", **arrays)  # type: ignore[arg-type]
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
