"""The stages of a run after `prepare`: train and export (and `evaluation.py`). Each takes an open session and leaves files."""

import json
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from sftrec_jax.config import RunConfig, TrainConfig
from sftrec_jax.console import console
from sftrec_jax.data.mixture import Mixture
from sftrec_jax.data.segments import Segments
from sftrec_jax.data.tasks import make_tasks
from sftrec_jax.distributed import place
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.metrics import DEFAULT_KS
from sftrec_jax.evaluate.uncertainty import draw
from sftrec_jax.items.index_file import write_index
from sftrec_jax.items.paths import codes_paths
from sftrec_jax.model.cards import CardInfo
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.dtype import compute_dtype
from sftrec_jax.model.export import export_merged
from sftrec_jax.model.mesh import platform_of
from sftrec_jax.model.packed_attention import attention_path
from sftrec_jax.model.peft_read import trains_tokens
from sftrec_jax.model.peft_write import export_adapter
from sftrec_jax.model.remat import choose_remat
from sftrec_jax.model.sharding import BATCH, with_arrays
from sftrec_jax.run.asked import Asked
from sftrec_jax.run.evaluation import list_metrics
from sftrec_jax.run.example_names import example_names
from sftrec_jax.run.export_catalogue import write_catalogue
from sftrec_jax.run.fingerprint import check_same, fingerprint, packing_sha256
from sftrec_jax.run.places import open_checkpoints
from sftrec_jax.run.session import Session, describe_devices, recommender
from sftrec_jax.train.batches import BatchPlan, Packable
from sftrec_jax.train.calibrate import calibrate
from sftrec_jax.train.checkpoint import Checkpoints
from sftrec_jax.train.loop import TrainResult, train
from sftrec_jax.train.meter import Meter
from sftrec_jax.train.optimizer import rows_only_steps
from sftrec_jax.train.row_length import better_row_length

CARD_METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr")


LONG = 2
"""With more segments a user than this, most are targets whose prompts begin elsewhere each."""


def _size(state: nnx.State) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state))


def train_stage(session: Session, resume: bool, accept: bool = False) -> TrainResult:
    """Trains and leaves `checkpoints/` and `metrics.jsonl`.

    `resume`: from the newest whole checkpoint, which must be of this very run; `accept`: or of one whose settings are named.
    """
    with closing(open_checkpoints(session.folder, session.config.train)) as checkpoints:
        first = checkpoints.newest() if resume else None
        wrote = {} if first is None else checkpoints.manifest_of(first).fingerprint
        session = session.computing_as(wrote)
        return _train(session, checkpoints, first, wrote, accept)


