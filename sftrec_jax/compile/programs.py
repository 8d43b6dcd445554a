"""The training step and the search of a run, lowered for devices that need not be there: from shapes alone."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sftrec_jax.config import RunConfig
from sftrec_jax.data.segments import PackedBatch
from sftrec_jax.decode.batches import ladder
from sftrec_jax.decode.beam import recommend
from sftrec_jax.decode.index import build_index
from sftrec_jax.decode.pruning import Pruned
from sftrec_jax.decode.tree import CodeTree
from sftrec_jax.errors import UserError
from sftrec_jax.model.load import Build, trainable_filter
from sftrec_jax.model.sharding import path_name, sharding_for, spec_of, ways, with_arrays
from sftrec_jax.train.optimizer import make_optimizer
from sftrec_jax.train.step import abstract_state, batch_shardings, make_train_step

SEMANTIC = ("rqvae", "rqkmeans", "pq", "opq", "file")
WORDS = 16
"""Tokens of an item that is named in words or digits: of MovieLens' titles the mean is 9, with the year."""


@dataclass(frozen=True)
class Assumed:
    """What a program's shapes depend on beside the config."""

    items: int
    targets_per_row: int
    """K (see `PackedBatch`)."""


def assumed_targets(config: RunConfig) -> int:
    """Targets that a row is likely to have room for: of a stream every token, of prompts with targets every eighth."""
    length = config.train.row_length
    return length if config.prompt.format == "stream" else max(1, length // 8)


def _abstract(state: nnx.State, mesh: Mesh, dtype: Any) -> dict[str, Any]:
    """Arrays by path as shapes in their shardings; float32 ones as `dtype` where that is given."""
    found = {}
    for path, leaf in nnx.to_flat_state(state):
        name, value = path_name(path), leaf.get_value()
        narrow = dtype is not None and value.dtype == jnp.float32 and not name.endswith(("_scale", "/rows"))
        kind = dtype if narrow else value.dtype
        found[name] = jax.ShapeDtypeStruct(value.shape, kind, sharding=sharding_for(name, value.shape, mesh))
    return found


def lower_step(config: RunConfig, build: Build, mesh: Mesh, assumed: Assumed) -> Any:
    """The jitted training step on abstract arguments, lowered."""
    train = config.train
    model = nnx.eval_shape(lambda: build.decoder(jax.random.key(0), mesh))
    graphdef, trained, frozen = nnx.split(model, trainable_filter(train.method, build.whole), ...)
    optimizer = make_optimizer(train, 1000)
    state = abstract_state(_abstract(trained, mesh, None), optimizer, mesh)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained)
    dropout = train.seed if config.drops else None
    step = make_train_step(graphdef, template, optimizer, dropout, state)
    shardings = vars(batch_shardings(mesh))
    sizes = {name: train.row_length for name in shardings} | dict.fromkeys(
        ("target_positions", "labels", "weights"), assumed.targets_per_row
    )
    arrays: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(
            (train.accumulate, train.batch_rows, sizes[name]),
            jnp.float32 if name == "weights" else jnp.int32,
            sharding=sharding,
        )
        for name, sharding in shardings.items()
    }
    rest = with_arrays(frozen, _abstract(frozen, mesh, build.param_dtype))
    return step.lower(state, rest, PackedBatch(**arrays))  # type: ignore[attr-defined]


def assumed_codes(config: RunConfig, build: Build, items: int) -> np.ndarray:
    """int32 [items, L] codes of a catalogue of so many items, drawn at random in the shape that the config gives them.

    Raises: UserError where semantic ids are fewer than items.
    """
    vocab, rng = build.arch.vocab_size, np.random.default_rng(0)
    if config.items.tokenizer == "atomic":
        return np.asarray(build.row_ids, np.int32)[:items, None]
    if config.items.tokenizer not in SEMANTIC:
        return rng.integers(0, vocab, (items, WORDS), np.int32)
    semantic = config.semantic
    levels = semantic.levels + (semantic.collisions == "extra")
    own = semantic.collisions == "item"
    if not own and items > semantic.codes**levels:
        raise UserError(f"{items:,} items need more than {levels} levels of {semantic.codes} codes; raise semantic.codes")
    codes = rng.integers(0, semantic.codes, (items, levels), np.int32)
    codes = codes + vocab + np.arange(levels, dtype=np.int32) * semantic.codes
    if own:
        codes = np.concatenate([codes, vocab + levels * semantic.codes + np.arange(items, dtype=np.int32)[:, None]], axis=1)
    return codes


def lower_search(config: RunConfig, build: Build, mesh: Mesh, assumed: Assumed) -> Any:
    """The jitted constrained search on abstract arguments, lowered: a batch of users with long prompts and items to leave out."""
    tree = CodeTree.of(assumed_codes(config, build, assumed.items))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def replicated(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    index = jax.tree.map(replicated, build_index(tree, config.decode.layout))
    users = config.decode.batch_users
    place = NamedSharding(mesh, spec_of("users") if users % ways(mesh, "users") == 0 else PartitionSpec())
    longest = min(build.arch.context, config.train.row_length) - tree.length
    prompts = jax.ShapeDtypeStruct((users, max(16, longest // 16 * 16)), jnp.int32, sharding=place)
    lengths = jax.ShapeDtypeStruct((users,), jnp.int32, sharding=place)
    seen: Any = jax.ShapeDtypeStruct((users, ladder(config.prompt.max_history)), jnp.int32, sharding=place)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build.decoder(jax.random.key(0), mesh)))
    arrays = with_arrays(state, _abstract(state, mesh, build.param_dtype))
    k = min(config.decode.top_k, tree.n_leaves)
    beam = k if tree.length == 1 else config.decode.beam
    pruned = Pruned(None, None, seen)  # type: ignore[arg-type]
    return recommend.lower(
        graphdef, arrays, index, prompts, lengths, None, pruned, None, k=k, beam=beam, normaliser=config.decode.normaliser
    )
