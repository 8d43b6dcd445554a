"""Training speed: TRL's SFTTrainer with PEFT on torch against this package, without and with shared prompts, on the same CPU.

    python benchmarks/train_speed.py --quick          # about 10 minutes; without --quick all three rows, an hour

SmolLM2-135M, LoRA of rank 16 on all linear projections, AdamW, no gradient checkpointing. Examples are training targets of
Amazon Beauty (`$SFTREC_DATA`): prompt and answer are titles, tokenised piece by piece; all three get the same token ids, and as
many examples a step (ours as near as whole rows allow). The sample is users evenly spaced by the length of their history whose
token ratio is within 5 % of that of the whole data. In each repetition the three train once over the sample, in turns; the first
pass of each is left out.

Rows: `windows of 26 to 50 items, no text after the history`; `the same with 9 tokens after it`; `exactly the last 20 items, no
text after`. TRL runs in the fastest of float32 and bfloat16, padded in batches of like lengths and padding-free, whose loss is
right on the first row measured; all are printed, and one whose head is patched to score targets alone, which TRL does on a
GPU only (`patched_over_taken`). `--quick` takes float32 padding-free, four at a time. Rows after the first measured have 64
examples and two repetitions.

The last line is one JSON object, of the first row measured: `examples_per_s_trl`, `ratio_plain` and `ratio_shared` (our examples
a second over TRL's, without and with sharing; medians over the repetitions), `token_ratio` (tokens of the whole data one by one
over those shared), `loss_gap` (largest difference of the three first losses, nats a target token), `goal_shared` (0.85 x
token_ratio x ratio_plain), `patched_over_taken`, `rows`, `device`, `versions`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from command import run_main
from flax import nnx
from trl_side import IGNORED, TrlSide, write_base

from sftrec_jax.config import DataConfig, LoraConfig, MeshConfig, ModelConfig, PromptConfig, TrainConfig
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.known import data_root
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.data.prompts import PromptBuilder, prompt_builder
from sftrec_jax.data.segments import Example, Segments
from sftrec_jax.data.windows import Windows
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.naming import title_codes
from sftrec_jax.items.titles import distinct_titles
from sftrec_jax.model.dtype import compute_dtype
from sftrec_jax.model.hub import load_tokenizer, resolve_base
from sftrec_jax.model.load import load_decoder, make_build, source_architecture, trainable_filter
from sftrec_jax.model.mesh import make_mesh
from sftrec_jax.model.sharding import named_arrays
from sftrec_jax.train.batches import BatchPlan
from sftrec_jax.train.loss import target_loss
from sftrec_jax.train.optimizer import make_optimizer
from sftrec_jax.train.step import init_state, make_train_step, shard_batches

PROMPTS = {
    "windows of 26 to 50 items, no text after the history": PromptConfig("instruct", 50, prefix="", suffix="", stride=25),
    "the same with 9 tokens after it": PromptConfig(
        "instruct", 50, prefix="", suffix="The next item that they will take:\n", stride=25
    ),
    "exactly the last 20 items, no text after": PromptConfig("instruct", 20, prefix="", suffix=""),
}
CONTEXT = 8192
"""The model's, which no example of 50 titles reaches."""
BATCH = 32
"""Examples an optimizer step."""
LONGEST_ROW = 2048
"""Row lengths up to this are tried, longer ones where a segment is longer."""
TOLERANCE = 0.05
"""The sample's token ratio is that of the whole data within this share."""
PAUSE = 0.3
"""Seconds between the sides: idle OpenMP threads of torch spin for a while and would take a core from the next."""


@dataclass(frozen=True)
class Sample:
    """Some users' examples."""

    shared: Segments
    token_ratio: float
    whole_ratio: float
    first: int
    """Leading segments whose targets make up the first step of TRL."""

    @property
    def examples(self) -> int:
        return int(self.shared.target_items.sum())


def beauty() -> Dataset:
    """Histories in file order, titles; UserError where the data is not there."""
    folder = data_root() / "amazon-beauty"
    files = {"source": str(folder / "sequences.txt.gz"), "catalogue": str(folder / "items.jsonl.gz")}
    return prepare_dataset(DataConfig(**files, time_column=None))


