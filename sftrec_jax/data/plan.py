"""Which examples share a row, for millions of examples.

The plan is a pure function of (lengths, targets, seed, epoch): any row of any epoch is known without an iterator, so
resuming is exact.
"""

from dataclasses import dataclass

import numpy as np

from sftrec_jax.errors import UserError

CLASSES = 1 << 15
"""Most distinct (tokens, targets) that rows are filled from; beyond it sizes are rounded up."""

ENOUGH = 1.005
"""A plan with no more rows than this multiple of the lower bound is taken without trying another; of those tried the first that
has no more than this multiple of the fewest."""

PIECES = 1 << 15
"""Pieces that best fit places one by one; beyond it a piece stands for several examples of one size."""

JITTER = 0.1
"""Share of its size by which a class may move up the order in which rows are filled. Without it data in which every example
has another size would have the same rows in every epoch."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows of one epoch, one behind the other."""

    order: np.ndarray
    """int32 [n] (int64 from 2**31 examples on), every example index once, row by row."""
    starts: np.ndarray
    """int64 [rows + 1], where each row begins in `order`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """The example indices of one row: a view."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a plan of {len(self)} rows")
        return self.order[self.starts[row] : self.starts[row + 1]]


@dataclass(frozen=True, eq=False)
class _Sizes:
    """The distinct sizes, as int64 [C], and how many examples have each."""

    length: np.ndarray
    target: np.ndarray
    count: np.ndarray


@dataclass(frozen=True, eq=False)
class _Filling:
    """Row patterns as int64 arrays: `times[p]` rows each hold `copies[e]` examples of class `member[e]`, for the entries e with
    `pattern[e]` = p. Entries are sorted by pattern."""

    times: np.ndarray
    pattern: np.ndarray
    member: np.ndarray
    copies: np.ndarray

    @property
    def rows(self) -> int:
        return int(self.times.sum())


def plan_epoch(lengths: np.ndarray, targets: np.ndarray, row_length: int, targets_per_row: int, seed: int, epoch: int) -> Plan:
    """Puts every example of an epoch into exactly one row.

    Rows are filled by size, not by example, as in histogram packing (Krell et al. 2021, arXiv 2107.02027): a row takes the
    largest size that still fits, again and again, and the pattern found so is repeated for as long as there are examples of
    its sizes. That is first fit decreasing under two capacities, in a number of steps that grows with the distinct sizes
    alone. Where it leaves rows unfilled, other rules are tried. Then examples of the same size are drawn at random, and rows
    are shuffled. All of it depends on (seed, epoch) alone.

    Args:
        lengths: int [n] tokens of each example, at least 1.
        targets: int [n] targets of each example, at least 0.
        row_length: tokens in a row (T).
        targets_per_row: targets in a row (K).
        seed: of the run.
        epoch: from 0.

    Raises: UserError where one example exceeds a row; ValueError for sizes out of range.
    """
    lengths, targets = np.asarray(lengths), np.asarray(targets)
    if lengths.ndim != 1 or lengths.shape != targets.shape:
        raise ValueError(f"lengths {lengths.shape} and targets {targets.shape} must be two arrays [n]")
    if lengths.size == 0:
        return Plan(np.zeros(0, np.int32), np.zeros(1, np.int64))
    if lengths.max() > row_length:
        raise UserError(
            f"the longest of {lengths.size} examples has {lengths.max()} tokens but a row has {row_length}; "
            f"raise train.row_length to {lengths.max()} or more, or lower prompt.max_history"
        )
    if targets.max() > targets_per_row:
        raise UserError(
            f"an example has {targets.max()} targets but a row has room for {targets_per_row}; raise the targets of a row"
        )
    if lengths.min() < 1 or targets.min() < 0:
        raise ValueError(f"an example has {lengths.min()} tokens or {targets.min()} targets; at least 1 and 0 are expected")
    sizes, size_of = _sizes(lengths, targets, row_length, targets_per_row)
    # Raw bits of a counter-based generator: their stream is fixed, unlike that of numpy's permutation.
    source = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    filling = _best_filling(sizes, row_length, targets_per_row, source)
    # The size in the upper 16 bits, random ones below: one sort groups by size and shuffles within.
    key = source.random_raw(lengths.size)
    key >>= np.uint64(16)
    key |= size_of.astype(np.uint64) << np.uint64(48)
    index = np.int32 if lengths.size < 2**31 else np.int64
    shuffled = np.argsort(key, kind="stable").astype(index)
    del key, size_of
    return _hand_out(filling, shuffled, np.argsort(source.random_raw(filling.rows), kind="stable"))


