"""From configuration to a decoder in its shardings: base weights, adapters at identity, new token rows."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sftrec_jax.config import LoraConfig, ModelConfig, TrainConfig
from sftrec_jax.distributed import place, to_host
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.adapter_start import begin_adapters
from sftrec_jax.model.adapters import TABLES, AdapterSpec, saved_paths
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.decoder import Decoder, Remat
from sftrec_jax.model.dtype import compute_dtype
from sftrec_jax.model.gguf_file import read_gguf
from sftrec_jax.model.hf_config import parse_architecture, read_architecture
from sftrec_jax.model.hub import BaseSource
from sftrec_jax.model.lora import AdapterConstant, LoRAParam
from sftrec_jax.model.mesh import platform_of
from sftrec_jax.model.peft_read import configured_spec, modules_to_save, read_adapter
from sftrec_jax.model.quantised import Quantisation
from sftrec_jax.model.remat import choose_remat
from sftrec_jax.model.sharding import named_arrays, path_name, sharding_for, with_arrays
from sftrec_jax.model.tensor_files import open_tensors
from sftrec_jax.model.token_table import TokenRows
from sftrec_jax.model.weights import base_arrays

ROWS_AT_ONCE = 4096
"""New rows whose beginnings are gathered from the token table together."""
TRAINABLE = nnx.Any(LoRAParam, TokenRows)
"""What `train.method: lora` trains."""


def trainable_filter(method: str, whole: tuple[str, ...] = ()) -> Any:
    """The nnx filter of trained variables: token rows, adapters and token rows, or everything; and parameters by path."""
    kinds = {"rows": TokenRows, "embeddings": TokenRows, "lora": TRAINABLE, "full": nnx.Variable}[method]
    return nnx.Any(kinds, lambda path, _: path_name(path) in whole) if whole else kinds


def source_architecture(source: BaseSource) -> Architecture:
    """Reads the architecture from config.json or from the GGUF metadata."""
    if source.gguf is not None:
        return parse_architecture(read_gguf(source.gguf).config, str(source.gguf))
    return read_architecture(source.folder)


@dataclass(frozen=True)
class Build:
    """Everything static that makes a decoder, so that training and decoding build the same one."""

    arch: Architecture
    adapters: AdapterSpec | None
    row_ids: tuple[int, ...]
    dtype: Any
    param_dtype: Any
    remat: Remat
    quantise: Quantisation | None = None
    whole: tuple[str, ...] = ()
    """Paths of base parameters that are trained, beside what the method trains; kept in float32."""
    dropout: float = 0.0
    levels: tuple[tuple[int, int], ...] = ()
    """Of each place of an item's tokens the trainable rows that stand there, where targets are normalised over these alone."""

    def decoder(self, key: jax.Array, mesh: Mesh | None = None) -> Decoder:
        """A randomly initialised decoder for a mesh (trace it with `nnx.eval_shape` for shapes only)."""
        return Decoder(
            self.arch, self.adapters, self.row_ids, self.dtype, self.remat, key, mesh, self.quantise, self.dropout, self.levels
        )


def make_build(
    model: ModelConfig, lora: LoraConfig, train: TrainConfig, arch: Architecture, codes: ItemCodes, mesh: Mesh | None = None
) -> Build:
    """Puts the static parts together. Frozen weights are kept in the compute type, trained ones in float32.

    Raises: UserError for a method or a first stage that trains new token rows where the items have none.
    """
    if not codes.new_tokens and (train.method == "rows" or train.rows_first):
        setting, other = ("method: rows", "method: lora") if train.method == "rows" else ("rows_first", "rows_first: 0")
        raise UserError(
            f"train.{setting} trains new token rows, but these items have none; use an items.tokenizer that adds tokens, such as "
            f"atomic, or train.{other}"
        )
    dtype, _ = compute_dtype(model, platform_of(mesh))
    adapters = configured_spec(lora, arch) if train.method == "lora" else None
    frozen = jnp.dtype(jnp.float32) if train.method == "full" else dtype
    remat, _ = choose_remat(model, train, arch, adapters, dtype, mesh)
    quantise = None if model.quantise == "none" else model.quantise
    if quantise and (wrong := _unfit_for_quantising(model, lora, train)):
        raise UserError(f"model.quantise is {quantise}, but {wrong}")
    whole: tuple[str, ...] = ()
    if train.method == "embeddings":
        whole = TABLES[:1] if arch.tied else TABLES
    elif train.method == "lora":
        whole = saved_paths(modules_to_save(lora), arch)
    more = _more_rows(lora, arch, codes) if train.method == "lora" else ()
    rows = (*(int(i) for i in codes.new_token_ids), *more)
    levels = level_rows(codes) if train.normaliser == "level" else ()
    return Build(arch, adapters, rows, dtype, frozen, remat, quantise, whole, train.dropout, levels)


def level_rows(codes: ItemCodes) -> tuple[tuple[int, int], ...]:
    """(begin, end) among the new tokens of those that stand at each place of the items' codes.

    Raises: UserError where items have tokens of the base, are of different lengths, or use one token at two places.
    """
    at = np.searchsorted(codes.new_token_ids, codes.codes)
    inside = np.minimum(at, max(len(codes.new_token_ids) - 1, 0))
    if not codes.new_tokens or (codes.new_token_ids[inside] != codes.codes).any():
        raise UserError(
            "train.normaliser is level, but items are not of the same number of new tokens each; use items.tokenizer atomic or "
            "semantic ids of one length, or train.normaliser: full"
        )
    edges = [(int(place.min()), int(place.max()) + 1) for place in at.T]
    if any(end > begin for (_, end), (begin, _) in zip(edges, edges[1:], strict=False)):
        raise UserError("train.normaliser is level, but a token stands at two places of items; use train.normaliser: full")
    return tuple(edges)