def ratio(segments: Segments) -> float:
    """Tokens one by one over tokens shared."""
    return float(segments.apart().lengths.sum() / segments.lengths.sum())


def draw(builder: PromptBuilder, dataset: Dataset, examples: int) -> Sample:
    """Users evenly spaced by history length, so many that they have `examples` targets; those of the first step lead."""
    whole = builder.segments(dataset.items, dataset.training)
    histories = dataset.training
    targets = histories.end - histories.first - 1
    able = np.flatnonzero(targets > 0)
    able = able[np.argsort(targets[able], kind="stable")]
    whole_ratio = ratio(whole)
    for count in range(max(2, int(examples / targets[able].mean()) + 8), 1, -1):
        for shift in np.linspace(0, 1, 101)[:-1]:
            users = able[((np.arange(count) + shift) * len(able) / count).astype(int)]
            if targets[users].sum() != examples:
                continue
            users, first = lead(users, targets[users], BATCH)
            if not first:
                continue
            chosen = Windows(*(x[users] for x in (histories.begin, histories.first, histories.end)))
            # Histories as a data set of their own, in this order.
            items = np.concatenate([dataset.items[a:b] for a, b in zip(chosen.begin, chosen.end, strict=True)])
            edges = np.concatenate([[0], np.cumsum(chosen.end - chosen.begin)])
            shared = builder.segments(items, Windows(edges[:-1], edges[:-1], edges[1:]))
            leading = int(np.searchsorted(shared.windows.first, edges[first]))
            if abs(ratio(shared) / whole_ratio - 1) < TOLERANCE and shared.target_items[:leading].sum() == BATCH:
                return Sample(shared, ratio(shared), whole_ratio, leading)
    raise UserError(f"no {examples} examples of evenly spaced users have the token ratio of the whole; take another number")


def lead(users: np.ndarray, targets: np.ndarray, wanted: int) -> tuple[np.ndarray, int]:
    """The users with those in front whose targets add up to `wanted`, and how many these are (0: none do)."""
    ways: dict[int, list[int]] = {0: []}
    for at, count in enumerate(targets.tolist()):
        for total, members in list(ways.items()):
            ways.setdefault(total + count, [*members, at])
    found = ways.get(wanted, [])
    rest = [at for at in range(len(users)) if at not in found]
    return users[[*found, *rest]], len(found)


class OurSide:
    """The package's training step over segments, `BATCH` examples a step on average, in rows that make the fewest positions."""

    def __init__(self, segments: Segments, steps: int, codes: ItemCodes):
        self.segments, self.steps = segments, steps
        plans = [BatchPlan(segments, TrainConfig(row_length=length)) for length in row_lengths(segments)]
        # Not the fullest: a row too short for a segment divides it, and its beginning stands there twice.
        least = min((p for p in plans if len(p.rows(0)) % steps == 0), key=lambda p: len(p.rows(0)) * p.config.row_length)
        config = TrainConfig(
            row_length=least.config.row_length, batch_rows=1, accumulate=len(least.rows(0)) // steps, learning_rate=1e-4
        )
        self.plan = BatchPlan(segments, config)
        model = ModelConfig(base="smollm2-135m", remat="none")
        source, self.mesh = resolve_base(model.base), make_mesh(MeshConfig())
        build = make_build(model, LoraConfig(), config, source_architecture(source), codes)
        decoder = load_decoder(build, source, codes, self.mesh, 0, False)
        self.graphdef, self.trained, self.frozen = nnx.split(decoder, trainable_filter("lora"), ...)
        optimizer = make_optimizer(config, 1_000_000)
        self.state = init_state(named_arrays(self.trained), optimizer, self.mesh)
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.trained)
        self.step = make_train_step(self.graphdef, template, optimizer, None, self.state)

    def first_loss(self, count: int) -> float:
        """Nats a target token over the first `count` segments; before any `epoch`."""
        length, targets = self.plan.config.row_length, self.plan.targets_per_row
        windows = Windows(*(x[:count] for x in vars(self.segments.windows).values()))
        parts = replace(self.segments, windows=windows).within(length, targets)
        loss = jax.jit(lambda t, batch: target_loss(nnx.merge(self.graphdef, t, self.frozen), batch))
        rows = [parts.pack([np.asarray([i])], length, targets) for i in range(len(parts))]
        return sum(float(loss(self.trained, row)) for row in rows) / sum(float(row.weights.sum()) for row in rows)

    def epoch(self, steps: int | None = None) -> float:
        """Seconds for one pass over the sample, or its first steps, making the batches included."""
        begin = time.perf_counter()
        metrics = None
        for step in range(steps or self.steps):
            batch = shard_batches(self.plan.batch(step), self.mesh)
            self.state, metrics = self.step(self.state, self.frozen, batch)
        jax.block_until_ready((metrics, self.state))
        return time.perf_counter() - begin


