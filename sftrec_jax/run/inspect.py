"""`sftrec inspect`: what is trained on, decoded: packed rows, what carries loss, and counts."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from sftrec_jax.config import RunConfig
from sftrec_jax.console import console
from sftrec_jax.data.mixture import Mixture
from sftrec_jax.data.segments import PackedBatch
from sftrec_jax.errors import UserError, printable
from sftrec_jax.run.folder import RunFolder
from sftrec_jax.run.session import Session, open_session, prepare
from sftrec_jax.run.stages import training_segments, with_tasks
from sftrec_jax.train.batches import BatchPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT, TARGET, MARK = "dim", "bold green", "cyan"
ITEMS_SHOWN = 10
"""Items whose tokens are put into words."""


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one segment that is either prompt or target."""

    segment: int
    branch: int
    fork: int
    """Of a branch: how many tokens of the trunk it sees."""
    target: bool
    """Whether the tokens carry loss."""
    ids: list[int]


def inspect_stage(where: Path | RunConfig, rows: int, step: int) -> None:
    """Prints rows of an optimizer step (counted from 1) and the counts of the whole run.

    Args:
        where: the run's folder, or the config of a run that is not prepared yet: it is, in a folder that is removed again.
    """
    if rows < 1 or step < 1:
        raise UserError(f"--rows {rows} and --step {step}: use 1 or more")
    if isinstance(where, Path):
        _show(open_session(where), rows, step)
        return
    with tempfile.TemporaryDirectory() as folder:
        _show(prepare(RunFolder(Path(folder)), where), rows, step)


def _show(session: Session, rows: int, step: int) -> None:
    prompts, sharing = training_segments(session)
    counts = session.prompts.counts.copy()
    examples, said = with_tasks(session, prompts)
    plan = BatchPlan(examples, session.config.train)
    if step > plan.steps:
        raise UserError(f"--step {step}: the run has {plan.steps} steps; use 1 to {plan.steps}")
    batch = plan.batch(step - 1)
    flat = PackedBatch(**{name: value.reshape(-1, value.shape[-1]) for name, value in vars(batch).items()})
    names = _Names(plan)
    console.print(Text.assemble(("prompt", PROMPT), "  ", ("⟦target: carries loss⟧", TARGET), "  ", ("segment, branch", MARK)))
    shown: list[list[int]] = []
    for row in range(min(rows, len(flat.tokens))):
        used = int((flat.segments[row] > 0).sum())
        text = f"step {step}, row {row + 1} of {len(flat.tokens)}: {int(flat.segments[row].max())} segments, "
        console.print(f"{text}{used} of {flat.tokens.shape[1]} positions, {int(flat.weights[row].sum())} target tokens")
        found = list(pieces(flat, row))
        shown += [piece.ids for piece in found]
        for line in _lines(found, session.tokenizer, names.of(plan.parts_of(step - 1)[row])):
            console.print(line)
    for name, example in names.others():
        console.print(f"an example of {name}, which is not among these rows:")
        found = list(pieces(plan.parts.pack([np.asarray([example])], session.config.train.row_length, plan.targets_per_row), 0))
        shown += [piece.ids for piece in found]
        for line in _lines(found, session.tokenizer, [name]):
            console.print(line)
    for line in _item_words(session, shown):
        console.print(line, markup=False, highlight=False)
    console.print(_counts(session, plan, counts, sharing))
    for line in said:
        console.print(line)


def pieces(batch: PackedBatch, row: int) -> Iterator[Piece]:
    """What a row holds, segment by segment, each its trunk first and then its branches, in runs of prompt and target."""
    tokens, segments, branches = batch.tokens[row], batch.segments[row], batch.branches[row]
    wanted: dict[int, list[int]] = {}
    for at, label, weight in zip(batch.target_positions[row], batch.labels[row], batch.weights[row], strict=True):
        if weight > 0:
            wanted.setdefault(int(at), []).append(int(label))
    for segment in range(1, int(segments.max(initial=0)) + 1):
        inside = np.flatnonzero(segments == segment)
        trunk = inside[branches[inside] == 0]
        own = [inside[branches[inside] == b] for b in np.unique(branches[inside])]
        fed: list[tuple[int, int]] = []  # (place of a label's predictor, label) that stand in the row themselves
        spans: list[tuple[np.ndarray, list[bool]]] = []
        for run in own:
            fork = int(batch.forks[row, run[0]])
            before = -1 if branches[run[0]] == 0 else int(trunk[fork - 1])
            carries = []
            for place in run.tolist():
                hit = int(tokens[place]) in wanted.get(before, [])
                carries.append(hit)
                fed += [(before, int(tokens[place]))] if hit else []
                before = place
            spans.append((run, carries))
        left = {at: list(labels) for at, labels in wanted.items()}
        for at, label in fed:
            if label in left[at]:
                left[at].remove(label)
        for run, carries in spans:
            yield from _runs(batch, row, segment, run, carries, left)