def _train(session: Session, checkpoints: Checkpoints, first: int | None, wrote: dict[str, str], accept: bool) -> TrainResult:
    config = session.config
    prompts, sharing = training_segments(session)
    segments, counts = prompts[0], session.prompts.counts.copy()
    examples, tasks = with_tasks(session, prompts)
    plan = BatchPlan(examples, t := config.train)
    checkpoints.fingerprint = fingerprint(session) | {"packing": packing_sha256(plan)}
    if first is not None:
        check_same(session.folder.path, first, wrote, checkpoints.fingerprint, accept)
    decoder = session.base_decoder()
    start = config.lora.start if t.method == "lora" else None
    if start is not None:
        console.print(f"adapters: begin with those of {start}")
    if session.codes.new_tokens and (start is None or not trains_tokens(start)):
        batch = jax.tree.map(lambda x: x[0], plan.batch(0))
        share = calibrate(decoder, place(batch, NamedSharding(session.mesh, BATCH)), len(session.codes.new_tokens))
        console.print(f"new rows: {len(session.codes.new_tokens):,}, shifted by {share:.2f} of their length to match text")
    graphdef, trained, frozen = session.split(decoder)
    build = session.build
    dtype, remat = build.dtype, build.remat
    _, why = compute_dtype(config.model, platform_of(session.mesh))
    _, reason = choose_remat(config.model, t, build.arch, build.adapters, dtype, session.mesh)
    if wrote:
        why = reason = f"as at step {first}"
    console.print(f"devices: {describe_devices(session.mesh)}")
    console.print(f"compute: {dtype.name} ({why}); adapters and optimizer float32; remat {remat} ({reason})")
    console.print(f"attention: {attention_path(t.row_length, build.arch.head_dim, dtype, platform_of(session.mesh))[1]}")
    console.print(f"parameters: {_size(trained):,} trained of {_size(trained) + _size(frozen):,} ({t.method})")
    console.print(
        f"examples: {counts['examples']:,} with {int(segments.targets.sum()):,} target tokens in {int(segments.lengths.sum()):,} "
        f"tokens; {sharing}, {segments.lengths_apart.sum() / segments.lengths.sum():.2f} times as many tokens one by one"
    )
    for line in tasks:
        console.print(line)
    console.print(f"rows: {_fit(examples, plan)}")
    if cut := counts["examples_cut_to_context"]:
        short = t.row_length < build.arch.context
        console.print(
            f"context: {cut:,} of {counts['examples']:,} examples are cut to their newest items, since "
            + (
                f"train.row_length is {t.row_length}; raise it"
                if short
                else f"the model sees {build.arch.context} tokens; use another"
            )
            + " or lower prompt.max_history"
        )
    if left := counts["training_items_left_out"]:
        console.print(
            f"no target: {left:,} training items (the first of a history in prompt.format instruct; prompt.windows last)"
        )
    if empty := plan.without_target:
        console.print(f"no target token: {empty:,} examples, which are left out")
    console.print(
        f"batch: {t.accumulate} passes x {t.batch_rows} rows x {t.row_length} tokens = "
        f"{t.accumulate * t.batch_rows * t.row_length:,} positions a step; {plan.steps:,} steps, "
        f"{plan.steps * plan.rows_per_step / len(plan.rows(0)):.3g} epochs"
    )
    if t.rows_first:
        console.print(_when(t, plan.steps))
    console.print(f"files: {session.folder.path}")
    validator = _Validator(session, decoder)
    meter = Meter(build.arch, build.adapters, t.method, len(build.row_ids), dtype, session.mesh.size)
    result = train(
        graphdef, trained, frozen, plan, config.drops, session.mesh, session.folder.path, checkpoints,
        lambda arrays: validator(nnx.merge(graphdef, with_arrays(trained, arrays), frozen)), meter, first,
        example_names(plan.parts, session.dataset),
    )  # fmt: skip
    skipped = f"; {result.skipped:,} updates skipped" if result.skipped else ""
    console.print(
        f"trained {result.step} steps in {result.seconds / 60:.1f} min ({result.seconds_validating / 60:.1f} validating); "
        f"best validation {t.best_metric.upper()} {result.best:.4f} at step {result.best_step}{skipped}"
    )
    console.print(f"speed: {meter.describe()}")
    return result


def training_segments(session: Session) -> tuple[list[Segments], str]:
    """The training examples of a run as each template writes them, and a few words on whether prompts are shared."""
    data = session.dataset
    told = data.told_in_training
    made = [builder.segments(data.items, data.training, told) for builder in (session.prompts, *session.more_prompts)]
    if session.prompts.format == "stream":
        return made, "every item of a stream is a target"
    setting, drops = session.config.train.share_prefixes, session.config.drops
    if setting == "off":
        return [segments.apart() for segments in made], "prompts one by one, as configured"
    if setting == "auto" and drops:
        why = "prompts one by one, since dropout would draw one noise for a shared beginning"
        return [segments.apart() for segments in made], why
    said = "beginnings shared"
    if drops:
        said += " as configured, with one noise of dropout for all targets of a beginning"
    prompt = session.config.prompt
    if prompt.stride == 1 and len(made[0]) > LONG * len(data.training):
        said += f" (prompt.stride {max(2, prompt.max_history // 2)} would share more of long histories)"
    return made, said


def with_tasks(session: Session, prompts: list[Segments]) -> tuple[Packable, list[str]]:
    """The examples of all tasks, and a line on each beside the first; `prompts` are those of `sequential`, by template."""
    config = session.config
    context = min(session.build.arch.context, config.train.row_length)
    tasks = make_tasks(config, session.dataset, session.codes, session.tokenizer, context)
    if not tasks and config.tasks.sequential == 1 and len(prompts) == 1:
        return prompts[0], []
    apart = not _shares(config)
    parts = [t.examples.apart() if apart and isinstance(t.examples, Segments) else t.examples for t in tasks]
    of_each = config.tasks.sequential / len(prompts)
    said = [f"task sequential: weight {config.tasks.sequential:g}"] if config.tasks.sequential != 1 else []
    if len(prompts) > 1:
        said.append(f"templates: {len(prompts)}, of which an epoch draws each for 1 in {len(prompts)} of its prompts")
    for task, part in zip(tasks, parts, strict=True):
        sizes = f"{int(part.target_items.sum()):,} examples with {int(part.lengths.sum()):,} tokens"
        line = f"task {task.name}: an epoch takes {task.weight:g} times {sizes}"
        said.append(line + (f"; {task.left_out}" if task.left_out else ""))
    called = ["sequential"] if len(prompts) == 1 else [f"sequential, {Path(t).name[2:]}" for t in config.prompt.templates]
    weights = (*[of_each] * len(prompts), *(t.weight for t in tasks))
    return Mixture((*prompts, *parts), weights, (*called, *(t.name for t in tasks))), said