def row_lengths(segments: Segments) -> range:
    """Those tried: from the longest example on, to a length that divides no segment."""
    least, whole = (-(-int(s.lengths.max()) // 8) * 8 for s in (segments.apart(), segments))
    return range(least, max(LONGEST_ROW, whole + whole // 16) + 1, 8)


def in_torch(segments: Segments) -> list[tuple[list[int], list[int]]]:
    """The examples one by one with labels, the last token fed as well."""

    def row(example: Example) -> tuple[list[int], list[int]]:
        ids = [*example.tokens.tolist(), int(example.labels[-1])]
        labels = [IGNORED] * len(ids)
        for position, label in zip(example.target_positions.tolist(), example.labels.tolist(), strict=True):
            labels[position + 1] = label
        return ids, labels

    return [row(example) for example in segments.apart().examples()]


Variant = tuple[str, str, int, str]
"""Type, layout, examples a pass, and what the head scores. TRL scores `targets` alone only on a GPU; here a function of it is
patched for that, so this variant is shown and not taken."""
QUICK: Variant = ("float32", "padding_free", 4, "all")
VARIANTS: list[Variant] = [
    *(("float32", "padded", device_batch, "all") for device_batch in (1, 2, 4)),
    ("float32", "padding_free", 4, "all"),
    ("bfloat16", "padded", 2, "all"),
    ("bfloat16", "padding_free", 4, "all"),
    ("float32", "padded", 2, "targets"),
]


def trl_side(folder: Path, examples: list[tuple[list[int], list[int]]], variant: Variant) -> TrlSide:
    dtype, layout, device_batch, head = variant
    return TrlSide(folder, examples, BATCH, dtype, layout, device_batch, head)  # type: ignore[arg-type]


def fastest(folder: Path, examples: list[tuple[list[int], list[int]]], reference: float) -> tuple[Variant, float]:
    """The fastest variant of TRL with the right loss, and how many times as fast the patched one is; prints all of them."""
    rates: dict[Variant, float] = {}
    for variant in VARIANTS:
        side = trl_side(folder, examples, variant)
        gap = abs(side.first_loss() - reference)
        timing = side.steps(1)
        says = "" if gap < 1e-2 else " (left out)"
        dtype, layout, device_batch, head = variant
        print(
            f"TRL {dtype} {layout}, {device_batch} a pass, head at {head}: {timing.examples / timing.seconds:.3f} examples/s, "
            f"{timing.tokens / timing.seconds:.0f} tokens/s, first loss {gap:.1e} from ours{says}",
            flush=True,
        )
        if not says:
            rates[variant] = timing.tokens / timing.seconds
    patched = rates.pop(VARIANTS[-1], 0.0)
    if not rates:
        raise UserError("no variant of TRL has the loss of ours")
    best = max(rates, key=lambda v: rates[v])
    print(f"taken: {best}")
    return best, patched / rates[best]


def measure(
    builder: PromptBuilder, dataset: Dataset, folder: Path, wanted: int, repetitions: int, variant: Variant | None
) -> tuple[dict[str, Any], Variant]:
    """One row of the table, and the variant of TRL that it was compared with; None: the fastest of all."""
    codes = builder.codes
    sample = draw(builder, dataset, wanted)
    steps = sample.examples // BATCH
    plain, shared = (OurSide(s, steps, codes) for s in (sample.shared.apart(), sample.shared))
    losses = {"plain": plain.first_loss(BATCH), "shared": shared.first_loss(sample.first)}
    examples = in_torch(sample.shared)
    print(f"{sample.examples} examples, token ratio {sample.token_ratio:.2f} ({sample.whole_ratio:.2f} of the whole data)")
    patched = None
    if variant is None:
        variant, patched = fastest(folder, examples, losses["plain"])
    trl = trl_side(folder, examples, variant)
    losses["trl"] = trl.first_loss()
    for side, what in ((plain, "ours one by one"), (shared, "ours shared")):
        c = side.plan.config
        print(f"{what}: rows of {c.row_length}, {c.accumulate} a step, {side.plan.efficiency():.1%} of positions used")
    print("first losses: " + ", ".join(f"{side} {loss:.5f}" for side, loss in losses.items()), flush=True)
    plain.epoch(1), shared.epoch(1)
    times: dict[str, list[float]] = {"trl": [], "plain": [], "shared": []}
    for repetition in range(repetitions):
        for side, run in (("trl", lambda: trl.steps(steps).seconds), ("plain", plain.epoch), ("shared", shared.epoch)):
            time.sleep(PAUSE)
            times[side].append(run())
        print(f"repetition {repetition + 1}: " + ", ".join(f"{side} {t[-1]:.1f} s" for side, t in times.items()), flush=True)
    ratios = {
        f"ratio_{side}": statistics.median(a / b for a, b in zip(times["trl"], times[side], strict=True))
        for side in ("plain", "shared")
    }
    row = {
        "examples": sample.examples,
        "examples_per_s_trl": sample.examples / statistics.median(times["trl"]),
        **ratios,
        "token_ratio": sample.whole_ratio,
        "sample_token_ratio": sample.token_ratio,
        "goal_shared": 0.85 * sample.whole_ratio * ratios["ratio_plain"],
        "loss_gap": max(losses.values()) - min(losses.values()),
        "patched_over_taken": patched,
        "seconds": times,
        "positions_used": {"plain": plain.plan.efficiency(), "shared": shared.plan.efficiency()},
        "trl": variant,
    }
    return row, variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first row alone, TRL in float32, padding-free, fewer examples")
    parser.add_argument(
        "--examples", type=int, help=f"examples of the sample, a multiple of {BATCH} (quick: {2 * BATCH}, else {4 * BATCH})"
    )
    parser.add_argument("--repetitions", type=int, help="passes of each side (quick: 2, else 3)")
    parser.add_argument("--rows", type=int, nargs="+", choices=(1, 2, 3), help="which rows (quick: 1, else all)")
    args = parser.parse_args()
    args.rows = args.rows or ([1] if args.quick else [1, 2, 3])
    args.examples = args.examples or (2 * BATCH if args.quick else 4 * BATCH)
    args.repetitions = args.repetitions or (2 if args.quick else 3)
    if args.examples % BATCH:
        raise UserError(f"--examples {args.examples} is no multiple of {BATCH}")
    dataset = beauty()
    tokenizer = load_tokenizer(resolve_base("smollm2-135m"), None)
    codes = title_codes(distinct_titles(dataset.titles, dataset.item_ids), tokenizer, 64, dataset.item_ids)
    dtype, why = compute_dtype(ModelConfig())
    print(f"ours computes in {dtype.name} ({why})")
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder) / "base")
        variant = QUICK if args.quick else None
        rows = []
        for name, prompt in (list(PROMPTS.items())[row - 1] for row in sorted(set(args.rows))):
            print(f"== {name}")
            builder = prompt_builder(prompt, codes, tokenizer, CONTEXT)
            size = (2 * BATCH, 2) if rows else (args.examples, args.repetitions)
            row, variant = measure(builder, dataset, base, *size, variant)
            rows.append({"row": name, **row})
    kept = ("examples_per_s_trl", "ratio_plain", "ratio_shared", "token_ratio", "loss_gap", "goal_shared", "patched_over_taken")
    packages = ("jax", "flax", "torch", "transformers", "trl", "peft")
    print(json.dumps({
        **{key: rows[0][key] for key in kept},
        "rows": rows,
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in packages},
    }))  # fmt: skip


if __name__ == "__main__":
    run_main(main)
