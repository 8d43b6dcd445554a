"""Ranked lists for many users: prompts sorted into few lengths, decoded in batches, put back in order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sftrec_jax.config import DecodeConfig
from sftrec_jax.decode.beam import AllTokens, free_search, recommend
from sftrec_jax.decode.groups import CodeGroups
from sftrec_jax.decode.index import CatalogueIndex, build_index
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.sharding import BATCH

FEW_BATCHES = 3
"""A prompt length with fewer batches joins the next longer one: padding them costs less than compiling for them."""

Progress = Callable[[int], None]
"""Called with the number of users just finished."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Ranked lists of U users."""

    items: np.ndarray
    """int32 [U, K] item indices, best first; -1 where the list is shorter."""
    scores: np.ndarray
    """float32 [U, K] log-probabilities of the items' tokens; -inf where there is no item."""


class Recommender:
    """Constrained ranking with one decoder and one catalogue.

    Args:
        decoder: its parameters stay where they are.
        codes: tokens of every item. Items with equal codes stand together in a list, each with the score of the code; see
            `CodeGroups` for their order.
        config: beams, batch and layout. With one token an item a list is exact whatever `beam` says.
        mesh: devices of the parameters; users of a batch are divided over its axes data and fsdp where the batch divides.

    Raises: UserError for codes that the decoder has no rows for.
    """

    def __init__(self, decoder: Decoder, codes: ItemCodes, config: DecodeConfig, mesh: Mesh | None = None):
        self.codes, self.config, self.mesh = codes, config, mesh
        _check_tokens(decoder, codes.codes)
        self.groups = CodeGroups.of(codes)
        self.index: CatalogueIndex = build_index(self.groups.codes, config.layout)
        self._space = AllTokens(_column_tokens(decoder), self.index.length, _terminator(codes.codes))
        if mesh is not None:
            self.index, self._space = jax.device_put((self.index, self._space), NamedSharding(mesh, PartitionSpec()))
        self.update(decoder)

    def update(self, decoder: Decoder) -> None:
        """Decodes with these parameters from now on; nothing is compiled again for a decoder of the same build."""
        self._context = decoder.arch.context
        self._graphdef, self._state = nnx.split(decoder)

    def rank(
        self,
        prompts: Sequence[np.ndarray],
        exclude: Sequence[np.ndarray] | None,
        k: int,
        progress: Progress | None = None,
    ) -> Ranking:
        """The `k` best items after each prompt.

        Args:
            prompts: U arrays int32 of token ids, at least one token each.
            exclude: U arrays of item indices that must not be returned (seen items), or None.
            k: length of the lists.

        Raises: UserError for k beyond the catalogue or the beam, an empty prompt, one over the context, or NaN scores.
        """
        return self._rank(prompts, exclude, k, False, progress)[0 if exclude is not None else 1]

    def rank_both(
        self, prompts: Sequence[np.ndarray], seen: Sequence[np.ndarray], k: int, progress: Progress | None = None
    ) -> tuple[Ranking, Ranking]:
        """Rankings (without seen items, with them) from one pass over the prompts; see `rank`."""
        return self._rank(prompts, seen, k, True, progress)

    def generate(self, prompts: Sequence[np.ndarray], k: int, progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The `k` best sequences that the model writes with no catalogue to hold it.

        A sequence ends at the token that ends all codes (and stands nowhere else in them), else at L tokens.

        Returns: int32 [U, K, L] token ids, -1 after the end; float32 [U, K] log-probabilities, -inf where there is none.
        """
        self._check(prompts, k, self._space.tokens.shape[0], "the vocabulary", k)
        tokens = np.full((len(prompts), k, self.index.length), -1, np.int32)
        scores = np.full((len(prompts), k), -np.inf, np.float32)

        def dispatch(rows: np.ndarray, padded: jax.Array, lengths: jax.Array) -> Any:
            return free_search(self._graphdef, self._state, self._space, padded, lengths, k=k, beam=self._beam(k))

        def store(rows: np.ndarray, found: Any) -> None:
            tokens[rows], scores[rows] = (np.asarray(x)[: len(rows)] for x in found)

        self._batches(prompts, dispatch, store, progress)
        return tokens, scores

    def invalid_rate(self, prompts: Sequence[np.ndarray], k: int, progress: Progress | None = None) -> float:
        """Share of the `k` best unconstrained sequences of each prompt that are no item; NaN without prompts."""
        tokens, scores = self.generate(prompts, k, progress)
        codes = np.ascontiguousarray(self.codes.codes[:, : self.index.length])
        real = {row.tobytes() for row in codes}
        written = tokens[scores > -np.inf]
        return float(np.mean([row.tobytes() not in real for row in written])) if len(written) else float("nan")

    def _beam(self, k: int) -> int:
        return k if self.index.length == 1 else self.config.beam

    def _check(self, prompts: Sequence[np.ndarray], k: int, most: int, of_what: str, searched: int) -> None:
        if not 1 <= k <= most:
            raise UserError(f"{k} items a user were asked for but {of_what} has {most}; use a number from 1 to {most}")
        if searched > self._beam(searched):
            raise UserError(f"{k} items a user were asked for but decode.beam is {self.config.beam}; raise decode.beam")
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {row} is empty; a user without history needs prompt.format: instruct or a BOS token")
            if len(prompt) + self.index.length > self._context:
                raise UserError(
                    f"prompt {row} has {len(prompt)} tokens and the answer {self.index.length}, "
                    f"but the model's context is {self._context}; lower prompt.max_history"
                )

    def _rank(
        self, prompts: Sequence[np.ndarray], exclude: Sequence[np.ndarray] | None, k: int, both: bool, progress: Progress | None
    ) -> tuple[Ranking, Ranking]:
        groups = self.groups
        # Codes are searched, and k of them are enough: each that is not blocked has an item to return.
        shared, searched = groups.shared > 0, min(k, self.index.n_items)
        self._check(prompts, k, len(groups.group), "the catalogue", searched)
        if exclude is not None and len(exclude) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(exclude)} lists of items to exclude")
        blocked = [groups.excluded(items) for items in exclude] if shared and exclude is not None else exclude
        shape = (len(prompts), k)
        results = tuple(Ranking(np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)) for _ in range(2))
        # One width for the whole call, so that it adds no compilation.
        most = _ladder(max(map(len, blocked), default=0)) if blocked is not None else 0

        def dispatch(rows: np.ndarray, padded: jax.Array, lengths: jax.Array) -> Any:
            left_out = None
            if blocked is not None:
                left_out = np.full((padded.shape[0], most), -1, np.int32)
                for at, row in enumerate(rows):
                    left_out[at, : len(blocked[row])] = blocked[row]
                left_out = self._place(left_out)
            search = (self._graphdef, self._state, self.index, padded, lengths, left_out)
            return recommend(*search, k=searched, beam=self._beam(searched), both=both)

        def store(rows: np.ndarray, found: Any) -> None:
            for result, part, masked in zip(results, found, (True, False), strict=True):
                if part is None:
                    continue
                items, scores = np.asarray(part.items)[: len(rows)], np.asarray(part.scores)[: len(rows)]
                if np.isnan(scores).any():
                    raise UserError("the model's scores are NaN: its weights are broken; use an earlier checkpoint")
                if not shared:
                    result.items[rows], result.scores[rows] = items, scores
                    continue
                for at, row in enumerate(rows):
                    left_out = exclude[row] if masked and exclude is not None else None
                    result.items[row], result.scores[row] = groups.expand(items[at], scores[at], left_out, k)

        self._batches(prompts, dispatch, store, progress)
        return results[0], results[1]

    def _batches(
        self,
        prompts: Sequence[np.ndarray],
        dispatch: Callable[[np.ndarray, jax.Array, jax.Array], Any],
        store: Callable[[np.ndarray, Any], None],
        progress: Progress | None,
    ) -> None:
        """Runs `dispatch` on every batch; the next one is launched before the results of the last are waited for."""
        size = min(self.config.batch_users, 1 << max(0, len(prompts) - 1).bit_length())
        waiting: tuple[np.ndarray, Any] | None = None

        def finish() -> None:
            if waiting is not None:
                store(*waiting)
                if progress is not None:
                    progress(len(waiting[0]))

        for rows, width in plan_batches(np.asarray([len(p) for p in prompts], np.int64), size):
            # Rows that fill the last batch up are a prompt of one token.
            padded, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
            for at, row in enumerate(rows):
                padded[at, : len(prompts[row])] = prompts[row]
                lengths[at] = len(prompts[row])
            launched = (rows, dispatch(rows, self._place(padded), self._place(lengths)))
            finish()
            waiting = launched
        finish()

    def _place(self, values: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return jnp.asarray(values)
        divides = len(values) % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]) == 0
        return jax.device_put(values, NamedSharding(self.mesh, BATCH if divides else PartitionSpec()))


def plan_batches(lengths: np.ndarray, size: int) -> list[tuple[np.ndarray, int]]:
    """Batches of at most `size` prompts, longest first, each with the width that it is padded to.

    Widths are 16, 32, 48, 64, 96, 128, 192, ... or the longest prompt rounded up to 16; few of them are in use, since
    each is compiled.

    Args:
        lengths: int64 [U] tokens of each prompt.

    Returns: (rows int64 [at most size], width) per batch. The longest come first, so that want of memory shows at once.
    """
    if not len(lengths):
        return []
    order = np.argsort(-lengths, kind="stable")
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    longest = -(-int(lengths.max()) // 16) * 16
    wanted = [min(_ladder(int(lengths[g[0]])), longest) for g in groups]
    batches: list[tuple[np.ndarray, int]] = []
    width, used = longest, 0
    for at, group in enumerate(groups):
        narrower = wanted[at] < width
        if narrower and used >= FEW_BATCHES and wanted.count(wanted[at]) >= FEW_BATCHES:
            width, used = wanted[at], 0
        used += 1
        batches.append((group, width))
    return batches


def _ladder(n: int) -> int:
    """The least of 16, 32, 48, 64, 96, 128, 192, ... (powers of two and half-way steps) that is at least n."""
    step = 16
    while step < n:
        if step >= 32 and step * 3 // 2 >= n:
            return step * 3 // 2
        step *= 2
    return step


def _check_tokens(decoder: Decoder, codes: np.ndarray) -> None:
    exists = np.union1d(np.arange(decoder.arch.vocab_size), np.asarray(decoder.head.row_ids, np.int64))
    missing = (codes >= 0) & ~np.isin(codes, exists)
    if missing.any():
        item, position = (int(x) for x in np.argwhere(missing)[0])
        raise UserError(
            f"item {item}: its token {codes[item, position]} is not in the model's vocabulary of {decoder.arch.vocab_size} "
            f"and {len(decoder.head.row_ids)} new tokens; prepare the items with this model's tokenizer"
        )


def _column_tokens(decoder: Decoder) -> jax.Array:
    own = jnp.arange(decoder.head.vocab_size, dtype=jnp.int32)
    return jnp.concatenate([own, jnp.asarray(decoder.head.row_ids, jnp.int32)])


def _terminator(codes: np.ndarray) -> int:
    """The token that ends every code and stands nowhere else in any, or -1."""
    lengths = (codes >= 0).sum(1)
    last = codes[np.arange(len(codes)), lengths - 1]
    common = int(last[0])
    return common if (last == common).all() and (codes == common).sum() == len(codes) else -1