def _shares(config: RunConfig) -> bool:
    setting = config.train.share_prefixes
    return setting == "on" or (setting == "auto" and not config.drops)


def _fit(examples: Packable, plan: BatchPlan) -> str:
    """How well segments fill rows, and which length of rows would do better."""
    config, more, whole = plan.config, int(plan.lengths.sum()), int(examples.lengths.sum())
    said = f"rows of {config.row_length}, {plan.efficiency():.1%} of positions used"
    if more > whole:
        said += f", {more / whole - 1:.1%} more tokens since segments longer than a row are divided"
    if isinstance(examples, Segments) and (better := better_row_length(examples, config)):
        said += f" (train.row_length {better[0]}: {1 - better[1]:.0%} fewer positions an epoch)"
    return said


def _when(config: TrainConfig, steps: int) -> str:
    """What is trained in which steps."""
    until = rows_only_steps(config, steps)
    rest = {
        "rows": "new token rows only",
        "embeddings": "the token table",
        "lora": "adapters and new token rows",
        "full": "everything",
    }[config.method]
    return (f"steps 1-{until} train new token rows only, " if until else "") + f"steps {until + 1}-{steps} train {rest}"


class _Validator:
    """Recall and NDCG on validation targets of a fixed sample of users."""

    def __init__(self, session: Session, decoder: Decoder):
        self.session = session
        self.users = draw(
            np.flatnonzero(session.dataset.valid_position >= 0), session.config.train.validate_users, session.config.train.seed
        )
        self.asked = Asked(session, self.users, session.dataset.valid_position)
        self.prompts = self.asked.prompts()
        self.recommender = recommender(session, decoder)

    def __call__(self, decoder: Decoder) -> dict[str, float]:
        if not len(self.users):
            return {f"{name}@{k}": 0.0 for name in ("recall", "ndcg", "mrr") for k in DEFAULT_KS}
        self.recommender.update(decoder)
        k = min(self.session.config.decode.top_k, len(self.session.dataset.item_ids))
        left_out = self.asked.histories if self.session.config.evaluate.mask_seen else None
        ranking = self.recommender.rank(self.prompts, left_out, k)
        metrics = list_metrics(ranking.items, self.asked.targets, self.recommender.groups, left_out)
        return {**metrics, "users": float(len(self.users))}


def _card(session: Session, command: str) -> CardInfo:
    data, config = session.dataset, session.config
    metrics: dict[str, Any] = {}
    if session.folder.metrics.exists():
        metrics = json.loads(session.folder.metrics.read_text(encoding="utf-8"))
    return CardInfo(
        name=session.folder.path.resolve().name,
        base=config.model.base,
        data=(
            f"{Path(config.data.source).name}: {len(data.user_ids):,} users, {len(data.item_ids):,} items, {len(data.items):,} "
            f"interactions; split {config.data.split}, tie seed {config.data.tie_seed}. "
            "Metrics: test targets, full catalogue, seen items masked."
        ),
        command=command,
        metrics={n: {k: row[k] for k in CARD_METRICS if k in row} for n, row in metrics.items() if isinstance(row, dict)},
    )


def export_to(session: Session, decoder: Decoder, command: str, out: Path, form: str, dtype: Any, overwrite: bool) -> None:
    """Writes the `merged` model or the `adapter` to a folder."""
    card = _card(session, command)
    parts = (decoder, session.build, session.codes, session.tokenizer)
    if form == "merged":
        report = export_merged(*parts, out, card, dtype, overwrite, more=partial(write_catalogue, session))
        change = f"; merging changed logits by at most {report.merge_change:.1e}"
    else:
        report = export_adapter(*parts, session.config.model.base, out, card, overwrite)
        change = ""
    console.print(
        f"export: {report.folder} ({form}, {report.bytes / 1e6:.0f} MB, {report.vocab_size:,} token rows, {report.dtype}){change}"
    )


def export_index(session: Session, out: Path, overwrite: bool) -> None:
    """Writes the items' tokens as `index.json`, keyed by item id."""
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it or choose another place")
    write_index(out, codes_paths(session.codes), session.dataset.item_ids, overwrite)
    console.print(f"export: {out} (tokens of {len(session.codes.codes):,} items)")


def export_stage(session: Session, decoder: Decoder, command: str, overwrite: bool) -> None:
    """Leaves `export/` (merged, float32) and, where the run has one, `export/adapter/`."""
    out = session.folder.export
    export_to(session, decoder, command, out, "merged", "float32", overwrite)
    if session.build.adapters is not None:
        export_to(session, decoder, command, out / "adapter", "adapter", "float32", overwrite)