def _more_rows(lora: LoraConfig, arch: Architecture, codes: ItemCodes) -> tuple[int, ...]:
    wanted = sorted(set(lora.trainable_token_indices) - set(codes.new_token_ids.tolist()))
    beyond = [i for i in wanted if not 0 <= i < arch.vocab_size]
    if beyond:
        raise UserError(f"lora.trainable_token_indices: {beyond[0]}; the base has tokens 0 to {arch.vocab_size - 1}")
    return tuple(wanted)


def _unfit_for_quantising(model: ModelConfig, lora: LoraConfig, train: TrainConfig) -> str | None:
    if train.method == "full":
        return "train.method: full trains the base; use lora, or model.quantise: none"
    if model.from_scratch:
        return "model.from_scratch leaves nothing to freeze; use model.quantise: none"
    if train.method == "lora" and lora.init == "pissa":
        return "lora.init: pissa changes the base; use lora.init: default"
    return None


def initial_rows(table: jax.Array, codes: ItemCodes, vectors: np.ndarray | None) -> np.ndarray:
    """First values of the new token rows [n_new, D]: the mean of each token's `init_tokens`, else of the table.

    Means are scaled to the table's median row norm: an average of several rows is shorter than a row, and a short
    row would start with a logit that no training example justifies. `vectors` [n_new, E] (mean squared length 1 times
    the wanted scale) are added through a fixed random rotation into the D dimensions, in units of that norm.
    """
    norms, mean = _row_norms(table)
    norm, fallback = float(np.median(to_host(norms))), to_host(mean)
    rows = np.empty((len(codes.init_tokens), table.shape[1]), np.float32)
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        some = codes.init_tokens[begin : begin + ROWS_AT_ONCE]
        used = np.unique(np.concatenate([np.zeros(0, np.int64), *(np.asarray(ids, np.int64) for ids in some)])).astype(np.int64)
        held = to_host(table[used].astype(jnp.float32))
        for at, ids in enumerate(some):
            rows[begin + at] = held[np.searchsorted(used, ids)].mean(0) if ids else fallback
    rows = rows * (norm / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))
    if vectors is not None:
        gauss = np.random.default_rng(0).standard_normal((table.shape[1], vectors.shape[1]))
        if vectors.shape[1] <= table.shape[1]:
            gauss = np.linalg.qr(gauss)[0]  # keeps inner products
        else:
            gauss /= np.sqrt(table.shape[1])  # keeps them on average
        rows = rows + norm * vectors @ gauss.T
    return rows.astype(np.float32)


@jax.jit
def _row_norms(table: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = table.astype(jnp.float32)
    return jnp.linalg.norm(wide, axis=1), wide.mean(0)


def load_decoder(
    build: Build,
    source: BaseSource,
    codes: ItemCodes,
    mesh: Mesh,
    seed: int,
    from_scratch: bool,
    vectors: np.ndarray | None = None,
    start: str | None = None,
) -> Decoder:
    """Builds the decoder and fills it, each array straight into its sharding.

    Adapters start at the identity. With `from_scratch` the base is random, drawn by `seed`. `vectors`: see `initial_rows`.
    `start`: folder of a PEFT adapter with whose weights, and rows of tokens of the same names, adapters begin.
    """
    abstract = nnx.eval_shape(lambda: build.decoder(jax.random.key(0), mesh))
    graphdef, abstract_state = nnx.split(abstract)
    names = {path_name(path): leaf for path, leaf in nnx.to_flat_state(abstract_state)}
    shardings = {name: sharding_for(name, leaf.get_value().shape, mesh) for name, leaf in names.items()}

    def initialise(key: jax.Array) -> dict[str, jax.Array]:
        return named_arrays(nnx.split(build.decoder(key))[1])

    base_names = [n for n, leaf in names.items() if not isinstance(leaf, LoRAParam | AdapterConstant | TokenRows)]
    wanted = list(names) if from_scratch else [n for n in names if n not in base_names]
    pick = jax.jit(lambda key: {n: initialise(key)[n] for n in wanted}, out_shardings={n: shardings[n] for n in wanted})
    arrays: dict[str, jax.Array] = pick(jax.random.key(seed)) if wanted else {}
    if not from_scratch:
        tensors = open_tensors(source.gguf or source.folder)
        arrays |= dict(base_arrays(tensors, build.arch, source.label, shardings, build.param_dtype, build.quantise, build.whole))
    for table in ("embed_tokens", "lm_head"):
        if (rows := f"{table}/rows") in names:
            weight = arrays[f"{table}/weight"]
            own = to_host(weight[np.asarray(build.row_ids[len(codes.new_tokens) :], np.int32)].astype(jnp.float32))
            value = np.concatenate([initial_rows(weight, codes, vectors), own]) if codes.new_tokens else own
            arrays[rows] = place(value, shardings[rows])
    if build.adapters is not None:
        given = read_adapter(start, build.adapters, build.arch, codes, build.row_ids, build.whole) if start else {}
        begun = begin_adapters(build.adapters, arrays, given, build.quantise)
        for name, value in begun.items():
            moved = jax.device_put if isinstance(value, jax.Array) else place
            arrays[name] = moved(value, shardings[name])
    return nnx.merge(graphdef, with_arrays(abstract_state, arrays))