def _runs(
    batch: PackedBatch, row: int, segment: int, run: np.ndarray, carries: list[bool], left: dict[int, list[int]]
) -> Iterator[Piece]:
    """One branch; labels that are not fed (the last of each target) follow the token that predicts them."""
    branch, fork = int(batch.branches[row, run[0]]), int(batch.forks[row, run[0]])
    made: list[tuple[bool, list[int]]] = []

    def add(target: bool, ids: list[int]) -> None:
        if made and made[-1][0] == target:
            made[-1][1].extend(ids)
        else:
            made.append((target, list(ids)))

    for place, hit in zip(run.tolist(), carries, strict=True):
        add(hit, [int(batch.tokens[row, place])])
        if left.get(place):
            add(True, left[place])
    for target, ids in made:
        yield Piece(segment, branch, fork, target, ids)


class _Names:
    """Which task each segment of a row is of; no name where there is one task alone."""

    def __init__(self, plan: BatchPlan):
        self._mixture = plan.parts if isinstance(plan.parts, Mixture) else None
        self._seen: set[int] = set()

    def of(self, examples: np.ndarray) -> list[str]:
        """By segment of a row that holds these examples; in a row the parts of a mixture stand one behind the other."""
        if self._mixture is None:
            return []
        parts = np.sort(np.searchsorted(self._mixture.edges, examples, "right") - 1).tolist()
        self._seen |= set(parts)
        return [self._mixture.names[part] for part in parts]

    def others(self) -> Iterator[tuple[str, int]]:
        """Parts of which no row was named so far, and an example of each."""
        if self._mixture is not None:
            for part, (name, weight) in enumerate(zip(self._mixture.names, self._mixture.weights, strict=True)):
                if part not in self._seen and weight > 0 and len(self._mixture.parts[part]):
                    yield name, int(self._mixture.edges[part])


def _item_words(session: Session, shown: list[list[int]]) -> Iterator[str]:
    """What the new tokens of the first few items say that stand among tokens."""
    codes = session.codes
    if not codes.new_tokens:
        return
    items = {tuple(row[row >= 0].tolist()): item for item, row in enumerate(codes.codes)}
    first, lengths = {code[0] for code in items}, sorted(set(map(int, codes.lengths)))
    found: dict[int, None] = {}
    for ids in shown:
        for at in range(len(ids)):
            if ids[at] in first and len(found) < ITEMS_SHOWN:
                found |= {items[code]: None for n in lengths if (code := tuple(ids[at : at + n])) in items}
    for item in list(found)[:ITEMS_SHOWN]:
        row = codes.codes[item]
        name = session.tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=False)
        yield f"  {name} is {printable(str(codes.titles[item]))}"


def _lines(found: list[Piece], tokenizer: "PreTrainedTokenizerFast", tasks: list[str]) -> Iterator[Text]:
    at: tuple[int, int] | None = None
    line = Text()
    for piece in found:
        if (piece.segment, piece.branch) != at:
            if at is not None:
                yield line
            at = piece.segment, piece.branch
            name = (
                f"[{piece.segment}] " if piece.branch == 0 else f"  [{piece.segment}.{piece.branch} after {piece.fork} tokens] "
            )
            line = Text(name, style=MARK)
            if piece.branch == 0 and tasks:
                line.append(f"({tasks[piece.segment - 1]}) ")
        text = str(tokenizer.decode(piece.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        line.append(f"⟦{text}⟧" if piece.target else text, style=TARGET if piece.target else PROMPT)
    if at is not None:
        yield line


def _counts(session: Session, plan: BatchPlan, counts: dict[str, int], sharing: str) -> Table:
    table = Table("what", "how much", title=f"all of an epoch; {sharing}")
    rows = plan.rows(0)
    lengths = session.codes.lengths
    used = np.unique(session.codes.codes[session.codes.codes >= 0])
    values = {
        "rows, rows of all steps": f"{len(rows):,}, {plan.steps * plan.rows_per_step:,} in {plan.steps:,} steps",
        "positions used": f"{plan.efficiency():.1%}",
        "segments a row": f"{len(rows.order) / len(rows):.2f}",
        "targets": f"{int(plan.parts.target_items[rows.order].sum()):,} ({int(plan.targets[rows.order].sum()):,} tokens)",
        "tokens one by one over packed": f"{plan.parts.lengths_apart.sum() / plan.lengths.sum():.2f}",
        "examples cut to the context": f"{counts['examples_cut_to_context']:,}",
        "training items that are no target": f"{counts['training_items_left_out']:,}",
        "tokens an item": f"{lengths.min()} to {lengths.max()}, median {int(np.median(lengths))}",
        "distinct tokens of items": f"{len(used):,}, {len(session.codes.new_tokens):,} of them new",
        "items": f"{len(lengths):,}",
    }
    for name, value in values.items():
        table.add_row(name, value)
    return table