def _sizes(lengths: np.ndarray, targets: np.ndarray, row_length: int, targets_per_row: int) -> tuple[_Sizes, np.ndarray]:
    # Also returns the class of each example, uint16 [n].
    width = targets_per_row + 1
    key = lengths.astype(np.int64)
    key *= width
    key += targets
    distinct, inverse, count = np.unique(key, return_inverse=True, return_counts=True)
    length, target = distinct // width, distinct % width
    if (target * row_length <= targets_per_row * length).all():
        target = np.zeros_like(target)  # whatever fits by tokens fits by targets
    values, capacities = (length, target), (row_length, targets_per_row)

    def rounded(unit: tuple[int, int]) -> list[np.ndarray]:
        return [np.minimum(-(-v // u) * u, c) for v, u, c in zip(values, unit, capacities, strict=True)]

    def rise(unit: tuple[int, int]) -> float:
        # A smooth maximum of the rows that tokens and targets ask for: what does not bind is rounded first, until it would.
        return sum((float(v @ count) / max(c, 1)) ** 4 for v, c in zip(rounded(unit), capacities, strict=True))

    unit = (1, 1)
    while True:
        up = rounded(unit)
        merged, joined = np.unique(up[0] * width + up[1], return_inverse=True)
        if len(merged) <= CLASSES:
            break
        coarser = ((2 * unit[0], unit[1]), (unit[0], 2 * unit[1]))
        unit = min((c for c, v, u in zip(coarser, values, unit, strict=True) if u < v.max()), key=rise)
    counts = np.bincount(joined, weights=count).astype(np.int64)
    return _Sizes(merged // width, merged % width, counts), joined.astype(np.uint16)[inverse]


def _best_filling(sizes: _Sizes, row_length: int, targets_per_row: int, source: np.random.Philox) -> _Filling:
    # No rule is best everywhere. Rows of balanced filling and of best fit over those of first fit decreasing, 20,000 examples of
    # 1..59 tokens: 0.95 and 0.95 where 1..11 targets are drawn apart from tokens (T = 512, K = 150); where the shortest have the
    # most targets 0.97 and 0.93 (T = 100, K = 40), 0.98 and 1.02 (T = 100, K = 16, the last rule for balanced). Rules whose rows
    # differ from epoch to epoch come first.
    need = sizes.length / row_length + sizes.target / max(targets_per_row, 1)
    lift = 1 + JITTER * (source.random_raw(len(need)) >> np.uint64(11)) * 2.0**-53
    used = [int((v * sizes.count).sum()) for v in (sizes.length, sizes.target)]
    bound = max(used[0] / row_length, used[1] / max(targets_per_row, 1))
    rules = [
        lambda: _fill(sizes, need * lift, row_length, targets_per_row, False),
        lambda: _fill(sizes, need * lift, row_length, targets_per_row, True),
        lambda: _best_fit(sizes, row_length, targets_per_row, source),
        lambda: _fill(sizes, need, row_length, targets_per_row, False),
        lambda: _fill(sizes, need, row_length, targets_per_row, True),
    ]
    tried: list[_Filling] = []
    for rule in (0, 1, 2, 3, 4) if used[1] else (0, 2, 3):
        tried.append(rules[rule]())
        if tried[-1].rows <= ENOUGH * bound:
            return tried[-1]
    fewest = min(f.rows for f in tried)
    return next(f for f in tried if f.rows <= ENOUGH * fewest)


def _fill(sizes: _Sizes, need: np.ndarray, row_length: int, targets_per_row: int, balanced: bool) -> _Filling:
    # Bit i of a Python integer stands for the i-th smallest class, so that the largest of a set is its top bit, found at once;
    # an intersection of sets of 32,768 takes 0.2 microseconds.
    rank = np.argsort(need, kind="stable")
    length, target = sizes.length[rank], sizes.target[rank]
    fits_length = _at_most(length, row_length)
    fits_target = _at_most(target, targets_per_row)
    total = [int((v * sizes.count).sum()) for v in (sizes.length, sizes.target)]
    # Positive: more tokens for its targets than the average example.
    excess = length * total[1] - target * total[0]
    sides = (_bits(excess >= 0), _bits(excess < 0))
    lean = excess.tolist()
    count = sizes.count[rank].tolist()
    lengths, targets = length.tolist(), target.tolist()
    alive = (1 << len(count)) - 1
    times, pattern, member, copies = [], [], [], []
    while alive:
        tokens, free, tilt = row_length, targets_per_row, 0
        open_to = alive
        taken: dict[int, int] = {}
        while open_to:
            # A balanced row makes up for the excess of what it has, so that what is left for later rows stays balanced as well
            # (cf. Leinberger et al. 1999, multi-capacity bin packing).
            if balanced and taken:
                i = ((open_to & sides[tilt > 0]) or open_to).bit_length() - 1
            else:
                i = open_to.bit_length() - 1
            size, labels = lengths[i], targets[i]
            left = count[i] - taken.get(i, 0)
            if balanced:
                k = 1
                tilt += lean[i]
            else:
                k = min(left, tokens // size)
                if labels:
                    k = min(k, free // labels)
            taken[i] = taken.get(i, 0) + k
            tokens -= k * size
            free -= k * labels
            if k == left:
                open_to ^= 1 << i
            open_to &= fits_length[tokens] & fits_target[free]
        repeated = min(count[i] // k for i, k in taken.items())
        for i, k in taken.items():
            pattern.append(len(times))
            member.append(i)
            copies.append(k)
            count[i] -= k * repeated
            if not count[i]:
                alive ^= 1 << i
        times.append(repeated)
    return _Filling(np.asarray(times), np.asarray(pattern), rank[member], np.asarray(copies))


def _best_fit(sizes: _Sizes, row_length: int, targets_per_row: int, source: np.random.Philox) -> _Filling:
    # Pieces of up to `each` examples of one size come in random order and go, an example a row, into the fullest rows (by tokens)
    # that hold them. A node stands for `rows[node]` rows that hold examples of member[node] and of all nodes above it.
    each = -(-int(sizes.count.sum()) // PIECES)
    pieces = -(-sizes.count // each)
    piece_class = np.repeat(np.arange(len(pieces)), pieces)
    piece_size = np.full(len(piece_class), each)
    piece_size[np.cumsum(pieces) - 1] -= pieces * each - sizes.count
    order = np.argsort(source.random_raw(len(piece_class)), kind="stable")
    # Open nodes lie in stacks by (tokens left, targets left). `open_targets[l]` has bit t set where rows have l tokens and t
    # targets left; `roomy[j]` has bit l set where some of the rows with l tokens left have steps[j] targets left or more.
    steps = np.unique(np.sort(sizes.target[piece_class])[np.arange(33) * (len(piece_class) - 1) // 32])
    step_of = np.searchsorted(steps, np.arange(targets_per_row + 2), side="right").tolist()  # how many steps t targets reach
    wanted = np.searchsorted(steps, sizes.target).tolist()
    roomy = [0] * len(steps)
    open_targets = [0] * (row_length + 1)
    reached = [0] * (row_length + 1)  # steps that the roomiest row with l tokens left reaches
    stacks: dict[tuple[int, int], list[int]] = {}
    parent: list[int] = []
    member: list[int] = []
    rows: list[int] = []
    lengths, targets = sizes.length.tolist(), sizes.target.tolist()
    for which, still in zip(piece_class[order].tolist(), piece_size[order].tolist(), strict=True):
        length, target = lengths[which], targets[which]
        made: list[tuple[int, int, int]] = []
        while still:
            above = roomy[wanted[which]] >> length
            if above:
                left = length + (above & -above).bit_length() - 1
                fitting = open_targets[left] >> target
                free = target + (fitting & -fitting).bit_length() - 1
                stack = stacks[left, free]
                node = stack[-1]
                taken = min(still, rows[node])
                rows[node] -= taken
                if not rows[node]:
                    stack.pop()
                if not stack:
                    open_targets[left] ^= 1 << free
                    now = step_of[open_targets[left].bit_length() - 1] if open_targets[left] else 0
                    for j in range(now, reached[left]):
                        roomy[j] ^= 1 << left
                    reached[left] = now
            else:
                left, free, node, taken = row_length, targets_per_row, -1, still
            made.append((left - length, free - target, len(rows)))
            parent.append(node)
            member.append(which)
            rows.append(taken)
            still -= taken
        for left, free, node in made:  # only now, so that a piece does not fill rows with its own size
            if left:
                stack = stacks.setdefault((left, free), [])
                if not stack:
                    open_targets[left] |= 1 << free
                    for j in range(reached[left], step_of[free]):
                        roomy[j] |= 1 << left
                    reached[left] = max(reached[left], step_of[free])
                stack.append(node)
    up, member_of = np.asarray(parent), np.asarray(member)
    node = np.flatnonzero(rows)
    times = np.asarray(rows)[node]
    pattern = np.arange(len(node))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    while len(node):
        found.append((pattern, member_of[node]))
        on = up[node] >= 0
        pattern, node = pattern[on], up[node[on]]
    pattern, members = (np.concatenate(part) for part in zip(*found, strict=True))
    sort = np.argsort(pattern, kind="stable")
    return _Filling(times, pattern[sort], members[sort], np.ones_like(pattern))


def _bits(chosen: np.ndarray) -> int:
    return int.from_bytes(np.packbits(chosen, bitorder="little").tobytes(), "little")


def _at_most(values: np.ndarray, capacity: int) -> list[int]:
    # For each c up to `capacity` the set of classes whose value is at most c.
    out: list[int] = []
    for edge in np.unique(values).tolist():
        out += [out[-1] if out else 0] * (edge - len(out))
        out.append(_bits(values <= edge))
    return out + [out[-1]] * (capacity + 1 - len(out))


def _hand_out(filling: _Filling, shuffled: np.ndarray, row_order: np.ndarray) -> Plan:
    # `shuffled` int [n]: the examples, class by class; `row_order` int64 [rows]: which row comes first, second, ...
    held = np.bincount(filling.pattern, weights=filling.copies).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(np.repeat(held, filling.times)[row_order])])
    begins = np.empty(len(row_order), np.int64)  # where each row begins in the order
    begins[row_order] = starts[:-1]
    # Entries class by class, as the examples are; within a row they stand in the order of the pattern.
    by_class = np.argsort(filling.member, kind="stable")
    before = np.cumsum(filling.copies) - filling.copies
    before -= np.concatenate([[0], np.cumsum(held)])[filling.pattern]
    first_row = np.cumsum(filling.times) - filling.times
    pattern, copies, before = filling.pattern[by_class], filling.copies[by_class], before[by_class]
    order = np.empty_like(shuffled)
    done = 0
    for part in _parts(copies * filling.times[pattern]):
        times = filling.times[pattern[part]]
        size = copies[part] * times
        at = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        times = np.repeat(times, size)
        place = begins[np.repeat(first_row[pattern[part]], size) + at % times]
        place += np.repeat(before[part], size)
        place += at // times
        order[place] = shuffled[done : done + len(at)]
        done += len(at)
    return Plan(order, starts)


def _parts(sizes: np.ndarray, most: int = 1 << 20) -> list[slice]:
    # Runs of entries with about `most` examples each, to hold little at once.
    ends = np.cumsum(sizes)
    edges = np.unique(np.concatenate([[0], np.searchsorted(ends, np.arange(most, ends[-1], most)) + 1, [len(sizes)]]))
    return [slice(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
