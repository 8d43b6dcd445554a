"""Ranked lists for many users: prompts decoded in batches, requests turned into arrays, states into items."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sftrec_jax.config import DecodeConfig
from sftrec_jax.decode.batches import Progress, run_batches
from sftrec_jax.decode.beam import AllTokens, free_search, recommend
from sftrec_jax.decode.choose import GROUP, Chooser
from sftrec_jax.decode.groups import CodeGroups
from sftrec_jax.decode.index import Room, build_index, leaf_of
from sftrec_jax.decode.prefix import Shared, shared_prefix
from sftrec_jax.decode.pruning import Allowed, Pruner
from sftrec_jax.decode.sampling import Diverse, Gumbel
from sftrec_jax.decode.score import log_probabilities
from sftrec_jax.decode.tree import CodeTree
from sftrec_jax.distributed import place, to_host
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.sharding import spec_of, ways

SHARE_FROM = 8
"""Prompts that begin with fewer tokens in common are not divided."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Ranked lists of U users."""

    items: np.ndarray
    """int32 [U, K] item indices, best first; -1 where the list is shorter."""
    scores: np.ndarray
    """float32 [U, K] log-probabilities of the items' tokens, normalised as asked for; -inf where there is no item."""

    @classmethod
    def empty(cls, users: int, k: int) -> "Ranking":
        """Lists without items."""
        return cls(np.full((users, k), -1, np.int32), np.full((users, k), -np.inf, np.float32))


