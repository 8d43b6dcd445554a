"""What sharing prompts does to quality: validation NDCG@10 after the same examples, one by one and shared.

    python benchmarks/sharing_quality.py --seeds 3          # about 40 minutes

Shared prompts put the targets of a user into one optimizer step. LoRA over stories260K (`configs/quick.yaml`) with prompts of
item tokens on MovieLens latest-small, the newest 16 items in windows that move by 8. All variants train on the same targets as
often; they differ in whether beginnings are shared, in the examples of a step, and in how far windows move (a smaller stride puts
fewer targets of a user together, and shares less). Every user is validated, seen items masked, at the end alone.

The last line is JSON: for each variant `ndcg@10` (mean over seeds) and `ndcg@10_seeds`, `recall@10`, `examples_a_step`,
`users_a_step`, `steps`, `token_ratio` (tokens one by one over those trained on), `train_seconds` (mean, validation left out).
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from command import run_main

from sftrec_jax.config import PromptConfig, RunConfig, TrainConfig
from sftrec_jax.config_file import load_config
from sftrec_jax.data.segments import Segments
from sftrec_jax.run import stages
from sftrec_jax.run.folder import RunFolder
from sftrec_jax.run.session import prepare
from sftrec_jax.train.batches import BatchPlan

CONFIG = Path(__file__).parent.parent / "configs" / "quick.yaml"
EXAMPLES = 384
"""A step of the first two variants has about so many."""
VARIANTS: dict[str, tuple[bool, float, int]] = {
    "one by one": (False, 1, 8),
    "shared": (True, 1, 8),
    "shared, half the examples a step": (True, 0.5, 8),
    "shared, twice the examples a step": (True, 2, 8),
    "shared, windows moving by 2": (True, 1, 2),
}
"""Whether beginnings are shared, examples a step over `EXAMPLES`, stride."""


def configured(base: RunConfig, shared: bool, times: float, stride: int, seed: int, epochs: float) -> RunConfig:
    """As many rows a step as hold nearest to the wanted examples; found in `measure`."""
    prompt = PromptConfig("instruct", 16, history="tokens", prefix="", suffix="", separator="", stride=stride)
    train = dataclasses.replace(
        base.train,
        share_prefixes="on" if shared else "off",
        seed=seed,
        epochs=epochs,
        validate_every=1_000_000,
        validate_users=1_000_000,
    )
    # One type for all: `auto` measures on a CPU.
    model = dataclasses.replace(base.model, compute_dtype="float32")
    return dataclasses.replace(base, prompt=prompt, model=model, train=train)


def rows_for(segments: Segments, train: TrainConfig, wanted: float) -> int:
    """Rows that hold about so many examples."""
    plan = BatchPlan(segments, dataclasses.replace(train, batch_rows=1))
    return max(1, round(wanted * len(plan.rows(0)) / int(segments.target_items.sum())))


def users_a_step(segments: Segments, owner: np.ndarray, plan: BatchPlan) -> float:
    """Mean number of users whose targets an optimizer step of the first epoch has; `owner` of each interaction."""
    parts = plan.parts
    assert isinstance(parts, Segments)
    rows, size = plan.rows(0), plan.rows_per_step
    whole = [np.concatenate([rows[i] for i in range(at, min(at + size, len(rows)))]) for at in range(0, len(rows), size)]
    return float(np.mean([len(np.unique(owner[parts.windows.first[chosen]])) for chosen in whole]))


def measure(base: RunConfig, variant: tuple[bool, float, int], seed: int, epochs: float, folder: Path) -> dict[str, float]:
    """Trains one variant with one seed."""
    shared, times, stride = variant
    session = prepare(RunFolder(folder), configured(base, shared, times, stride, seed, epochs))
    segments = stages.training_segments(session)[0][0]
    rows = rows_for(segments, session.config.train, times * EXAMPLES)
    train = dataclasses.replace(session.config.train, batch_rows=rows)
    session = dataclasses.replace(session, config=dataclasses.replace(session.config, train=train))
    plan = BatchPlan(segments, train)
    result = stages.train_stage(session, False)
    records = [json.loads(line) for line in (session.folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    valid = next(record["valid"] for record in reversed(records) if "valid" in record)
    owner = np.repeat(np.arange(len(session.dataset.user_ids)), np.diff(session.dataset.offsets))
    return {
        "ndcg@10": valid["ndcg@10"],
        "recall@10": valid["recall@10"],
        "examples_a_step": float(segments.target_items.sum()) / len(plan.rows(0)) * rows,
        "users_a_step": users_a_step(segments, owner, plan),
        "steps": plan.steps,
        "token_ratio": float(segments.apart().lengths.sum() / segments.lengths.sum()),
        "train_seconds": result.seconds - result.seconds_validating,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    base = load_config(CONFIG)
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(args.only):
            runs = []
            for seed in range(args.seeds):
                runs.append(measure(base, VARIANTS[name], seed, args.epochs, Path(folder) / f"{i}-{seed}"))
                print(f"== {name}, seed {seed}: {json.dumps(runs[-1])}", flush=True)
            table[name] = {key: round(float(np.mean([run[key] for run in runs])), 4) for key in runs[0]}
            table[name]["ndcg@10_seeds"] = [round(run["ndcg@10"], 4) for run in runs]
    print(json.dumps(table))


if __name__ == "__main__":
    run_main(main)