class Recommender:
    """Constrained ranking with one decoder and one catalogue.

    Args:
        decoder: its parameters stay where they are.
        codes: tokens of every item. Items with equal codes stand together in a list, each with the score of the code; see
            `CodeGroups` for their order.
        config: beams, batch, layout and normaliser. With one token an item a list is exact whatever `beam` says.
        mesh: devices of the parameters; users of a batch are divided over all its axes but tensor where the batch divides.
        common: int32 [S] tokens with which prompts begin; where all of a call do, these are computed once for all.
        capacity: room for so many items, so that `swap` compiles nothing; None: no more than the catalogue takes.

    Raises: UserError for codes that the decoder has no rows for.
    """

    def __init__(
        self,
        decoder: Decoder,
        codes: ItemCodes,
        config: DecodeConfig,
        mesh: Mesh | None = None,
        common: np.ndarray | None = None,
        capacity: int | None = None,
    ):
        self.config, self.mesh = config, mesh
        self._common = np.zeros(0, np.int32) if common is None else common
        tree = CodeTree.of(codes.codes)
        if capacity is not None and capacity < tree.n_items:
            raise UserError(f"a capacity of {capacity:,} items is less than the {tree.n_items:,} of the catalogue; raise it")
        self._room = None if capacity is None else Room.for_items(tree, capacity)
        self._set(decoder, codes, tree)
        self.update(decoder)

    def swap(self, codes: ItemCodes) -> None:
        """Ranks another catalogue from now on. Raises UserError, and stays with the old one, where it does not fit."""
        if self._room is None:
            raise UserError("this Recommender has no room for other catalogues; make it with a capacity")
        tree = CodeTree.of(codes.codes, self._room.length)
        self._room.check(tree)
        self._set(nnx.merge(self._graphdef, self._state), codes, tree)

    def _set(self, decoder: Decoder, codes: ItemCodes, tree: CodeTree) -> None:
        _check_tokens(decoder, codes.codes, tree)
        index = build_index(tree, self.config.layout, self._room)
        self.codes, self.tree, self.groups = codes, tree, CodeGroups.of(tree, codes.titles)
        self.index = self._everywhere(index)
        tokens = jnp.asarray(_all_tokens(decoder), jnp.int32)
        self._space = self._everywhere(AllTokens((tokens,), tokens, tree.length, _terminator(tree)))

    def update(self, decoder: Decoder) -> None:
        """Decodes with these parameters from now on; nothing is compiled again for a decoder of the same build."""
        self._context = decoder.arch.context
        tokens = _all_tokens(decoder)
        self._known = np.zeros(tokens.max() + 2, bool)  # the last entry: tokens beyond
        self._known[tokens[tokens >= 0]] = True
        self._graphdef, self._state = nnx.split(decoder)
        self._shared: Shared | None = None

    def rank(
        self,
        prompts: Sequence[np.ndarray],
        exclude: Sequence[np.ndarray] | None,
        k: int,
        progress: Progress | None = None,
        allowed: Allowed | None = None,
    ) -> Ranking:
        """The `k` best items after each prompt, as if the catalogue had no others than those that the request leaves.

        Args:
            prompts: U arrays int32 of token ids, at least one token each.
            exclude: U arrays of item indices that must not be returned (seen items, a deny-list), or None.
            k: length of the lists.
            allowed: items that may be returned, for all users or by the user.

        Raises: UserError for k beyond the catalogue or the beam, an empty prompt, one over the context, an allow-list without
            items, or NaN scores.
        """
        masked, plain = self._rank(prompts, exclude, k, progress, allowed)
        return plain if masked is None else masked

    def rank_both(
        self, prompts: Sequence[np.ndarray], seen: Sequence[np.ndarray], k: int, progress: Progress | None = None
    ) -> tuple[Ranking, Ranking]:
        """Rankings (without seen items, with them) from one pass over the prompts; see `rank`."""
        masked, plain = self._rank(prompts, seen, k, progress, None, both=True)
        assert masked is not None
        return masked, plain

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        exclude: Sequence[np.ndarray] | None,
        k: int,
        seed: int,
        progress: Progress | None = None,
        allowed: Allowed | None = None,
    ) -> Ranking:
        """`k` distinct items drawn from the model after each prompt, in the order of drawing; see `Gumbel`.

        Scores are those of `rank`. A user's draws depend on `seed` and the user's place in `prompts` alone (and, with a
        capacity, on the room that it makes). `k` may exceed decode.beam.
        """
        keys = jax.random.split(jax.random.key(seed), max(1, len(prompts)))

        def chooser(rows: np.ndarray, size: int) -> Chooser:
            return Gumbel(keys[np.pad(rows, (0, size - len(rows)))])

        # Draws need no wider beam than there are draws. With room the number is that of every catalogue, see `_rank`.
        beam = min(k, self.tree.n_leaves) if self._room is None else k
        masked, plain = self._rank(prompts, exclude, k, progress, allowed, chooser, beam=beam)
        return plain if masked is None else masked

    def diverse(
        self,
        prompts: Sequence[np.ndarray],
        exclude: Sequence[np.ndarray] | None,
        k: int,
        groups: int,
        penalty: float,
        progress: Progress | None = None,
        allowed: Allowed | None = None,
    ) -> Ranking:
        """The best `k` distinct items of `groups` groups of beams that avoid each other's tokens; see `Diverse`.

        Each group gives its share of k, rounded up; lists are short where groups run out of items. Groups differ where items
        share first tokens: with one token an item the list is that of `rank`.
        """
        if not 1 <= groups <= self._beam(k):
            raise UserError(f"{groups} groups share {self._beam(k)} beams; use a number from 1 to {self._beam(k)}")
        if not 0 <= penalty < float("inf"):
            raise UserError(f"the penalty is {penalty}; use a log-probability of 0 or more")
        chooser = Diverse(jnp.float32(penalty), groups)
        masked, plain = self._rank(prompts, exclude, k, progress, allowed, lambda rows, size: chooser, wide=groups)
        return plain if masked is None else masked

    def log_probabilities(self, prompts: Sequence[np.ndarray], items: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """float32 [U, K] log-probability (`full`) of `items` int32 [U, K] after each prompt; -inf for item -1."""
        self.check(prompts)
        items = np.asarray(items)
        if items.ndim != 2 or len(items) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but items are {list(items.shape)}")
        if items.size and not -1 <= items.min() <= items.max() < self.tree.n_items:
            raise ValueError(f"items are {items.min()} to {items.max()}, the catalogue has 0 to {self.tree.n_items - 1}")
        out = np.full(items.shape, -np.inf, np.float32)
        codes = np.where(items[..., None] >= 0, self.codes.codes[:, : self.index.length][items], -1).astype(np.int32)

        def dispatch(rows: np.ndarray, search: tuple[Any, ...], size: int) -> Any:
            some = np.full((size, *codes.shape[1:]), -1, np.int32)
            some[: len(rows)] = codes[rows]
            return log_probabilities(*search, self._place(some))

        def store(rows: np.ndarray, found: Any) -> None:
            out[rows] = to_host(found)[: len(rows)]

        self._batches(prompts, (), dispatch, store, progress)
        return out

    def generate(self, prompts: Sequence[np.ndarray], k: int, progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The `k` best sequences that the model writes with no catalogue to hold it.

        A sequence ends at the token that ends all codes (and stands nowhere else in them), else at L tokens.

        Returns: int32 [U, K, L] token ids, -1 after the end; float32 [U, K] log-probabilities, -inf where there is none.
        """
        self.check_k(k, int((np.asarray(self._space.every) >= 0).sum()), "the vocabulary", k)
        return self._free(prompts, self._space, k, self._beam(k), progress)

    def write(self, prompts: Sequence[np.ndarray], most: int, end: int, progress: Progress | None = None) -> np.ndarray:
        """int32 [U, most] words that the model writes after each prompt, the likeliest token each time, -1 after token `end`.

        Tokens that were added to name items are none of them.
        """
        known = np.asarray(self._space.every)
        words = jnp.asarray(known[~np.isin(known, self.codes.new_token_ids)], jnp.int32)
        return self._free(prompts, self._everywhere(AllTokens((words,), words, most, end)), 1, 1, progress)[0][:, 0]

    def _free(
        self, prompts: Sequence[np.ndarray], space: AllTokens, k: int, beam: int, progress: Progress | None
    ) -> tuple[np.ndarray, np.ndarray]:
        self.check(prompts, space.length)
        tokens = np.full((len(prompts), k, space.length), -1, np.int32)
        scores = np.full((len(prompts), k), -np.inf, np.float32)

        def dispatch(rows: np.ndarray, search: tuple[Any, ...], size: int) -> Any:
            return free_search(*search, k=k, beam=beam)

        def store(rows: np.ndarray, found: Any) -> None:
            tokens[rows], scores[rows] = (to_host(x)[: len(rows)] for x in found)

        self._batches(prompts, (space,), dispatch, store, progress)
        return tokens, scores

    def invalid_rate(self, prompts: Sequence[np.ndarray], k: int, progress: Progress | None = None) -> float:
        """Share of the `k` best unconstrained sequences of each prompt that are no item; NaN without prompts."""
        tokens, scores = self.generate(prompts, k, progress)
        real = {row.tobytes() for row in self.tree.rows}
        written = tokens[scores > -np.inf]
        return float(np.mean([row.tobytes() not in real for row in written])) if len(written) else float("nan")

    def search(
        self,
        prompts: Sequence[np.ndarray],
        pruner: Pruner,
        k: int,
        beam: int,
        size: int,
        chooser: Callable[[np.ndarray, int], Chooser] | None,
        store: Callable[[np.ndarray, Any], None],
        progress: Progress | None = None,
        both: bool = False,
    ) -> None:
        """Runs `recommend` over batches of at most `size` users; `store` gets rows and its result, as arrays on the host."""

        def dispatch(rows: np.ndarray, search: tuple[Any, ...], size: int) -> Any:
            pruned = pruner.batch(rows, size)
            if pruned is not None:
                live = None if pruned.live is None else self._everywhere(tuple(jnp.asarray(bits) for bits in pruned.live))
                parts = (None if x is None else self._place(x) for x in (pruned.mask, pruned.dead))
                pruned = type(pruned)(live, *parts)
            how = None if chooser is None else chooser(rows, size)
            found = recommend(*search, pruned, how, k=k, beam=beam, both=both, normaliser=self.config.normaliser)
            return found if chooser is None or not isinstance(how, Gumbel | Diverse) else (*found[:2], None)

        self._batches(
            prompts, (self.index,), dispatch, lambda rows, found: store(rows, jax.tree.map(to_host, found)), progress, size
        )

    def _rank(
        self,
        prompts: Sequence[np.ndarray],
        exclude: Sequence[np.ndarray] | None,
        k: int,
        progress: Progress | None,
        allowed: Allowed | None,
        chooser: Callable[[np.ndarray, int], Chooser] | None = None,
        both: bool = False,
        wide: int = 1,
        beam: int | None = None,
    ) -> tuple[Ranking | None, Ranking]:
        # Codes are searched, and k of them are enough: each that is not pruned has an item to return.
        searched = min(k, self.tree.n_leaves)
        self.check(prompts)
        self.check_k(k, self.tree.n_items, "the catalogue", searched if beam is None else 0)
        if exclude is not None and len(exclude) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(exclude)} lists of items to exclude")
        pruner = Pruner(self.tree, self.index, self.groups, len(prompts), exclude, allowed)
        if self._room is not None:  # the same number for every catalogue, or fewer codes than k would compile anew
            searched = min(k, self._beam(k) if beam is None else beam)
        # `wide` groups of beams share k, so each needs its part, rounded up.
        searched = -(-searched // wide) * wide
        beam = max(self._beam(searched) if beam is None else beam, searched)
        masked, plain = (Ranking.empty(len(prompts), k) for _ in range(2))

        def store(rows: np.ndarray, found: Any) -> None:
            for into, part in ((masked, found[0]), (plain, found[1])):
                if part is not None:
                    self.items(into, rows, part, pruner if into is masked else None)

        self.search(prompts, pruner, searched, beam, self.config.batch_users, chooser, store, progress, both)
        left_out = exclude is not None or allowed is not None
        return masked if left_out else None, plain

    def items(self, into: Ranking, rows: np.ndarray, found: Any, pruner: Pruner | None) -> None:
        """Writes the lists of `rows` from states and scores [at least len(rows), K], of which the first are theirs."""
        states, scores = (np.asarray(x)[: len(rows)] for x in found)
        if np.isnan(scores).any():
            raise UserError("the model's scores are NaN: its weights are broken; use an earlier checkpoint")
        leaves, k = leaf_of(self.tree, self.index, states), into.items.shape[1]
        if scores.shape[1] == k and not self.groups.shared:
            items = self.groups.members[leaves]
            into.items[rows], into.scores[rows] = np.where(scores > -np.inf, items, -1), scores
            return
        for at, row in enumerate(rows.tolist()):
            left_out = None if pruner is None or pruner.exclude is None else pruner.exclude[row]
            mine = leaves[at], scores[at]
            allowed = None if pruner is None else pruner.allowed(row)
            into.items[row], into.scores[row] = self.groups.expand(*mine, left_out, k, allowed)

    def _beam(self, k: int) -> int:
        return k if self.index.length == 1 else self.config.beam

    def check_k(self, k: int, most: int, of_what: str, searched: int) -> None:
        """Raises UserError for lists of `k` of `most` items, which a search for `searched` codes cannot give."""
        if not 1 <= k <= most:
            raise UserError(f"{k} items a user were asked for but {of_what} has {most}; use a number from 1 to {most}")
        if searched > self._beam(searched):
            raise UserError(f"{k} items a user were asked for but decode.beam is {self.config.beam}; raise decode.beam")

    def check(self, prompts: Sequence[np.ndarray], answer: int | None = None) -> None:
        """Raises UserError for an empty prompt, one that the context cannot hold, or tokens that the model does not have.

        `answer`: tokens after each prompt; None: those of an item.
        """
        room = self._context - (self.index.length if answer is None else answer)
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {row} is empty; a user without history needs prompt.format: instruct or a BOS token")
            if len(prompt) > room:
                raise UserError(
                    f"prompt {row} has {len(prompt)} tokens and the answer {self._context - room}, "
                    f"but the model's context is {self._context}; lower prompt.max_history"
                )
        tokens = np.concatenate([np.zeros(0, np.int64), *prompts]).astype(np.int64)
        foreign = ~self._known[np.clip(tokens, -1, len(self._known) - 1)] | (tokens < 0)
        if foreign.any():
            at = int(np.argmax(foreign))
            row = int(np.searchsorted(np.cumsum([len(p) for p in prompts]), at, side="right"))
            raise UserError(f"prompt {row} has the token {tokens[at]}, which the model does not have; use its own tokenizer")

    def _batches(
        self,
        prompts: Sequence[np.ndarray],
        space: tuple[Any, ...],
        dispatch: Callable[[np.ndarray, tuple[Any, ...], int], Any],
        store: Callable[[np.ndarray, Any], None],
        progress: Progress | None,
        size: int | None = None,
    ) -> None:
        """`run_batches`, with what the prompts have in common taken off and the first arguments of all searches made up."""
        begin, shared = len(self._common), None
        if begin >= SHARE_FROM and all(len(p) > begin and (p[:begin] == self._common).all() for p in prompts):
            if self._shared is None:
                tokens = self._everywhere(jnp.asarray(self._common))
                self._shared = _run_shared(self._graphdef, self._state, tokens)
            shared, prompts = self._shared, [p[begin:] for p in prompts]

        def run(rows: np.ndarray, padded: np.ndarray, lengths: np.ndarray) -> Any:
            parts = (self._graphdef, self._state, *space, self._place(padded), self._place(lengths), shared)
            return dispatch(rows, parts, len(padded))

        run_batches(prompts, self.config.batch_users if size is None else size, run, store, progress)

    def _place(self, values: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return jnp.asarray(values)
        divides = len(values) % ways(self.mesh, "users") == 0
        return place(values, NamedSharding(self.mesh, spec_of("users") if divides else PartitionSpec()))

    def _everywhere(self, values: Any) -> Any:
        return values if self.mesh is None else place(values, NamedSharding(self.mesh, PartitionSpec()))


@jax.jit(static_argnames="graphdef")
def _run_shared(graphdef: Any, state: Any, tokens: jax.Array) -> Shared:
    return shared_prefix(nnx.merge(graphdef, state), tokens)


def _check_tokens(decoder: Decoder, codes: np.ndarray, tree: CodeTree) -> None:
    used = np.unique(np.concatenate(tree.tokens))
    known = (used < decoder.arch.vocab_size) | np.isin(used, np.asarray(decoder.head.row_ids, np.int64))
    if not known.all():
        item, position = (int(x) for x in np.argwhere(np.isin(codes, used[~known]))[0])
        raise UserError(
            f"item {item}: its token {codes[item, position]} is not in the model's vocabulary of {decoder.arch.vocab_size} "
            f"and {len(decoder.head.row_ids)} new tokens; prepare the items with this model's tokenizer"
        )


def _all_tokens(decoder: Decoder) -> np.ndarray:
    tokens = np.union1d(np.arange(decoder.head.vocab_size), np.asarray(decoder.head.row_ids, np.int64))
    return np.pad(tokens, (0, -len(tokens) % GROUP), constant_values=-1)  # whole groups, see `top_places`


def _terminator(tree: CodeTree) -> int:
    """The token that ends every code and stands nowhere else in any, or -1."""
    rows = tree.rows
    lengths = (rows >= 0).sum(1)
    last = rows[np.arange(len(rows)), lengths - 1]
    common = int(last[0])
    return common if (last == common).all() and (rows == common).sum() == len(rows) else -1
